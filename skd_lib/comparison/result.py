"""A comparison's figures, as `comparison.json` holds them."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from pydantic import Field

from skd_lib.config import Section
from skd_lib.report.summary import Course, Score, Scores, rounded

IntervalKind = Literal["t over seeds", "bootstrap over examples", ""]
"""The second includes Wilson's intervals of accuracies."""
SHOWN_VARIANTS = 24
"""On Kubeflow's page for comparing runs, where each figure is a row."""


class TrialResult(Section):
    """One run: a variant with one seed."""

    variant: str
    seed: int
    init: str = ""
    reason: str = Field("", description="Why it failed; empty where it did not.")
    scores: Scores | None = None
    rejection_rate: float | None = Field(None, description="Mean over the steps; none where no token was tested.")
    tokens_per_teacher_call: float | None = Field(None, description="In the last tenth of the steps.")
    draft: dict[str, float] = Field({}, description="As draft: acceptance rate, tokens per teacher call, speed-up.")
    figures: dict[str, float] = Field({}, description="The training's: steps, tokens, seconds, validation loss.")
    course: Course | None = Field(None, description="The training's curves: losses, rejection rate, lengths by step.")

    def flat(self) -> dict[str, Any]:
        """As one row of a table."""
        scores: dict[str, Score] = {}
        if self.scores is not None:
            sets = {"": self.scores, **{f"{name}.": each for name, each in self.scores.held_out.items()}}
            scores = {f"{at}{name}": score for at, found in sets.items() for name, score in found.metrics.items()}
        row: dict[str, Any] = {"variant": self.variant, "seed": self.seed, "init": self.init, "failed": self.reason}
        for name, score in scores.items():
            row |= {name: score.score, f"{name}_low": score.low, f"{name}_high": score.high}
        sampling = {
            "rejection_rate": self.rejection_rate,
            "tokens_per_teacher_call": self.tokens_per_teacher_call,
        }
        row |= {name: value for name, value in sampling.items() if value is not None}
        return {**row, **{f"draft_{name}": value for name, value in self.draft.items()}, **self.figures}


class Estimate(Section):
    """A variant's score: the mean over its seeds, and how sure it is."""

    mean: float
    low: float
    high: float
    kind: IntervalKind = Field("", description="What the 95 % interval is about: new trainings, or new examples.")
    caution: str = Field("", description="Why the interval is not to be relied on; empty where it is.")
    runs: int


class Test(Section):
    """A variant against the reference, paired by example and seed."""

    difference: float
    low: float
    high: float
    p_value: float | None = Field(None, description="None where the examples are too few for a test.")
    p_holm: float | None = Field(None, description="Adjusted for the number of variants tested by this metric.")
    examples: int
    seeds: int = Field(description="Seeds that both have; on these alone the test rests.")


class VariantResult(Section):
    """One variant, over its seeds."""

    variant: str
    runs: int = Field(description="Runs that ended with a model.")
    failed: int
    scores: dict[str, Estimate] = Field(description="By metric; those of a held-out set as SET.METRIC.")
    tests: dict[str, Test] = Field({}, description="By metric, on the test set.")
    draft: dict[str, float] = Field({}, description="Means over the runs, as draft of the teacher.")
    costs: dict[str, float] = Field({}, description="Means over the runs: rejection rate, tokens, steps, seconds.")

    def means(self) -> dict[str, float]:
        """All of them by name."""
        scores = {metric: score.mean for metric, score in self.scores.items()}
        return scores | {f"draft_{name}": value for name, value in self.draft.items()} | self.costs


class Comparison(Section):
    """All of it."""

    name: str
    reference: str
    metrics: list[str] = Field(description="The task's, the one that matters first.")
    teacher: dict[str, Score] = Field({}, description="The fine-tuned teacher's scores, by metric.")
    variants: list[VariantResult]
    trials: list[TrialResult]

    def headline(self) -> dict[str, float]:
        """The means, flat, as trackers want them: `skd/chrf`, `skd/rejection_rate`, ..."""
        return {f"{each.variant}/{name}": value for each in self.variants for name, value in each.means().items()}

    def figures(self) -> dict[str, float]:
        """The means by which Kubeflow's page compares runs: of the first variants, by the task's metric and as drafts.

        Rounded, and few enough to be kept with every node of the run.
        """
        return {
            f"{each.variant}/{name}": rounded(means[name])
            for each in self.variants[:SHOWN_VARIANTS]
            for means in [each.means()]
            for name in (*self.metrics[:1], "draft_speedup")
            if math.isfinite(means.get(name, math.nan))
        }

    def to_json(self) -> str:
        """The content of `comparison.json`."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), indent=2, ensure_ascii=False) + "\n"
