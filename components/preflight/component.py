"""KFP component `preflight`: check a run before anything expensive starts."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def preflight(
    run_name: str,
    config: str,
    comparison: str,
    data_train: str,
    data_validation: str,
    data_test: str,
    model_teacher: str,
    model_student: str,
    task: str,
    training_method: str,
    training_steps: int,
    mlflow_experiment: str,
    reuse: bool,
    comet: bool,
    findings: dsl.Output[dsl.Markdown],
    prepare_data: dsl.OutputPath(str),
    teacher_sft: dsl.OutputPath(str),
    student_init: dsl.OutputPath(str),
    distill: dsl.OutputPath(str),
    evaluate_teacher: dsl.OutputPath(str),
    evaluate: dsl.OutputPath(str),
    specdec_benchmark: dsl.OutputPath(str),
    evaluate_champion: dsl.OutputPath(str),
    comet_score: dsl.OutputPath(str),
    report: dsl.OutputPath(str),
    trials: dsl.OutputPath(list),
    compare_variant: dsl.OutputPath(str),
    model_fingerprints: dsl.OutputPath(str),
    compare_table: dsl.OutputPath(str),
    plan: dsl.OutputPath(str),
    problems: dsl.OutputPath(str),
) -> dsl.ContainerSpec:
    """Check a run before anything expensive starts.

    Lists everything that is wrong within seconds; on a cluster the next step fails with it. It also hands each later
    step its own part of the configuration, so that a step's cache key depends on that part alone: JSON of ASCII in
    which texts arrive as they were written, with only what differs from the defaults.

    Args:
        run_name: The run's name is made of it where the configuration has none.
        config: JSON of what differs from the defaults, or the URI of a run's YAML file.
        comparison: JSON of a comparison without its `base`, or the URI of its YAML file; `(a single run)`: none.
        data_train: Training data: paths, globs or URIs, separated by commas. Here and below, empty: as `config` says.
        data_validation: Validation data, likewise.
        data_test: Test data, likewise.
        model_teacher: Teacher: hub id, mounted folder, gs:// URI or wheel:// reference.
        model_student: Student, likewise; empty also where it is cut from the teacher.
        task: Task to start from, by name, or the URI of its YAML file.
        training_method: How the student learns.
        training_steps: Optimiser steps of the distillation; 0: as `config` says.
        mlflow_experiment: MLflow experiment of the run; empty: the one of the settings.
        reuse: Whether later steps may be taken from the cache.
        comet: Whether the pipeline has a step for COMET.

    Returns:
        findings: What was checked and what was found.
        prepare_data: Its `config`. The fingerprint of the data is in it, so that new data re-run what depends on them.
        teacher_sft: Its `config`, likewise, with the fingerprint of the teacher's files.
        student_init: Its `config`, likewise, with the fingerprint of the student's files. Empty in a comparison.
        distill: Its `config`. Empty in a comparison.
        evaluate_teacher: The `config` of `evaluate_teacher`.
        evaluate: The `config` of `evaluate_student`.
        specdec_benchmark: Its `config`. Empty in a comparison.
        evaluate_champion: Its `config`. Empty in a comparison.
        comet_score: Its `config`. Empty in a comparison.
        report: Its `config`. Empty in a comparison.
        trials: The trials of a comparison, each with the fields in which it differs.
        compare_variant: The configuration that all trials of a comparison start from; empty for a single run.
        model_fingerprints: Of a comparison, fingerprints of the teacher and of all students, by reference, as JSON.
        compare_table: Its `config`; empty for a single run.
        plan: Of a comparison, what its table needs: reference, trials, and those left out.
        problems: What is wrong with the run, as a JSON list; the next step fails with it.
    """
    return run_step(
        "preflight",
        TRAIN,
        {
            "run_name": run_name,
            "config": config,
            "comparison": comparison,
            "data_train": data_train,
            "data_validation": data_validation,
            "data_test": data_test,
            "model_teacher": model_teacher,
            "model_student": model_student,
            "task": task,
            "training_method": training_method,
            "training_steps": training_steps,
            "mlflow_experiment": mlflow_experiment,
            "reuse": reuse,
            "comet": comet,
            "report_out": findings.path,
        },
        {
            "findings": findings,
            "prepare_data": prepare_data,
            "teacher_sft": teacher_sft,
            "student_init": student_init,
            "distill": distill,
            "evaluate_teacher": evaluate_teacher,
            "evaluate": evaluate,
            "specdec_benchmark": specdec_benchmark,
            "evaluate_champion": evaluate_champion,
            "comet_score": comet_score,
            "report": report,
            "trials": trials,
            "compare_variant": compare_variant,
            "model_fingerprints": model_fingerprints,
            "compare_table": compare_table,
            "plan": plan,
            "problems": problems,
        },
    )
