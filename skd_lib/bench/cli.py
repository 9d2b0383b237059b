"""`skd bench`: the benchmarks' command lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from rich.table import Table

# Nothing heavy at the top: `skd --help` has to answer at once.

bench = typer.Typer(help="Measure how fast things are on this machine.", no_args_is_help=True)

Teacher = Annotated[
    str, typer.Option(help="Reference to a model, or random:SHAPE for random weights in a real model's shape.")
]
Student = Annotated[str, typer.Option(help="Like --teacher.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows decoded together.")]
PromptTokens = Annotated[int, typer.Option(min=2, help="Longest prompt; the shortest has half of it.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens of every response.")]
Gamma = Annotated[int, typer.Option(min=1, help="Tokens drafted for each teacher call; the most, if adaptive.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed passes of each kind; figures are medians.")]
TopK = Annotated[
    int | None, typer.Option(min=0, help="K of SKD.", show_default="set by --acceptance; 25 for given models")
]
Acceptance = Annotated[
    float, typer.Option(min=0, max=1, help="Acceptance with random weights: K is this share of the vocabulary.")
]
Dtype = Annotated[str, typer.Option(help="Of weights and cache, e.g. float32.")]
Device = Annotated[str | None, typer.Option(show_default="the GPU if there is one", help="E.g. cpu, cuda.")]
Seed = Annotated[int, typer.Option(help="Of random weights, prompts and samples.")]
Output = Annotated[Path, typer.Option(help="JSON file to write.")]


@bench.command("sampling")
def sampling(
    teacher: Teacher = "random:smollm2-135m",
    student: Student = "random:smollm2-135m-22-layers",
    batch_size: BatchSize = 8,
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 48,
    gamma: Gamma = 5,
    repeats: Repeats = 5,
    top_k: TopK = None,
    acceptance: Acceptance = 0.9,
    student_top_p: Annotated[float, typer.Option(min=0.01, max=1, help="The student's nucleus.")] = 1.0,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Seed = 0,
    only: Annotated[
        list[str] | None, typer.Option(help="Name of a row to measure; again for more.", show_default="all")
    ] = None,
    output: Output = Path("runs/bench-sampling.json"),
) -> None:
    """Measure the sampling engine against generate, token-by-token and assisted decoding, and against its floor.

    Shapes: smollm2-135m, gemma-2b, gemma-7b, or with another depth, e.g. smollm2-135m-6-layers. The floor is the bare
    forwards of the same rounds.
    """
    from skd_lib.bench.sampling import WAYS, bench_sampling, render
    from skd_lib.bench.setup import Settings

    settings = Settings(
        teacher=teacher,
        student=student,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        gamma=gamma,
        repeats=repeats,
        top_k=_k(top_k, teacher),
        acceptance=acceptance,
        student_top_p=student_top_p,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    result = _with_progress(lambda progress: bench_sampling(settings, only or WAYS, progress))
    _show(render(result), result.to_json(), output)


@bench.command("growth")
def growth(
    teacher: Teacher = "random:smollm2-135m",
    student: Student = "random:smollm2-135m-22-layers",
    batch_size: BatchSize = 8,
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 16,
    gamma: Gamma = 5,
    repeats: Repeats = 1,
    acceptance: Acceptance = 0.8,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Seed = 0,
    output: Output = Path("runs/bench-growth.json"),
) -> None:
    """Measure how interleaved sampling grows with batch, prompt length, draft length, acceptance and K.

    One is changed at a time; the options say where the others stay. Acceptance is set by K, so weights are random.
    """
    from skd_lib.bench.growth import bench_growth, render
    from skd_lib.bench.setup import Settings

    settings = Settings(
        teacher=teacher,
        student=student,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        gamma=gamma,
        repeats=repeats,
        acceptance=acceptance,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    result = _with_progress(lambda progress: bench_growth(settings, progress))
    _show([render(result)], result.to_json(), output)


@bench.command("training")
def training(
    teacher: Teacher = "random:smollm2-135m",
    student: Student = "random:smollm2-135m-22-layers",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of an optimiser step.")] = 8,
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 48,
    gamma: Gamma = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each trainer; figures are medians.")] = 3,
    top_k: TopK = None,
    acceptance: Acceptance = 0.8,
    beta: Annotated[
        float, typer.Option(min=0, max=1, help="Of the divergence (GKD): 0 is the forward KL, 1 the reverse KL.")
    ] = 0.5,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Ours compute activations again (TRL's would sample without a cache)."
        ),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of the teacher.", show_default="bfloat16 where precision auto is bf16")
    ] = None,
    device: Device = None,
    seed: Seed = 0,
    trl_python: Annotated[
        Path | None, typer.Option(help="Python that has TRL.", show_default="an environment that is made and kept")
    ] = None,
    one_at_a_time: Annotated[
        bool, typer.Option("--one-at-a-time", help="Start a trainer when the one before has ended: less memory.")
    ] = False,
    output: Output = Path("runs/bench-training.json"),
) -> None:
    """Measure an optimiser step of on_policy and of skd against TRL's on-policy trainers.

    TRL runs in an environment of its own, pinned by constraints/trl.txt; without one, ours are measured alone.
    """
    from skd_lib.bench.setup import Settings
    from skd_lib.bench.training import bench_training, render, teacher_dtype

    settings = Settings(
        teacher=teacher,
        student=student,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        gamma=gamma,
        repeats=repeats,
        top_k=_k(top_k, teacher),
        acceptance=acceptance,
        dtype=dtype or teacher_dtype(device),
        device=device,
        seed=seed,
    )
    result = _with_progress(
        lambda progress: bench_training(
            settings,
            beta=beta,
            gradient_checkpointing=gradient_checkpointing,
            trl_python=trl_python,
            one_at_a_time=one_at_a_time,
            on_progress=progress,
        )
    )
    _show(render(result), result.to_json(), output)


def _k(top_k: int | None, teacher: str) -> int | None:
    """SKD's K: that of the paper for models whose ranks mean something, else set by the acceptance."""
    from skd_lib.bench.setup import RANDOM

    return 25 if top_k is None and not teacher.startswith(RANDOM) else top_k


ResultT = TypeVar("ResultT")


def _with_progress(measure: Callable[[Callable[[int, int], None]], ResultT]) -> ResultT:
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=None)
        return measure(lambda done, total: progress.update(task, completed=done, total=total))


def _show(tables: list[Table], figures: str, output: Path) -> None:
    from rich.console import Console

    from skd_lib.bench.setup import write

    console = Console()
    for table in tables:
        console.print(table)
    write(figures, output)
    console.print(f"{output}: all figures", markup=False, highlight=False, soft_wrap=True)
