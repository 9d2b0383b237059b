"""Growth of the cost of interleaved sampling: one setting changes at a time.

K acts through the acceptance alone. To show that it costs nothing itself, the teacher drafts for itself, greedily: its
tokens are accepted for every K, and only the counting of likelier tokens is left to differ.

The cost, with B rows, prompts of P tokens, T new tokens, draft length G, acceptance rate a and top K:

- rounds: T / E, with E = 1 + a + ... + a^(G-1) tokens a round (one term more with a bonus). K acts through a alone:
  counting the logits above a draft's takes the same time for every K.
- a round: G student forwards of B tokens and one teacher forward of B x G tokens. A forward reads the model's weights
  once, whatever B and G, and multiplies B (or B x G) times with them: on a GPU the reading takes the time, so a
  round hardly grows with B and G until the multiplications take longer (some hundred rows x positions); on a CPU both
  count, and a round grows with B x G almost from the start.
- attention: each forward reads B x (P + tokens so far) keys and values, 2 x layers x kv_heads x head_dim elements each.
- prefill: once, B x P positions through both models; linear in P but for attention's P^2.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from skd_lib.bench.setup import Settings, load_pair, machine_figures, prompts_for, timed
from skd_lib.config import SamplingParams
from skd_lib.models.heads import common_vocabulary
from skd_lib.sampling.acceptance import top_k
from skd_lib.sampling.engine import Sampler

AXES: dict[str, tuple[Any, ...]] = {
    "batch_size": (1, 2, 4, 8, 16),
    "prompt_tokens": (16, 64, 256, 512),
    "gamma": (1, 2, 3, 5, 8),
    "acceptance": (0.5, 0.7, 0.8, 0.9, 1.0),
}
OWN_K = (1, 100, 10_000)
"""Values of K for the teacher that drafts for itself."""


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        axis: What was changed.
        value: To what.
        tokens_per_second: Response tokens, of the median pass.
        tokens_per_teacher_call: Block efficiency.
        round_seconds: Of one round of the whole batch.
    """

    axis: str
    value: float
    tokens_per_second: float
    tokens_per_teacher_call: float
    round_seconds: float


@dataclass(frozen=True)
class Growth:
    """All measurements, and what they were made on."""

    settings: Settings
    machine: dict[str, Any]
    points: list[Point]

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=2) + "\n"


def bench_growth(settings: Settings, on_progress: Callable[[int, int], None] | None = None) -> Growth:
    """Measure `top_k` with a fixed draft length around `settings`, along every axis.

    Args:
        settings: Where all that is not being changed stays; `acceptance` is set by K = share of the vocabulary, so it
            needs random weights.
        on_progress: Called with the points that are done and the points there are.

    Raises:
        SkdError: a model cannot be loaded, or a shape or dtype is unknown.
    """
    student, teacher = load_pair(settings)
    figures = machine_figures(student.device)
    total = sum(map(len, AXES.values())) + len(OWN_K)
    points: list[Point] = []

    def add(point: Point) -> None:
        points.append(point)
        if on_progress is not None:
            on_progress(len(points), total)

    vocabulary = common_vocabulary(student, teacher)
    for axis, values in AXES.items():
        for value in values:
            change: dict[str, Any] = {axis: value}
            changed = replace(settings, **change)
            add(_measured(axis, value, changed, student, teacher, changed.k(vocabulary), SamplingParams()))
    for k in OWN_K:
        add(_measured("K, own drafts", k, settings, teacher, teacher, k, SamplingParams(temperature=0)))
    return Growth(settings, figures, points)


def render(growth: Growth) -> Table:
    """Show the measurements to people."""
    base = growth.settings
    title = (
        f"top_k: {base.batch_size} rows, prompts of {base.prompt_tokens} tokens, {base.new_tokens} new, "
        f"gamma {base.gamma}, acceptance {base.acceptance:g}, but for one"
    )
    table = Table(title=title, box=None, min_width=60)
    for column in ("changed", "to", "tokens/s", "tokens a call", "ms a round"):
        table.add_column(column, justify="left" if column == "changed" else "right", no_wrap=True)
    previous = ""
    for point in growth.points:
        table.add_row(
            "" if point.axis == previous else point.axis.replace("_", " "),
            f"{point.value:g}",
            f"{point.tokens_per_second:.1f}",
            f"{point.tokens_per_teacher_call:.2f}",
            f"{1000 * point.round_seconds:.0f}",
        )
        previous = point.axis
    return table


def _measured(
    axis: str,
    value: float,
    settings: Settings,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    k: int,
    params: SamplingParams,
) -> Point:
    sampler = Sampler(
        student=student,
        teacher=teacher,
        rule=top_k(k),
        eos_ids=(),
        pad_id=0,
        max_new_tokens=settings.new_tokens,
        gamma=settings.gamma,
        student_params=params,
        teacher_params=params,
    )
    prompts = prompts_for(settings, common_vocabulary(student, teacher))
    seeds = [settings.seed + row for row in range(len(prompts))]
    counts = sampler.sample(prompts, seeds).statistics  # warms up, too
    seconds = median(timed(lambda: sampler.sample(prompts, seeds), student.device) for _ in range(settings.repeats))
    return Point(
        axis=axis,
        value=value,
        tokens_per_second=counts.tokens / seconds,
        tokens_per_teacher_call=counts.tokens_per_teacher_call,
        round_seconds=seconds * len(prompts) / counts.teacher_calls,
    )
