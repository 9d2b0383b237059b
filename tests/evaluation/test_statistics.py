from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from skd_lib.config import MetricName
from skd_lib.evaluation.metrics import CorpusMetric, FloatArray, measure
from skd_lib.evaluation.statistics import (
    LEAST_EXAMPLES,
    bootstrap_interval,
    paired_bootstrap,
    scored,
    wilson_interval,
)
from tests.evaluation.test_metrics import corpus


def mean_of(values: FloatArray) -> CorpusMetric:
    """A metric whose score is the mean of one number a sentence."""
    statistics_NS = np.stack([values, np.ones(len(values))], axis=1)
    return CorpusMetric(statistics_NS, lambda totals_S: float(totals_S[0] / totals_S[1]), "mean")


@pytest.mark.parametrize("name", ["chrf", "bleu", "rougeL"])
def test_interval_holds_the_score_and_narrows_with_more_sentences(name: MetricName) -> None:
    widths = []
    for sentences in (40, 640):
        measured = measure(name, *corpus(sentences))
        low, high = bootstrap_interval(measured, resamples=300)
        assert low < measured.score < high
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.35)  # 1 / sqrt(16)


def test_interval_is_seeded() -> None:
    measured = measure("chrf", *corpus(50))
    assert bootstrap_interval(measured, seed=3) == bootstrap_interval(measured, seed=3)
    assert bootstrap_interval(measured, seed=3) != bootstrap_interval(measured, seed=4)


def test_interval_of_the_mean_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(10, 3, size=400)
    low, high = bootstrap_interval(mean_of(values), resamples=4000)
    margin = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - margin, values.mean() + margin), abs=0.03)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for experiment in range(300):
        right = (generator.random(120) < 0.6).astype(np.float64)
        low, high = bootstrap_interval(mean_of(right), resamples=200, seed=experiment)
        covered += low <= 0.6 <= high
    # 95 %, less what 120 sentences and 200 resamples cost; three standard deviations of 300 experiments are 4 %.
    assert 0.89 <= covered / 300 <= 0.99


def test_a_resample_scores_what_its_sentences_score() -> None:
    predictions, targets = corpus(30)
    measured = measure("bleu", predictions, targets)
    chosen = np.random.default_rng(0).integers(30, size=30)
    counts = np.bincount(chosen, minlength=30)
    again = measure("bleu", [predictions[i] for i in chosen], [targets[i] for i in chosen])
    assert measured.corpus_score(counts @ measured.statistics_NS) == pytest.approx(again.score, abs=1e-9)


def test_one_sentence_has_no_spread() -> None:
    measured = measure("chrf", ["the file"], ["the file has been saved"])
    assert bootstrap_interval(measured, resamples=100) == pytest.approx((measured.score, measured.score))


def test_paired_test_sees_a_small_steady_difference_that_intervals_do_not() -> None:
    generator = np.random.default_rng(0)
    difficulty = generator.normal(50, 20, size=200)
    worse, better = mean_of(difficulty), mean_of(difficulty + generator.normal(1, 2, size=200))
    assert bootstrap_interval(worse)[1] > bootstrap_interval(better)[0]  # they overlap
    result = paired_bootstrap(better, worse)
    assert result.p_value is not None
    assert result.p_value < 0.01
    assert 0 < result.low < result.difference < result.high


def test_paired_test_is_two_sided_and_antisymmetric() -> None:
    generator = np.random.default_rng(0)
    a, b = mean_of(generator.normal(0, 1, 100)), mean_of(generator.normal(0.3, 1, 100))
    forward, backward = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert forward.difference == -backward.difference
    assert forward.p_value == backward.p_value
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))


def test_a_model_does_not_differ_from_itself() -> None:
    measured = measure("chrf", *corpus(50))
    result = paired_bootstrap(measured, measured)
    assert (result.difference, result.p_value) == (0, 1)


