"""`skd evaluate`, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import SaveTinyModel, Skd
from tests.support.local_runs import finished_run


@pytest.fixture
def models(tmp_path: Path, save_tiny_model: SaveTinyModel) -> tuple[Path, Path]:
    return save_tiny_model(tmp_path / "one", seed=2), save_tiny_model(tmp_path / "other", seed=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"question": f"The file {n} has been saved.", "answer": f"Le fichier {n}."} for n in range(24)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text("prompt: '{source}'\nmetrics: [chrf]\nmax_new_tokens: 8\n")
    return tmp_path / "test.jsonl"


def test_scores_and_their_difference(
    skd: Skd, models: tuple[Path, Path], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--data", data, "--task", tmp_path / "task.yaml", "--source", "question", "--target", "answer"]
    done = skd(
        "evaluate", models[0], "--baseline", models[1], *options, "--json", "--predictions", tmp_path / "answers"
    )
    assert done.returncode == 0, done.stderr
    assert "evaluating 24/24" in caplog.text
    figures = json.loads(done.stdout)
    scores = [figures[name]["chrf"]["score"] for name in ("model", "baseline")]
    assert figures["difference"]["chrf"]["difference"] == pytest.approx(scores[0] - scores[1])
    assert figures["difference"]["chrf"]["p_value"] is not None
    assert figures["model"]["examples"] == 24
    assert {path.name for path in (tmp_path / "answers").iterdir()} == {"model.jsonl", "baseline.jsonl"}
    table = skd("evaluate", models[0], "--baseline", models[1], *options, "--examples", "5")
    assert "Model minus baseline" in table.stdout
    assert table.stdout.count("chrF") == 2
    assert "† 5 examples are too few" in table.stdout
    assert "too few examples" in table.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there are no examples"),
        (["--data", "test.jsonl"], "no task is named"),
        (["--data", "missing.jsonl", "--task", "gsm8k"], "missing.jsonl"),
        (["--data", "missing.jsonl", "--task", "gsm9k"], "gsm9k"),
    ],
)
def test_what_is_missing_is_said(skd: Skd, models: tuple[Path, Path], options: list[str], message: str) -> None:
    done = skd("evaluate", models[0], *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_misspelt_model_is_told_before_what_else_is_missing(skd: Skd) -> None:
    done = skd("evaluate", "runs/demo/studnet")
    assert done.returncode == 2
    assert "runs/demo/studnet: no such folder, and not a hub id" in done.stderr


def test_a_runs_student_is_asked_its_runs_test_set(
    skd: Skd, data: Path, tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    root = finished_run(tmp_path, "demo", save_tiny_model)
    config = yaml.safe_load((root / "config.yaml").read_text())
    for split, text in {"train": "A train.", "validation": "A validation."}.items():
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": text, "answer": text}))
    files = {"test": [str(data)], **{split: [str(tmp_path / f"{split}.jsonl")] for split in ("train", "validation")}}
    columns = {"source": "question", "target": "answer"}
    config["data"]["source"] = {"type": "files", "columns": columns, **files}
    config["task"] = {"metrics": ["chrf"], "max_new_tokens": 8}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    done = skd("evaluate", root / "student", "--examples", "4", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["examples"] == 4
