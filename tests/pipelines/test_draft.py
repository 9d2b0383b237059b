"""`skd draft`: the run that its arguments make; with tiny models a whole run from a log, twice, and its texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from skd_lib.config import RunConfig, load_config
from tests.conftest import ROOT, SaveTinyModel, Skd

CANARY = "quetzalcoatl"
"""A word of every request, looked for in all that a run leaves behind."""


def log(path: Path, count: int = 60, offset: int = 0, *, answered: bool = False) -> Path:
    """Write requests as an API's log has them: some answered, some not, with the address of the person who asked."""
    rows = []
    for number in range(offset, offset + count):
        asked = {"role": "user", "content": f"How many {CANARY}s are {number} and {7 * number}? me{number}@example.org"}
        answer = {"role": "assistant", "content": f"{CANARY} {8 * number}"}
        rows.append({"messages": [asked, answer] if answered or number % 3 else [asked]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def planned(skd: Skd, tmp_path: Path, *options: str, answered: bool = False) -> RunConfig:
    """The configuration that --dry-run prints and --output writes."""
    file = tmp_path / "draft.yaml"
    file.unlink(missing_ok=True)
    logged = log(tmp_path / "log.jsonl", answered=answered)
    done = skd("draft", "org/big", "org/small", "--prompts", logged, "--output", file, "--dry-run", *options)
    assert done.returncode == 0, done.stderr
    assert f"{file} is written: `skd run {file}`" in done.stderr
    text, _, plan = done.stdout.partition("\nrun ")
    assert yaml.safe_load(text) == yaml.safe_load(file.read_text())
    assert "specdec_benchmark" in plan
    return load_config(file)


def test_a_log_becomes_a_run_without_fine_tuning_and_targets(skd: Skd, tmp_path: Path) -> None:
    config = planned(skd, tmp_path)
    assert (config.teacher, config.student) == ("org/big", "org/small")
    assert config.data.source.model_dump()["train"] == [str(tmp_path / "log.jsonl")]
    assert not config.teacher_sft.enabled
    assert config.data.private
    assert (config.distill.method, config.distill.engine) == ("skd", "transformers")
    assert (config.registry.gate, config.registry.model_name) == ("draft", "draft")
    example = load_config(ROOT / "pipelines/configs/draft.yaml")
    assert config.model_dump(exclude={"teacher", "student", "data"}) == example.model_dump(
        exclude={"teacher", "student", "data"}
    )


@pytest.mark.parametrize(
    ("method", "answers", "fields"),
    [
        ("seqkd", "ignore", {}),
        ("on_policy", "ignore", {"on_policy_fraction": 1.0}),
        ("skd_mixed", "ignore", {"sampled_fraction": 1.0}),
        ("sft", "read", {}),
    ],
)
def test_methods_that_sample_need_no_answer_of_the_log(
    skd: Skd, tmp_path: Path, method: str, answers: str, fields: dict[str, Any]
) -> None:
    config = planned(skd, tmp_path, "--method", method, "--name", "fast", answered=answers == "read")
    assert config.data.source.model_dump()["columns"]["answers"] == answers
    assert config.distill.model_dump() | fields == config.distill.model_dump()
    assert (config.name, config.registry.model_name) == ("fast", "fast")


def test_a_dry_run_fails_on_what_can_be_seen_to_be_wrong(skd: Skd, tmp_path: Path) -> None:
    logged = log(tmp_path / "log.jsonl")
    logged.write_text(logged.read_text() + '{"messages": 3}\n')
    done = skd("draft", "./no-folder", "org/small", "--prompts", logged, "--dry-run")
    assert done.returncode == 2
    assert "registry the student becomes" in done.stdout
    assert "log.jsonl, row 61, field `messages`: " in done.stderr
    assert "./no-folder: no such folder" in done.stderr


def test_vllm_samples_and_measures_and_set_has_the_last_word(skd: Skd, tmp_path: Path) -> None:
    config = planned(skd, tmp_path, "--vllm", "--set", "distill.training.max_steps=7")
    assert (config.distill.engine, config.specdec.engine) == ("vllm", "vllm")
    assert config.distill.training.max_steps == 7
    assert planned(skd, tmp_path, "--vllm", "--set", "specdec.engine=transformers").specdec.engine == "transformers"


def test_a_student_may_be_cut_from_the_teacher(skd: Skd, tmp_path: Path) -> None:
    logged = log(tmp_path / "log.jsonl")
    command = ("draft", "org/big", "--prompts", logged, "--dry-run")
    cut = [f"--set=student_init.{field}" for field in ("mode=prune", "keep_first=2", "keep_last=1")]
    done = skd(*command, *cut)
    assert done.returncode == 0, done.stderr
    assert "student  cut from the teacher (prune)" in done.stdout
    assert "skd draft: student: needed" in skd(*command).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "nope"), "unknown method 'nope'"),
        (("--set", "nope=1"), "skd draft, field `nope`: unknown field"),
        (("--set", "nope=null"), "skd draft, field `nope`: unknown field"),
        (("--name", "A draft"), "name"),
        (("--output", "README.md"), "it exists already"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    skd: Skd, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = skd("draft", "org/big", "org/small", "--prompts", log(tmp_path / "log.jsonl"), *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_command_that_goes_on_finds_its_own_file(skd: Skd, tmp_path: Path) -> None:
    logged, output = log(tmp_path / "log.jsonl"), tmp_path / "draft.yaml"
    command = ("draft", "org/big", "org/small", "--prompts", logged, "--output", output, "--dry-run")
    assert [skd(*command).returncode, skd(*command).returncode] == [0, 0]
    other = skd(*command, "--name", "other")
    assert (other.returncode, "it exists already" in other.stderr) == (2, True)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("gone.jsonl", "gone.jsonl: cannot read: No such file"),
        ("logs/*.jsonl", "error: logs/*.jsonl: "),
    ],
)
def test_a_log_that_is_not_there_is_an_error_of_a_dry_run_too(
    skd: Skd, tmp_path: Path, prompts: str, message: str
) -> None:
    output = tmp_path / "draft.yaml"
    logs = ["--prompts", log(tmp_path / "log.jsonl"), "--prompts", prompts]
    done = skd("draft", "org/big", "org/small", *logs, "--output", output, "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "hint: " in done.stderr
    assert not output.exists()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    save_tiny_model(folder / "teacher", seed=1, layers=3)
    save_tiny_model(folder / "student", seed=2, layers=1)
    (folder / "tmp").mkdir()
    (folder / "home").mkdir()
    return folder


def run(place: Path, logged: Path, *changes: str) -> str:
    """Run `skd draft` to its end in a process whose home and temporary folder are in `place`."""
    settings = {
        "task.max_prompt_tokens": 128,
        "task.max_new_tokens": 12,
        "distill.training.max_steps": 30,
        "distill.training.learning_rate": 3e-3,
        "distill.training.eval_steps": 15,
        "specdec.examples": 6,
        "specdec.gamma": 3,
        "specdec.gammas": [3],
        "specdec.batch_sizes": [4],
        "specdec.temperatures": [0],
        "specdec.repeats": 1,
        "data.redact": [{"pattern": r"[\w.]+@[\w.]+", "replacement": "MAIL"}],
        "registry.max_slowdown": 1,
        "data.near_duplicate_threshold": 1,
    }
    options = [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
    command = ["skd_kfp.pipelines.cli", "draft", "./teacher", "./student", "--prompts", str(logged)]
    done = subprocess.run(
        [sys.executable, "-m", *command, *options, *changes],
        cwd=place,
        env={**os.environ, "HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def holding(folder: Path, word: str) -> Iterator[Path]:
    """Yield the files in a folder that hold a word."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and word.encode() in path.read_bytes():
            yield path.relative_to(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_log_becomes_a_champion_and_its_texts_stay_where_they_were_put(place: Path) -> None:
    output = run(place, log(place / "day-1.jsonl"))
    assert "promoted: first champion of this name, with " in output
    assert "tokens per teacher call" in output
    summary = json.loads((place / "runs/draft/summary.json").read_text())
    before, after = summary["specdec"]["before"], summary["specdec"]["after"]
    assert after["tokens_per_teacher_call"] > before["tokens_per_teacher_call"]
    assert "vllm serve" in after["vllm"]["command"]

    # The log itself and, among the artifacts, the prepared data and the answers to its test split. Nothing else.
    *artifacts, logged = sorted(holding(place, CANARY), key=lambda path: path.parts[0] != "runs")
    assert logged == Path("day-1.jsonl")
    assert {(*path.parts[:3], path.parts[4]) for path in artifacts} == {
        ("runs", "draft", "artifacts", step) for step in ("prepare-data", "evaluate-student", "evaluate-teacher")
    }
    assert {path.name for path in holding(place, "@example.org")} == {"day-1.jsonl"}
    client = MlflowClient(f"sqlite:///{place}/runs/mlflow.db")
    version = client.get_model_version_by_alias("draft", "champion")
    assert version.tags["figure.tokens_per_teacher_call"] == str(after["tokens_per_teacher_call"])

    # Training for no step: the next draft is the student as it came, of which the teacher accepts less.
    second = run(place, log(place / "day-2.jsonl", offset=60), "--set=distill.training.learning_rate=1e-12")
    assert "not promoted: " in second
    assert "tokens per teacher call against" in second
    assert client.get_model_version_by_alias("draft", "champion").version == version.version
