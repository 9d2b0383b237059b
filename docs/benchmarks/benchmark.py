"""The benchmarks of docs/benchmarks.md that are not a command of `skd`: sampling, how it grows, and a training step.

    python docs/benchmarks/benchmark.py --help

Run it at the root of the source tree, with the Python of `make install`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from skd_kfp.pipelines.cli.bench import Acceptance, Gamma, PromptTokens, Repeats, Seed, TopK
from skd_lib._core.terminal import progress_bar, run_command
from skd_lib.bench.setup import Settings, k_for
from skd_lib.errors import SkdError
from skd_lib.storage import write_text_atomic

Teacher = Annotated[
    str, typer.Option(help="Reference to a model, or random:SHAPE for random weights in a real model's shape.")
]
Student = Annotated[str, typer.Option(help="Like --teacher.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows decoded together.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens of every response.")]
Dtype = Annotated[str, typer.Option(help="Of weights and cache, e.g. float32.")]
Device = Annotated[str | None, typer.Option(show_default="the GPU if there is one", help="E.g. cpu, cuda.")]
Output = Annotated[Path, typer.Option(help="JSON file to write.")]

app = typer.Typer(
    help="The benchmarks of docs/benchmarks.md that are not a command of `skd`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.command("sampling")
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
    from sampling import WAYS, bench_sampling, render

    settings = Settings(
        teacher=teacher,
        student=student,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        gamma=gamma,
        repeats=repeats,
        top_k=k_for(top_k, teacher),
        acceptance=acceptance,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    with progress_bar("measuring") as on_progress:
        result = bench_sampling(settings, only or WAYS, on_progress)
    show(render(result), result.to_json(), output)


@app.command("growth")
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
    from growth import bench_growth, render

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
    with progress_bar("measuring") as on_progress:
        result = bench_growth(settings, on_progress)
    show([render(result)], result.to_json(), output)


@app.command("training")
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
    from training import bench_training, render, teacher_dtype

    settings = Settings(
        teacher=teacher,
        student=student,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        gamma=gamma,
        repeats=repeats,
        top_k=k_for(top_k, teacher),
        acceptance=acceptance,
        dtype=dtype or teacher_dtype(device),
        device=device,
        seed=seed,
    )
    with progress_bar("measuring") as on_progress:
        result = bench_training(
            settings,
            beta=beta,
            gradient_checkpointing=gradient_checkpointing,
            trl_python=trl_python,
            one_at_a_time=one_at_a_time,
            on_progress=on_progress,
        )
    show(render(result), result.to_json(), output)


def show(tables: Sequence[Table], figures: str, output: Path) -> None:
    """Print the tables, and write all figures to a file, with its folders; raises SkdError if it cannot be written."""
    console = Console()
    for table in tables:
        console.print(table)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(output, figures)
    except OSError as error:
        raise SkdError(f"cannot write the result: {error.strerror}", where=str(output)) from error
    console.print(f"{output}: all figures", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(app)
