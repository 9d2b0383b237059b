"""The figures of one run, as `summary.json` holds them, and how they are put together.

The first keys are fixed, for programs: `task_metric`, `models`, `specdec`, `seconds`. The others say how sure and how
comparable the figures are, and what they were measured on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from skd_lib._core.documents import read_text
from skd_lib.config import LOWER_IS_BETTER, Section, parse_section
from skd_lib.evaluation.predictions import read_predictions
from skd_lib.models.fingerprint import short
from skd_lib.models.records import software
from skd_lib.report.worth import Worth, worth_of
from skd_lib.results import (
    DRAFT_FIGURES,
    MOMENTS,
    ROLES,
    Comet,
    Course,
    Moment,
    PairedTest,
    Role,
    Score,
    Scores,
    Specdec,
    rounded,
)
from skd_lib.storage import write_text_atomic
from skd_lib.tracking.locate import IMAGE_VARIABLE

_BINS = 16
_LINEAGE_NAMES = {
    "teacher": "teacher",
    "teacher_fingerprint": "teacher fingerprint",
    "base_student": "student",
    "base_student_fingerprint": "student fingerprint",
    "method": "method",
    "divergence": "divergence",
    "beta": "beta",
    "top_k": "top_k",
    "gamma": "gamma",
    "on_policy_fraction": "on_policy_fraction",
    "data_fingerprint": "data fingerprint",
    "teacher_weights_sha256": "teacher weights",
    "initial_weights_sha256": "student weights before",
    "weights_sha256": "student weights after",
    "precision": "precision",
    "code_version": "code version",
    "pipeline_run_id": "trained in pipeline run",
}
_MODEL_FINGERPRINTS = ("teacher fingerprint", "student fingerprint")


class Lengths(Section):
    """The lengths of a model's answers to the test set, in tokens."""

    mean: float
    longest: int
    truncated_fraction: float = Field(description="Share of answers that ended by the length limit.")
    edges: tuple[float, ...] = Field(description="Of the histogram's bins: one more than counts.")
    counts: tuple[int, ...]


class Loss(Section):
    """The rows that one split of the data lost before anything was trained or measured on it."""

    rows: int
    lost: dict[str, int] = Field({}, description="Number of rows left out, by reason.")

    @property
    def total(self) -> int:
        """Number of rows left out."""
        return sum(self.lost.values())

    @property
    def share(self) -> float:
        """Share of all rows, 0 to 1."""
        return self.total / self.rows if self.rows else 0.0


def headline_columns(metrics: Sequence[str]) -> list[str]:
    """Return the names of a run's headline figures by which people sort runs, given the task's metrics."""
    first, others = metrics[:1], metrics[1:3]
    scores = [f"{role}/{metric}" for metric in first for role in ("student_after", "student_before", "teacher")]
    drafts = [f"draft_after/{name}" for name in DRAFT_FIGURES]
    return [*scores, "worth/quality_kept", *drafts, *(f"student_after/{metric}" for metric in others)]


