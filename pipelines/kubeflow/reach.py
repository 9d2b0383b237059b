"""What a run reads and writes has to be where the cluster's machines can get at it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skd_lib._core.uris import holds_secret, shown
from skd_lib.config import FilesSource, RunConfig
from skd_lib.config.data import DataSource, HeldOutFiles, HeldOutHub
from skd_lib.errors import SkdError
from skd_lib.storage import is_remote

NEEDS_ROOT = (
    "needs the pipeline root and the ConfigMap's `checkpoint-root` in object storage that the nodes can read: for "
    "Kubeflow's own (minio://) they need its keys, in the Secret `skd-storage`; --pipeline-root gs://... names another"
)


def out_of_reach(config: RunConfig, runs: Sequence[RunConfig]) -> list[SkdError]:
    """Return what is on this machine and would have to be where a cluster can read it.

    Args:
        config: A run's configuration, or the one that all runs of a comparison start from.
        runs: Those that are trained.
    """
    sources: list[tuple[str, DataSource | HeldOutFiles | HeldOutHub]] = [("data.source", config.data.source)]
    sources += [(f"data.held_out ({each.name})", each.source) for each in config.data.held_out]
    problems = [
        # An absolute path may be a mounted volume's.
        SkdError("the cluster cannot read a file of this machine", where=f"{place}: {file}", hint=_remedy(file))
        for place, source in sources
        for file in _files(source)
        if not is_remote(file) and not Path(file).is_absolute()
    ]
    models = [("teacher", config.teacher), *(("student", run.student or "") for run in runs)]
    hint = "copy it to gs://; if a model of the hub is meant, start this where nothing of that name lies"
    return problems + [
        SkdError("the cluster cannot read a folder of this machine", where=f"{field}: {model}", hint=hint)
        for field, model in dict.fromkeys(models)
        if model.startswith(("./", "../", "~")) or _lies_here(model)
    ]


def _remedy(file: str) -> str:
    if "{source}" in file:
        return "`{source}` is for `skd trigger`, which puts the folder of new data there: write where the data are"
    return "copy it to gs://"


def _lies_here(model: str) -> bool:
    """Whether a run on this machine would take a file or folder of this name, which may look like a hub id."""
    if not model or "://" in model or Path(model).is_absolute():
        return False
    try:
        return model.endswith(".gguf") or Path(model).exists()
    except OSError:  # no name that a file could have
        return False


def _files(source: DataSource | HeldOutFiles | HeldOutHub) -> list[str]:
    if isinstance(source, FilesSource):
        return [*source.train, *source.validation, *source.test]
    return source.files if isinstance(source, HeldOutFiles) else []


def wrong_root(pipeline_root: str, runs: Sequence[RunConfig]) -> list[SkdError]:
    """Return what is wrong with the place where Kubeflow is to keep artifacts."""
    where = f"--pipeline-root {shown(pipeline_root)}"
    if holds_secret(pipeline_root):
        what = "it holds a password, which Kubeflow shows to all who may see the run"
        hint = "leave it out, and give the run's service account access, or use the Secret `skd-storage`"
        return [SkdError(what, where=where, hint=hint)]
    if pipeline_root and not is_remote(pipeline_root) and any(map(wants_nodes, runs)):
        what = "`multinode` cannot work there: the nodes of a TrainJob read the step's inputs from it"
        return [SkdError(what, where=where, hint="give one in gs://, or other object storage that is read here")]
    return []


def wants_nodes(run: RunConfig) -> bool:
    """Whether a step of a run trains on several machines."""
    return run.teacher_sft.multinode is not None or run.distill.multinode is not None
