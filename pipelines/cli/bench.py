"""`skd bench`: the command lines of the benchmarks."""

from __future__ import annotations

from typing import Annotated

import typer

from skd_kfp.pipelines.cli.options import AsJson, say_json
from skd_lib.errors import SkdError

bench = typer.Typer(help="Measure how fast things are on this machine.", no_args_is_help=True)

PromptTokens = Annotated[int, typer.Option(min=2, help="Longest prompt; the shortest has half of it.")]
Gamma = Annotated[int, typer.Option(min=1, help="Tokens drafted for each teacher call; the most, if adaptive.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed passes of each kind; figures are medians.")]
TopK = Annotated[
    int | None, typer.Option(min=0, help="K of SKD.", show_default="set by --acceptance; 25 for given models")
]
Acceptance = Annotated[
    float, typer.Option(min=0, max=1, help="Acceptance with random weights: K is this share of the vocabulary.")
]
Seed = Annotated[int, typer.Option(help="Of random weights, prompts and samples.")]


@bench.callback()
def _bench() -> None:
    """Keep `bench` a group, although it has one command."""


@bench.command("engine")
def engine(
    teacher: Annotated[str, typer.Argument(help="A folder or another reference, or random:SHAPE for random weights.")],
    student: Annotated[str, typer.Argument(help="Like TEACHER, with the same tokenizer.")],
    batch_sizes: Annotated[str, typer.Option(help="Rows sampled together.")] = "8,32",
    new_tokens: Annotated[str, typer.Option(help="Tokens of every response.")] = "32,128",
    signals: Annotated[str, typer.Option(help="What is kept of the teacher.")] = "none,states,top_k",
    servers: Annotated[int, typer.Option(min=1, help="vLLM servers to start here; one is measured, too.")] = 1,
    url: Annotated[
        list[str] | None, typer.Option(help="A server that `skd engine start` started, instead. Repeatable.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="A server's share of a GPU's memory, or GiB for keys and values on a CPU.")
    ] = None,
    prompt_tokens: PromptTokens = 64,
    gamma: Gamma = 5,
    repeats: Repeats = 5,
    top_k: TopK = None,
    acceptance: Acceptance = 0.9,
    dtype: Annotated[
        str | None, typer.Option(help="Of both models, e.g. float32.", show_default="that of `precision: auto`")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure interleaved sampling by both engines of `distill.engine`, and where the time of a training step goes.

    A vLLM server is started for it, in the environment of `skd engine install`. `vllm` drafts --gamma tokens always,
    `transformers` at most. Shapes: smollm2-135m, gemma-2b, gemma-7b, or with another depth, e.g.
    smollm2-135m-6-layers.

    Example: `skd bench engine runs/demo/teacher runs/demo/student --batch-sizes 8,32 --new-tokens 32`.
    """
    from skd_lib._core.terminal import Console, progress_bar
    from skd_lib.bench.engine import SIGNALS, bench_engine
    from skd_lib.bench.setup import Settings, k_for
    from skd_lib.models.loading import default_device
    from skd_lib.models.precision import compute_dtype

    settings = Settings(
        teacher=teacher,
        student=student,
        prompt_tokens=prompt_tokens,
        gamma=gamma,
        repeats=repeats,
        top_k=k_for(top_k, teacher),
        acceptance=acceptance,
        dtype=dtype or str(compute_dtype("auto", default_device())).removeprefix("torch."),
        seed=seed,
    )
    asked = signals.split(",")
    if wrong := [signal for signal in asked if signal not in SIGNALS]:
        raise SkdError(f"no signal is called `{wrong[0]}`", where="--signals", hint=f"known: {', '.join(SIGNALS)}")
    rows, lengths = _numbers("--batch-sizes", batch_sizes), _numbers("--new-tokens", new_tokens)
    with progress_bar("measuring") as on_progress:
        result = bench_engine(
            settings,
            batch_sizes=rows,
            new_tokens=lengths,
            signals=asked,
            servers=servers,
            urls=url or (),
            memory=memory,
            on_progress=on_progress,
        )
    if as_json:
        say_json(result.to_dict())
        return
    for table in result.tables():
        Console().print(table.to_rich())


def _numbers(option: str, text: str) -> list[int]:
    """Read numbers with commas between."""
    found = [int(part) if part.isascii() and part.isdigit() else 0 for part in text.split(",")]
    if 0 in found:
        raise SkdError(f"whole numbers from 1 with commas between, not `{text}`", where=option, hint="e.g. 8,32")
    return found
