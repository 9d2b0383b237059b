"""Everything that can be known to be wrong with a run before it starts, found in one go and in seconds.

No weights are loaded, and those of a hub model are not even fetched.
"""

from __future__ import annotations

from collections.abc import Sequence

from skd_lib import storage
from skd_lib.config import RunConfig
from skd_lib.preflight.checks import Check, Checks, PreflightReport, distinct
from skd_lib.preflight.data import check_data
from skd_lib.preflight.dates import check_date
from skd_lib.preflight.models import check_comet, check_model, check_student, check_unread, cut_size
from skd_lib.preflight.surroundings import (
    check_gpu,
    check_memory,
    check_multinode,
    check_precision,
    check_teacher_precision,
    check_tracking_store,
    check_writable,
)

__all__ = ["Check", "PreflightReport", "run_checks"]


def run_checks(
    config: RunConfig,
    *,
    checkpoint_root: str,
    tracking_uri: str,
    pipeline_root: str | None = None,
    require_gpu: bool = False,
    variants: Sequence[RunConfig] = (),
) -> PreflightReport:
    """Look at everything a run needs. Nothing is raised for what is wrong: it is all in the report.

    Args:
        config: The run.
        checkpoint_root: Folder (local or gs://) for the training steps' checkpoints; empty: not looked at.
        tracking_uri: MLflow's tracking URI; empty: tracking is off.
        pipeline_root: Folder (local or gs://) for the pipeline's artifacts; None: not looked at.
        require_gpu: A missing GPU is an error.
        variants: Runs of a comparison, which share data, task and teacher with `config`; then `config` is none itself.
    """
    checks = Checks()
    teacher = check_model(checks, "teacher", config.teacher, config)
    runs = variants or [config]
    students = [
        check_student(checks, teacher, run) for run in distinct(runs, lambda run: (run.student, run.student_init))
    ]
    for run in distinct(runs, lambda run: run.distill):
        check_unread(checks, run)
    report = PreflightReport(checks.found)
    models = [model for model in (teacher, *students) if model]
    report.model_fingerprints = {model.reference: model.fingerprint for model in models}
    report.date = checks.attempt("date", lambda: check_date(checks, models, config, checkpoint_root)) or ""
    report.data_fingerprint = check_data(checks, config, models, runs)
    if config.task.wants_comet:
        check_comet(checks, config.evaluation.comet.model)
    check_writable(checks, "checkpoints", checkpoint_root, lambda: storage.check_checkpoint_root(checkpoint_root))
    check_writable(checks, "artifacts", pipeline_root or "")
    check_multinode(checks, runs, checkpoint_root)
    check_tracking_store(checks, tracking_uri)
    gpu = check_gpu(checks, require_gpu)
    check_precision(checks, runs, gpu)
    if teacher:
        for run in distinct(runs, lambda run: run.distill.training.teacher_precision):
            check_teacher_precision(checks, run, teacher.folder, gpu)
    if teacher and len(runs) == 1 and (run.student_init.cuts or students[0]):
        student = students[0]
        check_memory(checks, run, teacher.size, student.size if student else cut_size(teacher.size, run), gpu)
    return report
