"""The two steps of a comparison, as KFP calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skd_lib.compare.result import Comparison
from skd_lib.errors import SkdError
from skd_lib.evaluation.predictions import write_predictions
from skd_lib.steps import compare_table, compare_variant
from tests.compare.test_build import RIGHT, accuracy, answers
from tests.compare.test_trials import BASE

TRIALS = [{"variant": variant, "seed": float(seed), "init": "", "overrides": {}} for variant, seed in RIGHT]
DRAFT = {"acceptance_rate": 0.5, "tokens_per_teacher_call": 2.0, "speedup": 1.5, "settings": []}


def table(folder: Path, **changes: Any) -> dict[str, Any]:
    """Run `compare_table` on lists of artifacts, as they come from a loop; its executor output."""
    predictions = []
    for number, right in enumerate(RIGHT.values()):
        predictions.append(folder / f"predictions-{number}")
        write_predictions(predictions[-1], answers(right, order=number))
    metadata = {"steps": 5.0, "tokens_per_teacher_call_last_tenth": 2.5, "seconds_loss": 2.0, "display_name": "x"}
    inputs = {
        "predictions": {"artifacts": [{"uri": str(path)} for path in predictions]},
        "figures": {"artifacts": [{"uri": "gs://bucket/metrics", "metadata": metadata}] * len(RIGHT)},
    }
    values = {
        "trials": TRIALS,
        "scores": [accuracy(right).metrics | {"examples": 40} for right in RIGHT.values()],
        "courses": [{"rejection_rate": [0.5, 0.25], "steps": [1.0, 2.0]}] * len(RIGHT),
        "drafts": [DRAFT, *[{}] * (len(RIGHT) - 1)],
        "failed": [{**TRIALS[0], "variant": "hot", "reason": "it exploded"}],
        "teacher": {"accuracy": {"score": 90, "low": 80, "high": 95}},
        **changes,
    }
    compare_table.main(
        **{name: json.dumps(value, default=lambda score: score.model_dump()) for name, value in values.items()},
        **{f"{name}_out": folder / name for name in ("page", "runs", "comparison")},
        reference="skd",
        run_name="test",
        config='{"bootstrap_samples": 100}',
        task_config='{"metrics": ["accuracy"]}',
        executor_input=json.dumps({"inputs": {"artifacts": inputs}}),
    )
    output: dict[str, Any] = json.loads((folder / "executor_output.json").read_text())
    return output


def test_table_of_collected_artifacts(tmp_path: Path):
    output = table(tmp_path)
    comparison = Comparison.model_validate_json((tmp_path / "comparison").read_text())
    assert [each.variant for each in comparison.variants] == ["skd", "sft", "seqkd", "hot"]
    skd, sft, _, hot = comparison.variants
    assert (skd.costs["rejection_rate"], skd.costs["steps"], skd.costs["tokens_per_teacher_call"]) == (0.375, 5, 2.5)
    assert skd.draft == {"acceptance_rate": 0.5, "tokens_per_teacher_call": 2, "speedup": 1.5}
    assert sft.tests["accuracy"].seeds == 2
    assert (hot.runs, hot.failed) == (0, 1)
    assert "| hot | 0 | it exploded |" in (tmp_path / "page").read_text()
    assert len((tmp_path / "runs").read_text().splitlines()) == 1 + len(RIGHT) + 1
    course = comparison.trials[0].course
    assert course is not None
    assert (course.steps, course.rejection_rate) == ((1, 2), (0.5, 0.25))
    headline = output["artifacts"]["comparison"]["artifacts"][0]["metadata"]
    assert headline["skd/accuracy"] == pytest.approx(77.5)


def test_lists_of_different_length_are_refused(tmp_path: Path):
    with pytest.raises(SkdError, match="the lists of the 5 runs have different lengths: \\[4, 5\\]"):
        table(tmp_path, courses=[{}] * 4)


def test_variant_hands_on_its_own_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    overrides = {"distill.method": "sft", "student_init": {"mode": "prune", "keep_first": 1.0, "keep_last": 2.0}}
    trial = {"variant": "a", "seed": 3.0, "init": "cut", "overrides": overrides}
    compare_variant.main(trial=json.dumps(trial), config=json.dumps(BASE))
    handed_on = json.loads((tmp_path / "executor_output.json").read_text())["parameterValues"]
    assert {name: handed_on[name] for name in ("student", "seed", "label", "init_label")} == {
        "student": "",
        "seed": 3,
        "label": "a-seed-3",
        "init_label": "cut-seed-3",
    }
    assert handed_on["distill_config"]["method"] == "sft"
    assert handed_on["student_init_config"]["keep_last"] == 2
