"""`skd specdec` in this process: loading torch anew for each case would take longer than all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from skd_kfp.pipelines.cli import app
from skd_lib.errors import SkdError
from skd_lib.results import Specdec
from tests.conftest import SaveTinyModel

QUICK = ("--gammas", "1,2", "--gamma", "2", "--sweep", "none", "--repeats", "1", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "teacher": save_tiny_model(root / "teacher"),
        "draft": save_tiny_model(root / "draft", seed=1, layers=1),
        "before": save_tiny_model(root / "before", seed=2, layers=1),
    }


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("Open the file.\n\nClose the file.\nPrint the table.\n", encoding="utf-8")
    return path


def skd(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["specdec", *map(str, arguments)], env={"COLUMNS": "200"})
    if isinstance(result.exception, SkdError):
        raise result.exception
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def test_prompts_from_a_text_file(models: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    pair = (models["teacher"], models["draft"], "--before", models["before"])
    shown = skd(*pair, "--prompts", prompts, "--temperatures", "0", "--batch-sizes", "1,3", *QUICK, "--out", out)
    written = json.loads(out.read_text(encoding="utf-8"))
    assert list(written) == ["before", "after"]
    result = Specdec.model_validate(written["after"])
    assert [(each.batch_size, each.prompts) for each in result.settings] == [(1, 3), (3, 3)]
    assert [length.gamma for length in result.settings[0].lengths] == [1, 2]
    for heading in ("before: greedy, batch size 1", "after: greedy, batch size 3", "after: latency in ms"):
        assert heading in shown
    assert f"{result.speedup:.2f}x" in shown
    assert f"At batch size 1: 2 drafted tokens, {result.best_speedup:.2f}x the teacher alone; no other length" in shown
    assert '"num_speculative_tokens": 2}' in shown
    assert result.draft_only_tokens_per_second is not None
    assert re.search(rf"draft alone +{result.draft_only_tokens_per_second:.1f} ", shown)
    assert "greedy output is the teacher's own" in shown
    assert result.vllm is not None
    assert f"\n{result.vllm.command}\n" in shown  # in one line, to be copied


def test_prompts_from_the_test_set_of_a_run(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"source": f"word {number}", "target": f"answer {number}"} for number in range(12)]
    files = {}
    for split, part in {"train": rows[:4], "validation": rows[4:8], "test": rows[8:]}.items():
        files[split] = [str(tmp_path / f"{split}.jsonl")]
        Path(files[split][0]).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    config: dict[str, Any] = {
        "name": "tiny",
        "teacher": str(models["teacher"]),
        "student": str(models["draft"]),
        "data": {"source": {"type": "files", **files}, "near_duplicate_threshold": 1},
        "task": {"chat_template": False, "max_new_tokens": 5},
        "specdec": {"gamma": 2, "gammas": [2], "batch_sizes": [2], "temperatures": [0.0], "repeats": 1},
    }
    path, out = tmp_path / "run.yaml", tmp_path / "out.json"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    skd(models["teacher"], models["draft"], "--config", path, "--examples", "3", "--out", out)
    result = Specdec.model_validate(json.loads(out.read_text(encoding="utf-8"))["draft"])
    assert (result.gamma, result.batch_size, result.prompts) == (2, 2, 2)  # 3 rows hold one whole batch of 2
    assert result.tokens <= 2 * 5


def test_prompts_from_a_column(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "a"}\n{"question": "b"}\n', encoding="utf-8")
    options = ("--no-chat", "--template", "Q: {source}", "--batch-sizes", "2", "--temperatures", "1", *QUICK)
    shown = skd(models["teacher"], models["draft"], "--prompts", path, "--column", "question", *options)
    assert "temperature 1, batch size 2, 2 prompts" in shown
    assert "teacher's own" not in shown  # sampled: there is nothing to compare
    with pytest.raises(SkdError, match="row 1"):
        skd(models["teacher"], models["draft"], "--prompts", path, "--column", "prompt", *options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no prompts to decode"),
        (("--prompts", "nowhere.txt"), "prompts nowhere.txt: cannot read: No such file"),
        (("--prompts", "PROMPTS", "--gammas", "1,x"), "field `gammas"),
        (("--prompts", "PROMPTS", "--sweep", "some"), "field `sweep`"),
        (("--prompts", "PROMPTS", "--template", "no place"), "field `prompt`"),
        (("--prompts", "PROMPTS", "--out", "PROMPTS/out.json"), "cannot write"),
        (("--prompts", "PROMPTS", "--out", "."), "--out .: a folder, not a file"),
        (("--prompts", "PROMPTS", "--temperatures", "nan"), "field `temperatures.0`: Input should be a finite number"),
        (("--prompts", "PROMPTS", "--temperatures", "0,inf"), "field `temperatures.1`: Input should be a finite"),
        (("--prompts", "PROMPTS", "--gamma", "9", "--max-new-tokens", "8"), "specdec.gamma: 9 is beyond"),
        (("--prompts", "PROMPTS", "--gammas", "1,9", "--max-new-tokens", "8"), "specdec.gammas: 9 is beyond"),
    ],
)
def test_mistakes_are_named_before_a_model_is_looked_at(
    prompts: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [argument.replace("PROMPTS", str(prompts)) for argument in arguments]
    with pytest.raises(SkdError) as caught:
        skd("no/such/teacher", "no/such/draft", *given)
    assert message in str(caught.value)


def test_a_seed_is_in_range(prompts: Path) -> None:
    result = CliRunner().invoke(app, ["specdec", "a", "b", "--prompts", str(prompts), "--seed", str(2**70)])
    assert result.exit_code == 2
    assert "--seed" in result.output


def test_models_with_other_tokens(
    models: dict[str, Path], prompts: Path, tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    other = save_tiny_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token, number in vocabulary.items() if number in (300, 301)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(SkdError, match="differ in 2 of"):
        skd(models["teacher"], other, "--prompts", prompts, *QUICK)
