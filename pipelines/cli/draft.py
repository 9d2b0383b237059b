"""`skd draft`: a draft for a served model, from a log of its requests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from skd_kfp.pipelines.cli.init import EXAMPLES
from skd_kfp.pipelines.cli.inputs import check_places
from skd_kfp.pipelines.cli.options import Local, Set, short
from skd_kfp.pipelines.cli.run import print_plan, run_here
from skd_lib._core.terminal import say
from skd_lib.errors import SkdError

BASE = EXAMPLES / "draft.yaml"
"""The run whose fields the command's arguments fill in."""


def draft(
    teacher: Annotated[str, typer.Argument(help="The model that you serve: a folder or another reference.")],
    local: Local,
    prompts: Annotated[
        list[str],
        typer.Option(
            help="Log of requests, a file, folder or glob: lines of {messages: [...]} or {prompt: ...}. Repeatable."
        ),
    ],
    student: Annotated[
        str,
        typer.Argument(
            help="A small model with the same tokenizer, likewise.",
            show_default="cut from the teacher: --set student_init.mode=prune, .keep_first, .keep_last",
        ),
    ] = "",
    method: Annotated[
        str,
        typer.Option(
            help="How the draft is trained. sft and supervised_kd train on the log's own answers, all others sample."
        ),
    ] = "skd",
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Let vLLM sample in training, and measure the drafts in vLLM itself.")
    ] = False,
    name: Annotated[str, typer.Option(help="Name of the run, and of the registered model.")] = "draft",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Also write the run's YAML file, for `skd run` and `skd submit`; with --dry-run nothing runs.",
            show_default="none",
        ),
    ] = None,
    changes: Set = None,
) -> None:
    """Train a draft for a model that you serve, and measure it on held-out requests; the teacher stays as it is.

    The run is that of pipelines/configs/draft.yaml with these arguments filled in; --dry-run prints it. It ends with
    acceptance and speed against no draft and against the student before. With MLflow the draft becomes champion if the
    teacher accepts more of it than of the present champion, and it is not slower.

    Examples: `skd draft org/large org/small --prompts requests.jsonl --dry-run`,
    `skd draft org/large org/small --prompts 'logs/*.jsonl' --vllm --set distill.training.max_steps=300`.
    """
    from skd_lib._core.terminal import Console
    from skd_lib.config import RunConfig, apply, parse_overrides, parse_section, read_yaml, refuse_multinode
    from skd_lib.config._reading import check_unset
    from skd_lib.data.files import data_files
    from skd_lib.storage import check_writable, write_text_atomic

    local.check()
    where = "skd draft"
    filled = {
        "name": name,
        "teacher": teacher,
        "student": student or None,
        **_method(method),
        "registry.model_name": name,
    }
    filled |= {"data.source.train": prompts, **({"distill.engine": "vllm", "specdec.engine": "vllm"} if vllm else {})}
    filled |= parse_overrides(changes or ())
    check_unset(RunConfig, filled, where=where)
    values = apply(read_yaml(BASE), filled, where=where)
    config = parse_section(RunConfig, values, where=where)
    refuse_multinode(config, where=where)
    for log in prompts:
        data_files(log)  # an error where there are none
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    # a run that stopped is started again by the same command: the file is there then
    new = output is not None and not (output.is_file() and output.read_bytes() == text.encode())
    if output is not None and new:
        if output.exists():
            raise SkdError("it exists already", where=f"--output {output}", hint="name another file, or remove it")
        check_writable(str(output.absolute().parent))
    console = Console(file=sys.stdout)  # this very stream: kfp's own output is redirected from `sys.stdout`
    if local.dry_run:
        say(text)
        print_plan(console, config, local)
    else:
        check_places(config)
    if output is not None and new:
        write_text_atomic(output, text)
        say(f"{short(output)} is written: `skd run {short(output)}`, `skd submit {short(output)}`", err=True)
    if not local.dry_run:
        run_here(console, config, local)


def _method(method: str) -> dict[str, Any]:
    """Return the fields for a method: one that can sample samples every response, and then no answer is read."""
    from skd_lib.config import DistillConfig, parse_section
    from skd_lib.distillation.methods import METHODS, samples_every_response

    parse_section(DistillConfig, {"method": method}, where="--method")
    shares = [name for name in METHODS[method].settings if name in ("on_policy_fraction", "sampled_fraction")]
    settings = {"method": method, **dict.fromkeys(shares, 1.0)}
    samples = samples_every_response(parse_section(DistillConfig, settings, where="--method"))
    fields = {f"distill.{name}": value for name, value in settings.items()}
    return {**fields, "data.source.columns.answers": "ignore" if samples else "read"}
