"""What every task of our pipelines has."""

from kfp import dsl, kubernetes

from pipelines.resources import Resources


def settle(task: dsl.PipelineTask, name: str, resources: Resources, *, cache: bool = True) -> dsl.PipelineTask:
    """Give a task what every task has: its name, its resources, its caching, and the run's id.

    The id comes from the pod's label, not as a parameter: a parameter would be part of the cache key.
    """
    resources.apply(task.set_display_name(name).set_caching_options(cache))
    kubernetes.use_field_path_as_env(task, "KFP_RUN_ID", "metadata.labels['pipeline/runid']")
    return task


def retried(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Try a step again that may fail for reasons of its machine; training resumes from its checkpoint.

    A step that got SIGTERM has saved its work and exits with `skd_lib.errors.Preempted.exit_code`, which is retried as
    any other code is.
    """
    return task.set_retry(num_retries=2, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration="600s")
