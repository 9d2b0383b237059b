"""The speed of sampling: the engine, what else there is, and what the hardware allows, in one run.

All rows of the table sample on the same models, prompts, dtypes and lengths, in turns, so that a machine that is busy
for a while slows all of them; figures are medians over the repetitions. Prefill is part of every one, and no response
ends early. Rows of batch size 1 take the first prompt: more would take as much longer as they are more.

With random weights a teacher ranks a student's token anywhere alike, so K = share x V sets SKD's acceptance to about
that share; the acceptance of `lossless` is what the two distributions give. Acceptance is measured and shown.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

import baselines
from skd_lib.bench.setup import Settings, load_pair, machine_figures, prompts_for, timed
from skd_lib.config import SamplingParams
from skd_lib.errors import SkdError
from skd_lib.models.heads import common_vocabulary
from skd_lib.sampling.acceptance import AcceptanceRule, lossless, student_only, top_k
from skd_lib.sampling.drafting import AdaptiveGamma, weights_read
from skd_lib.sampling.engine import Sampler, SamplingStatistics
from skd_lib.sampling.timing import Forward, bare, recorded


@dataclass(frozen=True)
class Row:
    """One way to sample: its name in `WAYS`, rows decoded together, tokens of a pass, and seconds of each timed pass.

    `floor_seconds` are those of the bare forwards of the same rounds (empty without the engine), `weight_seconds` the
    time to read the weights as often, at the memory's copy bandwidth (CUDA only), and `statistics` the engine's.
    """

    name: str
    batch_size: int
    tokens: int
    seconds: list[float]
    floor_seconds: list[float]
    weight_seconds: float | None
    statistics: SamplingStatistics | None

    @property
    def tokens_per_second(self) -> float:
        """Of the median pass."""
        return self.tokens / median(self.seconds)

    @property
    def share_of_floor(self) -> float | None:
        """Time of the bare forwards / time taken: 1 is as fast as can be. The median over passes side by side."""
        if not self.floor_seconds:
            return None
        return median(floor / taken for floor, taken in zip(self.floor_seconds, self.seconds, strict=True))

    @property
    def share_of_weight_limit(self) -> float | None:
        """Time to read the weights / time taken."""
        return None if self.weight_seconds is None else self.weight_seconds / median(self.seconds)

    @property
    def gamma(self) -> float | None:
        """Tokens drafted for each teacher call, on average; None without a teacher."""
        counts = self.statistics
        return counts.drafted / counts.teacher_calls if counts is not None and counts.teacher_calls else None

    @property
    def acceptance(self) -> float | None:
        """Accepted / tested; None where nothing is tested."""
        return self.statistics.acceptance_rate if self.statistics is not None and self.statistics.tested else None

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict, ratios included."""
        derived = ("tokens_per_second", "share_of_floor", "share_of_weight_limit", "gamma", "acceptance")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class Result:
    """A whole run of the benchmark."""

    settings: Settings
    machine: dict[str, Any]
    top_k: int
    rows: list[Row]

    def speedups(self) -> dict[str, float]:
        """Compare ways to sample: tokens a second of one / of the other."""
        speed = {row.name: row.tokens_per_second for row in self.rows}
        pairs = [
            ("everything", "generate"),
            ("top_k", "token-by-token"),
            ("top_k adaptive", "token-by-token"),
            ("top_k adaptive", "published shape"),
            ("lossless, 1 row", "assisted"),
            ("lossless adaptive, 1 row", "assisted"),
        ]
        return {f"{ours} / {other}": speed[ours] / speed[other] for ours, other in pairs if {ours, other} <= set(speed)}

    def to_json(self) -> str:
        """Return the whole result as JSON."""
        values = {
            "settings": asdict(self.settings),
            "machine": self.machine,
            "top_k": self.top_k,
            "rows": [row.to_dict() for row in self.rows],
            "speedups": self.speedups(),
        }
        return json.dumps(values, indent=2) + "\n"


