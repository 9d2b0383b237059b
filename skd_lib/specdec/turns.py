"""Passes in turns, at one temperature and batch size.

Each pass of a draft model is paired with a pass of the teacher alone, on the same prompts and seeds: a machine that is
busy for a while slows both.

`sweep: best` spends little on draft lengths that cannot win. After each measurement the speed-up of every other length
is predicted: theory's (`skd_lib.specdec.theory`), times what the nearest timed length achieved of its own. The length
that promises most is timed next, until it is one that was timed already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median, quantiles
from typing import TYPE_CHECKING

from skd_lib._core.seeds import derived
from skd_lib.results import Alone, DraftLength, Forwards, Latency, Percentiles, Setting, Timed
from skd_lib.sampling.drafting import expected_tokens
from skd_lib.sampling.engine import Sampler, SamplingStatistics
from skd_lib.specdec.decode import Pass, count_by_position, decode
from skd_lib.specdec.theory import speedup, speedup_of_paper, stretched
from skd_lib.specdec.verify import Rounding, measured_rounding, verify_greedy

if TYPE_CHECKING:
    from skd_lib.specdec.benchmark import Plan

OnProgress = Callable[[int, int], None]
"""Called with the responses that are decoded and those that there will be, as far as is known."""


@dataclass
class Decoded:
    """Progress, counted in responses."""

    on_progress: OnProgress | None
    total: int
    done: int = 0

    def add(self, responses: int) -> None:
        """Count some more."""
        self.done += responses
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


@dataclass
class _Series:
    """The passes of one draft model at one draft length, each paired with one of the teacher alone."""

    speedups: list[float] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    ties: int = 0

    def timed(self, gamma: int) -> Timed:
        blocks = (block for one in self.passes for row in one.blocks for block in row)
        tested, accepted = count_by_position(blocks, gamma)
        counts = sum((one.statistics for one in self.passes), SamplingStatistics())
        return Timed(
            speedup=median(self.speedups),
            tokens_per_second=1 / median(one.seconds_per_token for one in self.passes),
            acceptance_rate=counts.acceptance_rate,
            acceptance_by_position=[of / tests for of, tests in zip(accepted, tested, strict=True) if tests],
            tested_by_position=tested,
            tokens_per_teacher_call=counts.tokens_per_teacher_call,
            tokens=counts.tokens,
            by_prompt=[
                (sum(block.tokens for blocks in row for block in blocks), sum(map(len, row)))
                for row in zip(*(one.blocks for one in self.passes), strict=True)
            ],
            latency=_latency(self.passes),
            ties=self.ties,
        )


class Turns:
    """All passes at one temperature and batch size."""

    def __init__(
        self,
        plan: Plan,
        temperature: float,
        batch_size: int,
        forwards: Mapping[str, Forwards],
        progress: Decoded,
    ) -> None:
        self.plan, self.temperature, self.batch_size = plan, temperature, batch_size
        self.forwards, self.progress = forwards, progress
        self.prompts = list(plan.prompts[: plan.filling(batch_size)])
        self.alone: list[Pass] = []
        self.drafts_alone: dict[str, list[Pass]] = {name: [] for name in plan.drafts}
        self.timed: dict[str, dict[int, Timed]] = {name: {} for name in plan.drafts}

    def run(self) -> dict[str, Setting]:
        """Take the turns that the sweep asks for."""
        self._take_turns(self.plan.first)
        if self.plan.config.sweep == "best":
            while any((due := {name: self._next(name) for name in self.plan.drafts}).values()):
                self.progress.total += self.plan.passes(due) * len(self.prompts)
                self._take_turns(due)
        return {name: self._setting(name) for name in self.plan.drafts}

    def _take_turns(self, due: Mapping[str, list[int]]) -> None:
        """Time the teacher alone and with each draft at its lengths, one after the other, `repeats` times.

        Each draft answers by itself in the first of these rounds too.
        """
        plan = self.plan
        alone = plan.alone(plan.teacher, self.temperature, self.batch_size)
        drafts = {
            name: plan.alone(draft, self.temperature, self.batch_size)
            for name, draft in plan.drafts.items()
            if not self.drafts_alone[name]
        }
        drafted = {
            (name, gamma): plan.sampler(plan.drafts[name], gamma, self.temperature, self.batch_size)
            for name, gammas in due.items()
            for gamma in gammas
        }
        for sampler in (alone, *drafted.values(), *drafts.values()):
            self._warm_up(sampler)
        series = {which: _Series() for which in drafted}
        for repeat in range(plan.config.repeats):
            seeds = [derived("specdec", plan.seed, repeat, row) for row in range(len(self.prompts))]
            reference = self._decode(alone, seeds)
            self.alone.append(reference)
            for which, sampler in drafted.items():
                taken = self._decode(sampler, seeds)
                series[which].passes.append(taken)
                series[which].speedups.append(reference.seconds_per_token / taken.seconds_per_token)
                if self.temperature == 0:
                    series[which].ties = self._verify(taken, reference)
            for name, sampler in drafts.items():
                self.drafts_alone[name].append(self._decode(sampler, seeds))
        for (name, gamma), found in series.items():
            self.timed[name][gamma] = found.timed(gamma)

    def _warm_up(self, sampler: Sampler) -> None:
        """Decode a whole batch on a GPU, where kernels are chosen by shape; one prompt on a CPU."""
        rows = self.batch_size if self.plan.teacher.device.type == "cuda" else 1
        decode(sampler, self.prompts[:rows], [self.plan.seed] * rows, rows)

    def _decode(self, sampler: Sampler, seeds: list[int]) -> Pass:
        return decode(sampler, self.prompts, seeds, self.batch_size, on_batch=self.progress.add)

    def _verify(self, taken: Pass, reference: Pass) -> int:
        return verify_greedy(
            self.plan.teacher,
            self.prompts,
            taken.responses,
            reference.responses,
            eos_ids=self.plan.eos_ids,
            max_new_tokens=self.plan.max_new_tokens,
            vocabulary=self.plan.vocabulary,
            measure=lambda: self._rounding,
        )

    @cached_property
    def _rounding(self) -> Rounding:
        """Rounding, measured once: at temperature 0 the teacher alone writes the same responses in every turn."""
        return measured_rounding(self.plan.teacher, self.prompts, self.alone[0].responses, self.plan.vocabulary)

    def _next(self, name: str) -> list[int]:
        """Return the draft length that promises most, unless it was timed already."""
        timed, forwards = self.timed[name], self.forwards[name]

        def promise(gamma: int) -> float:
            nearest = min(timed, key=lambda other: abs(other - gamma))
            achieved = timed[nearest].speedup / speedup(forwards, timed[nearest].acceptance_by_position, nearest)
            return achieved * speedup(forwards, self._basis(name, gamma).acceptance_by_position, gamma)

        best = max(self.plan.gammas, key=promise)
        return [] if best in timed else [best]

    def _basis(self, name: str, gamma: int) -> Timed:
        """Return the measurements that tell acceptance at a draft length: its own, or those of the longest timed."""
        timed = self.timed[name]
        return timed[gamma if gamma in timed else max(timed)]

    def _setting(self, name: str) -> Setting:
        timed, forwards = self.timed[name], self.forwards[name]
        lengths = []
        for gamma in self.plan.gammas:
            basis = self._basis(name, gamma)
            by_position = basis.acceptance_by_position
            lengths.append(
                DraftLength(
                    gamma=gamma,
                    expected_tokens_per_teacher_call=expected_tokens(stretched(by_position, gamma)),
                    theoretical_speedup=speedup(forwards, by_position, gamma),
                    theoretical_speedup_iid=speedup_of_paper(forwards, basis.acceptance_rate, gamma),
                    timed=timed.get(gamma),
                )
            )
        best = max(timed, key=lambda gamma: timed[gamma].speedup)
        return Setting(
            temperature=self.temperature,
            batch_size=self.batch_size,
            prompts=len(self.prompts),
            teacher_alone=_alone(self.alone),
            draft_alone=_alone(self.drafts_alone[name]),
            forwards=forwards,
            lengths=lengths,
            best_gamma=best,
            best_speedup=timed[best].speedup,
        )


def _alone(passes: Sequence[Pass]) -> Alone:
    rate = 1 / median(one.seconds_per_token for one in passes)
    return Alone(tokens_per_second=rate, latency=_latency(passes))


def _latency(passes: Sequence[Pass]) -> Latency:
    first = [seconds for one in passes for seconds in one.first_token]
    per_token = [seconds for one in passes for seconds in one.per_token]
    return Latency(first_token=_percentiles(first), per_token=_percentiles(per_token) if per_token else None)


def _percentiles(values: Sequence[float]) -> Percentiles:
    if len(values) == 1:
        return Percentiles(p50=values[0], p90=values[0], p99=values[0])
    cuts = quantiles(values, n=100, method="inclusive")
    return Percentiles(p50=cuts[49], p90=cuts[89], p99=cuts[98])
