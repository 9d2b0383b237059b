"""The comparison: methods, settings, student inits and seeds on one prepared data set and one teacher.

    prepare -> teacher -> compare
    exit handler: finish

`prepare` and `compare` are chapters (`skd_kfp.pipelines.chapters`), `teacher` is step teacher_sft. Compiled by
`skd compile` into `pipelines/compiled/compare_methods.yaml`; `skd compare` runs the same definition on this
machine, one trial after another.
"""

from functools import partial
from typing import Any

from kfp import dsl

from skd_kfp.components.finish.component import finish
from skd_kfp.components.teacher_sft.component import teacher_sft
from skd_kfp.pipelines import chapters
from skd_kfp.pipelines.chapters import PREPARE, select
from skd_kfp.pipelines.parameters import POOL, form, pipeline
from skd_kfp.pipelines.profiles import Profile
from skd_kfp.pipelines.task_settings import make_task

HANDED_ON = {
    **dict.fromkeys(
        ("teacher_sft", "evaluate_teacher", "compare_variant", "model_fingerprints", "compare_table", "plan"), str
    ),
    "trials": list,
}


def compare_methods(profile: Profile) -> Any:
    """Return the pipeline."""
    prepare, compare = chapters.prepare(profile, HANDED_ON), chapters.compare(profile)

    @pipeline(
        "skd-compare-methods",
        "Train students by several methods, settings and seeds under one teacher, and compare them: means, "
        "intervals, paired tests, and what each cost.",
        form(profile, comparison=True),
    )
    def compare_methods(given: Any) -> None:
        run_name = dsl.PIPELINE_JOB_NAME_PLACEHOLDER
        step = partial(make_task, profile, given)
        end = step(finish, "finish", cache=False, run_name=run_name)
        with dsl.ExitHandler(end, name="comparison"):
            prepared = prepare(**select(given, PREPARE), run_name=run_name, training_method="").outputs
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
                **select(given, POOL),
            )

    return compare_methods
