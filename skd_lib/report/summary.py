"""The figures of one run, as `summary.json` holds them.

Its first keys are fixed, for programs: `task_metric`, `models`, `specdec`, `seconds`. The others say how sure and
how comparable the figures are, and where they came from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, FiniteFloat, model_validator

from skd_lib._core.documents import read_text
from skd_lib.config import Section, parse_section
from skd_lib.storage import write_text_atomic

Role = Literal["teacher_base", "teacher", "student_before", "student_after"]
Moment = Literal["before", "after"]
ROLES: tuple[Role, ...] = ("teacher_base", "teacher", "student_before", "student_after")
MOMENTS: tuple[Moment, ...] = ("before", "after")
DRAFT_FIGURES = ("acceptance_rate", "tokens_per_teacher_call", "speedup")


def rounded(value: float) -> float:
    """A figure with five significant digits, which is what a page shows at most."""
    return float(f"{value:.5g}")


class Score(Section):
    """One metric of one model: the score and its 95 % interval, 0 to 100, and what makes it reproducible.

    `caution` says why the interval is not to be relied on; empty where it is.
    """

    model_config = ConfigDict(extra="ignore")

    score: float
    low: float
    high: float
    signature: str = ""
    caution: str = ""


class Scores(Section):
    """What `evaluate` found for one model: every metric by name, the number of examples and the seconds it took."""

    model_config = ConfigDict(extra="ignore")

    metrics: dict[str, Score]
    missing: dict[str, str] = Field({}, description="Metrics that could not be computed, and why.")
    held_out: dict[str, Scores] = Field({}, description="The same for every further test set.")
    examples: int = 0
    seconds: float = 0.0

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, values: Any) -> Any:
        # The step's result is flat: metrics stand beside the counts.
        if not isinstance(values, dict):
            return values
        metrics = {name: value for name, value in values.items() if isinstance(value, dict) and "score" in value}
        return {"metrics": metrics, **{name: value for name, value in values.items() if name not in metrics}}

    def figures(self) -> dict[str, float]:
        """The scores alone."""
        return {name: score.score for name, score in self.metrics.items()}


class Comet(Section):
    """What `comet_score` found: COMET's score of each model, or why there is none. Empty where nobody asked for it."""

    model_config = ConfigDict(extra="ignore")

    models: dict[Role | Literal["champion"], Score] = Field(
        {}, description="By model; scores are 100 times COMET's own."
    )
    missing: str = Field("", description="Why there is none, for a person.")

    def figures(self, role: Role | Literal["champion"]) -> dict[str, float]:
        """A model's score, as `Scores.figures` gives the others."""
        return {"comet": self.models[role].score} if role in self.models else {}


class Percentiles(Section):
    """Of a latency, in seconds."""

    model_config = ConfigDict(extra="allow")

    p50: float
    p90: float
    p99: float


class Latency(Section):
    """How long a reader waits for the first token, and for each after it."""

    model_config = ConfigDict(extra="allow")

    first_token: Percentiles
    per_token: Percentiles | None = None


class TimedDraft(Section):
    """A draft length that was timed."""

    model_config = ConfigDict(extra="allow")

    speedup: float


class DraftLength(Section):
    """A draft length: what theory expects of it, and what was measured if it was timed."""

    model_config = ConfigDict(extra="allow")

    gamma: int
    theoretical_speedup: float | None = None
    timed: TimedDraft | None = None


class DraftSetting(Section):
    """One temperature and batch size."""

    model_config = ConfigDict(extra="allow")

    temperature: float
    batch_size: int
    lengths: tuple[DraftLength, ...] = ()


class Vllm(Section):
    """How vLLM serves the pair, and what stands in the way of it."""

    model_config = ConfigDict(extra="allow")

    command: str
    reasons: tuple[str, ...] = ()


class Specdec(Section):
    """What `specdec_benchmark` found for one draft model. Further figures of the benchmark are kept as they are."""

    model_config = ConfigDict(extra="allow")

    acceptance_rate: float = Field(description="Accepted / tested drafted tokens.")
    tokens_per_teacher_call: float = Field(description="Response tokens for each teacher call; 1 without drafts.")
    speedup: float = Field(description="Wall-clock, over decoding with the teacher alone.")
    gamma: int | None = None
    temperature: float | None = None
    ties: int = Field(0, description="Responses that differ by ties within rounding; any other difference is an error.")
    seconds: float = 0.0
    acceptance_by_position: tuple[float, ...] = Field(
        (), description="Share of the drafts at each position of a block that were accepted, given they were tested."
    )
    theoretical_speedup: float | None = Field(None, description="From acceptance and the models' forward times.")
    settings: tuple[DraftSetting, ...] = Field((), description="Every temperature and batch size that was measured.")
    latency: Latency | None = None
    teacher_only_latency: Latency | None = None
    vllm: Vllm | None = None

    def figures(self) -> dict[str, float]:
        """The three that matter, by name."""
        return {name: float(getattr(self, name)) for name in DRAFT_FIGURES}


