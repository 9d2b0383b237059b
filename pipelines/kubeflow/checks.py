"""Check what could not work in a cluster: files out of its reach, old servers, wrong schedules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skd_lib._core.uris import holds_secret, shown
from skd_lib.config import FilesSource, RunConfig
from skd_lib.config.data import DataSource, HeldOutFiles, HeldOutHub
from skd_lib.errors import SkdError
from skd_lib.storage import is_remote

Version = tuple[int, int, int]

OLDEST: Version = (2, 15, 0)
"""From here on Secrets and ConfigMaps are optional; before, a step whose Secret is missing waits for ever."""
NEWEST: Version = (2, 17, 0)
"""The newest version that this project was run on."""
SCHEDULES_LOSE_PARAMETERS: Version = (2, 17, 0)
"""After this version, where a plugin (MLflow) is set up, a schedule's runs may start without their parameters
(kubeflow/pipelines#13940), although the API shows them in the schedule."""


def text(version: Version) -> str:
    """Return a version as text."""
    return ".".join(map(str, version))


def read_version(healthz: Mapping[str, Any]) -> Version | None:
    """Return the version in the answer to `/apis/v2beta1/healthz`; None where it does not say.

    The API server calls it `tag_name`, and the page's server, which answers instead behind the dashboard,
    `apiServerTagName`; a server that was built from source says "unknown".
    """
    said = healthz.get("tag_name") or healthz.get("apiServerTagName")
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", str(said or ""))
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def check_version(version: Version | None, host: str) -> str:
    """Check that the pipelines work on a server's version; return a remark for a person, or an empty text."""
    if version is None:
        return f"the server does not say its version: {text(OLDEST)} or newer is needed, {text(NEWEST)} was tried"
    if version < OLDEST:
        raise SkdError(
            f"the server is Kubeflow Pipelines {text(version)}: {text(OLDEST)} or newer is needed",
            where=host,
            hint="before it, steps wait for ever for Secrets and ConfigMaps that need not exist; upgrade the server",
        )
    if version > NEWEST:
        return f"the server is Kubeflow Pipelines {text(version)}, newer than {text(NEWEST)}, the newest that was tried"
    return ""


def schedule_notice(version: Version | None) -> str:
    """Return a remark on recurring runs on a server; empty where there is none."""
    if version is not None and version <= SCHEDULES_LOSE_PARAMETERS:
        return ""
    which = f"Kubeflow Pipelines {text(version)}" if version else "this version of Kubeflow Pipelines, which is unknown"
    return (
        f"{which} may start the runs of a schedule without their parameters where its MLflow plugin is set up "
        "(kubeflow/pipelines#13940): look at the parameters of the first run"
    )


CRON_FIELDS = 6

_CRON = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")),
    ("day of the week", 0, 6, ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")),
)
"""The name, least value, greatest value and names of values of each field."""


def with_seconds(cron: str) -> str:
    """Return a schedule as Kubeflow wants it, with six fields; raise SkdError where a field is wrong."""
    fields = cron.split()
    if len(fields) == CRON_FIELDS - 1:
        fields = ["0", *fields]
    if len(fields) != CRON_FIELDS:
        hint = 'e.g. "0 3 * * *" for three o\'clock every night (UTC)'
        raise SkdError(f"a schedule has 5 fields, or 6 with seconds first, not {len(fields)}", where=cron, hint=hint)
    for text, (name, least, greatest, names) in zip(fields, _CRON, strict=True):
        if not all(_is_range(part, least, greatest, names) for part in text.split(",")):
            hint = f"numbers from {least} to {greatest}, e.g. {least}, {least}-{greatest}, */{greatest // 2}, or *"
            raise SkdError(f"`{text}` is no {name}", where=cron, hint=hint)
    return " ".join(fields)


def described(cron: str) -> str:
    """Return a sentence on when and how a recurring run starts its runs."""
    names = ", ".join(name for name, *_ in _CRON)
    return f"{with_seconds(cron)} ({names}; UTC), one run at a time; one that was missed is not made up for"


def _is_range(text: str, least: int, greatest: int, names: Sequence[str]) -> bool:
    """Return whether a part of a field is `*`, a value, or `FIRST-LAST`, each maybe with `/STEP`."""
    span, slash, step = text.partition("/")
    if slash and not (re.fullmatch("[0-9]{1,3}", step) and int(step) > 0):
        return False
    if span in ("*", "?"):
        return True
    ends = [names.index(end.upper()) + least if end.upper() in names else _number(end) for end in span.split("-")]
    return len(ends) <= 2 and all(least <= end <= greatest for end in ends) and ends == sorted(ends)


def _number(text: str) -> int:
    return int(text) if re.fullmatch("[0-9]{1,3}", text) else -1


NEEDS_ROOT = (
    "needs the pipeline root and the ConfigMap's `checkpoint-root` in object storage that the nodes can read: for "
    "Kubeflow's own (minio://) they need its keys, in the Secret `skd-storage`; --pipeline-root gs://... names another"
)


_COPY = "copy it to object storage (gs://, s3://, minio://); an absolute path is taken for a volume that the pods mount"


def out_of_reach(config: RunConfig, runs: Sequence[RunConfig]) -> list[SkdError]:
    """Return errors for files and models on this machine that a cluster could not read."""
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
    hint = f"{_COPY}; if a model of the hub is meant, start this in a folder without a file of that name"
    return problems + [
        SkdError("the cluster cannot read a folder of this machine", where=f"{field}: {model}", hint=hint)
        for field, model in dict.fromkeys(models)
        if model.startswith(("./", "../", "~")) or _lies_here(model)
    ]


def _remedy(file: str) -> str:
    if "{source}" in file:
        return "`{source}` is for `skd trigger`, which puts the folder of new data there: write where the data are"
    return _COPY


def _lies_here(model: str) -> bool:
    """Return whether a run on this machine would use a local file or folder of this name, even one like a hub id."""
    if not model or "://" in model or Path(model).is_absolute():
        return False
    try:
        return model.endswith(".gguf") or Path(model).exists()
    except OSError:  # a file cannot have this name
        return False


def _files(source: DataSource | HeldOutFiles | HeldOutHub) -> list[str]:
    if isinstance(source, FilesSource):
        return [*source.train, *source.validation, *source.test]
    return source.files if isinstance(source, HeldOutFiles) else []


def wrong_root(pipeline_root: str, runs: Sequence[RunConfig]) -> list[SkdError]:
    """Return errors of the place where Kubeflow is to keep artifacts."""
    where = f"--pipeline-root {shown(pipeline_root)}"
    if holds_secret(pipeline_root):
        what = "it holds a password, which Kubeflow shows to everyone who may see the run"
        hint = "leave it out, and give the run's service account access, or use the Secret `skd-storage`"
        return [SkdError(what, where=where, hint=hint)]
    if pipeline_root and not is_remote(pipeline_root) and any(map(wants_nodes, runs)):
        what = "`multinode` cannot work there: the nodes of a TrainJob read the step's inputs from it"
        return [SkdError(what, where=where, hint="give one in gs://, or other object storage that is read here")]
    return []


def wants_nodes(run: RunConfig) -> bool:
    """Return whether a step of a run trains on several machines."""
    return run.teacher_sft.multinode is not None or run.distill.multinode is not None
