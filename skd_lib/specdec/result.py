"""The figures of the benchmark, for one draft model: what `specdec_benchmark` hands on and `skd specdec --out` writes.

Seconds are wall-clock, speed-ups are over the teacher decoding alone in the same turns. The fields at the top are the
headline: the first temperature and the first batch size of the configuration, at its draft length `gamma`, which is the
same for every draft model, so that they can be compared. `settings` has all the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from skd_lib.config import Section

Figure = Annotated[float, AfterValidator(lambda value: float(f"{value:.6g}"))]
"""Six digits say more than any timing knows, and keep small what Kubeflow hands from step to step."""


class Percentiles(Section):
    """Of a latency, in seconds."""

    p50: Figure
    p90: Figure
    p99: Figure


class Latency(Section):
    """How long a reader waits."""

    first_token: Percentiles = Field(
        description="From the batch's start to the end of the round that wrote a response's first token: prefill, and "
        "with a draft model a whole block."
    )
    per_token: Percentiles | None = Field(
        None,
        description="Of every token after the first round: the seconds of its round over the tokens that the round "
        "wrote to its response. None where no response took more than one round.",
    )


class TeacherAlone(Section):
    """The teacher decoding without a draft model, over all turns of a setting."""

    tokens_per_second: Figure = Field(description="Median over the turns.")
    latency: Latency


class Forwards(Section):
    """Measured seconds of bare forwards of one batch; medians."""

    draft_seconds: Figure = Field(description="The draft model over one position a row.")
    draft_start_seconds: Figure = Field(description="Over two positions a row: the first forward of a block.")
    teacher_seconds: dict[int, Figure] = Field(description="The teacher, by positions a row: 1, and gamma + 1 of each.")


class Timed(Section):
    """A draft length that was timed."""

    speedup: Figure = Field(description="Seconds a token, teacher alone / speculative; the median over the turns.")
    tokens_per_second: Figure = Field(description="Median over the turns.")
    acceptance_rate: Figure = Field(description="Accepted / tested drafted tokens.")
    acceptance_by_position: list[Figure] = Field(
        description="Accepted / tested for each position in the block, given that all before it were accepted; ends "
        "where no block got further. The share of blocks that get beyond a position is the product up to it."
    )
    tested_by_position: list[int] = Field(description="How many tests each rate stands on; gamma long.")
    tokens_per_teacher_call: Figure = Field(
        description="Block efficiency: response tokens for each teacher forward of a row; 1 to gamma + 1."
    )
    tokens: int = Field(description="Response tokens of all timed passes.")
    latency: Latency
    ties: int = Field(description="Responses of one pass that differ from the teacher's own by ties within rounding.")


class DraftLength(Section):
    """One draft length: what theory expects of it, and what was measured if it was timed."""

    gamma: int
    expected_tokens_per_teacher_call: Figure = Field(description="From acceptance by position.")
    theoretical_speedup: Figure = Field(
        description="From acceptance by position and the forwards' measured times, the teacher's over gamma + 1 "
        "positions. What it leaves out (drawing, acceptance, bookkeeping, prefill) is the engine's share."
    )
    theoretical_speedup_iid: Figure = Field(
        description="Leviathan et al. 2023, theorem 3.8: one acceptance rate for all positions, and a teacher forward "
        "that costs the same for a block as for a token."
    )
    timed: Timed | None = Field(None, description="None: not timed.")


class Setting(Section):
    """One temperature and batch size."""

    temperature: Figure
    batch_size: int
    prompts: int
    teacher_alone: TeacherAlone
    forwards: Forwards
    lengths: list[DraftLength] = Field(description="By gamma.")
    best_gamma: int = Field(description="Draft length with the highest speed-up among those timed.")
    best_speedup: Figure

    def timed(self, gamma: int) -> Timed:
        """The measurements at a draft length that was timed."""
        found = next(length.timed for length in self.lengths if length.gamma == gamma)
        assert found is not None  # noqa: S101 - the caller names one that was timed
        return found


class VllmExport(Section):
    """The pair in vLLM."""

    command: str = Field(description="A line for a shell.")
    reasons: list[str] = Field(
        description="Which of vLLM's conditions, as far as they can be checked here, are not met; empty if all are."
    )


class SpecdecResult(Section):
    """How much a draft model saves its teacher."""

    acceptance_rate: Figure
    tokens_per_teacher_call: Figure
    speedup: Figure
    gamma: int
    temperature: Figure
    batch_size: int
    prompts: int
    repeats: int
    ties: int = Field(description="Over all settings at temperature 0; any other difference there is an error.")
    tokens: int
    teacher_only_tokens_per_second: Figure
    speculative_tokens_per_second: Figure
    seconds: Figure = Field(description="Of the whole benchmark, all draft models together.")
    acceptance_by_position: list[Figure]
    theoretical_speedup: Figure
    theoretical_speedup_iid: Figure
    best_gamma: int
    best_speedup: Figure
    latency: Latency
    teacher_only_latency: Latency
    settings: list[Setting]
    vllm: VllmExport | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without what is None: KFP's structured parameters cannot hold null."""
        return self.model_dump(mode="json", exclude_none=True)

    def figures(self) -> dict[str, float]:
        """The numbers by which runs are compared, flat: the headline, and the best of every setting."""
        numbers = {name: value for name, value in self if isinstance(value, int | float)}
        by_position = {f"acceptance_position_{at}": rate for at, rate in enumerate(self.acceptance_by_position, 1)}
        latencies = {
            f"{which}{name}": value
            for which, latency in (("", self.latency), ("teacher_only_", self.teacher_only_latency))
            for name, value in _flat(latency)
        }
        best = {
            f"best_speedup_temperature_{setting.temperature:g}_batch_{setting.batch_size}": setting.best_speedup
            for setting in self.settings
        }
        return {**numbers, **by_position, **latencies, **best}


def _flat(latency: Latency) -> Iterator[tuple[str, float]]:
    for what, percentiles in (("first_token", latency.first_token), ("per_token", latency.per_token)):
        if percentiles is not None:
            for name, value in percentiles:
                yield f"{what}_{name}_seconds", value
