"""One run of the step over a test set and several held-out sets, some of them broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skd_lib.config import DataConfig, TaskConfig
from skd_lib.config.step import StepConfig
from skd_lib.data.prepared import prepare
from skd_lib.evaluation.predictions import read_predictions
from skd_lib.report.folders import read_evaluation
from skd_lib.steps.evaluate import MAX_TABLE_ROWS, Role, held_out_sets, main, table
from tests.conftest import SaveTinyModel
from tests.evaluation.test_predictions import prediction

TASK: dict[str, Any] = TaskConfig(max_new_tokens=8, metrics=["chrf"]).model_dump()


def rows(path: Path, count: int, target: str = "the file {}") -> str:
    values = [{"source": f"{path.stem} {i}", "target": target.format(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")
    return str(path)


def held_out(name: str, file: str, **task: Any) -> dict[str, Any]:
    return {"name": name, "source": {"type": "files", "files": [file]}, "task": task}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("held_out")
    config = {
        "source": {"type": "files", "train": [rows(folder / "train.jsonl", 30)]},
        "near_duplicate_threshold": 1,
        "held_out": [
            held_out("numbers", rows(folder / "numbers.jsonl", 5, "#### {}"), answer="marked", metrics=["accuracy"]),
            held_out("words", rows(folder / "words.jsonl", 4), metrics=["accuracy", "rougeL", "perplexity"]),
            held_out("unscorable", rows(folder / "unscorable.jsonl", 3), metrics=["accuracy"]),
            held_out("too_long", rows(folder / "long.jsonl", 2), max_new_tokens=5000),
            held_out("nowhere", str(folder / "nowhere.jsonl")),
            held_out("lost", rows(folder / "lost.jsonl", 3)),
        ],
    }
    prepare(DataConfig.model_validate(config), folder / "data", seed=0)
    (folder / "data/held_out/lost.jsonl").unlink()
    out = folder / "out"
    main(
        model=save_tiny_model(folder / "model", seed=3),
        data=folder / "data",
        role=Role.student_after,
        evaluation_out=out,
        config=json.dumps({"evaluation": {"batch_size": 4, "bootstrap_samples": 100}, "task": TASK}),
    )
    return out, json.loads((out / "scores.json").read_text())


def test_every_set_is_scored_or_said_to_be_missing(result: tuple[Path, dict[str, Any]]) -> None:
    _, scores = result
    assert scores.keys() == {"role", "label", "model_uri", "data", "chrf", "examples", "seconds", "held_out"}
    sets = scores["held_out"]
    assert list(sets) == ["numbers", "words", "unscorable", "too_long", "nowhere", "lost"]
    assert sets["numbers"].keys() == {"accuracy", "examples", "seconds"}
    assert sets["numbers"]["examples"] == 5
    assert sets["words"]["rougeL"]["low"] <= sets["words"]["rougeL"]["score"] <= sets["words"]["rougeL"]["high"]
    assert sets["words"]["perplexity"]["score"] > 1
    assert "no reference holds an answer" in sets["words"]["missing"]["accuracy"]
    assert "no reference holds an answer" in sets["unscorable"]["missing"]["accuracy"]
    assert "positions" in sets["too_long"]["missing"]["chrf"]
    for name in ("nowhere", "lost"):
        assert "No such file" in sets[name]["missing"]["chrf"]
        assert "\n" not in sets[name]["missing"]["chrf"]
        assert sets[name]["examples"] == 0


def test_answers_of_each_set_are_kept(result: tuple[Path, dict[str, Any]]) -> None:
    out, _ = result
    assert len(read_predictions(out / "held_out/numbers.jsonl")) == 5
    words = read_predictions(out / "held_out/words.jsonl")
    assert words[0].scores.keys() == {"rougeL", "perplexity"}
    assert words[0].reference_tokens > 0
    assert read_predictions(out / "held_out/nowhere.jsonl") == []
    assert {row.source.split()[0] for row in read_predictions(out / "predictions.jsonl")} == {"train"}


def test_a_set_s_task_in_the_step_s_config_goes_before_the_manifest_s(tmp_path: Path) -> None:
    sets = [held_out(name, rows(tmp_path / f"{name}.jsonl", 3), metrics=["accuracy"]) for name in ("a", "b")]
    source = {"type": "files", "train": [rows(tmp_path / "train.jsonl", 30)]}
    prepared = prepare(DataConfig.model_validate({"source": source, "held_out": sets}), tmp_path / "data", seed=0)
    settings = StepConfig(task=TaskConfig(stop=["x"]), held_out={"a": TaskConfig(metrics=["rougeL"])})
    found = held_out_sets(prepared, settings)
    assert (found["a"].task.metrics, found["a"].task.stop) == (["rougeL"], [])
    assert (found["b"].task.metrics, found["b"].task.stop) == (["accuracy"], ["x"])


def test_the_report_reads_the_scores(result: tuple[Path, dict[str, Any]]) -> None:
    scores = read_evaluation(result[0]).scores
    assert scores.figures().keys() == {"chrf"}
    assert scores.held_out["numbers"].figures().keys() == {"accuracy"}
    assert scores.held_out["nowhere"].missing.keys() == {"chrf"}


def test_the_table_is_short_and_can_be_written() -> None:
    answers = [prediction(number, "\ud800" + "x" * 100_000, scores={"chrf": 1.0}) for number in range(600)]
    columns = table([*answers[:1], prediction(-1, "<script>"), *answers])
    assert {len(column) for column in columns.values()} == {MAX_TABLE_ROWS}
    assert columns["chrf"][:3] == [1.0, None, 1.0]
    assert columns["prediction"][1] == "<script>"
    assert len(json.dumps(columns, ensure_ascii=False).encode()) < MAX_TABLE_ROWS * 5000
