"""`skd init`: files that can be run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from skd_kfp.pipelines.cli.init import EXAMPLES
from skd_lib.config import load_config
from tests.conftest import Skd

FLAGS = ["--teacher", "org/teacher", "--student", "org/student", "--task", "gsm8k"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("train.jsonl", {"type": "files", "train": ["train.jsonl"]}),
        ("gs://bucket/my data/*.parquet", {"type": "files", "train": ["gs://bucket/my data/*.parquet"]}),
        ("openai/gsm8k", {"type": "hub", "dataset": "openai/gsm8k"}),
        ("org/data-v1.5", {"type": "hub", "dataset": "org/data-v1.5"}),
        ("007.csv", {"type": "files", "train": ["007.csv"]}),
    ],
)
def test_flags_are_answers(skd: Skd, tmp_path: Path, data: str, expected: dict[str, object]) -> None:
    path = tmp_path / "my-run.yaml"
    done = skd("init", path, *FLAGS, "--data", data)
    assert done.returncode == 0, done.stderr
    config = load_config(path)
    assert (config.name, config.teacher, config.student) == ("my-run", "org/teacher", "org/student")
    assert config.data.source.model_dump(exclude_defaults=True) | {"type": config.data.source.type} == expected
    assert [each.name for each in tmp_path.iterdir()] == ["my-run.yaml"]
    assert config.registry.model_name == "my-run"
    assert (f"warning: {data}: there is no such file" in done.stderr) == (data in ("train.jsonl", "007.csv"))


def test_what_it_wrote_passes_a_dry_run(skd: Skd, tmp_path: Path) -> None:
    rows = [{"source": f"Add {n} and 1.", "target": f"#### {n + 1}"} for n in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "warning" not in skd("init", tmp_path / "run.yaml", *FLAGS, "--data", tmp_path / "train.jsonl").stderr
    done = skd("run", tmp_path / "run.yaml", "--dry-run", "--runs-dir", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    fewer = "fewer than validation_examples: 64, test_examples: 256"
    assert f"splits   train 48, validation 6, test 6; {fewer}\n" in done.stdout
    assert "registry the student becomes a version of run, " in done.stdout
    (tmp_path / "train.jsonl").unlink()
    done = skd("run", tmp_path / "run.yaml", "--dry-run", "--runs-dir", tmp_path / "runs", "--tracking-uri", "")
    assert done.returncode == 2
    assert f"{tmp_path / 'train.jsonl'}: cannot read: No such file" in done.stderr
    assert "registry off" in done.stdout


@pytest.mark.parametrize("name", ["demo", "gemma-gsm8k"])
def test_examples_are_copied(skd: Skd, tmp_path: Path, name: str) -> None:
    assert skd("init", tmp_path / "run.yaml", "--from", name).returncode == 0
    assert (tmp_path / "run.yaml").read_text() == (EXAMPLES / f"{name}.yaml").read_text()


def test_a_terminal_is_asked(skd: Skd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").write_text("")
    data = tmp_path / "train.jsonl"
    answers = io.StringIO(f"org/teacher\norg/student\n{data}\ngsm8k\non_policy\n")
    answers.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", answers)
    assert skd("init", tmp_path / "run.yaml").returncode == 0
    config = load_config(tmp_path / "run.yaml")
    assert (config.teacher, config.student, config.task.name) == ("org/teacher", "org/student", "gsm8k")
    assert (config.data.source.train, config.distill.method) == ([str(data)], "on_policy")  # type: ignore[union-attr]


def test_an_answer_that_cannot_be_right_is_asked_for_again(
    skd: Skd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"teacher": "no teacher", "student": "ftp://x", "data": "missing.jsonl", "task": "gsm9k", "method": "sdk"}
    right = ("org/teacher", "org/student", "org/data", "gsm8k", "")
    lines = (f"{one}\n{other}\n" for one, other in zip(wrong.values(), right, strict=True))
    answers = io.StringIO("".join(lines))
    answers.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", answers)
    done = skd("init", tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 5
    assert "missing.jsonl: there is no such file" in done.stderr
    assert load_config(tmp_path / "run.yaml").distill.method == "skd"


def test_a_name_is_made_of_any_files_name(skd: Skd, tmp_path: Path) -> None:
    assert skd("init", tmp_path / "My Run.yaml", *FLAGS, "--data", "train.jsonl").returncode == 0
    assert load_config(tmp_path / "My Run.yaml").name == "my-run"


def test_errors_name_the_command_since_no_file_is_written(skd: Skd, tmp_path: Path) -> None:
    done = skd("init", tmp_path / "run.yaml", "--task", "gsm9k", *FLAGS[:4], "--data", "x.jsonl")
    assert "skd init, field `task`" in done.stderr
    assert "run.yaml" not in done.stderr


def test_a_missing_folder_is_made(skd: Skd, tmp_path: Path) -> None:
    assert skd("init", tmp_path / "sub" / "run.yaml", "--from", "demo").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "org/teacher"], "not given: --student, --data, --task"),
        (["--from", "demos"], "known: demo"),
        ([*FLAGS[:4], "--data", "train.jsonl", "--task", "gsm9k"], "gsm9k"),
    ],
)
def test_errors_leave_no_file(
    skd: Skd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    done = skd("init", tmp_path / "run.yaml", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_by_force(skd: Skd, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    assert skd("init", path, "--from", "demo").returncode == 2
    assert path.read_text() == "mine"
    assert skd("init", path, "--from", "demo", "--force").returncode == 0
    assert path.read_text() != "mine"
