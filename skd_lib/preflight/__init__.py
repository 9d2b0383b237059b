"""Preflight: find everything that is known to be wrong with a run before it starts, at once and in seconds.

No weights are loaded, and those of a hub model are not even fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from skd_lib import storage
from skd_lib.config import RunConfig
from skd_lib.config.models import served_teacher
from skd_lib.models.references import model_fingerprint
from skd_lib.planning.plan import compared
from skd_lib.preflight.checks import TRACKING, Check, Checks, PreflightReport, distinct
from skd_lib.preflight.data import check_data
from skd_lib.preflight.environment import (
    check_champion,
    check_comet,
    check_engine,
    check_gpu,
    check_judge,
    check_memory,
    check_multinode,
    check_precision,
    check_teacher_precision,
    check_tracking_store,
    in_cluster,
    trains_elsewhere,
)
from skd_lib.preflight.models import check_adapters, check_model, check_student, check_unread, cut_size
from skd_lib.preflight.plans import check_plans
from skd_lib.preflight.served import check_served
from skd_lib.preflight.storage_access import check_answers, check_readable, check_writable, texts
from skd_lib.preflight.templates import check_date

__all__ = ["Check", "PreflightReport", "run_checks"]


def run_checks(
    config: RunConfig,
    *,
    checkpoint_root: str,
    tracking_uri: str,
    experiment: str = "",
    pipeline_root: str | None = None,
    artifacts: str = "",
    require_gpu: bool = False,
    variants: Sequence[RunConfig] = (),
    comet: bool = True,
) -> PreflightReport:
    """Check everything a run needs. Nothing is raised for what is wrong: it is all in the report.

    Args:
        config: The run.
        checkpoint_root: Folder (local or gs://) for the training steps' checkpoints; empty: not checked.
        tracking_uri: MLflow's tracking URI; empty: tracking is off.
        experiment: MLflow experiment; empty: not checked.
        pipeline_root: Folder (local or gs://) for the pipeline's artifacts; None: not checked.
        artifacts: URI of an artifact of this run; without a scheme: not checked.
        require_gpu: A missing GPU is an error.
        variants: Runs of a comparison, which share data, task and teacher with `config`; then `config` is no run.
        comet: The pipeline has a step for COMET; its model is not checked otherwise.
    """
    checks = Checks()
    runs = variants or [config]
    read = [text for run in [config, *runs] for text in texts(run.model_dump(mode="json"))]
    if not check_answers(checks, [checkpoint_root, pipeline_root or "", *read]):
        return PreflightReport(checks.found)  # each of the others would wait for it, some of them for minutes
    served = served_teacher(config.teacher)
    teacher = (
        None if served else checks.attempt("teacher", partial(check_model, checks, "teacher", config.teacher, config))
    )
    students = [
        checks.attempt("student", partial(check_student, checks, teacher, run))
        for run in distinct(runs, lambda run: (run.student, run.student_init))
    ]
    for run in distinct(runs, lambda run: run.distill):
        checks.attempt("distill", partial(check_unread, checks, run))
    if served and students[0]:
        checks.attempt("teacher", partial(check_served, checks, served, students[0], runs))
    report = PreflightReport(checks.found)
    models = [model for model in (teacher, *students) if model]
    for run in distinct(runs, lambda run: (run.student, run.student_init, run.teacher_sft, run.distill.training.lora)):
        checks.attempt("adapters", partial(check_adapters, checks, run, models))
    report.model_fingerprints = {model.reference: model.fingerprint for model in models}
    if served:
        report.model_fingerprints[config.teacher] = model_fingerprint(config.teacher)
    report.date = checks.attempt("date", lambda: check_date(checks, models, config, checkpoint_root)) or ""
    data = checks.attempt("data", lambda: check_data(checks, config, models, runs))
    report.data_fingerprint, counted = data or ("", {})
    if comet and config.task.wants_comet:
        checks.attempt("comet", lambda: check_comet(checks, config.evaluation.comet.model))
    if config.wants_judge:
        checks.attempt("judge", lambda: check_judge(checks, config.evaluation.judge))
    usable = partial(storage.check_checkpoint_root, checkpoint_root)
    checks.attempt("checkpoints", lambda: check_writable(checks, "checkpoints", checkpoint_root, usable))
    if not checkpoint_root and in_cluster():
        hint = "name a gs:// URI or a mounted folder: key `checkpoint-root` of the ConfigMap that `settings` names"
        checks.add("checkpoints", "warning", "a step that is tried again starts from its beginning", hint=hint)
    checks.attempt("artifacts", lambda: check_writable(checks, "artifacts", pipeline_root or ""))
    checks.attempt("multinode", lambda: check_multinode(checks, runs, checkpoint_root))
    checks.attempt("vLLM servers", lambda: check_engine(checks, runs))
    checks.attempt(TRACKING, lambda: check_tracking_store(checks, tracking_uri, experiment))
    registers = bool(tracking_uri) and not variants
    if registers and report.tracking_works:
        checks.attempt("champion", lambda: check_champion(checks, tracking_uri, config.registry.model_name))
    by_nodes = any(run.teacher_sft.multinode or run.distill.multinode for run in runs)
    if registers or by_nodes:
        checks.attempt("artifacts", lambda: check_readable(checks, artifacts, by_nodes=by_nodes))
    gpu = checks.attempt("GPU", lambda: check_gpu(checks, require_gpu)) or False
    checks.attempt("precision", lambda: check_precision(checks, runs, gpu))
    if teacher:
        for run in distinct(runs, lambda run: run.distill.training.teacher_precision):
            checks.attempt("teacher precision", partial(check_teacher_precision, checks, run, teacher.folder, gpu))
    sizes = {model.role: model.size for model in models}
    if len(runs) == 1 and sizes and (teacher or served) and (run.student_init.cuts or students[0]):
        size = sizes["student"] if students[0] else cut_size(sizes["teacher"], run)
        # One on a server takes no memory here.
        pair = sizes.get("teacher", size), size
        checks.attempt("memory", lambda: check_memory(checks, run, *pair, gpu))
        elsewhere = trains_elsewhere(gpu)
        plans = checks.attempt("plan", lambda: check_plans(checks, run, pair, counted, elsewhere=elsewhere), "warning")
        if plans:
            report.plan = plans[0].table(run.name) if len(plans) == 1 else compared(run.name, plans)
    return report
