"""Checks of what a run needs around it: the cluster, MLflow, its champion, a judge, COMET, GPU, precision, memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from skd_lib import storage
from skd_lib._core.uris import shown
from skd_lib.config import JudgeConfig, Precision, RunConfig, TrainingConfig
from skd_lib.distillation.methods import METHODS
from skd_lib.errors import SkdError
from skd_lib.planning.memory import GIB, ModelSize, available_memory, estimates
from skd_lib.preflight.checks import TRACKING, Checks
from skd_lib.preflight.storage_access import bounded

if TYPE_CHECKING:
    from skd_lib.models.precision import Resolved
    from skd_lib.tracking.registry import Champion


def check_multinode(checks: Checks, runs: Sequence[RunConfig], checkpoint_root: str) -> None:
    """Check that this cluster takes a TrainJob from this service account."""
    sections = [section for run in runs for section in (run.teacher_sft.multinode, run.distill.multinode) if section]
    if not sections:
        return
    from skd_lib.multinode.cluster import Cluster
    from skd_lib.multinode.exchange import check_reachable
    from skd_lib.multinode.manifest import trial_job

    checks.attempt("multinode", lambda: check_reachable({"checkpoint_root": checkpoint_root}))
    cluster = Cluster.connect()
    for section in {section.model_dump_json(): section for section in sections}.values():
        cluster.create(trial_job(section), dry_run=True)
    nodes = ", ".join(sorted({str(section.nodes) for section in sections}))
    checks.add("multinode", "ok", f"Kubernetes would take the TrainJobs; nodes asked for: {nodes}")


def check_engine(checks: Checks, runs: Sequence[RunConfig]) -> None:
    """Check that this cluster takes the pods of vLLM's servers from this service account, and their image's name."""
    asked = [
        (run.distill.vllm.pods, run.distill.vllm.tensor_parallel)
        for run in runs
        if run.distill.engine == "vllm" and run.distill.vllm.pods is not None
    ]
    if not asked:
        return
    from skd_lib.multinode.servers import check_servers, image_of

    for pods, gpus in asked:
        check_servers(pods, gpus)
    named = ", ".join(sorted({f"{pods.count} of {image_of(pods)}" for pods, _ in asked}))
    checks.add("vLLM servers", "ok", f"Kubernetes would take their pods: {named}")


def check_tracking_store(checks: Checks, uri: str, experiment: str = "") -> None:
    """Check that MLflow answers, and takes runs of this experiment."""
    if not uri:
        checks.add(TRACKING, "ok", "off")
        return
    from skd_lib.tracking.client import check_tracking

    with impatient():
        error = check_tracking(uri, experiment)
    if error is not None:
        raise error
    checks.add(TRACKING, "ok", f"MLflow answers at {shown(uri)}")


@contextmanager
def impatient() -> Iterator[None]:
    """Notice within seconds an MLflow server that is down; training steps decide for themselves how long they wait."""
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


def check_champion(checks: Checks, tracking_uri: str, model_name: str) -> None:
    """Check that the files of the registered champion can be read, if there is one; they are listed, not fetched.

    A registry that does not answer is not reported: steps wait for it. One that refuses would refuse them, too.
    """
    from skd_lib.tracking.gate import REMEDY
    from skd_lib.tracking.registry import Silent
    from skd_lib.tracking.registry import champion as registered

    try:
        with impatient():
            champion = registered(tracking_uri=tracking_uri, model_name=model_name)
    except Silent:
        return
    except SkdError as error:
        hint = (
            "give the account of the run's steps (in a cluster the Secret `skd-mlflow`) the right to read and register "
            f"the model `{model_name}`, or name another one in `registry.model_name`"
        )
        checks.add("champion", "error", error.what, where=error.where, hint=hint)
        return
    if champion is None:
        return
    try:
        bounded(partial(_find_weights, champion), champion.weights_uri)
    except SkdError as error:
        what = f"the champion (version {champion.version}) cannot be compared with: {error.what}"
        hint = REMEDY if isinstance(error, storage.Missing) else f"{error.hint}; or {REMEDY}"
        where = champion.weights_uri or f"registered model `{model_name}`"
        checks.add("champion", "error", what, where=where, hint=hint)
    else:
        checks.add("champion", "ok", f"version {champion.version}: its files are there")


def _find_weights(champion: Champion) -> None:
    from skd_lib.models.files import check_model_folder

    uri = champion.weights_uri
    if not uri:
        raise storage.Missing("its version in the registry does not say where its weights are")
    if not storage.is_remote(uri):
        storage.check_kind(uri)
        if not Path(uri).is_dir():
            raise storage.Missing("there is no such folder")
        return check_model_folder(Path(uri))
    names = storage.file_sizes(uri)
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise storage.Missing("its config and weights are not there")
    return None


def check_judge(checks: Checks, config: JudgeConfig) -> None:
    """Check that the judge answers: it is asked for ratings only when the models are trained."""
    from skd_lib.evaluation import judge

    judge.check_judge(config)
    checks.add("judge", "ok", f"{config.model} answers at {config.url}")


def check_comet(checks: Checks, reference: str) -> None:
    """Check COMET's model; without it a run goes on, so that nothing here is an error."""
    from skd_lib.evaluation.comet.checkpoint import check_reference

    try:
        check_reference(reference)
    except SkdError as error:
        checks.add("comet", "warning", f"no scores by COMET: {error.what}", where=error.where, hint=error.hint)
    else:
        checks.add("comet", "ok", reference)


