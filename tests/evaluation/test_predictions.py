from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from skd_lib.errors import SkdError
from skd_lib.evaluation.metrics import measure
from skd_lib.evaluation.predictions import (
    Prediction,
    compare,
    paired_results,
    perplexity,
    read_predictions,
    write_predictions,
)
from skd_lib.results import PairedTest


def prediction(number: int, text: str, target: str = "the file has been saved", **more: Any) -> Prediction:
    return Prediction(f"id-{number}", "source", target, text, 3, False, **more)


def answered(text: str, rows: int = 30, **scores: float) -> list[Prediction]:
    return [prediction(number, text, scores={"chrf": 0, "bleu": 0, **scores}) for number in range(rows)]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    strange = [
        "",
        "two\nlines\r\n",
        "\u2028\u2029\x85",
        "\ud800 lone \udfff",
        "\U0001f600 é",
        '"quoted" \\ud800',
        "\x00\x1b",
    ]
    rows = [prediction(number, text) for number, text in enumerate(strange)]
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, rows)
    assert read_predictions(path) == rows
    assert "é" in path.read_text(encoding="utf-8")  # readable to people
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: not JSON"),
        ('{"id": "x"}', "line 2: not a prediction's row"),
        ("[1]", "line 2: not a prediction's"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [prediction(0, "x")])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(SkdError, match=complaint):
        read_predictions(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SkdError, match=r"nowhere\.jsonl: cannot read"):
        read_predictions(tmp_path / "nowhere.jsonl")


def test_models_are_compared_example_by_example() -> None:
    good, bad = answered("the file has been saved"), answered("the file")
    result = compare([good], [bad[::-1]], resamples=200)
    assert result.keys() == {"chrf", "bleu"}
    targets = [row.target for row in good]
    expected = 100 - measure("chrf", [row.prediction for row in bad], targets).score
    comparison, examples = result["chrf"]
    assert comparison.difference == pytest.approx(expected)
    assert examples == 30


def test_means_are_compared_on_the_examples_that_both_were_scored_by() -> None:
    first, second = answered("a", 4, accuracy=100.0), answered("a", 4, accuracy=0.0)
    second[1] = dataclasses.replace(second[1], scores={})
    comparison, examples = compare([first], [second])["accuracy"]
    assert (comparison.difference, comparison.low, comparison.high, examples) == (100, 100, 100, 3)


def test_perplexities_are_compared_over_tokens() -> None:
    def rows(nll: float) -> list[Prediction]:
        return [
            prediction(n, "", scores={"perplexity": 1}, reference_tokens=n + 1, reference_nll=nll * (n + 1))
            for n in range(20)
        ]

    comparison, _ = compare([rows(1.0)], [rows(2.0)])["perplexity"]
    assert comparison.difference == pytest.approx(math.exp(1) - math.exp(2))
    with pytest.raises(SkdError, match="likelihood of 1 of 21 references is not a number, first of id-99"):
        perplexity([*rows(1.0), prediction(99, "", reference_tokens=3)])
    assert perplexity([prediction(0, "", reference_tokens=1, reference_nll=1e6)]).score < float("inf")


def test_every_two_models_of_a_run_are_compared(tmp_path: Path) -> None:
    files = {}
    answers = {"teacher": "the file has been saved", "student_before": "no", "student_after": "the file"}
    for role, text in answers.items():
        files[role] = tmp_path / f"{role}.jsonl"
        write_predictions(files[role], answered(text))
    rows = paired_results(files, resamples=100)
    before, after = "student_before", "student_after"
    assert {(row.a, row.b) for row in rows} == {(before, "teacher"), (after, "teacher"), (after, before)}
    assert len(rows) == 6
    for row in rows:
        assert row.model_dump().keys() == {"a", "b", "metric", "difference", "low", "high", "p_value", "n"}
        assert row.n == 30
    gain = next(row for row in rows if (row.a, row.b, row.metric) == (after, before, "chrf"))
    assert 0 < gain.low <= gain.difference
    assert PairedTest.model_validate_json(gain.model_dump_json()) == gain
    assert paired_results({"teacher": files["teacher"]}) == []


def test_rows_of_an_older_version_are_read(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    old = {"id": "1", "source": "s", "target": "t", "prediction": "p", "tokens": 3, "truncated": False}
    path.write_text(json.dumps(old) + "\n")
    assert read_predictions(path) == [Prediction(**old)]


def test_other_examples_cannot_be_compared() -> None:
    rows = [prediction(0, "a"), prediction(1, "b")]
    for others in (rows[:1], [rows[0], prediction(2, "b")], [rows[0], prediction(1, "b", "another target")]):
        with pytest.raises(SkdError, match="different examples"):
            compare([rows], [others])
