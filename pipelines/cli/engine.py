"""`skd engine`: vLLM servers that sample for `distill.engine: vllm`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from skd_lib._core.terminal import say
from skd_lib.errors import SkdError

engine = typer.Typer(
    help="vLLM servers that sample for a distillation.", no_args_is_help=True, rich_markup_mode="markdown"
)


@engine.command()
def install() -> None:
    """Make the environment with vLLM, once: minutes, 2.5 GB on a CPU. A run makes it by itself when it needs it.

    Example: `skd engine install`.
    """
    from skd_lib.vllm.serve import environment

    say(str(environment()))


@engine.command()
def start(
    teacher: Annotated[str, typer.Argument(help="The teacher: a folder or another reference.")],
    student: Annotated[str, typer.Argument(help="The student before training, with the same tokenizer.")],
    gamma: Annotated[int, typer.Option(min=1, max=64, help="Tokens drafted for each call of the teacher.")] = 5,
    max_len: Annotated[int, typer.Option(min=2, help="Longest prompt with its response, in tokens.")] = 2048,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows in flight.")] = 64,
    dtype: Annotated[str, typer.Option(help="Precision of both models: bfloat16, float32.")] = "auto",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that share the teacher.")] = 1,
    memory: Annotated[
        float | None, typer.Option(help="Share of a GPU's memory, or GiB for keys and values on a CPU.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's need a firewall.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
) -> None:
    """Run a vLLM server for `distill.vllm.urls` until it is interrupted.

    The token in the environment variable SKD_ENGINE_TOKEN guards all its routes; the training needs the same one. Where
    it is unset one is made and printed. Example: `skd engine start ./teacher ./student --gamma 5`.
    """
    from skd_lib.models.files import load_config
    from skd_lib.models.references import resolve_model
    from skd_lib.vllm.guard import TOKEN_VARIABLE, given_token
    from skd_lib.vllm.serve import Served, environment, room, started, until_ended

    folders = resolve_model(teacher), resolve_model(student)
    limit = room(map(load_config, folders), gamma)
    if limit is not None and max_len > limit:
        what = f"the models have room for a prompt with its response of {limit} tokens, besides drafts of {gamma}"
        raise SkdError(what, where=f"--max-len {max_len}", hint=f"--max-len {limit}" if limit > 1 else "lower --gamma")
    served = Served(
        *folders,
        gamma,
        max_model_len=max_len,
        max_rows=max_rows,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        memory=memory,
    )
    python = environment()
    made = not given_token()
    with started(served, python, port, host=host) as process:
        if made:
            say(f"export {TOKEN_VARIABLE}={os.environ[TOKEN_VARIABLE]}")
        say(f"distill.vllm.urls: [http://{host}:{port}]")
        raise typer.Exit(until_ended(process))
