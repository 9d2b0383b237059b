"""The chapters of the pipelines: nested pipelines, each a box on Kubeflow's page that opens into its steps.

    prepare   preflight -> prepare_data -> show
    measure   score: evaluate_teacher, evaluate_student, specdec_benchmark, evaluate_champion
                  -> report
              (with COMET, judge: score -> comet_score, in the place of score)
    compare   evaluate_teacher
              for each trial: compare_variant -> student_init -> distill -> evaluate, specdec_benchmark -> show
                  -> compare_table

The last step of each chapter, and of each round of its loop, is never cached: Kubeflow Pipelines counts a DAG's steps
only when one of them has really run, and leaves one whose last step comes from the cache in state RUNNING (2.17.0).
Preflight gives each step its `config`: the part of the run's configuration that the step depends on.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from kfp import dsl

from skd_kfp.components.comet_score.component import comet_score
from skd_kfp.components.compare_table.component import compare_table
from skd_kfp.components.compare_variant.component import compare_variant
from skd_kfp.components.distill.component import distill
from skd_kfp.components.evaluate.component import evaluate
from skd_kfp.components.evaluate_champion.component import evaluate_champion
from skd_kfp.components.evaluate_student.component import evaluate_student
from skd_kfp.components.evaluate_teacher.component import evaluate_teacher
from skd_kfp.components.preflight.component import preflight
from skd_kfp.components.prepare_data.component import prepare_data
from skd_kfp.components.report.component import report
from skd_kfp.components.show.component import show
from skd_kfp.components.specdec_benchmark.component import specdec_benchmark
from skd_kfp.components.student_init.component import student_init
from skd_kfp.pipelines.parameters import POOL, PREFLIGHT, Parameter, pipeline
from skd_kfp.pipelines.profiles import Profile
from skd_kfp.pipelines.task_settings import make_task

Chapter = Callable[..., dsl.PipelineTask]
"""A nested pipeline: called within another, it is a task of that."""
PREPARE: Mapping[str, type] = {name: type_ for name, type_ in PREFLIGHT.items() if name != "comet"} | {"settings": str}
TRAINED = {"data": dsl.Input[dsl.Dataset], "teacher": dsl.Input[dsl.Model]}
SCORE: Mapping[str, Any] = {
    **TRAINED,
    **dict.fromkeys(("initial_student", "student"), dsl.Input[dsl.Model]),
    **dict.fromkeys(("teacher_config", "student_config", "specdec_config", "champion_config"), str),
    **POOL,
}
SCORED = dict.fromkeys(("of_teacher", "of_student", "drafts", "champion"), dsl.Artifact)


def select(given: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of these names, to hand them on to a chapter."""
    return {name: value for name, value in vars(given).items() if name in names}


def prepare(profile: Profile, handed_on: Mapping[str, type], *, comet: bool = False) -> Chapter:
    """Return the chapter that checks the run and prepares its data.

    `handed_on` are outputs of preflight that later chapters need, with their types; `comet`: a later chapter has a step
    for COMET.
    """
    prepared = {"data": dsl.Dataset, **handed_on}

    @pipeline("prepare", "Check the run before anything expensive starts, and prepare its data.", PREPARE, prepared)
    def prepare(given: Any) -> Any:
        step = partial(make_task, profile, given)
        checked = step(preflight, "preflight", cache=False, comet=comet, **select(given, PREFLIGHT)).outputs
        data = step(prepare_data, "prepare_data", config=checked["prepare_data"], problems=checked["problems"]).outputs[
            "data"
        ]
        step(show, "show-data", cache=False, artifact=data)
        return {"data": data, **{name: checked[name] for name in handed_on}}

    return prepare


def measure(profile: Profile, *, comet: bool) -> Chapter:
    """Return the chapter that measures teacher and student, as models and as a draft, and makes the report."""
    inner, handed_on = (_judge(profile), JUDGE) if comet else (_score(profile), SCORE)
    parameters = {**SCORE, "report_config": str, "comet_config": Parameter(str, "", "")}
    measured = {"report": dsl.HTML, "measured": str}

    @pipeline(
        "measure", "Measure teacher and student before and after, and the student as draft.", parameters, measured
    )
    def measure(given: Any) -> Any:
        scored = inner(**select(given, handed_on)).outputs
        # In this very chapter: the page finds an output of a nested pipeline one level down, no further.
        page = make_task(
            profile,
            given,
            report,
            "report",
            cache=False,
            teacher_evaluations=scored["of_teacher"],
            student_evaluations=scored["of_student"],
            drafts=scored["drafts"],
            champion=scored["champion"],
            comet=scored["comet"] if comet else "",
            config=given.report_config,
        )
        return {name: page.outputs[name] for name in measured}

    return measure


