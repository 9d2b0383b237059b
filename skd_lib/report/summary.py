"""The figures of one run, as `summary.json` holds them.

Its first keys are fixed, for programs: `task_metric`, `models`, `specdec`, `seconds`. The others say how sure and
how comparable the figures are, and where they came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from skd_lib.config import Section, parse_section
from skd_lib.storage import write_text_atomic

Role = Literal["teacher_base", "teacher", "student_before", "student_after"]
Moment = Literal["before", "after"]
ROLES: tuple[Role, ...] = ("teacher_base", "teacher", "student_before", "student_after")
MOMENTS: tuple[Moment, ...] = ("before", "after")
DRAFT_FIGURES = ("acceptance_rate", "tokens_per_teacher_call", "speedup")


class Score(Section):
    """One metric of one model: the score and its 95 % interval, 0 to 100, and what makes it reproducible."""

    model_config = ConfigDict(extra="ignore")

    score: float
    low: float
    high: float
    signature: str = ""


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

    models: dict[Role, Score] = Field({}, description="By model; scores are 100 times COMET's own.")
    missing: str = Field("", description="Why there is none, for a person.")

    def figures(self, role: Role) -> dict[str, float]:
        """A model's score, as `Scores.figures` gives the others."""
        return {"comet": self.models[role].score} if role in self.models else {}


class Specdec(Section):
    """What `specdec_benchmark` found for one draft model. Further figures of the benchmark are kept as they are."""

    model_config = ConfigDict(extra="allow")

    acceptance_rate: float = Field(description="Accepted / tested drafted tokens.")
    tokens_per_teacher_call: float = Field(description="Response tokens for each teacher call; 1 without drafts.")
    speedup: float = Field(description="Wall-clock, over decoding with the teacher alone.")
    gamma: int | None = None
    temperature: float | None = None
    mismatches: int = Field(0, description="Responses that differ from the teacher's own; temperature 0 only.")
    ties: int = Field(0, description="Responses that differ by ties within rounding.")
    seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        """The three that matter, by name."""
        return {name: float(getattr(self, name)) for name in DRAFT_FIGURES}


class Course(Section):
    """How the student's training went, one value a logged step; empty where a method has no such figure."""

    model_config = ConfigDict(extra="ignore")

    steps: tuple[int, ...] = ()
    rejection_rate: tuple[float, ...] = Field((), description="Share of tested draft tokens that the teacher replaced.")
    validation_steps: tuple[int, ...] = ()
    validation_loss: tuple[float, ...] = ()


class Summary(Section):
    """One run's results, in the order in which `summary.json` shows them."""

    task_metric: str = Field(description="The metric that decides promotion.")
    models: dict[Role, dict[str, float]] = Field(description="Scores by model and metric, 0 to 100.")
    specdec: dict[Moment, Specdec]
    seconds: dict[str, float] = Field(description="Wall-clock seconds by step.")
    intervals: dict[Role, dict[str, tuple[float, float]]] = Field({}, description="95 % intervals of the scores.")
    examples: dict[Role, int] = Field({}, description="Test examples behind the scores.")
    signatures: dict[str, str] = Field({}, description="By metric: what somebody else needs to get the same number.")
    missing: dict[str, str] = Field({}, description="By metric: why it could not be measured.")
    course: Course = Course()
    run_name: str = ""
    pipeline_run_id: str = ""
    mlflow_run_id: str = ""

    def with_seconds(self, seconds: Mapping[str, float]) -> Summary:
        """With steps' durations as whoever ran them measured them, which win over what the steps said themselves."""
        others = {step: value for step, value in self.seconds.items() if step not in seconds}
        return self.model_copy(update={"seconds": {**seconds, **others}})

    def headline(self) -> dict[str, float]:
        """The figures by which runs are compared, flat: `student_after_chrf`, `speedup_after`, ..."""
        scores = {f"{role}_{metric}": score for role, found in self.models.items() for metric, score in found.items()}
        drafts = {
            f"{name}_{moment}": value
            for moment, found in self.specdec.items()
            for name, value in found.figures().items()
        }
        return {**scores, **drafts}

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
        return parse_section(cls, path.read_text(encoding="utf-8"), where=str(path))


def build_summary(
    *,
    task_metric: str,
    scores: Mapping[Role, Scores],
    specdec: Mapping[Moment, Specdec],
    course: Course,
    comet: Comet | None = None,
    run_name: str = "",
    pipeline_run_id: str = "",
    mlflow_run_id: str = "",
) -> Summary:
    """Put the steps' results together. Roles that were not evaluated are simply missing."""
    comet = comet or Comet()
    found = {role: _with_comet(scores[role], comet.models.get(role)) for role in ROLES if role in scores}
    drafts = {moment: specdec[moment] for moment in MOMENTS if moment in specdec}
    seconds = {f"evaluate-{role}": value.seconds for role, value in found.items()}
    if drafts:  # one step measures both
        seconds["specdec_benchmark"] = max(value.seconds for value in drafts.values())
    signatures = {
        name: score.signature for value in found.values() for name, score in value.metrics.items() if score.signature
    }
    return Summary(
        task_metric=task_metric,
        models={role: value.figures() for role, value in found.items()},
        specdec=drafts,
        seconds=seconds,
        intervals={
            role: {name: (score.low, score.high) for name, score in value.metrics.items()}
            for role, value in found.items()
        },
        examples={role: value.examples for role, value in found.items()},
        signatures=signatures,
        missing={"comet": comet.missing} if comet.missing else {},
        course=course,
        run_name=run_name,
        pipeline_run_id=pipeline_run_id,
        mlflow_run_id=mlflow_run_id,
    )


def _with_comet(scores: Scores, comet: Score | None) -> Scores:
    return scores if comet is None else scores.model_copy(update={"metrics": {**scores.metrics, "comet": comet}})
