"""The distillation pipeline: from a teacher, a student and data to a measured, registered student.

    prepare -> teacher -> student -> distil -> measure -> release
    exit handler: finish

`pipelines.chapters` says what is in each. Compiled by `skd compile` into `pipelines/compiled/distillation.yaml`;
`skd run` runs the same definition locally.
"""

from typing import Any

from kfp import dsl

from components.distill.component import distill
from components.finish.component import finish
from components.student_init.component import student_init
from pipelines import chapters
from pipelines.places import CONFIG_MAP
from pipelines.profiles import Profile
from pipelines.tasks import Settler


def distillation(profile: Profile) -> Any:
    """Return the pipeline.

    Args:
        profile: What the steps ask of the cluster.
    """
    pool_labels, pool_taints = profile.shared_pool
    prepare, teach = chapters.prepare(profile), chapters.teacher(profile)
    measure, release = chapters.measure(profile), chapters.release(profile)

    @dsl.pipeline(
        name="skd-distillation",
        description="Distil a large language model into a small one by Speculative Knowledge Distillation, measure it "
        "as a model and as a draft for speculative decoding, and register it.",
    )
    def pipeline(
        config: str = "{}",
        data_test: str = "",
        data_train: str = "",
        data_validation: str = "",
        mlflow_experiment: str = "",
        model_student: str = "",
        model_teacher: str = "",
        node_selector: dict = pool_labels,  # type: ignore[type-arg]
        node_tolerations: list = pool_taints,  # type: ignore[type-arg]
        reuse: bool = True,
        settings: str = CONFIG_MAP,
        task: str = "",
        training_method: str = "",
        training_steps: int = 0,
    ) -> None:
        """Distil a teacher into a student.

        Args:
            config: What else differs from the defaults, as JSON, or the URI of a run's YAML file. A field of this form
                that is not empty goes before what it says.
            data_test: Test data: paths, globs or URIs of files (JSONL, CSV, Parquet, ...), separated by commas. Empty:
                cut from the training data.
            data_train: Training data, likewise.
            data_validation: Validation data, likewise. Empty: cut from the training data.
            mlflow_experiment: MLflow experiment. Empty: the one of the settings.
            model_student: Student: hub id (`google/gemma-2b-it`), mounted folder or gs:// URI, with the teacher's
                tokenizer. Empty where it is cut from the teacher (`student_init.mode: prune` in `config`).
            model_teacher: Teacher, likewise.
            node_selector: Labels that nodes must have on which models are loaded, e.g. a GPU pool's; {} for any node.
            node_tolerations: Taints that those nodes may have, as Kubernetes spells them:
                `[{"key": "nvidia.com/gpu", "operator": "Exists"}]`.
            reuse: Whether steps that were done before, with the same data, models and settings, are taken from the
                cache.
            settings: The ConfigMap of the namespace that says where MLflow is and where checkpoints are kept.
            task: What is asked: `translation`, `summarization`, `gsm8k`, `math`, `instruction`, or the URI of a task's
                YAML file. Empty: as `config` says.
            training_method: How the student learns: `skd`, `skd_mixed`, `on_policy`, `imitkd`, `two_stage`,
                `supervised_kd`, `seqkd` or `sft`. Empty: as `config` says, else `skd`.
            training_steps: Optimiser steps of the distillation. 0: as `config` says.
        """
        pool = {"settings": settings, "node_selector": node_selector, "node_tolerations": node_tolerations}
        step = Settler(profile, **pool).step
        run_name = dsl.PIPELINE_JOB_NAME_PLACEHOLDER
        end = step(finish, "finish", cache=False, run_name=run_name)
        with dsl.ExitHandler(end, name="distillation"):
            prepared = prepare(
                run_name=run_name,
                config=config,
                comparison="",
                data_train=data_train,
                data_validation=data_validation,
                data_test=data_test,
                model_teacher=model_teacher,
                model_student=model_student,
                task=task,
                training_method=training_method,
                training_steps=training_steps,
                mlflow_experiment=mlflow_experiment,
                reuse=reuse,
                settings=settings,
            ).outputs
            common = {name: prepared[name] for name in ("data", "task_config", "seed")}
            taught = teach(
                reference=prepared["teacher"],
                fingerprint=prepared["teacher_fingerprint"],
                fresh=prepared["fresh"],
                trust_remote_code=prepared["trust_remote_code"],
                config=prepared["teacher_sft_config"],
                evaluation_config=prepared["evaluation_config"],
                **common,
                **pool,
            ).outputs
            initial = step(
                student_init,
                "student_init",
                title="student",
                student=prepared["student"],
                fingerprint=prepared["student_fingerprint"],
                teacher=taught["teacher"],
                config=prepared["student_init_config"],
                label="",
                **common,
            ).outputs["initial_student"]
            student = step(
                distill,
                "distill",
                title="distil",
                student=initial,
                teacher=taught["teacher"],
                config=prepared["distill_config"],
                label="",
                **common,
            ).outputs["distilled_student"]
            measured = measure(
                teacher=taught["teacher"],
                teacher_scores=taught["teacher_scores"],
                initial_student=initial,
                student=student,
                run_name=prepared["name"],
                evaluation_config=prepared["evaluation_config"],
                comet_config=prepared["comet_config"],
                comet_wanted=prepared["comet_wanted"],
                specdec_config=prepared["specdec_config"],
                registry_config=prepared["registry_config"],
                **common,
                **pool,
            ).outputs
            release(student=student, measured=measured["measured"], settings=settings)

    return pipeline