def check_gpu(checks: Checks, required: bool = False) -> bool:
    """Return whether PyTorch sees a GPU here."""
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        checks.add("GPU", "ok", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
        return True
    if required:
        hint = "run on a machine with a GPU and a driver that fits this PyTorch (`nvidia-smi`), or do not require one"
        checks.add("GPU", "error", f"none is visible to PyTorch {torch.__version__}", hint=hint)
    else:
        checks.add("GPU", "ok", "none is visible here; none was asked for")
    return False


def check_auto_precision(checks: Checks) -> Resolved | None:
    """Return what precision `auto` is on this machine; None if it cannot be said."""
    from skd_lib.models.loading import default_device
    from skd_lib.models.precision import VARIABLE, resolve_precision

    auto = checks.attempt("precision", lambda: resolve_precision("auto", default_device()))
    if auto is not None:
        by_variable = f", as {VARIABLE} says" if os.environ.get(VARIABLE) else ""
        checks.add("precision", "ok", f"`auto` is {auto} here{by_variable}")
    return auto


def check_precision(checks: Checks, runs: Sequence[RunConfig], gpu: bool) -> None:
    """Check that this machine can compute in the precisions that are asked for, and does so fast."""
    if trains_elsewhere(gpu) or (auto := check_auto_precision(checks)) is None:
        return
    from skd_lib.models.loading import default_device
    from skd_lib.models.precision import VARIABLE, precision_trouble

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
    for where in dict.fromkeys(where for where, precision in asked if precision == "bf16"):
        if trouble := checks.attempt("precision", lambda: precision_trouble("bf16", default_device())):
            hint = f"set it to fp32, or {'unset it' if VARIABLE in where else 'to auto'}"
            checks.add("precision", "warning", trouble, where=where, hint=hint)


def check_teacher_precision(checks: Checks, run: RunConfig, teacher: Path, gpu: bool) -> None:
    """Check that the teacher in a folder can be quantised as the run wants it."""
    precision = run.distill.training.teacher_precision
    if precision not in ("8bit", "4bit"):
        return
    import torch

    from skd_lib.models.loading import check_quantization

    device = torch.device("cuda" if gpu or trains_elsewhere(gpu) else "cpu")
    check_quantization(precision, teacher, device, trust_remote_code=run.trust_remote_code)
    checks.add("teacher precision", "ok", f"{precision}, by bitsandbytes")


def check_memory(checks: Checks, config: RunConfig, teacher: ModelSize, student: ModelSize, gpu: bool) -> None:
    """Compare the training step that needs most memory with the memory there is."""
    from skd_lib.models.loading import default_device

    largest = max(estimates(config, teacher, student, device=default_device()), key=lambda estimate: estimate.total)
    if trains_elsewhere(gpu):
        checks.add("memory", "ok", f"estimate for {largest}")
        return
    available, of_what = available_memory()
    what = f"estimate for {largest}; {of_what} has {available / GIB:.1f} GiB"
    if largest.total <= available:
        checks.add("memory", "ok", what)
    else:
        hint = "lower training.micro_batch_size, set gradient_checkpointing, use training.lora, or take more memory"
        checks.add("memory", "warning", what, hint=hint)


def trains_elsewhere(gpu: bool) -> bool:
    """Return whether the training steps get other nodes than this machine."""
    return not gpu and in_cluster()


def in_cluster() -> bool:
    """Return whether this is a pod."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
