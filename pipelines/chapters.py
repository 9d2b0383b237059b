"""The chapters of the pipelines: nested pipelines, each a box on Kubeflow's page that opens into its steps.

    prepare   preflight -> prepare_data -> show
    teacher   import_model -> teacher_sft -> evaluate_both -> show
    measure   score: evaluate_both, specdec_benchmark, evaluate_champion -> comet_score (if the task asks for it)
                  -> report
    release   gate -> register_model
    compare   for each trial: compare_variant -> student_init -> distill -> evaluate, specdec_benchmark -> show
                  -> compare_table

The last step of each chapter, and of each round of its loop, is never cached: Kubeflow Pipelines counts a DAG's steps
only when one of them has really run, and leaves one whose last step comes from the cache in state RUNNING (2.17.0).
Node pool and settings are handed on as parameters, since a nested pipeline sees its own parameters only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from kfp import dsl

from components.comet_score.component import comet_score
from components.compare_table.component import compare_table
from components.compare_variant.component import compare_variant
from components.distill.component import distill
from components.evaluate.component import evaluate
from components.evaluate_both.component import evaluate_both
from components.evaluate_champion.component import evaluate_champion
from components.gate.component import gate
from components.images import TRAIN
from components.import_model.component import import_model
from components.preflight.component import preflight
from components.prepare_data.component import prepare_data
from components.register_model.component import register_model
from components.report.component import report
from components.show.component import show
from components.specdec_benchmark.component import specdec_benchmark
from components.student_init.component import student_init
from components.teacher_sft.component import teacher_sft
from pipelines.profiles import Profile
from pipelines.tasks import Settler

Chapter = Callable[..., dsl.PipelineTask]
"""A nested pipeline: called within another, it is a task of that."""

SETTINGS: dict[str, type] = {
    "name": str,
    "data_config": str,
    "task_config": str,
    "teacher_sft_config": str,
    "student_init_config": str,
    "distill_config": str,
    "evaluation_config": str,
    "comet_config": str,
    "specdec_config": str,
    "registry_config": str,
    "comet_wanted": str,
    "trust_remote_code": bool,
    "teacher": str,
    "student": str,
    "seed": int,
    "teacher_fingerprint": str,
    "student_fingerprint": str,
    "model_fingerprints": str,
    "fresh": str,
    "trials": list,
    "run_config": str,
    "table_config": str,
    "drafts": bool,
}
"""What preflight finds and later chapters need, with its type."""


def outputs(**types: Any) -> Any:
    """Return the type of a nested pipeline's outputs, as KFP wants it declared."""
    return NamedTuple("Outputs", list(types.items()))


Prepared = outputs(data=dsl.Dataset, **SETTINGS)
Taught = outputs(teacher=dsl.Model, teacher_scores=dsl.Artifact)
Measured = outputs(report=dsl.HTML, measured=str)
Scored = outputs(student_scores=dsl.Artifact, drafts=dsl.Artifact, champion=dsl.Artifact, comet=str)
Compared = outputs(report=dsl.Markdown)


def prepare(profile: Profile) -> Chapter:
    """Return the chapter that checks the run and prepares its data."""

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
    ) -> Prepared:
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
        ).outputs
        prepared = step(
            prepare_data,
            "prepare_data",
            data_config=checked["data_config"],
            data_fingerprint=checked["data_fingerprint"],
            seed=checked["seed"],
            fresh=checked["fresh"],
            problems=checked["problems"],
        ).outputs
        step(show, "show-data", cache=False, artifact=prepared["data"])
        return Prepared(data=prepared["data"], **{name: checked[name] for name in SETTINGS})

    return prepare


