"""KFP component `preflight`: check a run before anything expensive starts."""

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


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
    report: dsl.Output[dsl.Markdown],
    name: dsl.OutputPath(str),
    data_config: dsl.OutputPath(str),
    task_config: dsl.OutputPath(str),
    teacher_sft_config: dsl.OutputPath(str),
    student_init_config: dsl.OutputPath(str),
    distill_config: dsl.OutputPath(str),
    evaluation_config: dsl.OutputPath(str),
    comet_config: dsl.OutputPath(str),
    specdec_config: dsl.OutputPath(str),
    registry_config: dsl.OutputPath(str),
    comet_wanted: dsl.OutputPath(str),
    trust_remote_code: dsl.OutputPath(bool),
    teacher: dsl.OutputPath(str),
    student: dsl.OutputPath(str),
    seed: dsl.OutputPath(int),
    data_fingerprint: dsl.OutputPath(str),
    teacher_fingerprint: dsl.OutputPath(str),
    student_fingerprint: dsl.OutputPath(str),
    model_fingerprints: dsl.OutputPath(str),
    fresh: dsl.OutputPath(str),
    trials: dsl.OutputPath(list),
    run_config: dsl.OutputPath(str),
    table_config: dsl.OutputPath(str),
    drafts: dsl.OutputPath(bool),
    problems: dsl.OutputPath(str),
) -> dsl.ContainerSpec:
    """Check a run before anything expensive starts.

    Lists everything that is wrong within seconds; on a cluster the next step fails with it. It also hands each
    later step its own section of the configuration, so that a step's cache key depends on that section alone.
    Sections are JSON of ASCII in which texts arrive as they were written; they hold only what differs from the
    defaults.

    Args:
        run_name: The run's name is made of it where the configuration has none.
        config: JSON of what differs from the defaults, or the URI of a run's YAML file.
        comparison: JSON of a comparison without its `base`, or the URI of its YAML file; empty: a single run.
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

    Returns:
        report: What was checked and what was found.
        name: The run's name.
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
        teacher: The teacher.
        student: The student; empty where it is cut from the teacher.
        seed: Seed of the run.
        data_fingerprint: Fingerprint of the data source; new data re-runs what depends on it.
        teacher_fingerprint: Fingerprint of the teacher's files; another teacher re-runs what depends on it.
        student_fingerprint: Fingerprint of the student's files; empty where it is cut from the teacher.
        model_fingerprints: Fingerprints of the teacher and of all students of a comparison, by reference, as JSON.
        fresh: The run's id where `reuse` is false, so that nothing of another run is taken; else empty.
        trials: The trials of a comparison, each with the fields in which it differs.
        run_config: Of a comparison, the configuration that all trials start from.
        table_config: Of a comparison, what its table needs: reference, trials, and those left out.
        drafts: Whether students are measured as drafts of the teacher.
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
            "report_out": report.path,
        },
        {
            "report": report,
            "name": name,
            "data_config": data_config,
            "task_config": task_config,
            "teacher_sft_config": teacher_sft_config,
            "student_init_config": student_init_config,
            "distill_config": distill_config,
            "evaluation_config": evaluation_config,
            "comet_config": comet_config,
            "specdec_config": specdec_config,
            "registry_config": registry_config,
            "comet_wanted": comet_wanted,
            "trust_remote_code": trust_remote_code,
            "teacher": teacher,
            "student": student,
            "seed": seed,
            "data_fingerprint": data_fingerprint,
            "teacher_fingerprint": teacher_fingerprint,
            "student_fingerprint": student_fingerprint,
            "model_fingerprints": model_fingerprints,
            "fresh": fresh,
            "trials": trials,
            "run_config": run_config,
            "table_config": table_config,
            "drafts": drafts,
            "problems": problems,
        },
    )