@dataclass(frozen=True)
class _Contender:
    name: str
    batch_size: int
    run: Callable[[], int | SamplingStatistics]
    eager: Callable[[], object] | None = None
    """The engine's rounds without graphs, in which no forward can be seen."""


WAYS = (
    "generate",
    "everything",
    "token-by-token",
    "published shape",
    "top_k",
    "top_k adaptive",
    "lossless",
    "lossless adaptive",
    "assisted",
    "lossless, 1 row",
    "lossless adaptive, 1 row",
)
"""All ways to sample, by name."""


def bench_sampling(
    settings: Settings, only: Collection[str] = WAYS, on_progress: Callable[[int, int], None] | None = None
) -> Result:
    """Measure ways to sample, in turns; `on_progress` is called with the passes done and the passes in all.

    Raises SkdError for a model that cannot be loaded, an unknown shape, dtype or way, or a wrong number of sampled
    tokens.
    """
    for name in only:
        if name not in WAYS:
            raise SkdError(f"no way to sample is called `{name}`", where="--only", hint=f"known: {'; '.join(WAYS)}")
    student, teacher = load_pair(settings)
    device = student.device
    vocabulary = common_vocabulary(teacher, student)
    k = settings.k(vocabulary)
    machine = machine_figures(device)
    prompts = prompts_for(settings, vocabulary)
    contenders = [each for each in _contenders(settings, student, teacher, k, prompts) if each.name in only]

    # One untimed pass of each: it warms up, and shows which forwards the engine makes (its rounds repeat exactly).
    passes = len(contenders) * (settings.repeats + 1)

    def progress(done: int) -> None:
        if on_progress is not None:
            on_progress(done, passes)

    warm: list[tuple[int | SamplingStatistics, list[Forward]]] = []
    for contender in contenders:
        with recorded(student, teacher) as forwards:
            if contender.eager is not None:
                contender.eager()
        counts = contender.run()
        tokens = counts if isinstance(counts, int) else counts.tokens
        if tokens != contender.batch_size * settings.new_tokens:
            raise SkdError(f"`{contender.name}` sampled {tokens} tokens, not {settings.new_tokens} a row")
        warm.append((counts, forwards))
        progress(len(warm))
    floors = [bare(forwards) if forwards else None for _, forwards in warm]
    bandwidth = copy_bandwidth(device) if device.type == "cuda" else None

    seconds: list[list[float]] = [[] for _ in contenders]
    floor_seconds: list[list[float]] = [[] for _ in contenders]
    for repeat in range(settings.repeats):
        for number, (contender, floor) in enumerate(zip(contenders, floors, strict=True)):
            seconds[number].append(timed(contender.run, device))
            if floor is not None:
                floor_seconds[number].append(timed(floor, device))
            progress(len(contenders) * (repeat + 1) + number + 1)
    machine["load_after"] = os.getloadavg()
    rows = [
        Row(
            name=contender.name,
            batch_size=contender.batch_size,
            tokens=contender.batch_size * settings.new_tokens,
            seconds=seconds[number],
            floor_seconds=floor_seconds[number],
            weight_seconds=seconds_to_read_weights(forwards, bandwidth) if bandwidth and forwards else None,
            statistics=None if isinstance(counts, int) else counts,
        )
        for number, (contender, (counts, forwards)) in enumerate(zip(contenders, warm, strict=True))
    ]
    return Result(settings, machine, k, rows)


