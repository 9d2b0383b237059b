"""The part of a run's figures that `register_model` needs, as one short parameter of the pipeline.

Kubeflow keeps a parameter about a dozen times for each step that reads it, so this stays below 2 kB. What decides is
exact; texts are cut off. It is JSON that arrives unchanged (`skd_lib._core.ascii_json`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from skd_lib._core.ascii_json import ascii_json
from skd_lib.config import MetricName, RegistryConfig, Section, parse_section
from skd_lib.report.folders import read_result
from skd_lib.results import Comet, Scores, Specdec
from skd_lib.tracking.gate import Rival

CHAMPION = "champion.json"
"""The file in which `evaluate_champion` keeps its `Rival`."""
TEXT_LENGTH = 160
"""Characters of a reason, and of a signature."""


LINE_LENGTH = 1000
"""Characters of a line for vLLM; half of one is worth nothing, so a longer one is left out."""


def longest(metrics: int, *, served: bool = False) -> int:
    """Return the most bytes that the parameter takes for a task with this many metrics, with vLLM's line or without."""
    return 700 + 150 * metrics + (LINE_LENGTH + 100 if served else 0)


class Measured(Section):
    """The student and the champion as this run has measured them."""

    task_metric: MetricName = Field(description="The metric that decides.")
    student: dict[str, float] = Field({}, description="The student's scores by metric, exact.")
    before: float | None = Field(
        None, description="The student's score before distillation, where that was better beyond chance."
    )
    signatures: dict[str, str] = Field({}, description="By metric: what makes a score reproducible.")
    draft: dict[str, float] = Field({}, description="The student as a draft of its teacher.")
    served: str = Field("", description="The line with which vLLM was started and measured with this draft, if it was.")
    drafted: str = Field("", description="How that was measured.")
    champion: Rival = Rival()
    comet_missing: str = Field("", description="Why COMET is missing; empty where it is not, or was not asked for.")
    registry: RegistryConfig = RegistryConfig()

    def to_parameter(self) -> str:
        """Return JSON, without what is at its default."""
        return ascii_json(self.model_dump(mode="json", exclude_defaults=True))


def measured(
    task_metric: MetricName,
    student: Scores,
    draft: Specdec | None,
    champion: Rival,
    comet: Comet,
    registry: RegistryConfig,
    before: float | None = None,
) -> Measured:
    """Put together what was measured; `before` is of `Summary.score_lost`."""
    scores = {
        **student.metrics,
        **({"comet": comet.models["student_after"]} if "student_after" in comet.models else {}),
    }
    of_drafts = ("tokens_per_call", "challenger_tokens_per_call", "gain_low", "gain_high")
    unread = dict.fromkeys(of_drafts) if registry.gate == "score" else {}
    return Measured(
        task_metric=task_metric,
        student=_finite({name: score.score for name, score in scores.items()}),
        before=before,
        signatures=_short({name: score.signature for name, score in scores.items() if score.signature}),
        draft={} if draft is None else draft.figures(),
        drafted="" if draft is None else draft.setting,
        served=_started(draft),
        champion=champion.model_copy(
            update={
                "figures": _finite({**champion.figures, **comet.figures("champion")}),
                **_short({"missing": champion.missing, "undrafted": champion.undrafted}),
                **unread,
            }
        ),
        comet_missing=comet.missing[:TEXT_LENGTH],
        registry=registry,
    )


def read_champion(folder: Path) -> Rival:
    """Read what `evaluate_champion` found."""
    file = folder / CHAMPION
    return parse_section(Rival, read_result(file, step="evaluate_champion"), where=str(file))


def _started(draft: Specdec | None) -> str:
    vllm = draft.vllm if draft else None
    return vllm.command if vllm and vllm.started and len(vllm.command) <= LINE_LENGTH else ""


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _short(texts: Mapping[str, str]) -> dict[str, str]:
    return {name: text[:TEXT_LENGTH] for name, text in texts.items()}
