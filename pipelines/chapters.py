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
Node pool and settings are handed on as parameters, since a nested pipeline sees its own parameters only. Preflight
gives each step its `config`: the part of the run's configuration that the step depends on.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
from skd_kfp.pipelines.profiles import Profile
from skd_kfp.pipelines.task_settings import Settler

Chapter = Callable[..., dsl.PipelineTask]
"""A nested pipeline: called within another, it is a task of that."""


def outputs(**types: Any) -> Any:
    """Return the type of a nested pipeline's outputs, as KFP wants it declared."""
    return NamedTuple("Outputs", list(types.items()))


def prepare(profile: Profile, handed_on: Mapping[str, type], *, comet: bool = False) -> Chapter:
    """Return the chapter that checks the run and prepares its data.

    Args:
        profile: The machines.
        handed_on: Outputs of preflight that later chapters need, with their types.
        comet: Whether a later chapter has a step for COMET.
    """
    prepared_type = outputs(data=dsl.Dataset, **handed_on)

    @dsl.pipeline(name="prepare", description="Check the run before anything expensive starts, and prepare its data.")
    def prepare(
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
        settings: str,
    ) -> prepared_type:
        step = Settler(profile, settings).step
        checked = step(
            preflight,
            "preflight",
            cache=False,
            run_name=run_name,
            config=config,
            comparison=comparison,
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
            comet=comet,
        ).outputs
        data = step(prepare_data, "prepare_data", config=checked["prepare_data"], problems=checked["problems"]).outputs[
            "data"
        ]
        step(show, "show-data", cache=False, artifact=data)
        return prepared_type(data=data, **{name: checked[name] for name in handed_on})

    return prepare


Scored = outputs(of_teacher=dsl.Artifact, of_student=dsl.Artifact, drafts=dsl.Artifact, champion=dsl.Artifact)
Measured = outputs(report=dsl.HTML, measured=str)


def measure(profile: Profile, *, comet: bool) -> Chapter:
    """Return the chapter that measures teacher and student, as models and as a draft, and makes the report.

    Args:
        profile: The machines.
        comet: Whether COMET judges the answers, in an image of its own.
    """
    score_all = _judge(profile) if comet else _score(profile)

    @dsl.pipeline(name="measure", description="Measure teacher and student before and after, and the student as draft.")
    def measure(
        data: dsl.Input[dsl.Dataset],
        teacher: dsl.Input[dsl.Model],
        initial_student: dsl.Input[dsl.Model],
        student: dsl.Input[dsl.Model],
        teacher_config: str,
        student_config: str,
        specdec_config: str,
        champion_config: str,
        report_config: str,
        settings: str,
        node_selector: dict,  # type: ignore[type-arg]
        node_tolerations: list,  # type: ignore[type-arg]
        comet_config: str = "",
    ) -> Measured:
        step = Settler(profile, settings, node_selector, node_tolerations).step
        scored = score_all(
            data=data,
            teacher=teacher,
            initial_student=initial_student,
            student=student,
            teacher_config=teacher_config,
            student_config=student_config,
            specdec_config=specdec_config,
            champion_config=champion_config,
            settings=settings,
            node_selector=node_selector,
            node_tolerations=node_tolerations,
            **({"comet_config": comet_config} if comet else {}),
        ).outputs
        # In this very chapter: the page finds an output of a nested pipeline one level down, no further.
        page = step(
            report,
            "report",
            cache=False,
            teacher_evaluations=scored["of_teacher"],
            student_evaluations=scored["of_student"],
            drafts=scored["drafts"],
            champion=scored["champion"],
            comet=scored["comet"] if comet else "",
            config=report_config,
        ).outputs
        return Measured(report=page["report"], measured=page["measured"])

    return measure


def _score(profile: Profile) -> Chapter:
    @dsl.pipeline(name="score", description="Score teacher and student, the student as a draft, and the champion.")
    def score(
        data: dsl.Input[dsl.Dataset],
        teacher: dsl.Input[dsl.Model],
        initial_student: dsl.Input[dsl.Model],
        student: dsl.Input[dsl.Model],
        teacher_config: str,
        student_config: str,
        specdec_config: str,
        champion_config: str,
        settings: str,
        node_selector: dict,  # type: ignore[type-arg]
        node_tolerations: list,  # type: ignore[type-arg]
    ) -> Scored:
        step = Settler(profile, settings, node_selector, node_tolerations).step
        of_teacher = step(
            evaluate_teacher, "evaluate_teacher", teacher=teacher, data=data, config=teacher_config
        ).outputs["evaluations"]
        of_student = step(
            evaluate_student,
            "evaluate_student",
            before=initial_student,
            after=student,
            data=data,
            config=student_config,
        ).outputs["evaluations"]
        # One step for both: the teacher and the two students take turns in one process, so that timings compare.
        drafts = step(
            specdec_benchmark,
            "specdec_benchmark",
            teacher=teacher,
            draft_before=initial_student,
            draft_after=student,
            data=data,
            config=specdec_config,
        ).outputs["drafts"]
        # Not cached: who the champion is may have changed. After the others, so that this chapter ends with a step that
        # has really run (evaluate_student, from the cache, ends at once).
        champion = step(
            evaluate_champion,
            "evaluate_champion",
            cache=False,
            student=student,
            teacher=teacher,
            data=data,
            config=champion_config,
        )
        champion.after(of_teacher.task, drafts.task)
        return Scored(
            of_teacher=of_teacher, of_student=of_student, drafts=drafts, champion=champion.outputs["champion"]
        )

    return score