def render(result: Result) -> list[Table]:
    """Show the result to people: every way, then the comparisons."""
    on_cuda = any(row.share_of_weight_limit is not None for row in result.rows)
    figures = ("tokens/s", "seconds", "floor", "gamma", "accepted", *(["weights"] if on_cuda else []))
    caption = "floor: time of the bare forwards / time; weights: time to read the weights / time"
    title = f"sampling, {result.settings.new_tokens} new tokens a row, K = {result.top_k}"
    rows = Table(title=title, caption=caption if on_cuda else caption.partition(";")[0], box=None, min_width=60)
    rows.add_column("way", no_wrap=True)
    for column in ("rows", *figures):
        rows.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        ratios = [row.share_of_floor, row.gamma, row.acceptance, *([row.share_of_weight_limit] if on_cuda else [])]
        rows.add_row(
            row.name,
            str(row.batch_size),
            f"{row.tokens_per_second:.1f}",
            f"{median(row.seconds):.3f}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        )
    if not result.speedups():
        return [rows]
    speedups = Table(title="how many times as fast", box=None, show_header=False)
    speedups.add_column(no_wrap=True)
    speedups.add_column(justify="right")
    for pair, ratio in result.speedups().items():
        speedups.add_row(pair, f"{ratio:.2f}")
    return [rows, speedups]


def _contenders(
    settings: Settings, student: PreTrainedModel, teacher: PreTrainedModel, k: int, prompts: list[list[int]]
) -> list[_Contender]:
    new_tokens, gamma = settings.new_tokens, settings.gamma
    plain = SamplingParams()
    one, batch = prompts[:1], len(prompts)

    def engine(name: str, rule: AcceptanceRule, rows: list[list[int]], gamma: int | AdaptiveGamma) -> _Contender:
        sampler = Sampler(
            student=student,
            teacher=teacher if rule.asks_teacher else None,
            rule=rule,
            eos_ids=(),
            pad_id=0,
            max_new_tokens=new_tokens,
            gamma=gamma,
            student_params=plain,
            # SKD's loss reads them; the other ways have no use for them.
            keep_teacher_states=rule.name.startswith("top_k"),
        )
        seeds = [settings.seed + row for row in range(len(rows))]
        eager = replace(sampler, graphs=False)
        return _Contender(
            name, len(rows), lambda: sampler.sample(rows, seeds).statistics, lambda: eager.sample(rows, seeds)
        )

    adaptive = AdaptiveGamma(gamma)
    return [
        _Contender("generate", batch, lambda: baselines.generate(student, prompts, new_tokens, plain)),
        engine("everything", student_only(), prompts, gamma),
        _Contender(
            "token-by-token",
            batch,
            lambda: baselines.token_by_token(student, teacher, k, prompts, new_tokens, plain, plain),
        ),
        _Contender(
            "published shape",
            1,
            lambda: baselines.published_shape(student, teacher, k, gamma, one[0], new_tokens, plain, plain),
        ),
        engine("top_k", top_k(k), prompts, gamma),
        engine("top_k adaptive", top_k(k), prompts, adaptive),
        engine("lossless", lossless(), prompts, gamma),
        engine("lossless adaptive", lossless(), prompts, adaptive),
        _Contender(
            "assisted",
            1,
            lambda: baselines.generate(teacher, one, new_tokens, plain, assistant=student, gamma=gamma),
        ),
        engine("lossless, 1 row", lossless(), one, gamma),
        engine("lossless adaptive, 1 row", lossless(), one, adaptive),
    ]


def seconds_to_read_weights(forwards: Sequence[Forward], bytes_per_second: float) -> float:
    """Return the time of the forwards if they read their weights and nothing else limits them."""
    models = {id(forward.model): forward.model for forward in forwards}
    sizes: dict[int, int] = {key: weights_read(model) * model.dtype.itemsize for key, model in models.items()}
    return sum(sizes[id(forward.model)] for forward in forwards) / bytes_per_second


def copy_bandwidth(device: torch.device, size: int = 2**30, repeats: int = 10) -> float:
    """Measure a CUDA device's memory bandwidth, bytes read and written a second, by a large copy."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        target.copy_(source)
    torch.cuda.synchronize(device)
    return 2 * size * repeats / (time.perf_counter() - started)