def test_equal_models_are_seldom_found_to_differ() -> None:
    generator = np.random.default_rng(0)
    found = 0
    for experiment in range(200):
        a, b = mean_of(generator.normal(0, 1, 60)), mean_of(generator.normal(0, 1, 60))
        found += (paired_bootstrap(a, b, resamples=200, seed=experiment).p_value or 0) < 0.05
    assert found / 200 < 0.12


def test_different_examples_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="same examples"):
        paired_bootstrap(measure("chrf", *corpus(10)), measure("chrf", *corpus(11)))
    with pytest.raises(ValueError, match="one metric"):
        paired_bootstrap(measure("rougeL", *corpus(10)), measure("accuracy", ["#### 1"] * 10, ["#### 1"] * 10))


@pytest.mark.parametrize("name", ["chrf", "bleu", "rougeL"])
def test_a_thousand_resamples_of_500_sentences_are_fast(name: MetricName) -> None:
    measured = measure(name, *corpus(500))
    started = time.process_time()
    bootstrap_interval(measured, resamples=1000)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("right", "examples", "low", "high"),
    # From R's binom.confint(methods = "wilson") and Brown, Cai and DasGupta 2001.
    [
        (0, 1, 0, 79.35),
        (0, 20, 0, 16.11),
        (20, 20, 83.89, 100),
        (0, 128, 0, 2.91),
        (1, 2, 9.45, 90.55),
        (8, 10, 49.02, 94.33),
    ],
)
def test_wilsons_interval(right: int, examples: int, low: float, high: float) -> None:
    assert wilson_interval(right / examples, examples) == pytest.approx((low, high), abs=0.01)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilsons_interval_holds_its_share(examples: int, part: float) -> None:
    share = round(part * examples) / examples
    low, high = wilson_interval(share, examples)
    assert 0 <= low <= 100 * share <= high <= 100
    assert high - low > 0


@pytest.mark.parametrize("truth", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("examples", [5, 20, 50, 128])
def test_wilsons_interval_covers_the_truth_on_average(truth: float, examples: int) -> None:
    chances = stats.binom.pmf(np.arange(examples + 1), examples, truth)
    intervals = [wilson_interval(right / examples, examples) for right in range(examples + 1)]
    covered = sum(chance for chance, (low, high) in zip(chances, intervals, strict=True) if low <= 100 * truth <= high)
    assert covered > 0.9  # the bootstrap: 35 % of examples = 20, truth = 0.02


def test_an_accuracy_has_wilsons_interval_however_few_the_examples() -> None:
    for right, of in ((0, 30), (30, 30), (3, 8), (40, 100)):
        answers = ["#### 1"] * right + ["#### 2"] * (of - right)
        found = scored(measure("accuracy", answers, ["#### 1"] * of))
        assert (found.low, found.high) == wilson_interval(right / of, of)
        assert found.caution == ""


def test_other_scores_on_few_examples_or_without_spread_come_with_a_caution() -> None:
    assert scored(measure("chrf", *corpus(1))).caution.startswith("1 example is too few")
    few = scored(measure("chrf", *corpus(LEAST_EXAMPLES - 1)))
    assert few.caution.startswith("19 examples are too few for a reliable interval (at least 20")
    enough = scored(measure("chrf", *corpus(LEAST_EXAMPLES)))
    assert enough.caution == ""
    assert enough.low < enough.score < enough.high
    assert "every example has the same score" in scored(measure("rougeL", ["no"] * 30, ["other words"] * 30)).caution


def test_below_twenty_examples_there_is_no_p_value() -> None:
    generator = np.random.default_rng(0)
    for examples in (1, 2, 5, LEAST_EXAMPLES - 1, LEAST_EXAMPLES):
        result = paired_bootstrap(mean_of(generator.normal(5, 1, examples)), mean_of(generator.normal(0, 1, examples)))
        assert (result.p_value is None) == (examples < LEAST_EXAMPLES)
