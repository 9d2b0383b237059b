from __future__ import annotations

from pathlib import Path

import pytest

from skd_lib.errors import SkdError
from skd_lib.evaluation.metrics import measure
from skd_lib.evaluation.predictions import Prediction, compare, read_predictions, write_predictions


def prediction(number: int, text: str, target: str = "the file has been saved") -> Prediction:
    return Prediction(f"id-{number}", "source", target, text, 3, False)


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
    good = [prediction(number, "the file has been saved", "the file has been saved") for number in range(30)]
    bad = [prediction(number, "the file", "the file has been saved") for number in range(30)]
    result = compare(good, bad[::-1], ["chrf", "bleu"], resamples=200)
    targets = [row.target for row in good]
    expected = 100 - measure("chrf", [row.prediction for row in bad], targets).score
    assert result["chrf"].difference == pytest.approx(expected)
    assert result["bleu"].difference > 0


def test_other_examples_cannot_be_compared() -> None:
    rows = [prediction(0, "a"), prediction(1, "b")]
    for others in (rows[:1], [rows[0], prediction(2, "b")], [rows[0], prediction(1, "b", "another target")]):
        with pytest.raises(SkdError, match="different examples"):
            compare(rows, others, ["chrf"])
