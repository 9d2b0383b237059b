"""The two steps of a comparison, as KFP calls them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from skd_lib.compare.result import Comparison
from skd_lib.errors import SkdError
from skd_lib.evaluation.predictions import write_predictions
from skd_lib.steps import compare_result, compare_table, compare_variant
from tests.compare.test_build import RIGHT, accuracy, answers
from tests.compare.test_trials import BASE

TRIALS = [{"variant": variant, "seed": float(seed), "init": "", "overrides": {}} for variant, seed in RIGHT]
DRAFT = {"acceptance_rate": 0.5, "tokens_per_teacher_call": 2.0, "speedup": 1.5, "settings": []}


def result(folder: Path, number: int, **changes: Any) -> Path:
    """Run `compare_result` of one run; its folder."""
    right = RIGHT[TRIALS[number]["variant"], int(TRIALS[number]["seed"])]
    predictions, figures = folder / f"predictions-{number}", folder / f"figures-{number}"
    write_predictions(predictions, answers(right, order=number))
    figures.write_text(json.dumps({"steps": 5.0, "tokens_per_teacher_call_last_tenth": 2.5, "seconds_loss": 2.0}))
    values = {
        "trial": TRIALS[number],
        "scores": accuracy(right).metrics | {"examples": 40},
        "course": {"rejection_rate": [0.5, 0.25], "steps": [1.0, 2.0]},
        "draft": {} if number else DRAFT,
        **changes,
    }
    out = folder / f"result-{number}"
    compare_result.main(
        **{name: json.dumps(value, default=lambda score: score.model_dump()) for name, value in values.items()},
        predictions=predictions,
        figures=figures,
        result_out=out,
    )
    return out


def table(folder: Path, results: Sequence[Path], **changes: Any) -> dict[str, Any]:
    """Run `compare_table` on a list of artifacts, as it comes from a loop; its executor output."""
    artifacts = {"results": {"artifacts": [{"uri": str(path)} for path in results]}}
    values = {
        "failed": [{**TRIALS[0], "variant": "hot", "reason": "it exploded"}],
        "teacher": {"accuracy": {"score": 90, "low": 80, "high": 95}},
        **changes,
    }
    compare_table.main(
        **{name: json.dumps(value) for name, value in values.items()},
        **{f"{name}_out": folder / name for name in ("page", "runs", "comparison")},
        reference="skd",
        run_name="test",
        config='{"bootstrap_samples": 100}',
        task_config='{"metrics": ["accuracy"]}',
        executor_input=json.dumps({"inputs": {"artifacts": artifacts}}),
    )
    output: dict[str, Any] = json.loads((folder / "executor_output.json").read_text())
    return output


def test_table_of_collected_results(tmp_path: Path):
    output = table(tmp_path, [result(tmp_path, number) for number in range(len(TRIALS))])
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


def test_table_without_a_run_or_with_a_folder_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(SkdError, match="there is no run to compare"):
        table(tmp_path, [])
    with pytest.raises(SkdError, match="name a folder that step `compare_result` wrote") as raised:
        table(tmp_path, [result(tmp_path, 0), tmp_path / "nowhere"])
    assert str(tmp_path / "nowhere" / "result.json") in str(raised.value)


def test_missing_figures_are_named(tmp_path: Path):
    folder = result(tmp_path, 0)
    with pytest.raises(SkdError, match="name the figures that step `distill` wrote"):
        compare_result.main(
            trial=json.dumps(TRIALS[0]),
            scores=json.dumps({"accuracy": {"score": 1, "low": 0, "high": 2}}),
            predictions=folder / "predictions.jsonl",
            figures=tmp_path / "nowhere.json",
            result_out=tmp_path / "out",
        )


def test_what_is_wrong_with_a_run_is_named(tmp_path: Path):
    with pytest.raises(SkdError, match="--course"):
        result(tmp_path, 0, course={"steps": ["first"]})
    with pytest.raises(SkdError, match="--draft"):
        result(tmp_path, 0, draft={"speedup": 1.5})


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


@pytest.mark.parametrize("own", ["", "org/other"])
def test_variant_hands_on_its_students_fingerprint(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    trial = {"variant": "a", "seed": 3, "overrides": {"student": own} if own else {}}
    known = {"org/teacher": "commit:1", "org/student": "commit:2", "org/other": "commit:3"}
    config = BASE | {"student": "org/student", "student_init": {"mode": "as_is"}}
    compare_variant.main(trial=json.dumps(trial), config=json.dumps(config), model_fingerprints=json.dumps(known))
    handed_on = json.loads((tmp_path / "executor_output.json").read_text())["parameterValues"]
    assert handed_on["student_fingerprint"] == known[own or "org/student"]
