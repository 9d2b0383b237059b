"""Every block of code in the documentation works: its commands are run or parsed by the program they call.

A block of an unknown language, and a command of an unknown program, are errors: give them a way here.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from skd_kfp.pipelines import cli
from skd_lib.config import RunConfig, TaskConfig, parse_overrides, parse_section
from skd_lib.models.records import write_record
from tests.conftest import ROOT, SaveTinyModel, Skd

SHELL = ("bash", "sh", "console")
NOT_RUN = {
    **dict.fromkeys(
        ("convert_hf_to_gguf.py", "llama-quantize", "llama-server", "mlx_lm.convert", "mlx_lm.generate", "ollama"),
        "tools of other formats, not installed here",
    ),
    "optimum-cli": "wants an older transformers",
    "jq": "not installed everywhere",
    "cosign": "checks images that a release publishes",
    "docker": "tests/images builds and runs the images",
    "gcloud": "needs an account",
    "git": "changes the repository",
    "kubectl": "needs a cluster; tests/kubeflow checks the manifests",
    "pip": "tests/test_imports.py installs the wheel",
    "torchrun": "tests/training starts processes",
    "vllm": "needs a GPU; tests/specdec checks the line that is printed",
    "run": "this is CI",
    **dict.fromkeys(("cd", "export", ".", "source"), "of the shell"),
}
"""Programs whose commands are only read: files of this repository that they name exist."""
RUN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("run", "compare", "draft", "submit"), ("--dry-run",)),  # whole runs are other tests
    **dict.fromkeys(("card", "compile", "config", "doctor", "evaluate", "generate", "report", "runs"), ()),
    "init": ("--force",),
    "specdec": (
        "--examples=2",
        "--max-new-tokens=8",
        "--gammas=2",
        "--batch-sizes=1",
        "--temperatures=0",
        "--repeats=1",
    ),
}
"""Commands of skd that are run in a prepared folder, with what is added to them; all others need a server."""
SLOW = ("mlflow", "python")
"""Programs that import for seconds."""
LOADING = ("evaluate", "generate", "specdec")
STAND_INS = {
    "pipelines/configs/demo.yaml": "tiny.yaml",
    "google/gemma-7b-it": "./teacher",
    "student-f16.gguf": "./draft",
    "google/gemma-2b-it": "./draft",
    "Qwen/Qwen2.5-7B-Instruct": "./teacher",
    "Qwen/Qwen2.5-0.5B-Instruct": "./draft",
}
"""What comes from the network, and what stands for it where models or data are loaded."""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def find_blocks() -> Iterator[Block]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("images/*.md")]
    for page in sorted(pages):
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, found.start()) + 1
            yield Block(page.relative_to(ROOT).as_posix(), line, found[1], found[2])


def words(text: str) -> Iterator[list[str]]:
    """Yield the simple commands of a shell's text as their words, without the variables that are set before them."""
    lexer = shlex.shlex(re.sub(r"(^|\s)#.*$", "", text, flags=re.MULTILINE).replace("\\\n", " "), True, True, "\n;&|")
    lexer.commenters, lexer.whitespace, lexer.whitespace_split = "", " \t\r", True
    command: list[str] = []
    for word in [*lexer, "\n"]:
        if set(word) <= set("\n;&|"):
            yield command
            command = []
        elif command or not re.match(r"\w+=", word):
            command.append(word)


def program(command: list[str]) -> str:
    return Path(command[0]).name or command[0]


BLOCKS = list(find_blocks())
COMMANDS = [
    pytest.param(command, id=f"{block}:{' '.join(command)[:60]}", marks=[pytest.mark.slow] * (program(command) in SLOW))
    for block in BLOCKS
    if block.language in SHELL or (not block.language and block.text.startswith(("skd ", "make ", "$ ")))
    for command in words(block.text)
    if command
]


def parse_skd(arguments: list[str]) -> str:
    """Let the program's own parser read a command; return the name of the command."""
    command: Any = typer.main.get_command(cli.app)
    context = command.make_context("skd", [], resilient_parsing=True)
    name = ""
    while hasattr(command, "resolve_command"):
        if arguments[0].startswith("--"):
            assert arguments[0] in {option for parameter in command.params for option in parameter.opts}, arguments
            return name
        name, command, arguments = command.resolve_command(context, arguments)
        groups = hasattr(command, "resolve_command")
        context = command.make_context(name, list(arguments), parent=context, resilient_parsing=groups)
    for change in context.params.get("changes") or ():
        parse_overrides([change])
    return name


def parse_make(arguments: list[str]) -> None:
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def parse_mlflow(arguments: list[str]) -> None:
    from mlflow.cli import cli as mlflow

    name, command, rest = mlflow.resolve_command(mlflow.make_context("mlflow", [], resilient_parsing=True), arguments)
    command.make_context(name, rest)


def parse_python(arguments: list[str]) -> None:
    """Scripts are run with --help by tests/test_docs.py."""
    if arguments[0] == "-c":
        exec(arguments[1], {})  # noqa: S102 - our own text
    else:
        assert (ROOT / arguments[0]).is_file()


