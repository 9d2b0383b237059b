"""What every task of our pipelines has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kfp import dsl, kubernetes

from components.command import on_several_gpus
from pipelines.profiles import Profile, Resources
from pipelines.secret_variables import give_secrets
from skd_lib.steps.finish import UI_VARIABLE
from skd_lib.tracking.buffer import FOLDER_VARIABLE

SETTINGS = "skd-settings"
"""The ConfigMap of a namespace in which its administrators say what holds for all runs; it need not exist."""


@dataclass(frozen=True)
class Settler:
    """Gives tasks what they need to run.

    Attributes:
        profile: The machines.
        node_selector: Pipeline parameter: labels of the nodes for steps that load models.
        tolerations: Pipeline parameter: taints that those nodes may have.
    """

    profile: Profile
    node_selector: Any
    tolerations: Any

    def settle(self, task: dsl.PipelineTask, name: str, *, cache: bool = True) -> dsl.PipelineTask:
        """Give a task its name, its caching, its resources, its secrets, and the run's id.

        The id comes from the pod's label, not as a parameter: a parameter would be part of the cache key. So would one
        that says where entries for MLflow are kept while it does not answer.
        """
        task.set_display_name(name).set_caching_options(cache)
        resources = self.profile.resources(name)
        _request(task, resources)
        self._place(task, name, resources)
        give_secrets(task, name)
        kubernetes.use_field_path_as_env(task, "KFP_RUN_ID", "metadata.labels['pipeline/runid']")
        if "tracking_uri" in task.inputs:
            settings = {"tracking-buffer": FOLDER_VARIABLE, "kubeflow-page": UI_VARIABLE}
            kubernetes.use_config_map_as_env(task, SETTINGS, settings, optional=True)
        return task

    def _place(self, task: dsl.PipelineTask, name: str, resources: Resources) -> None:
        if self.profile.in_shared_pool(name):
            kubernetes.add_node_selector_json(task, self.node_selector)
            kubernetes.add_toleration_json(task, self.tolerations)
            return
        for label, value in resources.node_selector.items():
            kubernetes.add_node_selector(task, label, value)
        kubernetes.add_toleration_json(task, resources.plain_tolerations())


def _request(task: dsl.PipelineTask, resources: Resources) -> None:
    """Ask for a pod's resources, and say how it is tried again.

    A step that got SIGTERM has saved its work and exits with `skd_lib.errors.Preempted.exit_code`, which is retried as
    any other code is.
    """
    task.set_cpu_request(resources.cpu).set_memory_request(resources.memory).set_memory_limit(resources.memory)
    if resources.gpus:
        task.set_accelerator_type(resources.gpu_type).set_accelerator_limit(resources.gpus)
    if resources.gpus > 1:
        task.container_spec.command = on_several_gpus(task.container_spec.command, resources.gpus)
    if resources.shared_memory:
        mount = "/dev/shm"  # noqa: S108 - a mount point in the container
        kubernetes.empty_dir_mount(task, "shared-memory", mount, medium="Memory", size_limit=resources.shared_memory)
    if resources.scratch:
        mount = "/tmp"  # noqa: S108 - likewise
        kubernetes.empty_dir_mount(task, "scratch", mount, size_limit=resources.scratch.size)
    retry = resources.retry
    if retry.count:
        # What KFP calls the longest pause is Argo's `maxDuration`, counted from the start of the first attempt.
        task.set_retry(retry.count, retry.wait, retry.factor, retry.within)
    if resources.timeout:
        kubernetes.set_timeout(task, _seconds(resources.timeout))


def _seconds(duration: str) -> int:
    return int(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]
