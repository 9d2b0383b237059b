"""The distillation pipeline: from a teacher, a student and data to a measured, registered student.

    prepare -> teacher -> student -> distil -> measure -> release
    exit handler: finish

`prepare` and `measure` are chapters (`skd_kfp.pipelines.chapters`), the others single steps: teacher_sft, student_init,
distill, register_model. Compiled by `skd compile` into `pipelines/compiled/distillation.yaml` and, with a step for
COMET, `distillation_comet.yaml`; `skd run` runs the same definition locally.
"""

from functools import partial
from typing import Any

from kfp import dsl

from skd_kfp.components.distill.component import distill
from skd_kfp.components.finish.component import finish
from skd_kfp.components.register_model.component import register_model
from skd_kfp.components.student_init.component import student_init
from skd_kfp.components.teacher_sft.component import teacher_sft
from skd_kfp.pipelines import chapters
from skd_kfp.pipelines.chapters import PREPARE, select
from skd_kfp.pipelines.parameters import POOL, form, pipeline
from skd_kfp.pipelines.profiles import Profile
from skd_kfp.pipelines.task_settings import make_task
from skd_lib.steps.preflight import NO_COMPARISON

HANDED_ON = dict.fromkeys(
    (
        *("teacher_sft", "student_init", "distill"),
        *("evaluate_teacher", "evaluate", "specdec_benchmark", "evaluate_champion", "report"),
    ),
    str,
)


def distillation_comet(profile: Profile) -> Any:
    """Return the pipeline in which COMET, in an image of its own, judges the answers; see `distillation`."""
    return distillation(profile, comet=True)


def distillation(profile: Profile, *, comet: bool = False) -> Any:
    """Return the pipeline; a step for COMET that is not needed costs image, node and room in Kubeflow's records."""
    judged = {"comet_score": str} if comet else {}
    prepare = chapters.prepare(profile, {**HANDED_ON, **judged}, comet=comet)
    measure = chapters.measure(profile, comet=comet)

    @pipeline(
        "skd-distillation",  # with and without COMET: Kubeflow's cache is for each name
        "Distil a large language model into a small one by Speculative Knowledge Distillation, measure it "
        f"as a model and as a draft for speculative decoding{', judge it by COMET' * comet}, and register it.",
        form(profile, comparison=False),
    )
    def distillation(given: Any) -> None:
        step = partial(make_task, profile, given)
        run_name = dsl.PIPELINE_JOB_NAME_PLACEHOLDER
        end = step(finish, "finish", cache=False, run_name=run_name)
        with dsl.ExitHandler(end, name="distillation"):
            prepared = prepare(**select(given, PREPARE), run_name=run_name, comparison=NO_COMPARISON).outputs
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
                **select(given, POOL),
            ).outputs
            step(
                register_model,
                "register_model",
                title="release",
                cache=False,
                student=student,
                measured=measured["measured"],
            )

    return distillation
