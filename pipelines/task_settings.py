"""Settings of every task of the pipelines: caching, resources, nodes, Secrets, and where records are kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl.base_component import BaseComponent

from skd_kfp.components.images import VLLM
from skd_kfp.pipelines.profiles import Profile, Resources
from skd_lib._core.machine import ENGINE_IMAGE_VARIABLE
from skd_lib.steps.environment import ROOT, SECRETS, SETTINGS_FOLDER

CONFIG_MAP = "skd-settings"
"""The ConfigMap of a namespace in which its administrators say what holds for its runs; it need not exist."""
UNTRACKED = ("show-data", "show-trial", "compare_variant")
"""Tasks that use neither MLflow nor storage of their own."""
MAKES_SERVERS = ("preflight", "distill")
"""Tasks that make vLLM servers in pods of their own, or check that they can."""
FETCHING = ("preflight", "prepare_data", "teacher_sft", "evaluate_teacher", "student_init", "comet_score")
"""Tasks that load from the Hugging Face hub."""


def make_task(
    profile: Profile,
    given: Any,
    component: BaseComponent,
    name: str,
    /,
    *,
    title: str = "",
    cache: bool = True,
    **inputs: Any,
) -> dsl.PipelineTask:
    """Make a task with its caching, its resources, its nodes, its Secrets, the run's settings and the run's id.

    Settings and id are no parameters of the component: they would be part of the cache's key. `name` is one in
    `profiles.KINDS`, with a role where a pipeline has several: `evaluate-teacher`; `title` is its name on Kubeflow's
    page, if another. Of the pipeline's parameters `settings` names the ConfigMap that says where records are kept;
    `node_selector` and `node_tolerations` choose the nodes of steps that load models.
    """
    task = _named(component, name)(**inputs)
    task.set_display_name(title or name).set_caching_options(cache)
    resources = profile.resources(name)
    _request(task, resources)
    if profile.in_shared_pool(name):
        kubernetes.add_node_selector_json(task, given.node_selector)
        kubernetes.add_toleration_json(task, given.node_tolerations)
    else:
        for label, value in resources.node_selector.items():
            kubernetes.add_node_selector(task, label, value)
        kubernetes.add_toleration_json(task, resources.plain_tolerations())
    for secret in SECRETS:
        if _needs_secret(name, secret):
            kubernetes.use_secret_as_volume(task, secret, str(ROOT / secret), optional=True)
    if name not in UNTRACKED:
        kubernetes.use_config_map_as_volume(task, given.settings, str(ROOT / SETTINGS_FOLDER), optional=True)
    if name in MAKES_SERVERS:
        task.set_env_variable(ENGINE_IMAGE_VARIABLE, VLLM)
    kubernetes.use_field_path_as_env(task, "KFP_RUN_ID", "metadata.labels['pipeline/runid']")
    return task


def _needs_secret(name: str, secret: str) -> bool:
    """Tell whether a task needs a Secret: each takes room in Kubeflow's records of the run."""
    match secret:
        case "skd-hub":
            return name in FETCHING
        case "skd-judge":
            return name == "preflight" or name.startswith("evaluate")
        case "skd-teacher":
            return name in ("preflight", "distill", "evaluate_teacher")
        case "skd-notify":
            return name == "finish"
        case _:
            return name not in UNTRACKED


def _named(component: BaseComponent, name: str) -> BaseComponent:
    """Return the component by another name, after which KFP names task, component and executor.

    kfp 2.17 mixes up the Kubernetes settings of executors that have one name in two nested pipelines.
    """
    named = copy.copy(component)
    named.component_spec = copy.copy(component.component_spec)
    named.component_spec.name = name.replace("_", "-")
    return named


def _request(task: dsl.PipelineTask, resources: Resources) -> None:
    """Ask for a pod's resources, and for further attempts whatever the exit code: KFP's launcher makes all 1."""
    task.set_cpu_request(resources.cpu).set_memory_request(resources.memory).set_memory_limit(resources.memory)
    if resources.gpus:
        task.set_accelerator_type(resources.gpu_type).set_accelerator_limit(resources.gpus)
    if resources.gpus > 1:
        task.container_spec.command = _on_several_gpus(task.container_spec.command, resources.gpus)
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
        seconds = int(resources.timeout[:-1]) * {"s": 1, "m": 60, "h": 3600}[resources.timeout[-1]]
        kubernetes.set_timeout(task, seconds)


def _on_several_gpus(command: Sequence[str], processes: int) -> list[str]:
    """Return a step's command for several processes, one for each GPU of the pod."""
    python, dash_m, module = command
    options = {
        "num_processes": str(processes),
        "num_machines": "1",
        "main_process_port": "0",  # any that is free
        "mixed_precision": "no",  # set by the trainer
        "dynamo_backend": "no",
    }
    launch = [part for name, value in options.items() for part in (f"--{name}", value)]
    return [python, dash_m, "accelerate.commands.launch", "--multi_gpu", *launch, "--module", module]
