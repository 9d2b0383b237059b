"""KFP component `preflight`: check a run before anything expensive starts."""

from typing import Any

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def preflight(
    run_name: str,
    teacher: str,
    student: str,
    method: str,
    divergence: str,
    top_k: int,
    gamma: int,
    max_steps: int,
    learning_rate: float,
    seed: int,
    config: dict[str, Any],
    checkpoint_root: str,
    report: dsl.Output[dsl.Markdown],
    run_config: dsl.OutputPath(dict),
    data_config: dsl.OutputPath(dict),
    task_config: dsl.OutputPath(dict),
    teacher_sft_config: dsl.OutputPath(dict),
    student_init_config: dsl.OutputPath(dict),
    distill_config: dsl.OutputPath(dict),
    evaluation_config: dsl.OutputPath(dict),
    comet_config: dsl.OutputPath(dict),
    specdec_config: dsl.OutputPath(dict),
    registry_config: dsl.OutputPath(dict),
    comet_wanted: dsl.OutputPath(str),
    trust_remote_code: dsl.OutputPath(bool),
    data_fingerprint: dsl.OutputPath(str),
    teacher_fingerprint: dsl.OutputPath(str),
    student_fingerprint: dsl.OutputPath(str),
    model_fingerprints: dsl.OutputPath(dict),
    tracking_uri: str = "",
    experiment: str = "skd",
    trials: list[dict] = [],  # type: ignore[type-arg]  # noqa: B006 - KFP copies it
) -> dsl.ContainerSpec:
    """Check a run before anything expensive starts.

    Fails within seconds with a list of everything that is wrong. It also hands each later step its own section of the
    configuration, so that a step's cache key depends on that section alone.

    Args:
        run_name: Name of the run: lower case, digits and dashes.
        teacher: Teacher: hub id, local folder, gs:// URI or wheel:// reference.
        student: Student, likewise; empty where it is cut from the teacher.
        method: Training method: sft, seqkd, supervised_kd, on_policy, imitkd, two_stage, skd or skd_mixed.
        divergence: Loss: forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd or adaptive_kl.
        top_k: SKD keeps a drafted token that is among the teacher's K likeliest; -1: see `config`.
        gamma: Tokens the student drafts per teacher call; -1: see `config`.
        max_steps: Optimiser steps of the distillation; 0 goes by epochs.
        learning_rate: Peak learning rate of the distillation.
        seed: Seed of the run.
        config: The rest of the run's configuration.
        checkpoint_root: Where checkpoints outlive the pod: a gs:// URI, or a folder on a volume. A retry resumes there.
        tracking_uri: MLflow tracking server; empty turns tracking off.
        experiment: MLflow experiment.
        trials: Runs of a comparison, each with the fields in which it differs.

    Returns:
        report: What was checked and what was found.
        run_config: The whole configuration.
        data_config: Section `data` of the configuration.
        task_config: Section `task` of the configuration.
        teacher_sft_config: Section `teacher_sft` of the configuration.
        student_init_config: Section `student_init` of the configuration.
        distill_config: Section `distill` of the configuration.
        evaluation_config: Section `evaluation` of the configuration, without COMET's part.
        comet_config: Section `evaluation` of the configuration, for COMET.
        specdec_config: Section `specdec` of the configuration.
        registry_config: Section `registry` of the configuration.
        comet_wanted: Whether the task asks for COMET, `true` or `false`.
        trust_remote_code: Whether code that comes with a model may run.
        data_fingerprint: Fingerprint of the data source; new data re-runs what depends on it.
        teacher_fingerprint: Fingerprint of the teacher's files; another teacher re-runs what depends on it.
        student_fingerprint: Fingerprint of the student's files; empty where it is cut from the teacher.
        model_fingerprints: Fingerprints of the teacher and of all students of a comparison, by reference.
    """
    return run_step(
        "preflight",
        TRAIN,
        {
            "run_name": run_name,
            "teacher": teacher,
            "student": student,
            "method": method,
            "divergence": divergence,
            "top_k": top_k,
            "gamma": gamma,
            "max_steps": max_steps,
            "learning_rate": learning_rate,
            "seed": seed,
            "config": config,
            "checkpoint_root": checkpoint_root,
            "tracking_uri": tracking_uri,
            "experiment": experiment,
            "trials": trials,
            "report_out": report.path,
        },
    )
