"""What every task of our pipelines has."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl.base_component import BaseComponent

from skd_kfp.components.command import on_several_gpus
from skd_kfp.pipelines.places import give_places
from skd_kfp.pipelines.profiles import Profile, Resources


@dataclass(frozen=True)
class Settler:
    """Gives tasks what they need to run.

    Attributes:
        profile: The machines.
        settings: Pipeline parameter: name of the ConfigMap with the run's places.
        node_selector: Pipeline parameter: labels of the nodes for steps that load models. None where no such step is.
        node_tolerations: Pipeline parameter: taints that those nodes may have.
    """

    profile: Profile
    settings: Any
    node_selector: Any = None
    node_tolerations: Any = None

    def step(
        self,
        component: BaseComponent,
        name: str,
        /,
        *,
        title: str = "",
        cache: bool = True,
        image: str = "",
        **inputs: Any,
    ) -> dsl.PipelineTask:
        """Make a task with its caching, its resources, its secrets, the run's places and the run's id.

        The id comes from the pod's label, not as a parameter: a parameter would be part of the cache's key.

        Args:
            component: What it runs.
            name: Its name in `profiles.KINDS`, with a role where a pipeline has several: `evaluate-teacher`.
            title: What Kubeflow's page calls it, where that is not its name.
            cache: Whether KFP may take its outputs from an earlier run.
            image: Another image than the component's.
            inputs: Of the component.
        """
        task = _named(component, name)(**inputs)
        task.set_display_name(title or name).set_caching_options(cache)
        if image:
            task.set_container_image(image)
        resources = self.profile.resources(name)
        _request(task, resources)
        self._place(task, name, resources)
        give_places(task, name, self.settings)
        kubernetes.use_field_path_as_env(task, "KFP_RUN_ID", "metadata.labels['pipeline/runid']")
        return task

    def _place(self, task: dsl.PipelineTask, name: str, resources: Resources) -> None:
        if self.profile.in_shared_pool(name):
            kubernetes.add_node_selector_json(task, self.node_selector)
            kubernetes.add_toleration_json(task, self.node_tolerations)
            return
        for label, value in resources.node_selector.items():
            kubernetes.add_node_selector(task, label, value)
        kubernetes.add_toleration_json(task, resources.plain_tolerations())


def _named(component: BaseComponent, name: str) -> BaseComponent:
    """Return the component by another name, after which KFP names task, component and executor.

    kfp 2.17 mixes up the Kubernetes settings of executors that have one name in two nested pipelines.
    """
    named = copy.copy(component)
    named.component_spec = copy.copy(component.component_spec)
    named.component_spec.name = name.replace("_", "-")
    return named


def _request(task: dsl.PipelineTask, resources: Resources) -> None:
    """Ask for a pod's resources, and say how it is tried again, whatever its exit code: KFP's launcher makes all 1."""
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
