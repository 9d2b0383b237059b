"""The speed of both engines of `distill.engine`, and where the time of a training step goes with each, in one run.

Both sample the same prompts by the same rule, in turns, so that a machine that is busy for a while slows both; figures
are medians, ratios those of passes side by side. No response ends early. Steps are made as the training makes them:
weights to the servers, sampling, loss and gradient, update.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from skd_lib._core.format import TextTable
from skd_lib.bench.setup import RANDOM, Settings, load_pair, machine_figures, prompts_for, timed
from skd_lib.config import DistillConfig, InterleavedConfig, SamplingParams
from skd_lib.config.distill import VllmConfig
from skd_lib.data.tokenize import TokenizedExample
from skd_lib.distillation.batch import Rollout
from skd_lib.distillation.loss import objective_for
from skd_lib.distillation.rollouts import RowKey, rollout_for, row_seed
from skd_lib.models.heads import common_vocabulary
from skd_lib.models.references import resolve_model
from skd_lib.sampling.acceptance import top_k
from skd_lib.sampling.drafting import AdaptiveGamma
from skd_lib.sampling.engine import Sampler
from skd_lib.sampling.samples import SamplingStatistics
from skd_lib.vllm.engine import vllm_engine
from skd_lib.vllm.sampler import VllmEngine
from skd_lib.vllm.serve import Served, serving

SIGNALS = ("none", "states", "top_k")
"""What is kept of the teacher; the engine `transformers` keeps states where vLLM's servers send its `top_k`."""
PHASES = ("weights", "sampling", "loss", "optimiser")
"""Of a training step: the student's weights to the servers; responses with the teacher's signal; and so on."""
OWN = "transformers"
_LEARNING_RATE = 1e-6  # so small that responses stay what they are
_LAST_STEP = 10**9


@dataclass
class Turn:
    """What takes turns: sampling, or a training step.

    `engine` is `transformers`, or `vllm` with the number of its servers; `signal` is one of `SIGNALS`, empty for a
    training step; `seconds` are by phase, of each timed pass.
    """

    engine: str
    rows: int
    new_tokens: int
    signal: str
    run: Callable[[Turn], dict[str, float]] = field(repr=False)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    statistics: SamplingStatistics = field(default_factory=SamplingStatistics)

    @property
    def totals(self) -> list[float]:
        """Seconds of each timed pass."""
        return [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]

    @property
    def tokens_per_second(self) -> float:
        """Of the median pass."""
        return self.rows * self.new_tokens / median(self.totals)

    def share(self, phase: str) -> float:
        """Return a phase's share of the time: the median over passes."""
        return median(part / whole for part, whole in zip(self.seconds[phase], self.totals, strict=True))


