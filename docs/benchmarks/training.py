"""The speed of a training step: ours and TRL's, on the same models, prompts and lengths, in one run.

Each trainer runs in a process of its own, TRL's in TRL's environment (`trl_worker.py`), and all make their
optimiser steps in turns, one at a time, so that a machine that is busy for a while slows all of them. A step is all
that a trainer does from one step to the next: data, responses, loss, backward pass, optimiser, logging. The first step
of each warms up and is not counted; figures are medians, ratios those of steps side by side.

No response ends before its last token: there is no EOS that could be sampled. All minimise the same divergence, the
student is in fp32, in bf16 autocast where precision `auto` is bf16, and attention has no dropout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table
from transformers.utils import logging as transformers_logging

from skd_lib.bench.setup import Settings, load_pair, machine_figures, prompts_for
from skd_lib.errors import SkdError
from skd_lib.models.heads import vocabulary_size
from skd_lib.models.loading import default_device
from skd_lib.models.precision import compute_dtype
from skd_lib.planning.memory import GIB
from skd_lib.storage.cache import default_cache_dir
from skd_lib.storage.environments import Tool, make_environment

TRL = Tool("trl", "TRL", "trl")
HERE = Path(__file__).resolve().parent
TRL_PINS = HERE.parents[1] / "constraints/trl.txt"
OURS = ("on_policy", "skd")
TRAINERS = ("GKDTrainer", "DistillationTrainer")
"""TRL's on-policy trainers: the one that is best known, and the one that TRL recommends in its place."""
PHASES = ("rollout", "loss", "optimiser")
"""Of a step: making the responses; both models' forward passes with the loss and the backward pass; the update."""

_LINES_SHOWN = 8
_LEARNING_RATE = 1e-6  # so small that responses stay what they are


@dataclass(frozen=True)
class Row:
    """The steps of one trainer.

    Attributes:
        name: A method of ours, or a trainer of TRL's.
        seconds: Of each timed step.
        cpu_seconds: Those that CPUs have worked for it, all threads together: on a busy machine they grow far less.
        phases: Seconds of each timed step in each of `PHASES`.
        peak_memory: The most bytes in use: on a CUDA GPU by tensors, elsewhere resident in the trainer's process.
        acceptance: Accepted / tested, on average; None where nothing is tested.
    """

    name: str
    seconds: list[float]
    cpu_seconds: list[float]
    phases: dict[str, list[float]]
    peak_memory: int
    acceptance: float | None


@dataclass(frozen=True)
class Ratio:
    """One of our methods / one of TRL's trainers.

    Attributes:
        time: Seconds of a step, the median over steps side by side.
        cpu_time: The same of CPU seconds.
        memory: Peak memory.
    """

    ours: str
    theirs: str
    time: float
    cpu_time: float
    memory: float


@dataclass(frozen=True)
class Result:
    """A whole run of the benchmark.

    Attributes:
        beta: Of the divergence that all minimise.
        gradient_checkpointing: Whether ours compute activations again in the backward pass.
        top_k: K of `skd`.
        trl: TRL's version; empty if it was not to be had.
        without_trl: Why it was not; empty if it was.
    """

    settings: Settings
    beta: float
    gradient_checkpointing: bool
    machine: dict[str, Any]
    top_k: int
    trl: str
    without_trl: str
    rows: list[Row]

    def ratios(self) -> list[Ratio]:
        """Each of ours / each of TRL's."""
        rows = {row.name: row for row in self.rows}
        pairs = [(rows[ours], rows[theirs]) for ours in OURS for theirs in TRAINERS if theirs in rows]
        return [
            Ratio(
                ours=ours.name,
                theirs=theirs.name,
                time=_side_by_side(ours.seconds, theirs.seconds),
                cpu_time=_side_by_side(ours.cpu_seconds, theirs.cpu_seconds),
                memory=ours.peak_memory / theirs.peak_memory,
            )
            for ours, theirs in pairs
        ]

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self) | {"ratios": [asdict(ratio) for ratio in self.ratios()]}, indent=2) + "\n"


def teacher_dtype(device: str | None) -> str:
    """Return the teacher's dtype in training, unless it is given: precision `auto` of the device."""
    return str(compute_dtype("auto", torch.device(device) if device else default_device())).removeprefix("torch.")


