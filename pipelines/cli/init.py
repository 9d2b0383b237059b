"""`skd init`: the YAML file of a run, from five answers or from an example."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from skd_lib._core.terminal import say
from skd_lib.errors import SkdError

EXAMPLES = Path(__file__).parents[1] / "configs"
QUESTIONS = {
    "teacher": "Teacher (hub id, folder, gs://...)",
    "student": "Student, with the same tokenizer",
    "data": "Data: a file (JSONL, CSV, Parquet, ...) or a dataset of the hub",
    "task": "Task (gsm8k, translation, summarization, ..., or a YAML file)",
    "method": "Method (skd, sft, supervised_kd, on_policy, ...)",
}
TEMPLATE = """\
# A run of skd. `skd config` explains every field, `skd run {file} --dry-run` checks this file.
name: {name}
teacher: {teacher}
student: {student}
data:
  source:
{source}
  # columns of other names: add `columns: {{ source: question, target: answer }}` to `source`
  test_examples: 256
  validation_examples: 64
task: {{ name: {task} }} # prompt, answer, metrics, lengths; fields given here win
teacher_sft:
  training: {{ epochs: 1 }} # `enabled: false` takes the teacher as it is
distill:
  method: {method} # sft, seqkd, supervised_kd, on_policy, imitkd, two_stage, skd, skd_mixed
  divergence: forward_kl
  sampling: {{ top_k: 25, gamma: 5 }} # a draft stands if it is among the teacher's 25 most likely tokens
  training: {{ max_steps: 300, batch_size: 8, learning_rate: 1.0e-5 }}
registry: {{ model_name: {name} }} # in MLflow; its versions compete for one champion
"""


def init(
    output: Annotated[Path, typer.Argument(help="File to write.")] = Path("run.yaml"),
    name: Annotated[str, typer.Option(help="Name of the run.", show_default="the file's")] = "",
    teacher: Annotated[str, typer.Option(help="Large model; asked for if not given.")] = "",
    student: Annotated[str, typer.Option(help="Small model; asked for if not given.")] = "",
    data: Annotated[str, typer.Option(help="Data file or dataset of the hub; asked for if not given.")] = "",
    task: Annotated[str, typer.Option(help="Task; asked for if not given.")] = "",
    method: Annotated[
        str, typer.Option(help="How the student is trained; asked for in a terminal.", show_default="skd")
    ] = "",
    example: Annotated[str, typer.Option("--from", help="Copy an example instead, e.g. demo or gemma-gsm8k.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write the YAML file of a run: from an example, or from five answers.

    A terminal is asked for what the options leave open, and again where an answer cannot be right.

    Examples: `skd init`, `skd init run.yaml --from demo`,
    `skd init --teacher org/large --student org/small --data train.jsonl --task gsm8k`.
    """
    from skd_lib._core.documents import parse_yaml
    from skd_lib.config import RunConfig, parse_section
    from skd_lib.config.names import run_name_from
    from skd_lib.storage import check_writable, write_text_atomic

    missing_data = ""
    if output.exists() and not force:
        raise SkdError("it exists already", where=str(output), hint="name another file, or add --force")
    if example:
        text = _example(example)
    else:
        answers = {"teacher": teacher, "student": student, "data": data, "task": task}
        missing = [f"--{question}" for question, answer in answers.items() if not answer]
        if missing and not sys.stdin.isatty():
            hint = "give the options, or --from an example"
            raise SkdError(f"not given: {', '.join(missing)}", where="skd init", hint=hint)
        for question, answer in answers.items():
            answers[question] = answer or _asked(question)
        method = method or (_asked("method", default="skd") if missing else "skd")
        missing_data = answers["data"] if _is_missing(answers["data"]) else ""
        source = _source(answers.pop("data"))
        quoted = {question: _quoted(answer) for question, answer in answers.items()}
        text = TEMPLATE.format(
            file=output,
            name=_quoted(name or run_name_from(output.stem)),
            source=source,
            method=_quoted(method),
            **quoted,
        )
    parse_section(RunConfig, parse_yaml(text, where="skd init"), where="skd init")
    check_writable(str(output.absolute().parent))
    write_text_atomic(output, text)
    if missing_data:
        say(f"warning: {missing_data}: there is no such file; `data.source.train` in {output} names it", err=True)
    say(f"{output} is written; check it with `skd run {output} --dry-run`, then run it with `skd run {output}`")


def _asked(question: str, default: str | None = None) -> str:
    """Ask a person, again until the answer can be right."""
    while True:
        answer = str(typer.prompt(QUESTIONS[question], default=default)).strip()
        try:
            _check(question, answer)
        except SkdError as error:
            say(f"error: {error}", err=True)
        else:
            return answer


def _check(question: str, answer: str) -> None:
    """Check one answer by itself; raise SkdError if it cannot be right."""
    from skd_lib.config import DistillConfig, TaskConfig, parse_section
    from skd_lib.models.references import parse_reference

    if not answer:
        raise SkdError("an answer is needed", where=question)
    if question in ("teacher", "student"):
        parse_reference(answer)
    elif question == "task":
        parse_section(TaskConfig, {"name": answer}, where="task")
    elif question == "method":
        parse_section(DistillConfig, {"method": answer}, where="distill")
    elif _is_missing(answer):
        raise SkdError("there is no such file", where=answer, hint="check the path; it is read from this folder")


def _example(name: str) -> str:
    known = sorted(path.stem for path in EXAMPLES.glob("*.yaml") if not path.stem.startswith("compare"))
    if name not in known:
        raise SkdError("there is no such example", where=f"--from {name}", hint=f"known: {', '.join(known)}")
    return (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")


def _source(data: str) -> str:
    from skd_lib.data.files import ending

    if "://" in data or Path(data).exists() or ending(data):
        return f"    type: files\n    train: [{_quoted(data)}]"
    return f"    type: hub\n    dataset: {_quoted(data)}\n    # subset: main # where the dataset has several"


def _is_missing(data: str) -> bool:
    """Return whether a file of this machine is named that is not there."""
    from skd_lib.data.files import ending

    return "://" not in data and not set("*?[") & set(data) and bool(ending(data)) and not Path(data).exists()


def _quoted(text: str) -> str:
    """Return the text as YAML: in quotes, unless it is plainly a word or a path."""
    plain = re.fullmatch(r"(gs://|s3://)?[A-Za-z/.][\w./@-]*/[\w./@-]+|[a-z][a-z_]*[0-9a-z_.-]*", text)
    return (
        text
        if plain and text not in ("yes", "no", "on", "off", "true", "false", "null", "y", "n")
        else json.dumps(text)
    )
