"""Checks of what a run needs around it: storage, the cluster, MLflow, a judge, GPU, libraries, memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from skd_lib import storage
from skd_lib._core.uris import shown
from skd_lib.config import JudgeConfig, Precision, RunConfig, TrainingConfig
from skd_lib.distillation.methods import METHODS
from skd_lib.errors import SkdError
from skd_lib.preflight.checks import TRACKING, Checks
from skd_lib.preflight.patience import bounded

if TYPE_CHECKING:
    from pathlib import Path

    from skd_lib.preflight.memory import ModelSize


def check_writable(checks: Checks, name: str, uri: str, usable: Callable[[], object] = lambda: None) -> None:
    """Whether a folder can be written, and is usable besides; nothing is looked at without a URI."""
    if not uri:
        return
    try:
        usable()
        bounded(partial(storage.check_writable, uri), uri)
    except SkdError as error:
        checks.failed(name, error)
    else:
        checks.add(name, "ok", f"{uri} can be written")


def check_multinode(checks: Checks, runs: Sequence[RunConfig], checkpoint_root: str) -> None:
    """Whether this cluster will take a TrainJob from this service account."""
    sections = [section for run in runs for section in (run.teacher_sft.multinode, run.distill.multinode) if section]
    if not sections:
        return
    from skd_lib.multinode.exchange import check_reachable

    checks.attempt("multinode", lambda: check_reachable({"checkpoint_root": checkpoint_root}))

    def look() -> bool:
        from skd_lib.multinode.cluster import Cluster
        from skd_lib.multinode.manifest import trial_job

        cluster = Cluster.connect()
        for section in {section.model_dump_json(): section for section in sections}.values():
            cluster.create(trial_job(section), dry_run=True)
        return True

    if checks.attempt("multinode", look):
        nodes = ", ".join(sorted({str(section.nodes) for section in sections}))
        checks.add("multinode", "ok", f"Kubernetes would take the TrainJobs; nodes asked for: {nodes}")


def check_tracking_store(checks: Checks, uri: str, experiment: str = "") -> None:
    """Whether MLflow answers, and takes runs of this experiment."""
    if not uri:
        checks.add(TRACKING, "ok", "off")
        return
    from skd_lib.tracking.client import check_tracking

    with impatient():
        error = check_tracking(uri, experiment)
    if error is not None:
        checks.failed(TRACKING, error)
    else:
        checks.add(TRACKING, "ok", f"MLflow answers at {shown(uri)}")


@contextmanager
def impatient() -> Iterator[None]:
    """Notice an MLflow server that is down within seconds; how long training steps wait is theirs to decide."""
    values = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_judge(checks: Checks, config: JudgeConfig) -> None:
    """Whether the judge answers: it is asked for ratings when the models are trained already."""
    from skd_lib.evaluation import judge

    judge.check_judge(config)
    checks.add("judge", "ok", f"{config.model} answers at {config.url}")


def check_gpu(checks: Checks, required: bool) -> bool:
    """Whether PyTorch sees a GPU here."""
    import torch

    if torch.cuda.is_available():
        checks.add("GPU", "ok", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
        return True
    if required:
        hint = "run on a machine with a GPU and a driver that fits this PyTorch (`nvidia-smi`), or do not require one"
        checks.add("GPU", "error", f"none is visible to PyTorch {torch.__version__}", hint=hint)
    else:
        checks.add("GPU", "ok", "none is visible here; none was asked for")
    return False


def check_precision(checks: Checks, runs: Sequence[RunConfig], gpu: bool) -> None:
    """Whether this machine can compute in the precisions that are asked for, and does so fast."""
    if _trains_elsewhere(gpu):
        return
    from skd_lib.models.loading import default_device
    from skd_lib.models.precision import VARIABLE, precision_trouble, resolve_precision

    device = default_device()
    auto = checks.attempt("precision", lambda: resolve_precision("auto", device))
    if auto is None:
        return
    checks.add("precision", "ok", f"`auto` is {auto} here")
    asked: list[tuple[str, Precision]] = [(f"environment variable {VARIABLE}", auto)]
    for run in runs:
        trainings: dict[str, TrainingConfig] = {"distill": run.distill.training}
        if run.teacher_sft.enabled:
            trainings["teacher_sft"] = run.teacher_sft.training
        if run.student_init.trains or run.student_init.cuts:
            trainings["student_init"] = run.student_init.training
        asked += [(f"{step}.training.precision", training.precision) for step, training in trainings.items()]
        if METHODS[run.distill.method].needs_teacher and run.distill.training.teacher_precision == "bf16":
            asked.append(("distill.training.teacher_precision", "bf16"))
    asked = [(where, precision) for where, precision in asked if precision == "bf16"]
    for where, precision in dict.fromkeys(asked):
        if trouble := checks.attempt("precision", partial(precision_trouble, precision, device)):
            hint = f"set it to fp32, or {'unset it' if VARIABLE in where else 'to auto'}"
            checks.add("precision", "warning", trouble, where=where, hint=hint)


def check_teacher_precision(checks: Checks, run: RunConfig, teacher: Path, gpu: bool) -> None:
    """Whether the teacher in the folder can be quantised as the run wants it."""
    precision = run.distill.training.teacher_precision
    if precision not in ("8bit", "4bit"):
        return
    import torch

    from skd_lib.models.loading import check_quantization

    device = torch.device("cuda" if gpu or _trains_elsewhere(gpu) else "cpu")
    try:
        check_quantization(precision, teacher, device, trust_remote_code=run.trust_remote_code)
    except SkdError as error:
        checks.failed("teacher precision", error)
    else:
        checks.add("teacher precision", "ok", f"{precision}, by bitsandbytes")


def check_memory(checks: Checks, config: RunConfig, teacher: ModelSize, student: ModelSize, gpu: bool) -> None:
    """The training step that needs most memory against what there is."""
    from skd_lib.models.loading import default_device
    from skd_lib.preflight.memory import GIB, available_memory, estimates

    found = checks.attempt("memory", lambda: estimates(config, teacher, student, device=default_device()))
    if found is None:
        return
    largest = max(found, key=lambda estimate: estimate.total)
    if _trains_elsewhere(gpu):
        checks.add("memory", "ok", f"estimate for {largest}")
        return
    available, of_what = available_memory()
    enough = largest.total <= available
    checks.add(
        "memory",
        "ok" if enough else "warning",
        f"estimate for {largest}; {of_what} has {available / GIB:.1f} GiB",
        hint=""
        if enough
        else "lower training.micro_batch_size, set gradient_checkpointing, use training.lora, or take more memory",
    )


def _trains_elsewhere(gpu: bool) -> bool:
    """Whether this machine says nothing about the nodes that the training steps will get."""
    return not gpu and in_cluster()


def in_cluster() -> bool:
    """Whether this is a pod."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