Judged = outputs(
    of_teacher=dsl.Artifact, of_student=dsl.Artifact, drafts=dsl.Artifact, champion=dsl.Artifact, comet=str
)


def _judge(profile: Profile) -> Chapter:
    score_all = _score(profile)

    @dsl.pipeline(name="judge", description="Score all models, and have COMET judge their answers.")
    def judge(
        data: dsl.Input[dsl.Dataset],
        teacher: dsl.Input[dsl.Model],
        initial_student: dsl.Input[dsl.Model],
        student: dsl.Input[dsl.Model],
        teacher_config: str,
        student_config: str,
        specdec_config: str,
        champion_config: str,
        comet_config: str,
        settings: str,
        node_selector: dict,  # type: ignore[type-arg]
        node_tolerations: list,  # type: ignore[type-arg]
    ) -> Judged:
        scored = score_all(
            data=data,
            teacher=teacher,
            initial_student=initial_student,
            student=student,
            teacher_config=teacher_config,
            student_config=student_config,
            specdec_config=specdec_config,
            champion_config=champion_config,
            settings=settings,
            node_selector=node_selector,
            node_tolerations=node_tolerations,
        ).outputs
        # Not cached: that COMET could not be reached is true of this run, not of the next.
        comet = (
            Settler(profile, settings, node_selector, node_tolerations)
            .step(
                comet_score,
                "comet_score",
                cache=False,
                teacher_evaluations=scored["of_teacher"],
                student_evaluations=scored["of_student"],
                champion=scored["champion"],
                config=comet_config,
            )
            .outputs["scores"]
        )
        made = {name: scored[name] for name in ("of_teacher", "of_student", "drafts", "champion")}
        return Judged(**made, comet=comet)

    return judge


Compared = outputs(report=dsl.Markdown)


def compare(profile: Profile) -> Chapter:
    """Return the chapter that trains and measures a student for each trial, and puts them in one table."""

    @dsl.pipeline(name="compare", description="Train and measure one student a trial, and compare them.")
    def compare(
        data: dsl.Input[dsl.Dataset],
        teacher: dsl.Input[dsl.Model],
        trials: list,  # type: ignore[type-arg]
        variant_config: str,
        model_fingerprints: str,
        teacher_config: str,
        table_config: str,
        plan: str,
        settings: str,
        node_selector: dict,  # type: ignore[type-arg]
        node_tolerations: list,  # type: ignore[type-arg]
    ) -> Compared:
        step = Settler(profile, settings, node_selector, node_tolerations).step
        of_teacher = step(
            evaluate_teacher, "evaluate_teacher", teacher=teacher, data=data, config=teacher_config
        ).outputs["evaluations"]
        # Without a name: KFP 2.15 looks for the loop by its title, under which its outputs are not.
        with dsl.ParallelFor(trials) as trial:
            # Each trial's own label is part of the key: equal steps that run side by side make artifacts of different
            # ids, one of which all of them would take from the cache the next time, and train again on it.
            own = step(
                compare_variant,
                "compare_variant",
                cache=False,
                trial=trial,
                config=variant_config,
                model_fingerprints=model_fingerprints,
            ).outputs
            initial = step(
                student_init, "student_init", teacher=teacher, data=data, config=own["student_init"]
            ).outputs["initial_student"]
            student = step(
                distill, "distill", student=initial, teacher=teacher, data=data, config=own["distill"]
            ).outputs["distilled_student"]
            answered = step(
                evaluate,
                "evaluate-student_after",
                model=student,
                data=data,
                role="student_after",
                config=own["evaluate"],
            ).outputs["evaluation"]
            drafted = step(
                specdec_benchmark,
                "specdec_benchmark",
                teacher=teacher,
                draft_before=initial,
                draft_after=student,
                data=data,
                config=own["specdec_benchmark"],
            ).outputs["drafts"]
            step(show, "show-trial", cache=False, artifact=answered).after(drafted.task)
        table = step(
            compare_table,
            "compare_table",
            cache=False,
            evaluations=dsl.Collected(answered),
            drafts=dsl.Collected(drafted),
            teacher_evaluations=of_teacher,
            config=table_config,
            plan=plan,
        ).outputs
        return Compared(report=table["report"])

    return compare