@dataclass(frozen=True)
class Result:
    """A whole run of the benchmark."""

    settings: Settings
    machine: dict[str, Any]
    turns: list[Turn]

    def speedup(self, turn: Turn) -> float:
        """Return how many times as fast as by `transformers` it is: the median over passes side by side."""
        own = next(
            other
            for other in self.turns
            if (other.engine, other.rows, other.new_tokens, other.signal)
            == (OWN, turn.rows, turn.new_tokens, turn.signal)
        )
        return median(theirs / mine for mine, theirs in zip(turn.totals, own.totals, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ratios included."""
        turns = [
            {
                "engine": turn.engine,
                "rows": turn.rows,
                "new_tokens": turn.new_tokens,
                "signal": turn.signal or None,
                "seconds": turn.seconds,
                "tokens_per_second": turn.tokens_per_second,
                "speedup": self.speedup(turn),
                "shares": {phase: turn.share(phase) for phase in turn.seconds},
                "acceptance": turn.statistics.acceptance_rate,
                "gamma": turn.statistics.drafted / max(turn.statistics.teacher_calls, 1),
            }
            for turn in self.turns
        ]
        return {
            "settings": asdict(self.settings),
            "machine": self.machine,
            "sampling": [turn for turn in turns if turn["signal"]],
            "training_steps": [turn for turn in turns if not turn["signal"]],
        }

    def tables(self) -> list[TextTable]:
        """Show it to people."""

        def row(turn: Turn) -> list[str]:
            figures = [f"{turn.tokens_per_second:.1f}", f"{self.speedup(turn):.2f}"]
            if turn.signal:
                work, figures = f", {turn.signal}", [*figures, f"{turn.statistics.acceptance_rate:.2f}"]
            else:
                work, figures = "", [*figures, *(f"{turn.share(phase):.0%}" for phase in PHASES)]
            return [f"{turn.rows} x {turn.new_tokens}{work}: {turn.engine}", *figures]

        head = ["rows x new tokens", "tokens/s", "speed-up"]
        sampling = [row(turn) for turn in self.turns if turn.signal]
        steps = [row(turn) for turn in self.turns if not turn.signal]
        return [
            TextTable("Sampling, by signal", [*head, "accepted"], sampling),
            TextTable("Training steps", [*head, *PHASES], steps),
        ]


def bench_engine(
    settings: Settings,
    *,
    batch_sizes: Sequence[int],
    new_tokens: Sequence[int],
    signals: Sequence[str] = SIGNALS,
    servers: int = 1,
    urls: Sequence[str] = (),
    memory: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Measure both engines, in turns.

    Of the settings `batch_size` and `new_tokens` are not read: training steps have each of `batch_sizes`, and the
    longest of `new_tokens`. Servers are started on this machine (of several one alone is measured, too), unless `urls`
    name some that run already; for `memory` see `DistillConfig.vllm.memory`.
    """
    transformers_logging.disable_progress_bar()
    longest, most = max(new_tokens), max(batch_sizes)
    student, teacher = load_pair(settings)
    dtype, vocabulary = student.dtype, common_vocabulary(student, teacher)
    machine = machine_figures(student.device)
    plain = SamplingParams()
    distill = DistillConfig(
        sampling=InterleavedConfig(top_k=settings.k(vocabulary), gamma=settings.gamma, student=plain, teacher=plain)
    )
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="skd-bench-")))
        folders = {
            name: _folder(reference, model, scratch / name)
            for name, reference, model in (
                ("student", settings.student, student),
                ("teacher", settings.teacher, teacher),
            )
        }
        served = Served(
            folders["teacher"],
            folders["student"],
            settings.gamma,
            max_model_len=settings.prompt_tokens + longest,
            max_rows=most,
            dtype=str(dtype).removeprefix("torch."),
            memory=memory,
            more=("--skip-tokenizer-init",),  # random weights have none, and ids are all that is needed
        )
        running = urls or [stack.enter_context(serving(served, scratch / str(n))).url for n in range(servers)]
        student.float()  # as in training
        engine = stack.enter_context(
            vllm_engine(
                distill.model_copy(update={"vllm": VllmConfig(urls=list(running))}),
                student=student,
                folders=folders,
                eos_ids=(),
                pad_id=0,
                max_new_tokens=longest,
                longest=settings.prompt_tokens + longest,
                dtype=dtype,
            )
        )
        stack.enter_context(torch.autocast(student.device.type, dtype, enabled=dtype != torch.float32))
        prompts = prompts_for(replace(settings, batch_size=most), vocabulary)
        bench = _Bench(settings, student, teacher, engine, distill, prompts)
        turns = [*bench.sampling(batch_sizes, new_tokens, signals), *bench.training(batch_sizes, longest)]
        for number in range((settings.repeats + 1) * len(turns)):
            turn = turns[number % len(turns)]
            taken = turn.run(turn)
            if number >= len(turns):  # the first of each warms up
                for phase, seconds in taken.items():
                    turn.seconds.setdefault(phase, []).append(seconds)
            if on_progress is not None:
                on_progress(number + 1, (settings.repeats + 1) * len(turns))
    machine["load_after"] = os.getloadavg()
    return Result(settings, machine, turns)


def _folder(reference: str, model: PreTrainedModel, scratch: Path) -> Path:
    """Return where a model's files are; those of random weights are written."""
    if not reference.startswith(RANDOM):
        return resolve_model(reference)
    model.save_pretrained(scratch)
    return scratch