def _score(profile: Profile) -> Chapter:
    @pipeline("score", "Score teacher and student, the student as a draft, and the champion.", SCORE, SCORED)
    def score(given: Any) -> Any:
        step = partial(make_task, profile, given)
        models = select(given, TRAINED)
        of_teacher = step(evaluate_teacher, "evaluate_teacher", **models, config=given.teacher_config)
        of_student = step(
            evaluate_student,
            "evaluate_student",
            before=given.initial_student,
            after=given.student,
            data=given.data,
            config=given.student_config,
        )
        # One step for both: the teacher and the two students take turns in one process, so that timings compare.
        drafts = step(
            specdec_benchmark,
            "specdec_benchmark",
            **models,
            draft_before=given.initial_student,
            draft_after=given.student,
            config=given.specdec_config,
        )
        # Not cached: who the champion is may have changed. After the others, so that this chapter ends with a step that
        # has really run (evaluate_student, from the cache, ends at once).
        champion = step(
            evaluate_champion,
            "evaluate_champion",
            cache=False,
            **models,
            student=given.student,
            config=given.champion_config,
        )
        champion.after(of_teacher, drafts)
        return {
            "of_teacher": of_teacher.outputs["evaluations"],
            "of_student": of_student.outputs["evaluations"],
            "drafts": drafts.outputs["drafts"],
            "champion": champion.outputs["champion"],
        }

    return score


JUDGE = {**SCORE, "comet_config": str}


def _judge(profile: Profile) -> Chapter:
    score_all = _score(profile)
    judged = {**SCORED, "comet": str}

    @pipeline("judge", "Score all models, and have COMET judge their answers.", JUDGE, judged)
    def judge(given: Any) -> Any:
        scored = score_all(**select(given, SCORE)).outputs
        # Not cached: that COMET could not be reached is true of this run, not of the next.
        comet = make_task(
            profile,
            given,
            comet_score,
            "comet_score",
            cache=False,
            teacher_evaluations=scored["of_teacher"],
            student_evaluations=scored["of_student"],
            champion=scored["champion"],
            config=given.comet_config,
        )
        return {**{name: scored[name] for name in SCORED}, "comet": comet.outputs["scores"]}

    return judge


COMPARE: Mapping[str, Any] = {
    **TRAINED,
    "trials": list,
    **dict.fromkeys(("variant_config", "model_fingerprints", "teacher_config", "table_config", "plan"), str),
    **POOL,
}


def compare(profile: Profile) -> Chapter:
    """Return the chapter that trains and measures a student for each trial, and puts them in one table."""
    compared = {"report": dsl.Markdown}

    @pipeline("compare", "Train and measure one student a trial, and compare them.", COMPARE, compared)
    def compare(given: Any) -> Any:
        step = partial(make_task, profile, given)
        models = select(given, TRAINED)
        of_teacher = step(evaluate_teacher, "evaluate_teacher", **models, config=given.teacher_config)
        # Without a name: KFP 2.15 looks for the loop by its title, under which its outputs are not.
        with dsl.ParallelFor(given.trials) as trial:
            # Each trial's own label is part of the key: equal steps that run side by side make artifacts of different
            # ids, one of which all of them would take from the cache the next time, and train again on it.
            own = step(
                compare_variant,
                "compare_variant",
                cache=False,
                trial=trial,
                config=given.variant_config,
                model_fingerprints=given.model_fingerprints,
            ).outputs
            initial = step(student_init, "student_init", **models, config=own["student_init"]).outputs[
                "initial_student"
            ]
            student = step(distill, "distill", **models, student=initial, config=own["distill"]).outputs[
                "distilled_student"
            ]
            answered = step(
                evaluate,
                "evaluate-student_after",
                model=student,
                data=given.data,
                role="student_after",
                config=own["evaluate"],
            ).outputs["evaluation"]
            drafted = step(
                specdec_benchmark,
                "specdec_benchmark",
                **models,
                draft_before=initial,
                draft_after=student,
                config=own["specdec_benchmark"],
            ).outputs["drafts"]
            step(show, "show-trial", cache=False, artifact=answered).after(drafted.task)
        table = step(
            compare_table,
            "compare_table",
            cache=False,
            evaluations=dsl.Collected(answered),
            drafts=dsl.Collected(drafted),
            teacher_evaluations=of_teacher.outputs["evaluations"],
            config=given.table_config,
            plan=given.plan,
        )
        return {name: table.outputs[name] for name in compared}

    return compare