PARSERS: Mapping[str, Callable[[list[str]], object]] = {
    "make": parse_make,
    "mlflow": parse_mlflow,
    "python": parse_python,
    "skd": parse_skd,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_its_program_takes(command: list[str]) -> None:
    name = program(command)
    assert name in PARSERS or name in NOT_RUN, f"`{name}`: add it to PARSERS, or to NOT_RUN with the reason"
    if name in PARSERS:
        PARSERS[name](command[1:])
    named = [word for word in command if re.match(r"(pipelines|images|docs|examples|components|skd_lib)/", word)]
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_a_command_that_is_wrong_is_caught() -> None:
    for wrong in ("run x.yaml --nonsense", "rnu x.yaml", "run x.yaml --set seed", "registry", "--verison"):
        with pytest.raises(Exception):  # noqa: B017, PT011 - of typer's own click, or ours
            parse_skd(wrong.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Path:
    """A folder with everything that the pages' commands name: models, data, configurations, runs."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("docs", "pipelines"):
        (folder / name).symlink_to(ROOT / name)
    save_tiny_model(folder / "teacher", seed=2)
    save_tiny_model(folder / "draft", seed=1)
    write_record(folder / "draft", lineage={"method": "skd", "base_student": "org/small", "teacher": "org/large"})
    for run in ("arithmetic", "demo", "draft", "gemma-gsm8k", "tickets"):
        (folder / "runs" / run).mkdir(parents=True)
        (folder / "runs" / run / "teacher").symlink_to(folder / "teacher")
        (folder / "runs" / run / "student").symlink_to(folder / "draft")
        summary = {"task_metric": "chrf", "models": {}, "specdec": {}, "seconds": {"distill": 1.0}}
        (folder / "runs" / run / "summary.json").write_text(json.dumps(summary))
    rows = [
        {**dict.fromkeys(("source", "question"), f"Add {n} and 2:"), **dict.fromkeys(("target", "answer"), f"{n + 2}")}
        for n in range(60)
    ]
    for name, part in {"train": rows[:40], "test": rows[40:50], "validation": rows[50:], "questions": rows[:2]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "logs").mkdir()
    shutil.copy(folder / "train.jsonl", folder / "logs")
    (folder / "data/gsm8k").mkdir(parents=True)
    for name in ("train", "test"):
        shutil.copy(folder / f"{name}.jsonl", folder / "data/gsm8k")
    prepared = folder / "runs/arithmetic-data"  # by docs/evidence/evidence.py
    prepared.mkdir()
    for name in ("train", "test", "validation"):
        shutil.copy(folder / f"{name}.jsonl", prepared)
    (prepared / "teacher").symlink_to(folder / "teacher")
    (prepared / "student").symlink_to(folder / "draft")
    for name in ("lines", "prompts"):
        (folder / f"{name}.txt").write_text("Add 1 and 2\nAdd 3 and 4\n")
    config = {
        "name": "tiny",
        "teacher": "teacher",
        "student": "draft",
        "data": {
            "source": {"type": "files", **{name: [f"{name}.jsonl"] for name in ("train", "validation", "test")}},
            "near_duplicate_threshold": 1.0,
        },
        "task": {"max_new_tokens": 4, "max_prompt_tokens": 64},
        "evaluation": {"bootstrap_samples": 100},
    }
    for name in ("tiny", "draft", "gemma-gsm8k", "my", "tickets"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | {"name": name}))
    shutil.copy(ROOT / "pipelines/compiled/distillation.yaml", folder / "mine.yaml")
    shutil.copy(ROOT / "pipelines/compiled/distillation_comet.yaml", folder / "mine-comet.yaml")
    return folder


RUNNABLE = [
    pytest.param(list(found), id=" ".join(found)[:80].replace("\n", " "))
    for found in sorted({tuple(each.values[0][1:]) for each in COMMANDS if program(each.values[0]) == "skd"})
    if found[0] in RUN
    and "vllm" not in found  # which tests/vllm starts
    and not any(Path(word).stem.isupper() or "..." in word or "$" in word.partition(":")[0] for word in found)
]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", RUNNABLE)
def test_a_command_runs(skd: Skd, place: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(typer, "launch", lambda *_: 0)
    name = arguments[0]
    words = [STAND_INS.get(word, word) for word in arguments] if name in LOADING else arguments
    if "--output" in words:  # the place has that file for other commands
        words = [f"new-{word}" if before == "--output" else word for before, word in pairwise(["", *words])]
    done = skd(*words, *(option for option in RUN[name] if option not in words))
    assert done.returncode == 0 or (name == "doctor" and done.returncode == 1), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language not in SHELL], ids=str)
def test_a_block_is_what_it_seems(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for other in BLOCKS:
        if other.page == block.page and (named := re.match(r"# ([\w/]+\.yaml)\n", other.text)):
            (tmp_path / named[1]).parent.mkdir(exist_ok=True)
            (tmp_path / named[1]).write_text(other.text)
    if block.language == "json":
        for text in re.split(r"\n(?=[{\[])", block.text):  # one value, or one a line
            json.loads(text)
    elif block.language == "python":  # tests/test_examples.py runs those of the README and of the guide
        body = f"def block():\n{textwrap.indent(block.text, '    ')}"
        compile(body, block.page, "exec")
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("skd_"):
                module = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []
    elif block.language == "yaml":
        for document in yaml.safe_load_all(block.text):
            check_yaml(document, str(block))
    else:
        assert block.language in ("", "text", "diff", "mermaid"), f"`{block.language}`: a language without a test"


def check_yaml(document: dict[str, Any], where: str) -> None:
    """Validate a task's file, and a run's or its sections; others are a comparison's (test_docs), or a tool's."""
    if document.keys() <= TaskConfig.model_fields.keys():
        parse_section(TaskConfig, document, where=where)
    elif document.keys() <= RunConfig.model_fields.keys():
        least: dict[str, Any] = {"name": "run", "teacher": "org/a", "student": "org/b", "data": {}, "task": {}}
        least["data"] = {"source": {"type": "files", "train": ["train.jsonl"]}}
        data = {"data": {**least["data"], **document.get("data", {})}}
        parse_section(RunConfig, {**least, **document, **data}, where=where)
    else:
        assert document.keys() & {"base", "main", "resources", "apiVersion"}, "neither a run's file nor a tool's"