def teacher(profile: Profile) -> Chapter:
    """Return the chapter that fetches the teacher, fine-tunes it, and scores it before and after."""

    @dsl.pipeline(name="teacher", description="Fetch the teacher, fine-tune it, and score it before and after.")
    def teacher(
        data: dsl.Input[dsl.Dataset],
        reference: str,
        fingerprint: str,
        fresh: str,
        trust_remote_code: bool,
        config: str,
        evaluation_config: str,
        task_config: str,
        seed: int,
        settings: str,
        node_selector: dict,  # type: ignore[type-arg]
        node_tolerations: list,  # type: ignore[type-arg]
    ) -> Taught:
        step = Settler(profile, settings, node_selector, node_tolerations).step
        base = step(
            import_model,
            "import_model",
            reference=reference,
            fingerprint=fingerprint,
            trust_remote_code=trust_remote_code,
            fresh=fresh,
        ).outputs["model"]
        common = {"data": data, "task_config": task_config, "seed": seed}
        tuned = step(teacher_sft, "teacher_sft", teacher=base, config=config, **common).outputs["tuned_teacher"]
        both = step(
            evaluate_both,
            "evaluate_both-teacher",
            before=base,
            after=tuned,
            pair="teacher",
            config=evaluation_config,
            **common,
        ).outputs["evaluations"]
        step(show, "show-teacher", cache=False, artifact=both)
        return Taught(teacher=tuned, teacher_scores=both)

    return teacher


def measure(profile: Profile) -> Chapter:
    """Return the chapter that measures the student, as a model and as a draft, and makes the report."""
    score_all = _score(profile)

    @dsl.pipeline(name="measure", description="Measure the student before and after, as a model and as a draft.")
    def measure(
        data: dsl.Input[dsl.Dataset],
        teacher: dsl.Input[dsl.Model],
        teacher_scores: dsl.Input[dsl.Artifact],
        initial_student: dsl.Input[dsl.Model],
        student: dsl.Input[dsl.Model],
        run_name: str,
        evaluation_config: str,
        comet_config: str,
        comet_wanted: str,
        specdec_config: str,
        registry_config: str,
        task_config: str,
        seed: int,
        settings: str,
        node_selector: dict,  # type: ignore[type-arg]
        node_tolerations: list,  # type: ignore[type-arg]
    ) -> Measured:
        step = Settler(profile, settings, node_selector, node_tolerations).step
        scored = score_all(
            data=data,
            teacher=teacher,
            teacher_scores=teacher_scores,
            initial_student=initial_student,
            student=student,
            evaluation_config=evaluation_config,
            comet_config=comet_config,
            comet_wanted=comet_wanted,
            specdec_config=specdec_config,
            registry_config=registry_config,
            task_config=task_config,
            seed=seed,
            settings=settings,
            node_selector=node_selector,
            node_tolerations=node_tolerations,
        ).outputs
        # In this very chapter: the page finds an output of a nested pipeline one level down, no further.
        page = step(
            report,
            "report",
            cache=False,
            run_name=run_name,
            task_config=task_config,
            registry_config=registry_config,
            teacher_evaluations=teacher_scores,
            student_evaluations=scored["student_scores"],
            drafts=scored["drafts"],
            champion=scored["champion"],
            comet=scored["comet"],
        ).outputs
        return Measured(report=page["report"], measured=page["measured"])

    return measure


def _score(profile: Profile) -> Chapter:
    @dsl.pipeline(name="score", description="Score the student as a model and as a draft, and the champion likewise.")
    def score(
        data: dsl.Input[dsl.Dataset],
        teacher: dsl.Input[dsl.Model],
        teacher_scores: dsl.Input[dsl.Artifact],
        initial_student: dsl.Input[dsl.Model],
        student: dsl.Input[dsl.Model],
        evaluation_config: str,
        comet_config: str,
        comet_wanted: str,
        specdec_config: str,
        registry_config: str,
        task_config: str,
        seed: int,
        settings: str,
        node_selector: dict,  # type: ignore[type-arg]
        node_tolerations: list,  # type: ignore[type-arg]
    ) -> Scored:
        step = Settler(profile, settings, node_selector, node_tolerations).step
        common = {"data": data, "task_config": task_config, "seed": seed}
        student_scores = step(
            evaluate_both,
            "evaluate_both-student",
            before=initial_student,
            after=student,
            pair="student",
            config=evaluation_config,
            **common,
        ).outputs["evaluations"]
        # One step for both: the teacher and the two students take turns in one process, so that timings compare.
        drafts = step(
            specdec_benchmark,
            "specdec_benchmark",
            teacher=teacher,
            draft_before=initial_student,
            draft_after=student,
            config=specdec_config,
            label="",
            wanted=True,
            **common,
        ).outputs["drafts"]
        # Not cached: who the champion is may have changed.
        champion = step(
            evaluate_champion,
            "evaluate_champion",
            cache=False,
            student=student,
            teacher=teacher,
            registry_config=registry_config,
            evaluation_config=evaluation_config,
            specdec_config=specdec_config,
            **common,
        ).outputs["champion"]
        judged = {
            "teacher_evaluations": teacher_scores,
            "student_evaluations": student_scores,
            "champion": champion,
            "config": comet_config,
            "task_config": task_config,
            "seed": seed,
        }
        # Not cached: that COMET could not be reached is true of this run, not of the next.
        with dsl.If(comet_wanted == "true", name="comet"):
            asked = step(comet_score, "comet_score", cache=False, **judged).outputs["scores"]
        with dsl.Else(name="no-comet"):
            # The same step with nothing to do; a cluster that runs without COMET needs no image with it.
            unasked = step(comet_score, "comet_score-off", cache=False, image=TRAIN, **judged).outputs["scores"]
        return Scored(student_scores=student_scores, drafts=drafts, champion=champion, comet=dsl.OneOf(asked, unasked))

    return score


