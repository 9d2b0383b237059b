"""`skd specdec`: one model as the draft of another, from the command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from skd_kfp.pipelines.cli.options import AsJson, say_json
from skd_lib._core.terminal import say
from skd_lib.errors import SkdError


def specdec(
    teacher: Annotated[str, typer.Argument(help="The model whose output is wanted: a folder or another reference.")],
    draft: Annotated[str, typer.Argument(help="The model that drafts for it, with the same tokenizer.")],
    before: Annotated[
        str | None,
        typer.Option(help="A second draft model, measured in turns with the first, e.g. the undistilled one."),
    ] = None,
    run_config: Annotated[
        Path | None,
        typer.Option("--config", help="A run's YAML file: its test set, its `task`, and its `specdec` as defaults."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Inputs instead: .txt with one a line, or a data file (JSONL, JSON, CSV, TSV, Parquet)."),
    ] = None,
    column: Annotated[str, typer.Option(help="Column of --prompts that holds the input.")] = "source",
    template: Annotated[
        str | None, typer.Option(help="Prompt around an input.", show_default="the task's, else {source}")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Whether to use the chat template.", show_default="the task's, else chat"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length limit of a response.", show_default="the task's, else 128")
    ] = None,
    examples: Annotated[int | None, typer.Option(help="Prompts used.", show_default="32")] = None,
    gamma: Annotated[int | None, typer.Option(help="Draft length of the headline figures.", show_default="5")] = None,
    gammas: Annotated[
        str | None, typer.Option(help="Draft lengths compared, e.g. 1,2,4.", show_default="1 to 8")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="Which of them are timed: all, best or none.", show_default="best")
    ] = None,
    batch_sizes: Annotated[
        str | None, typer.Option(help="Rows decoded together; for vLLM requests in flight.", show_default="1,8")
    ] = None,
    temperatures: Annotated[str | None, typer.Option(help="Of both models.", show_default="0,1")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed passes of each kind.", show_default="3")] = None,
    engine: Annotated[
        str | None, typer.Option(help="What decodes: transformers or vllm.", show_default="transformers")
    ] = None,
    vllm_arguments: Annotated[
        str | None,
        typer.Option(help="More words for `vllm serve`, e.g. '--tensor-parallel-size 4'.", show_default="none"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of what is sampled.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for all figures.", show_default="none")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure one model as the draft of another in speculative decoding, and print how to serve the pair with vLLM.

    The teacher alone and with its draft decode in turns. At temperature 0 the output is checked against the teacher's
    own, token by token.

    With `--engine vllm` the printed line is started, without and with the draft, and the figures are from vLLM's own
    counters, with as many requests in flight as `--batch-sizes` says. Its environment is made when first needed
    (`skd engine install`).

    Example: `skd specdec runs/demo/teacher runs/demo/student --prompts prompts.txt`.
    """
    from skd_lib.config import SpecdecConfig, TaskConfig, load_config, parse_section
    from skd_lib.config.run import check_gammas

    if prompts is None and run_config is None:
        raise SkdError(
            "there are no prompts to decode", where="skd specdec", hint="give --prompts FILE or --config RUN.yaml"
        )
    settings = load_config(run_config) if run_config is not None else None
    given = {
        "examples": examples,
        "gamma": gamma,
        "gammas": gammas and gammas.split(","),
        "sweep": sweep,
        "batch_sizes": batch_sizes and batch_sizes.split(","),
        "temperatures": temperatures and temperatures.split(","),
        "repeats": repeats,
        "engine": engine,
        "vllm_arguments": vllm_arguments and shlex.split(vllm_arguments),
    }
    asked = {"prompt": template, "chat_template": chat, "max_new_tokens": max_new_tokens}
    defaults = settings.specdec.model_dump() if settings else {}
    plan_config = parse_section(SpecdecConfig, defaults | _set(given), where="skd specdec")
    defaults = settings.task.model_dump() if settings else {"max_new_tokens": 128}
    task = parse_section(TaskConfig, defaults | _set(asked), where="skd specdec")
    try:
        check_gammas(plan_config, task)
    except ValueError as error:
        raise SkdError(str(error), where="skd specdec", hint="lower --gamma and --gammas") from error

    from skd_lib._core.terminal import Console, progress_bar
    from skd_lib.specdec.prompts import prompts_of_run, read_prompts
    from skd_lib.storage import check_writable, write_text_atomic

    if out is not None:
        if out.is_dir():
            raise SkdError("a folder, not a file", where=f"--out {out}", hint="name a file in it, e.g. figures.json")
        check_writable(str(out.absolute().parent))
    if prompts is not None:
        inputs = read_prompts(prompts, column=column, limit=plan_config.examples)
    else:
        assert settings is not None  # noqa: S101 - one of the two was given
        inputs = prompts_of_run(settings, limit=plan_config.examples)
    drafts = {"draft": draft} if before is None else {"before": before, "after": draft}
    console = Console()
    if plan_config.engine == "vllm":
        say(
            f"vLLM starts {1 + len(drafts)} times, without a draft and with each; a start takes a minute or more",
            err=True,
        )
    at_first = "starting vLLM" if plan_config.engine == "vllm" else "looking at the models"
    with progress_bar("decoding", at_first) as on_progress:
        from skd_lib.specdec.benchmark import measure_references
        from skd_lib.specdec.render import render

        results = measure_references(
            teacher,
            drafts,
            inputs,
            task=task,
            config=plan_config,
            seed=seed,
            on_progress=on_progress,
        )
    figures = {name: result.to_dict() for name, result in results.items()}
    if out is not None:
        write_text_atomic(out, json.dumps(figures, indent=2) + "\n")
    if as_json:
        say_json(figures)
        return
    console.print(render(results))
    for result in results.values():
        assert result.vllm is not None  # noqa: S101 - `measure` adds it
        console.print(result.vllm.command, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"{out}: all figures", markup=False, highlight=False, soft_wrap=True)


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the options that were left out."""
    return {name: value for name, value in values.items() if value is not None}
