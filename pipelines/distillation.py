"""The distillation pipeline: from a teacher, a student and data to a measured, registered student.

    prepare -> teacher -> student -> distil -> measure -> release
    exit handler: finish

`prepare` and `measure` are chapters (`skd_kfp.pipelines.chapters`), the others single steps: teacher_sft, student_init,
distill, register_model. Compiled by `skd compile` into `pipelines/compiled/distillation.yaml` and, with a step for
COMET, `distillation_comet.yaml`; `skd run` runs the same definition locally.
"""

from typing import Any

from kfp import dsl

from skd_kfp.components.distill.component import distill
from skd_kfp.components.finish.component import finish
from skd_kfp.components.register_model.component import register_model
from skd_kfp.components.student_init.component import student_init
from skd_kfp.components.teacher_sft.component import teacher_sft
from skd_kfp.pipelines import chapters
from skd_kfp.pipelines.places import CONFIG_MAP
from skd_kfp.pipelines.profiles import Profile
from skd_kfp.pipelines.task_settings import Settler
from skd_lib.steps.preflight import NO_COMPARISON

HANDED_ON = dict.fromkeys(
    (
        *("teacher_sft", "student_init", "distill"),
        *("evaluate_teacher", "evaluate", "specdec_benchmark", "evaluate_champion", "report"),
    ),
    str,
)
"""What preflight gives to later steps: each its part of the configuration."""


def distillation_comet(profile: Profile) -> Any:
    """Return the pipeline in which COMET, in an image of its own, judges the answers; see `distillation`."""
    return distillation(profile, comet=True)


def distillation(profile: Profile, *, comet: bool = False) -> Any:
    """Return the pipeline.

    Args:
        profile: What the steps ask of the cluster.
        comet: Whether it has a step for COMET. One that is not needed costs image, node and room in Kubeflow's records.
    """
    pool_labels, pool_taints = profile.shared_pool
    judged = {"comet_score": str} if comet else {}
    prepare, measure = (
        chapters.prepare(profile, {**HANDED_ON, **judged}, comet=comet),
        chapters.measure(profile, comet=comet),
    )

    @dsl.pipeline(
        name="skd-distillation",  # with and without COMET: Kubeflow's cache is for each name
        description="Distil a large language model into a small one by Speculative Knowledge Distillation, measure it "
        f"as a model and as a draft for speculative decoding{', judge it by COMET' * comet}, and register it.",
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
                comparison=NO_COMPARISON,
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
            data = prepared["data"]
            teacher = step(
                teacher_sft, "teacher_sft", title="teacher", data=data, config=prepared["teacher_sft"]
            ).outputs["tuned_teacher"]
            initial = step(
                student_init,
                "student_init",
                title="student",
                teacher=teacher,
                data=data,
                config=prepared["student_init"],
            ).outputs["initial_student"]
            student = step(
                distill,
                "distill",
                title="distil",
                student=initial,
                teacher=teacher,
                data=data,
                config=prepared["distill"],
            ).outputs["distilled_student"]
            measured = measure(
                data=data,
                teacher=teacher,
                initial_student=initial,
                student=student,
                teacher_config=prepared["evaluate_teacher"],
                student_config=prepared["evaluate"],
                specdec_config=prepared["specdec_benchmark"],
                champion_config=prepared["evaluate_champion"],
                report_config=prepared["report"],
                comet_config=prepared["comet_score"] if comet else "",
                **pool,
            ).outputs
            step(
                register_model,
                "register_model",
                title="release",
                cache=False,
                student=student,
                measured=measured["measured"],
            )

    return pipeline