def release(profile: Profile) -> Chapter:
    """Return the chapter that registers the student, and makes it the champion where it is good enough."""

    @dsl.pipeline(name="release", description="Register the student, as the champion where it is good enough.")
    def release(student: dsl.Input[dsl.Model], measured: str, settings: str) -> None:
        step = Settler(profile, settings).step
        decision = step(gate, "gate", cache=False, measured=measured).outputs
        step(
            register_model,
            "register_model",
            cache=False,
            student=student,
            measured=measured,
            promote=decision["promote"],
            reason=decision["reason"],
        )

    return release


def compare(profile: Profile) -> Chapter:
    """Return the chapter that trains and measures a student for each trial, and puts them in one table."""

    @dsl.pipeline(name="compare", description="Train and measure one student a trial, and compare them.")
    def compare(
        data: dsl.Input[dsl.Dataset],
        teacher: dsl.Input[dsl.Model],
        teacher_scores: dsl.Input[dsl.Artifact],
        trials: list,  # type: ignore[type-arg]
        run_name: str,
        run_config: str,
        model_fingerprints: str,
        evaluation_config: str,
        specdec_config: str,
        table_config: str,
        task_config: str,
        drafts: bool,
        seed: int,
        settings: str,
        node_selector: dict,  # type: ignore[type-arg]
        node_tolerations: list,  # type: ignore[type-arg]
    ) -> Compared:
        step = Settler(profile, settings, node_selector, node_tolerations).step
        common = {"data": data, "task_config": task_config}
        # Without a name: KFP 2.15 looks for the loop by its title, under which its outputs are not.
        with dsl.ParallelFor(trials) as trial:
            own = step(
                compare_variant,
                "compare_variant",
                cache=False,
                trial=trial,
                config=run_config,
                model_fingerprints=model_fingerprints,
            ).outputs
            # Each trial's own label is part of the key: equal steps that run side by side make artifacts of different
            # ids, one of which all of them would take from the cache the next time, and train again on it.
            initial = step(
                student_init,
                "student_init",
                student=own["student"],
                fingerprint=own["student_fingerprint"],
                teacher=teacher,
                config=own["student_init_config"],
                seed=own["seed"],
                label=own["label"],
                **common,
            ).outputs["initial_student"]
            student = step(
                distill,
                "distill",
                student=initial,
                teacher=teacher,
                config=own["distill_config"],
                seed=own["seed"],
                label=own["label"],
                **common,
            ).outputs["distilled_student"]
            answered = step(
                evaluate,
                "evaluate-student_after",
                model=student,
                role="student_after",
                config=evaluation_config,
                seed=seed,
                label=own["label"],
                **common,
            ).outputs["evaluation"]
            drafted = step(
                specdec_benchmark,
                "specdec_benchmark",
                teacher=teacher,
                draft_before=initial,
                draft_after=student,
                config=specdec_config,
                seed=seed,
                label=own["label"],
                wanted=drafts,
                **common,
            ).outputs["drafts"]
            step(show, "show-trial", cache=False, artifact=answered).after(drafted.task)
        table = step(
            compare_table,
            "compare_table",
            cache=False,
            run_name=run_name,
            evaluations=dsl.Collected(answered),
            drafts=dsl.Collected(drafted),
            teacher_evaluations=teacher_scores,
            config=table_config,
            evaluation_config=evaluation_config,
            task_config=task_config,
            seed=seed,
        ).outputs
        return Compared(report=table["report"])

    return compare