class Course(Section):
    """How the student's training went, one value a logged step; empty where a method has no such figure."""

    model_config = ConfigDict(extra="ignore")

    steps: tuple[int, ...] = Field((), description="Those of the sampler's figures.")
    rejection_rate: tuple[float, ...] = Field((), description="Share of tested draft tokens that the teacher replaced.")
    tokens_per_teacher_call: tuple[float, ...] = ()
    training_steps: tuple[int, ...] = ()
    training_loss: tuple[float, ...] = ()
    response_length: tuple[float, ...] = Field((), description="Mean tokens of a response trained on.")
    validation_steps: tuple[int, ...] = ()
    validation_loss: tuple[float, ...] = ()
    seconds: dict[str, float] = Field({}, description="Of each phase: rollout, loss, optimiser, ...")
    peak_bytes: dict[str, int] = Field({}, description="Most memory of the process, and of each phase on the device.")


class Comparison(Section):
    """A paired test between two models on the test set, by one metric."""

    model_config = ConfigDict(extra="ignore")

    a: Role
    b: Role
    metric: str
    difference: float = Field(description="Score of a minus score of b.")
    low: float
    high: float
    p_value: float | None = Field(None, description="None where the examples are too few for a test.")
    n: int = Field(description="Examples.")


class Lengths(Section):
    """How long a model's answers to the test set are, in tokens."""

    mean: float
    longest: int
    truncated_fraction: float = Field(description="Share of answers that ended by the length limit.")
    edges: tuple[float, ...] = Field(description="Of the histogram's bins: one more than counts.")
    counts: tuple[int, ...]


class Loss(Section):
    """What one split of the data lost before anything was trained or measured on it."""

    rows: int = Field(description="That there were.")
    lost: dict[str, int] = Field({}, description="How many were left out, by reason.")

    @property
    def total(self) -> int:
        """How many were left out."""
        return sum(self.lost.values())

    @property
    def share(self) -> float:
        """Of all rows, 0 to 1."""
        return self.total / self.rows if self.rows else 0.0


class Gap(NamedTuple):
    """Scores of the teacher and of the student before and after."""

    teacher: float
    before: float
    after: float

    @property
    def closed(self) -> float:
        """How much of the way from the untrained student to the teacher the distillation went; 1 is all of it."""
        return (self.after - self.before) / (self.teacher - self.before)


