from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from skd_lib.config import MetricName
from skd_lib.errors import SkdError
from skd_lib.evaluation.metrics import measure

NAMES: list[MetricName] = ["chrf", "bleu", "rougeL", "rouge1", "rouge2", "accuracy"]
TEXT = "the file has been saved do you want to continue, please enter a valid address (or not). 42 3.14 É naïve"
WORDS = TEXT.split()


def corpus(sentences: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Predictions that get two words in three right, and their targets; a few predictions are empty."""
    generator = random.Random(seed)
    targets = [" ".join(generator.choices(WORDS, k=generator.randint(3, 15))) for _ in range(sentences)]
    predictions = [
        " ".join(word if generator.random() < 0.67 else generator.choice(WORDS) for word in target.split())
        for target in targets
    ]
    predictions[::17] = [""] * len(predictions[::17])
    return predictions, targets


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "predictions.txt", tmp_path / "targets.txt"
    for path, lines in zip(paths, corpus(80), strict=True):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


@pytest.mark.parametrize("name", ["chrf", "bleu"])
def test_the_score_is_sacrebleus(name: MetricName, files: tuple[Path, Path]) -> None:
    predictions, targets = files
    command = [sys.executable, "-m", "sacrebleu", str(targets), "-i", str(predictions), "-m", name, "-w", "10"]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    measured = measure(name, *corpus(80))
    assert measured.score == pytest.approx(answer["score"], abs=1e-9)
    assert measured.signature == f"{answer['name']}|{answer['signature']}"


def test_the_score_is_rouge_scores(files: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, targets = files
    output = tmp_path / "scores.csv"
    names: list[MetricName] = ["rouge1", "rouge2", "rougeL"]
    command = [sys.executable, "-m", "rouge_score.rouge", f"--rouge_types={','.join(names)}", "--use_stemmer"]
    command += ["--noaggregate"]
    command += [
        f"--target_filepattern={targets}",
        f"--prediction_filepattern={predictions}",
        f"--output_filename={output}",
    ]
    subprocess.run(command, check=True, capture_output=True)
    with output.open() as file:
        rows = list(csv.DictReader(file))
    for name in names:
        wanted = [float(row[f"{name}-F"]) for row in rows]
        measured = measure(name, *corpus(80))
        assert measured.statistics_NS[:, 0] == pytest.approx(wanted, abs=1e-6)
        assert measured.score == pytest.approx(100 * np.mean(wanted), abs=1e-4)


def test_accuracy() -> None:
    targets = ["So 1000.\n#### 1,000", "#### 0.5", "#### -3", "7", "#### 4"]
    predictions = ["#### $1000.00", "#### 1/2", "#### 3", "#### 7", "4"]  # the last one has no mark: wrong
    measured = measure("accuracy", predictions, targets)
    assert measured.statistics_NS[:, 0].tolist() == [1, 1, 0, 1, 0]
    assert measured.score == 60


def test_mathematical_answers_are_equal_by_value() -> None:
    targets = [r"so \boxed{\frac{1}{2}}", r"\boxed{(1, 2)}", r"\frac{3}{4}", r"\boxed{x=7}"]
    predictions = [r"\boxed{0.5}", r"thus $\boxed{\left(1,2\right)}$.", r"\boxed{\dfrac34}", "7"]
    measured = measure("accuracy", predictions, targets, answer="boxed")
    assert measured.statistics_NS[:, 0].tolist() == [1, 1, 1, 0]
    assert "in boxed" in measured.signature


@pytest.mark.parametrize("name", NAMES)
def test_an_example_without_a_reference_is_left_out(name: MetricName) -> None:
    right = "the file was saved #### 42"
    measured = measure(name, [right, "anything", right], [right, " ", right])
    assert measured.score == pytest.approx(100)
    assert measured.by_example() == pytest.approx({0: 100, 2: 100})
    with pytest.raises(SkdError, match=f"metric `{name}`: (no reference holds an answer|every reference is empty)"):
        measure(name, ["a", "b"], ["", "\n"])


def test_a_reference_without_an_answer_is_left_out() -> None:
    measured = measure("accuracy", ["#### 1", "#### 2", "#### 3"], ["#### 1", "it depends", "#### 4"])
    assert measured.scored_N == (0, 2)
    assert measured.score == 50
    with pytest.raises(SkdError, match="no reference holds an answer: the first ends with 'it depends'"):
        measure("accuracy", ["#### 2"], ["it depends"])


@pytest.mark.parametrize("name", NAMES)
def test_right_is_100_and_nothing_is_0(name: MetricName) -> None:
    targets = ["the answer to this question is #### 42"] * 3
    assert measure(name, targets, targets).score == pytest.approx(100)
    assert measure(name, ["", "", ""], targets).score == 0


STRANGE = {
    "empty": "",
    "blank": " \t ",
    "long": "word " * 20_000,
    "one long word": "x" * 100_000,
    "html and script": "</td><script>alert('#### 1')</script><!-- \\boxed{",
    "not a number": "NaN nan inf #### nan",
    "control characters": "a\x00b\r\n\x1bc\u2028",
    "replacement character": "\ufffd\ufffd",
    "lone surrogates": "\ud800 and \udfff",
    "astral": "\U0001f600 \U00020000",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", STRANGE.values(), ids=STRANGE.keys())
@pytest.mark.timeout(20)
def test_strange_predictions_are_scored(name: MetricName, prediction: str) -> None:
    right = "the file was saved #### 42"
    measured = measure(name, [prediction, right], [right, right])
    assert 0 <= measured.score < 100
    assert np.isfinite(measured.statistics_NS).all()


def test_missing_predictions() -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 targets"):
        measure("chrf", ["a"], ["a", "b"])