class _Bench:
    def __init__(
        self,
        settings: Settings,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        engine: VllmEngine,
        distill: DistillConfig,
        prompts: list[list[int]],
    ) -> None:
        self.settings, self.distill, self.prompts = settings, distill, prompts
        self.student, self.teacher, self.engine = student, teacher, engine
        self.rule = top_k(settings.k(common_vocabulary(student, teacher)))
        self.servers = list(engine.engines)
        self.counts = sorted({1, len(self.servers)})
        self.optimiser = torch.optim.AdamW(student.parameters(), lr=_LEARNING_RATE, fused=True)
        self.step = self.sent = 0
        self._send(len(self.servers), 0)

    def sampling(self, batch_sizes: Sequence[int], new_tokens: Sequence[int], signals: Sequence[str]) -> Iterator[Turn]:
        """Yield sampling of each kind with each engine."""
        for rows in batch_sizes:
            for new in new_tokens:
                for signal in signals:
                    yield Turn(OWN, rows, new, signal, self._own(new, states=signal != "none"))
                    for count in self.counts:
                        yield Turn(_vllm(count), rows, new, signal, self._served(count))

    def training(self, batch_sizes: Sequence[int], new_tokens: int) -> Iterator[Turn]:
        """Yield training steps with each engine."""
        for rows in batch_sizes:
            for count in (0, *self.counts):
                yield Turn(_vllm(count) if count else OWN, rows, new_tokens, "", self._trained(count, new_tokens))

    def _own(self, new_tokens: int, *, states: bool) -> Callable[[Turn], dict[str, float]]:
        params = self.distill.sampling
        sampler = Sampler(
            student=self.student,
            teacher=self.teacher,
            rule=self.rule,
            eos_ids=(),
            pad_id=0,
            max_new_tokens=new_tokens,
            gamma=AdaptiveGamma(self.settings.gamma),
            student_params=params.student,
            teacher_params=params.teacher,
            keep_teacher_states=states,
        )
        return lambda turn: {"sampling": self._sampled(turn, sampler.sample)}

    def _served(self, count: int) -> Callable[[Turn], dict[str, float]]:
        def run(turn: Turn) -> dict[str, float]:
            self._send(count, self.sent)
            self.engine.max_new_tokens = turn.new_tokens
            self.engine.settings = self.engine.settings.model_copy(update={"signal": turn.signal})
            return {"sampling": self._sampled(turn, self.engine.sampler(self.rule, self.sent).sample)}

        return run

    def _sampled(self, turn: Turn, sample: Callable[..., Any]) -> float:
        prompts = self.prompts[: turn.rows]
        seeds = [row_seed(self.settings.seed, RowKey(0, row)) for row in range(turn.rows)]

        def run() -> None:
            turn.statistics = sample(prompts, seeds).statistics

        return timed(run, self.student.device)

    def _trained(self, count: int, new_tokens: int) -> Callable[[Turn], dict[str, float]]:
        """Return a training step with some servers, or with the engine `transformers`."""
        # Of the teacher the servers' client needs no more than the head.
        teacher = self.engine.head if count else self.teacher
        strategy = rollout_for(
            "skd",
            student=self.student,
            teacher=teacher,
            distill=self.distill,
            steps=_LAST_STEP,
            seed=self.settings.seed,
            eos_ids=(),
            pad_id=0,
            max_new_tokens=new_tokens,
            sampler_at=self.engine.sampler if count else None,
        )
        objective = objective_for("skd", teacher, self.distill)

        def run(turn: Turn) -> dict[str, float]:
            self.step += 1
            self.engine.max_new_tokens = new_tokens
            self.engine.settings = self.engine.settings.model_copy(update={"signal": "states"})
            examples = [TokenizedExample(prompt, [0]) for prompt in self.prompts[: turn.rows]]
            keys = [RowKey(self.step, row) for row in range(turn.rows)]
            made: list[Rollout] = []

            def loss() -> None:
                (rollout,) = made
                mean = objective(self.student, rollout).loss / rollout.tokens
                mean.backward()  # type: ignore[no-untyped-call]

            phases = (
                lambda: self._send(count, self.step),
                lambda: made.append(strategy(examples, keys)),
                loss,
                self._update,
            )
            taken = {phase: timed(run, self.student.device) for phase, run in zip(PHASES, phases, strict=True)}
            turn.statistics = made[0].statistics or turn.statistics
            return taken

        return run

    def _send(self, count: int, step: int) -> None:
        """Bring a step's student to the first servers that have another, as the first sampling of the step would."""
        if count:
            self.sent = step
            self.engine.engines = self.servers[:count]
            self.engine.spread(lambda *_: None, [], self.engine.sampler(self.rule, step).settings)

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()


def _vllm(servers: int) -> str:
    return "vllm" if servers == 1 else f"vllm, {servers} servers"