class Summary(Section):
    """One run's results, in the order in which `summary.json` shows them."""

    task_metric: str = Field(description="The metric that decides promotion.")
    models: dict[Role, dict[str, float]] = Field(description="Scores by model and metric, 0 to 100.")
    specdec: dict[Moment, Specdec]
    seconds: dict[str, FiniteFloat] = Field(description="Wall-clock seconds by step.")
    intervals: dict[Role, dict[str, tuple[float, float]]] = Field({}, description="95 % intervals of the scores.")
    cautions: dict[Role, dict[str, str]] = Field({}, description="Why an interval is not to be relied on.")
    examples: dict[Role, int] = Field({}, description="Test examples behind the scores.")
    signatures: dict[str, str] = Field({}, description="By metric: what another person needs to get the same number.")
    held_out: dict[str, dict[Role, Scores]] = Field({}, description="Scores on further test sets.")
    missing: dict[str, str] = Field({}, description="By metric: why it could not be measured.")
    comparisons: tuple[Comparison, ...] = ()
    lengths: dict[Role, Lengths] = Field({}, description="Of the answers to the test set.")
    course: Course = Course()
    losses: dict[str, Loss] = Field({}, description="What each split of the data lost, and why.")
    lineage: dict[str, str] = Field({}, description="What the run was made from and with.")
    run_name: str = ""
    pipeline_run_id: str = ""
    mlflow_run_id: str = ""
    mlflow_url: str = Field("", description="Page of the MLflow run, where there is a server.")

    def with_seconds(self, seconds: Mapping[str, float]) -> Summary:
        """With steps' durations as whoever ran them measured them, which win over what the steps said themselves."""
        others = {step: value for step, value in self.seconds.items() if step not in seconds}
        return self.model_copy(update={"seconds": {**seconds, **others}})

    def gap(self) -> Gap | None:
        """How far the student came towards the teacher, by the task's metric; None where a score is missing."""
        needed: tuple[Role, ...] = ("teacher", "student_before", "student_after")
        teacher, before, after = (self.models.get(role, {}).get(self.task_metric) for role in needed)
        if teacher is None or before is None or after is None or teacher <= before:
            return None
        return Gap(teacher, before, after)

    def headline(self) -> dict[str, float]:
        """The figures by which runs are compared, flat: `student_after_chrf`, `speedup_after`, ..."""
        scores = {f"{role}_{metric}": score for role, found in self.models.items() for metric, score in found.items()}
        drafts = {
            f"{name}_{moment}": value
            for moment, found in self.specdec.items()
            for name, value in found.figures().items()
        }
        return {**scores, **drafts}

    def figures(self) -> dict[str, float]:
        """The figures by which runs are compared on Kubeflow's page: few, rounded, under short names.

        The student's scores have the names of the metrics; by the task's metric there are the student before
        distillation and the teacher too.
        """
        found = dict(self.models.get("student_after", {}))
        others: dict[Role, str] = {"student_before": "before", "teacher": "teacher"}
        for role, name in others.items():
            if (score := self.models.get(role, {}).get(self.task_metric)) is not None:
                found[f"{self.task_metric}_{name}"] = score
        if (gap := self.gap()) is not None:
            found["gap_closed"] = gap.closed
        if "after" in self.specdec:
            found |= self.specdec["after"].figures()
        return {name: rounded(value) for name, value in found.items() if math.isfinite(value)}

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; what is not known is left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_json(self) -> str:
        """The content of `summary.json`."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Write `summary.json`.

        Raises:
            OSError: the folder is missing or not writable.
        """
        write_text_atomic(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Read `summary.json`.

        Raises:
            OSError: there is no such file.
            SkdError: it is not a summary.
        """
        return parse_section(cls, read_text(path), where=str(path))


def build_summary(
    *,
    task_metric: str,
    scores: Mapping[Role, Scores],
    specdec: Mapping[Moment, Specdec],
    course: Course,
    comet: Comet | None = None,
    comparisons: Sequence[Comparison] = (),
    lengths: Mapping[Role, Lengths] | None = None,
    lineage: Mapping[str, str] | None = None,
    losses: Mapping[str, Any] | None = None,
    run_name: str = "",
    pipeline_run_id: str = "",
    mlflow_run_id: str = "",
    mlflow_url: str = "",
) -> Summary:
    """Put the steps' results together. Roles that were not evaluated are simply missing."""
    comet = comet or Comet()
    found = {role: _with_comet(scores[role], comet.models.get(role)) for role in ROLES if role in scores}
    drafts = {moment: specdec[moment] for moment in MOMENTS if moment in specdec}
    seconds: dict[str, float] = {}
    for role, value in found.items():  # one step evaluates a model before and after
        step = f"evaluate_{role.partition('_')[0]}"
        seconds[step] = seconds.get(step, 0) + value.seconds
    if drafts:  # one step measures both
        seconds["specdec_benchmark"] = max(value.seconds for value in drafts.values())
    signatures = {
        name: score.signature for value in found.values() for name, score in value.metrics.items() if score.signature
    }
    held_out = {name: None for value in found.values() for name in value.held_out}
    return Summary(
        task_metric=task_metric,
        models={role: value.figures() for role, value in found.items()},
        specdec=drafts,
        seconds=seconds,
        intervals={
            role: {name: (score.low, score.high) for name, score in value.metrics.items()}
            for role, value in found.items()
        },
        cautions={
            role: cautions
            for role, value in found.items()
            if (cautions := {name: score.caution for name, score in value.metrics.items() if score.caution})
        },
        examples={role: value.examples for role, value in found.items()},
        signatures=signatures,
        held_out={
            name: {role: value.held_out[name] for role, value in found.items() if name in value.held_out}
            for name in held_out
        },
        missing={name: reason for value in found.values() for name, reason in value.missing.items()}
        | ({"comet": comet.missing} if comet.missing else {}),
        comparisons=tuple(comparisons),
        lengths=dict(lengths or {}),
        course=course,
        losses={name: Loss.model_validate((losses or {})[name]) for name in sorted(losses or {}, key=_place)},
        lineage=dict(lineage or {}),
        run_name=run_name,
        pipeline_run_id=pipeline_run_id,
        mlflow_run_id=mlflow_run_id,
        mlflow_url=mlflow_url,
    )


def _place(split: str) -> tuple[bool, str]:
    """The order of splits: training first. KFP hands objects on in any order."""
    return not split.startswith("train"), split


def _with_comet(scores: Scores, comet: Score | None) -> Scores:
    return scores if comet is None else scores.model_copy(update={"metrics": {**scores.metrics, "comet": comet}})
