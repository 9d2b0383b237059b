"""Checks of what a run needs around it: storage, the cluster, MLflow, GPU, libraries, memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from skd_lib import storage
from skd_lib.config import RunConfig, TeacherPrecision
from skd_lib.errors import SkdError
from skd_lib.preflight.checks import TRACKING, Checks

if TYPE_CHECKING:
    from skd_lib.memory import ModelSize


def check_writable(checks: Checks, name: str, uri: str, usable: Callable[[], object] = lambda: None) -> None:
    """Whether a folder can be written, and is usable besides; nothing is looked at without a URI."""
    if not uri:
        return
    try:
        usable()
        storage.check_writable(uri)
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
        from skd_lib.multinode.cluster import ROLE_HINT, Cluster

        cluster = Cluster.connect()
        if not cluster.may_create_jobs():
            what = "this service account may not create TrainJobs"
            raise SkdError(what, where=f"namespace {cluster.namespace}", hint=ROLE_HINT)
        return True

    if checks.attempt("multinode", look):
        nodes = ", ".join(sorted({str(section.nodes) for section in sections}))
        checks.add("multinode", "ok", f"TrainJobs may be created here; nodes asked for: {nodes}")


def check_tracking_store(checks: Checks, uri: str) -> None:
    """Whether MLflow answers."""
    if not uri:
        checks.add(TRACKING, "ok", "off")
        return
    from skd_lib.tracking.client import check_tracking

    # A server that is down is told within seconds; what the training steps wait is theirs to decide.
    with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT="5", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"):
        error = check_tracking(uri)
    if error is not None:
        checks.failed(TRACKING, error)
    else:
        checks.add(TRACKING, "ok", f"MLflow answers at {uri}")


@contextmanager
def _environment(**values: str) -> Iterator[None]:
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


def check_precision(checks: Checks, precision: TeacherPrecision) -> None:
    """Whether the teacher can be quantised."""
    if precision not in ("8bit", "4bit"):
        return
    from skd_lib.models.loading import check_quantization

    try:
        check_quantization(precision)
    except SkdError as error:
        checks.failed("teacher precision", error)
    else:
        checks.add("teacher precision", "ok", f"{precision}, by bitsandbytes")


def check_memory(checks: Checks, config: RunConfig, teacher: ModelSize, student: ModelSize, gpu: bool) -> None:
    """The training step that needs most memory against what there is."""
    from skd_lib.memory import GIB, available_memory, estimates

    found = estimates(config, teacher, student, element=2 if gpu else 4, gpu=gpu)
    largest = max(found, key=lambda estimate: estimate.total)
    if not gpu and os.environ.get("KUBERNETES_SERVICE_HOST"):
        # Here it says nothing about the nodes that the training steps will get.
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
