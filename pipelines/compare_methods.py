"""The comparison: methods, settings, student inits and seeds on one prepared data set and one teacher.

    prepare -> teacher -> compare
    exit handler: finish

`prepare` and `compare` are chapters (`skd_kfp.pipelines.chapters`), `teacher` is step teacher_sft. Compiled by
`skd compile` into `pipelines/compiled/compare_methods.yaml`; `skd compare` runs the same definition on this
machine, one trial after another.
"""

from typing import Any

from kfp import dsl

from skd_kfp.components.finish.component import finish
from skd_kfp.components.teacher_sft.component import teacher_sft
from skd_kfp.pipelines import chapters
from skd_kfp.pipelines.places import CONFIG_MAP
from skd_kfp.pipelines.profiles import Profile
from skd_kfp.pipelines.task_settings import Settler

HANDED_ON = {
    **dict.fromkeys(
        ("teacher_sft", "evaluate_teacher", "compare_variant", "model_fingerprints", "compare_table", "plan"), str
    ),
    "trials": list,
}
"""What preflight gives to later steps."""


def compare_methods(profile: Profile) -> Any:
    """Return the pipeline.

    Args:
        profile: What the steps ask of the cluster.
    """
    pool_labels, pool_taints = profile.shared_pool
    prepare, compare = chapters.prepare(profile, HANDED_ON), chapters.compare(profile)

    @dsl.pipeline(
        name="skd-compare-methods",
        description="Train students by several methods, settings and seeds under one teacher, and compare them: means, "
        "intervals, paired tests, and what each cost.",
    )
    def pipeline(
        comparison: str = "{}",
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
        training_steps: int = 0,
    ) -> None:
        """Compare ways of distilling a teacher into a student.

        Args:
            comparison: What is compared, as JSON (`{"methods": ["skd", "sft"], "seeds": [0, 1]}`), or the URI of a
                comparison's YAML file.
            config: What else differs from the defaults in all trials, as JSON, or the URI of a run's YAML file. A field
                of this form that is not empty goes before what it says.
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
            training_steps: Optimiser steps of each trial's distillation. 0: as `config` says.
        """
        pool = {"settings": settings, "node_selector": node_selector, "node_tolerations": node_tolerations}
        run_name = dsl.PIPELINE_JOB_NAME_PLACEHOLDER
        step = Settler(profile, **pool).step
        end = step(finish, "finish", cache=False, run_name=run_name)
        with dsl.ExitHandler(end, name="comparison"):
            prepared = prepare(
                run_name=run_name,
                config=config,
                comparison=comparison,
                data_train=data_train,
                data_validation=data_validation,
                data_test=data_test,
                model_teacher=model_teacher,
                model_student=model_student,
                task=task,
                training_method="",
                training_steps=training_steps,
                mlflow_experiment=mlflow_experiment,
                reuse=reuse,
                settings=settings,
            ).outputs
            teacher = step(
                teacher_sft, "teacher_sft", title="teacher", data=prepared["data"], config=prepared["teacher_sft"]
            ).outputs["tuned_teacher"]
            compare(
                data=prepared["data"],
                teacher=teacher,
                trials=prepared["trials"],
                variant_config=prepared["compare_variant"],
                model_fingerprints=prepared["model_fingerprints"],
                teacher_config=prepared["evaluate_teacher"],
                table_config=prepared["compare_table"],
                plan=prepared["plan"],
                **pool,
            )

    return pipeline
