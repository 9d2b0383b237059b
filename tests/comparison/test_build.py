"""The figures of a comparison, against brute force."""

from __future__ import annotations

import csv
import io
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from skd_lib.comparison.render import render, to_csv, to_markdown
from skd_lib.comparison.table import Comparison, TrialResult, VariantResult, build_comparison, estimate
from skd_lib.errors import SkdError
from skd_lib.evaluation.predictions import Prediction, compare
from skd_lib.evaluation.statistics import holm, t_interval
from skd_lib.results import Score, Scores

RESAMPLES = 200


def answers(right: list[bool], order: int = 0) -> list[Prediction]:
    """Predictions scored by accuracy, in an order of their own."""
    rows = [
        Prediction(f"example-{number}", "question", "#### 1", "", 3, truncated=False, scores={"accuracy": 100.0 * hit})
        for number, hit in enumerate(right)
    ]
    random.Random(order).shuffle(rows)
    return rows


def accuracy(right: list[bool]) -> Scores:
    score = 100 * sum(right) / len(right)
    return Scores.model_validate({"accuracy": {"score": score, "low": score - 9, "high": score + 9}, "examples": 8})


RIGHT = {
    ("skd", 0): [True] * 30 + [False] * 10,
    ("skd", 1): [True] * 32 + [False] * 8,
    ("sft", 0): [True] * 12 + [False] * 28,
    ("sft", 1): [True] * 10 + [False] * 30,
    ("seqkd", 1): [True] * 31 + [False] * 9,
}


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    done = [
        TrialResult(
            variant=variant,
            seed=seed,
            scores=accuracy(right),
            rejection_rate=0.25 * (seed + 1) if variant == "skd" else None,
            draft={"acceptance_rate": 0.5 + seed / 10, "tokens_per_teacher_call": 2, "speedup": 1.5}
            if variant == "skd"
            else {},
            figures={"steps": 5, "student_tokens": 1000 + seed, "seconds_loss": 2, "seconds_validation": 99},
        )
        for (variant, seed), right in RIGHT.items()
    ]
    lost = TrialResult(variant="seqkd", seed=0, reason="the loss <exploded> | at once")
    return build_comparison(
        name="test",
        reference="skd",
        metrics=["accuracy"],
        trials=[*done, lost],
        answers={key: answers(right, order=number) for number, (key, right) in enumerate(RIGHT.items())},
        teacher={"accuracy": Score(score=90, low=80, high=95)},
        resamples=RESAMPLES,
    )


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6))
def test_t_interval_is_scipys(values: list[float]):
    error = stats.sem(values)
    expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error) if error else (values[0],) * 2
    assert t_interval(values) == pytest.approx(expected, abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_the_largest_over_all_smaller_p_values(p_values: list[float]):
    """The definition: of p_(1) <= ... <= p_(m), p_(k) becomes the max over j <= k of min(1, (m - j + 1) p_(j))."""
    adjusted = holm(p_values)
    ordered = sorted(p_values)
    for p_value, found in zip(p_values, adjusted, strict=True):
        ranks = range(len([p for p in ordered if p <= p_value]))
        assert found == pytest.approx(max(min(1, (len(ordered) - j) * ordered[j]) for j in ranks))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_one_run_has_its_own_interval_and_several_that_of_their_mean():
    one = estimate([Score(score=50, low=40, high=60)])
    assert (one.mean, one.low, one.high, one.kind) == (50, 40, 60, "bootstrap over examples")
    two = estimate([Score(score=50, low=40, high=60), Score(score=52, low=40, high=60)])
    assert (two.mean, two.kind, two.runs) == (51, "t over seeds", 2)
    assert two.high - two.mean == pytest.approx(12.706, abs=1e-3)  # t of one degree of freedom times 1


def test_runs_of_one_and_the_same_score_have_the_interval_over_examples():
    found = estimate([Score(score=0, low=0, high=16), Score(score=0, low=0, high=16, caution="few")])
    assert (found.low, found.high, found.kind, found.caution) == (0, 16, "bootstrap over examples", "few")


def test_few_examples_have_neither_p_nor_star():
    right = {"skd": [True] * 19, "sft": [False] * 19}
    few = Scores.model_validate({"chrf": {"score": 5, "low": 5, "high": 5, "caution": "19 examples are too few"}})
    comparison = build_comparison(
        name="few",
        reference="skd",
        metrics=["accuracy"],
        trials=[TrialResult(variant=name, seed=0, scores=few) for name in right],
        answers={(name, 0): answers(hits) for name, hits in right.items()},
        teacher={},
        resamples=RESAMPLES,
    )
    test = comparison.variants[1].tests["accuracy"]
    assert (test.difference, test.p_value, test.p_holm, test.examples) == (-100, None, None, 19)
    assert Comparison.model_validate_json(comparison.to_json()) == comparison
    shown = comparison.model_copy(update={"variants": [_with_accuracy(each) for each in comparison.variants]})
    text = to_markdown(shown)
    assert "| sft | 1 | 5.0 [5.0, 5.0]† | -100.0 | withheld |  |" in text
    assert "- † 19 examples are too few." in text
    assert "- p is withheld (under 20 examples)" in text
    assert " *" not in text.partition("- ")[0]


def _with_accuracy(variant: VariantResult) -> VariantResult:
    return variant.model_copy(update={"scores": {"accuracy": variant.scores["chrf"]}})


def test_pooled_test_resamples_examples_with_all_their_seeds():
    ours, theirs = [RIGHT["skd", 0], RIGHT["skd", 1]], [RIGHT["sft", 0], RIGHT["sft", 1]]
    found, examples = compare(
        [answers(right, 1) for right in ours], [answers(right, 2) for right in theirs], resamples=RESAMPLES, seed=3
    )["accuracy"]
    assert examples == 40
    mean = np.mean(ours, axis=0) - np.mean(theirs, axis=0)  # an example's difference over both seeds
    assert found.difference == pytest.approx(100 * mean.mean())
    # The order in which the first model answered is the order in which examples are drawn.
    position = [int(row.id.removeprefix("example-")) for row in answers(ours[0], 1)]
    generator = np.random.default_rng(3)
    draws = [100 * mean[position][generator.integers(40, size=40)].mean() for _ in range(RESAMPLES)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))