class Gap(NamedTuple):
    """Scores of the teacher and of the student before and after."""

    teacher: float
    before: float
    after: float

    @property
    def closed(self) -> float:
        """Share of the way from the untrained student to the teacher that the distillation went."""
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
    comparisons: tuple[PairedTest, ...] = ()
    lengths: dict[Role, Lengths] = Field({}, description="Of the answers to the test set.")
    course: Course = Course()
    losses: dict[str, Loss] = Field({}, description="What each split of the data lost, and why.")
    lineage: dict[str, str] = Field({}, description="What the run was made from and with.")
    run_name: str = ""
    pipeline_run_id: str = ""
    mlflow_run_id: str = ""
    mlflow_url: str = Field("", description="Page of the MLflow run, where there is a server.")
    mlflow_table_url: str = Field("", description="Runs table of its experiment, likewise.")

    def with_seconds(self, seconds: Mapping[str, float]) -> Summary:
        """Return the summary with the durations that the runner measured, which replace those of the steps."""
        others = {step: value for step, value in self.seconds.items() if step not in seconds}
        return self.model_copy(update={"seconds": {**seconds, **others}})

    def gap(self) -> Gap | None:
        """Return the gap between student and teacher by the task's metric, None where there is none."""
        needed: tuple[Role, ...] = ("teacher", "student_before", "student_after")
        teacher, before, after = (self.models.get(role, {}).get(self.task_metric) for role in needed)
        if teacher is None or before is None or after is None or teacher == before:
            return None
        if (teacher < before) != (self.task_metric in LOWER_IS_BETTER):
            return None
        return Gap(teacher, before, after)

    def score_lost(self) -> float | None:
        """Return the student's score before distillation if that was better, beyond the interval of a paired test.

        None with too few examples for a test, and for COMET, which is tested elsewhere.
        """
        sign = -1.0 if self.task_metric in LOWER_IS_BETTER else 1.0
        for test in self.comparisons:
            if (test.a, test.b, test.metric) == ("student_after", "student_before", self.task_metric):
                better = test.p_value is not None and max(sign * test.low, sign * test.high) < 0
                return self.models.get("student_before", {}).get(self.task_metric) if better else None
        return None

    def worth(self) -> Worth:
        """Return what the student is worth against its teacher."""
        return worth_of(self)

    def headline(self) -> dict[str, float]:
        """Return the figures by which runs are compared, flat: `student_after/chrf`, `draft_after/speedup`, ..."""
        scores = {f"{role}/{metric}": score for role, found in self.models.items() for metric, score in found.items()}
        drafts = {
            f"draft_{moment}/{name}": value
            for moment, found in self.specdec.items()
            for name, value in found.figures().items()
        }
        worth = {f"worth/{name}": value for name, value in self.worth().figures().items()}
        return {**scores, **drafts, **worth}

    def figures(self) -> dict[str, float]:
        """Return the figures by which Kubeflow's page compares runs: few, rounded, under short names.

        The student's scores have the names of the metrics; by the task's metric there are the student before
        distillation and the teacher too.
        """
        found = dict(self.models.get("student_after", {}))
        others: dict[Role, str] = {"student_before": "before", "teacher": "teacher"}
        for role, name in others.items():
            if (score := self.models.get(role, {}).get(self.task_metric)) is not None:
                found[f"{self.task_metric}_{name}"] = score
        worth = self.worth().figures()
        found |= {name: worth[name] for name in ("quality_kept", "gap_closed", "relative_speed") if name in worth}
        if "after" in self.specdec:
            found |= self.specdec["after"].figures()
        return {name: rounded(value) for name, value in found.items() if math.isfinite(value)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; what is not known is left out."""
        return {**self.model_dump(mode="json", exclude_none=True), "worth": self.worth().figures()}

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_computed(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name != "worth"}

    def to_json(self) -> str:
        """Return the content of `summary.json`."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Write `summary.json`, atomically."""
        write_text_atomic(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Read `summary.json`; raise OSError where there is no such file, SkdError where it is not a summary."""
        return parse_section(cls, read_text(path), where=str(path))


def build_summary(
    *,
    task_metric: str,
    scores: Mapping[Role, Scores],
    specdec: Mapping[Moment, Specdec],
    comet: Comet | None = None,
    losses: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Summary:
    """Put the steps' results together, without roles that were not evaluated; `fields` are the summary's others."""
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
        losses={name: Loss.model_validate((losses or {})[name]) for name in sorted(losses or {}, key=_place)},
        **fields,
    )


def answer_lengths(predictions: Mapping[Role, Path]) -> dict[Role, Lengths]:
    """Measure the lengths of each model's answers, with histograms on one scale."""
    found = {role: read_predictions(path) for role, path in predictions.items()}
    longest = max((answer.tokens for answers in found.values() for answer in answers), default=0)
    edges = np.linspace(0, max(longest, 1), min(_BINS, max(longest, 1)) + 1)
    return {
        role: Lengths(
            mean=float(np.mean([answer.tokens for answer in answers])),
            longest=max(answer.tokens for answer in answers),
            truncated_fraction=float(np.mean([answer.truncated for answer in answers])),
            edges=tuple(edges.tolist()),
            counts=tuple(np.histogram([answer.tokens for answer in answers], edges)[0].tolist()),
        )
        for role, answers in found.items()
        if answers
    }


def lineage_in_words(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the lineage of the student's record in words, with image and versions: of its training or this process."""
    words = {
        name: short(str(record[key])) if name in _MODEL_FINGERPRINTS else str(record[key])
        for key, name in _LINEAGE_NAMES.items()
        if record.get(key) not in (None, "")
    }
    if image := record.get("image") or os.environ.get(IMAGE_VARIABLE):
        words["image"] = str(image)
    return {**words, "software": str(record.get("software") or software())}


def _place(split: str) -> tuple[bool, str]:
    """Return the sorting key of a split: training first. KFP hands objects on in any order."""
    return not split.startswith("train"), split


def _with_comet(scores: Scores, comet: Score | None) -> Scores:
    return scores if comet is None else scores.model_copy(update={"metrics": {**scores.metrics, "comet": comet}})