def bench_training(
    settings: Settings,
    *,
    beta: float,
    gradient_checkpointing: bool = False,
    trl_python: Path | None = None,
    one_at_a_time: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Measure a step of each trainer.

    Args:
        settings: What to measure; `dtype` is the teacher's.
        beta: Of the generalised Jensen-Shannon divergence: 0 is the forward KL, 1 the reverse KL.
        gradient_checkpointing: Ours compute activations again in the backward pass. TRL's never do: it would take the
            cache away from their sampling.
        trl_python: Interpreter that has TRL; None makes an environment, and if that cannot be, ours are measured alone.
        one_at_a_time: Let each trainer make all its steps before the next one is started, so that only one is in
            memory.
        on_progress: Called with the steps that are done and the steps there are.

    Raises:
        SkdError: a model cannot be loaded, TRL cannot train this pair, the given interpreter has no TRL, a trainer
            fails, or a step did not sample the tokens it should.
    """
    trl_python, trl, without_trl = _find_trl(trl_python)
    with TemporaryDirectory(prefix="skd-bench-") as scratch:
        request, machine = _prepare(settings, beta, Path(scratch), compared=trl_python is not None)
        own_command = [sys.executable, str(HERE / "own_worker.py")]
        trainers = [
            _Trainer(name, own_command, request | {"method": name, "checkpointing": gradient_checkpointing})
            for name in OURS
        ]
        if trl_python is not None:
            # -I: no module of this environment may get into TRL's.
            trl_command = [str(trl_python), "-I", str(HERE / "trl_worker.py")]
            trainers += [_Trainer(name, trl_command, request | {"trainer": name}) for name in TRAINERS]
        total, done = len(trainers) * (1 + settings.repeats), 0

        def step(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            nonlocal done
            reply = make()
            done += 1
            if on_progress is not None:
                on_progress(done, total)
            return reply

        groups = [[trainer] for trainer in trainers] if one_at_a_time else [trainers]
        rows = [row for group in groups for row in _steps(group, settings, step)]
    machine["load_after"] = os.getloadavg()
    return Result(
        settings=settings,
        beta=beta,
        gradient_checkpointing=gradient_checkpointing,
        machine=machine,
        top_k=request["top_k"],
        trl=trl,
        without_trl=without_trl,
        rows=rows,
    )


def render(result: Result) -> list[Table]:
    """Show the result to people: every trainer, then ours compared with others."""
    settings = result.settings
    title = (
        f"a training step: {settings.batch_size} rows, prompts of {settings.prompt_tokens} tokens, "
        f"{settings.new_tokens} new"
    )
    rows = Table(title=title, caption=f"jsd, beta {result.beta:g}; K of skd: {result.top_k}", box=None, min_width=60)
    rows.add_column("trainer", no_wrap=True)
    for column in ("seconds", *PHASES, "CPU s", "GiB", "accepted"):
        rows.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        rows.add_row(
            row.name,
            f"{median(row.seconds):.2f}",
            *(f"{median(row.phases[phase]):.2f}" for phase in PHASES),
            f"{median(row.cpu_seconds):.2f}",
            f"{row.peak_memory / GIB:.2f}",
            "" if row.acceptance is None else f"{row.acceptance:.2f}",
        )
    if result.gradient_checkpointing:
        rows.caption = f"{rows.caption}; ours with gradient checkpointing"
    if not result.trl:
        rows.caption = f"{rows.caption}\nwithout TRL: {result.without_trl}"
        return [rows]
    ratios = Table(title=f"ours / those of TRL {result.trl}", box=None)
    ratios.add_column("trainers", no_wrap=True)
    for column in ("time", "times as fast", "CPU time", "memory"):
        ratios.add_column(column, justify="right", no_wrap=True)
    for ratio in result.ratios():
        pair = f"{ratio.ours} / {ratio.theirs}"
        values = (ratio.time, 1 / ratio.time, ratio.cpu_time, ratio.memory)
        ratios.add_row(pair, *(f"{value:.2f}" for value in values))
    return [rows, ratios]


def _side_by_side(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return median(our / their for our, their in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class _Trainer:
    name: str
    command: list[str]
    request: dict[str, Any]


def _find_trl(given: Path | None) -> tuple[Path | None, str, str]:
    """Return the interpreter that has TRL, and TRL's version; or None, and the reason."""
    try:
        python = given or make_environment(TRL, TRL_PINS.read_text(encoding="utf-8"), default_cache_dir())
    except SkdError as error:
        return None, "", error.brief
    return python, _trl_version(python), ""


def _trl_version(python: Path) -> str:
    question = "import importlib.metadata as m; print(m.version('trl'))"
    try:
        answer = subprocess.run([str(python), "-I", "-c", question], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        hint = "name the python of an environment with trl, or leave the option out: one is made"
        raise SkdError("this is no Python interpreter that has TRL", where=str(python), hint=hint) from error
    return answer.stdout.strip()


def _prepare(settings: Settings, beta: float, folder: Path, *, compared: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Save the models; what all trainers are asked to do, and what the machine is."""
    transformers_logging.disable_progress_bar()
    student, teacher = load_pair(settings)
    sizes = vocabulary_size(student), vocabulary_size(teacher)
    if compared and sizes[0] != sizes[1]:
        raise SkdError(
            f"TRL compares equal vocabularies only; the student has {sizes[0]} tokens, the teacher {sizes[1]}",
            where="--student, --teacher",
            hint="choose models of one family",
        )
    student.save_pretrained(folder / "student")
    teacher.save_pretrained(folder / "teacher")
    request = {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "folder": str(folder / "output"),
        "device": str(student.device),
        "dtype": settings.dtype,
        "bf16": compute_dtype("auto", student.device) is torch.bfloat16,
        "prompts": prompts_for(settings, min(sizes)),
        "new_tokens": settings.new_tokens,
        "beta": beta,
        "gamma": settings.gamma,
        "top_k": settings.k(min(sizes)),
        "learning_rate": _LEARNING_RATE,
        "steps": settings.repeats + 2,  # one to warm up, and a last one that is never made
        "seed": settings.seed,
    }
    return request, machine_figures(student.device)


def _steps(
    trainers: Sequence[_Trainer],
    settings: Settings,
    step: Callable[[Callable[[], dict[str, Any]]], dict[str, Any]],
) -> list[Row]:
    """Start some trainers, and let them make their steps in turns."""
    with ExitStack() as running:
        # One after the other: each has made its first step before the next one is started.
        makers = []
        for trainer in trainers:
            makers.append(running.enter_context(_started(trainer)))
            step(makers[-1])
        turns = [[step(maker) for maker in makers] for _ in range(settings.repeats)]
    tokens = settings.batch_size * settings.new_tokens
    rows = []
    for trainer, replies in zip(trainers, zip(*turns, strict=True), strict=True):
        figures = [reply["figures"] for reply in replies]
        if any(logged["response_tokens"] != tokens for logged in figures):
            raise SkdError(f"`{trainer.name}` did not sample {settings.new_tokens} tokens a row")
        accepted = [logged["acceptance_rate"] for logged in figures if "acceptance_rate" in logged]
        rows.append(
            Row(
                name=trainer.name,
                seconds=[reply["seconds"] for reply in replies],
                cpu_seconds=[reply["cpu_seconds"] for reply in replies],
                phases={phase: [logged[f"seconds_{phase}"] for logged in figures] for phase in PHASES},
                peak_memory=replies[-1]["peak_memory"],
                acceptance=sum(accepted) / len(accepted) if accepted else None,
            )
        )
    return rows


@contextmanager
def _started(trainer: _Trainer) -> Iterator[Callable[[], dict[str, Any]]]:
    """Start a trainer's process; yield it, and a function that lets it make a step and waits for the reply."""
    folder = Path(trainer.request["folder"]) / trainer.name
    folder.mkdir(parents=True)
    request, log = folder / "request.json", folder / "log.txt"
    request.write_text(json.dumps(trainer.request | {"folder": str(folder)}), encoding="utf-8")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            [*trainer.command, str(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            env=env,
        ) as process,
    ):
        assert process.stdin is not None  # noqa: S101 - PIPE was asked for
        assert process.stdout is not None  # noqa: S101
        stdin, stdout = process.stdin, process.stdout

        def step() -> dict[str, Any]:
            with suppress(BrokenPipeError):  # it has ended, and why is told below
                os.write(stdin.fileno(), b"\n")
            line = stdout.readline()
            if not line:
                with log.open(encoding="utf-8", errors="replace") as lines:
                    said = "".join(f"  {text}" for text in deque(lines, _LINES_SHOWN))
                raise SkdError(f"`{trainer.name}` failed:\n{said.rstrip()}", hint="its whole log ends like this")
            reply: dict[str, Any] = json.loads(line)
            return reply

        try:
            yield step
        except BaseException:
            process.kill()
            raise