def test_pooled_test_needs_the_same_examples():
    with pytest.raises(SkdError, match="different examples"):
        compare([answers([True])] * 2, [answers([True]), answers([True, False])])
    with pytest.raises(ValueError, match="as many models"):
        compare([answers([True])] * 2, [answers([True])])


def test_variants_have_means_tests_and_costs(comparison: Comparison):
    skd, sft, seqkd = comparison.variants
    assert skd.scores["accuracy"].mean == pytest.approx(77.5)
    assert skd.tests == {}
    assert sft.tests["accuracy"].difference == pytest.approx(27.5 - 77.5)
    assert (sft.tests["accuracy"].seeds, seqkd.tests["accuracy"].seeds) == (2, 1)
    assert seqkd.tests["accuracy"].difference == pytest.approx(77.5 - 80)  # against the same seed alone
    assert sft.tests["accuracy"].p_holm == pytest.approx(2 * sft.tests["accuracy"].p_value)
    assert seqkd.tests["accuracy"].p_holm == pytest.approx(seqkd.tests["accuracy"].p_value)
    assert (seqkd.runs, seqkd.failed) == (1, 1)
    assert skd.costs == {"rejection_rate": 0.375, "steps": 5, "student_tokens": 1000.5, "seconds": 2}
    assert "rejection_rate" not in sft.costs
    assert skd.draft["acceptance_rate"] == pytest.approx(0.55)
    assert sft.draft == {}
    assert comparison.headline()["skd/accuracy"] == pytest.approx(77.5)
    assert Comparison.model_validate_json(comparison.to_json()) == comparison


def test_markdown_says_it_all_and_escapes_reasons(comparison: Comparison):
    text = to_markdown(comparison)
    rows = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    assert rows[2][:4] == ["| (teacher)", "", "90.0 [80.0, 95.0]", ""]
    (sft,) = (row for row in rows if row[0] == "| sft" and len(row) == 6)
    assert sft[1] == "2"
    assert sft[2].startswith("27.5 [")
    assert sft[3].startswith("-50.0 [")
    assert sft[5].endswith("* |")  # far apart
    (seqkd,) = (row for row in rows if row[0] == "| seqkd" and len(row) == 6)
    assert seqkd[1] == "1 of 2"
    assert "*" not in seqkd[5]
    assert "| skd | 55.0% | 2.00 | 1.50x |" in text
    assert "| seqkd | 0 | the loss &lt;exploded> \\| at once |" in text
    for kind in ("Student's t over the seeds", "bootstrap over the test examples", "against skd"):
        assert kind in text
    console = Console(file=io.StringIO(), width=80)
    console.print(render(comparison))
    assert "the loss <exploded> | at once" in console.file.getvalue()


def test_csv_has_a_row_for_every_run(comparison: Comparison):
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert [(row["variant"], int(row["seed"])) for row in rows] == [*RIGHT, ("seqkd", 0)]
    assert float(rows[0]["accuracy"]) == 75
    assert float(rows[0]["rejection_rate"]) == 0.25
    assert (rows[-1]["accuracy"], rows[-1]["failed"]) == ("", "the loss <exploded> | at once")


def test_reference_without_a_run_leaves_out_the_tests():
    only = build_comparison(
        name="test",
        reference="skd",
        metrics=["accuracy"],
        trials=[TrialResult(variant="sft", seed=0, scores=accuracy(RIGHT["sft", 0]))],
        answers={("sft", 0): answers(RIGHT["sft", 0])},
        teacher={},
    )
    assert only.variants[0].tests == {}
    assert "minus skd" in to_markdown(only)
