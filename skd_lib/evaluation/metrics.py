"""Corpus metrics, each as sentence statistics whose sum gives the score.

A metric first counts something in every sentence (matched n-grams, right answers); the score is a function of the
summed counts. Keeping both apart lets `significance` resample sentences without scoring any text twice.

chrF and BLEU are sacrebleu's own code with its default settings (Post 2018, arXiv 1804.08771), ROUGE-L is rouge-score's
with its stemmer (Lin 2004), accuracy is GSM8K's (Cobbe et al. 2021, arXiv 2110.14168).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from skd_lib.config import MetricName
from skd_lib.errors import SkdError
from skd_lib.evaluation.answers import ANSWER_MARK, extract_answer, parse_number

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """One metric over one corpus.

    Attributes:
        statistics_NS: What was counted in each of the N sentences, (N, S).
        corpus_score: The score, 0 to 100, of statistics summed over sentences, (S,).
        signature: Everything somebody else needs to get the same number.
    """

    statistics_NS: FloatArray
    corpus_score: Callable[[FloatArray], float]
    signature: str

    @property
    def score(self) -> float:
        """The corpus score, 0 to 100."""
        return self.corpus_score(self.statistics_NS.sum(axis=0))


def measure(name: MetricName, predictions: Sequence[str], targets: Sequence[str]) -> Measured:
    """Measure predictions against one reference each.

    Args:
        name: `chrf`, `bleu`, `rougeL` or `accuracy`.
        predictions: N answers; an empty one is an answer with nothing right.
        targets: Their N references.

    Raises:
        SkdError: there is nothing to measure, or (`accuracy`) a reference holds no number.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets")
    if not predictions:
        raise SkdError(
            "there are no predictions to score", where=f"metric `{name}`", hint="give the test split examples"
        )
    return _METRICS[name](predictions, targets)


def _chrf(predictions: Sequence[str], targets: Sequence[str]) -> Measured:
    from sacrebleu.metrics import CHRF

    return _sacrebleu(CHRF(), predictions, targets)


def _bleu(predictions: Sequence[str], targets: Sequence[str]) -> Measured:
    from sacrebleu.metrics import BLEU

    return _sacrebleu(BLEU(), predictions, targets)


def _sacrebleu(metric: Any, predictions: Sequence[str], targets: Sequence[str]) -> Measured:
    # The underscored methods are those that sacrebleu's own significance tests are made of (sacrebleu/significance.py).
    statistics_NS = np.array(metric._extract_corpus_statistics(predictions, [targets]), dtype=np.float64)
    name = metric._compute_score_from_stats(statistics_NS[0]).name
    return Measured(
        statistics_NS,
        lambda totals_S: float(metric._compute_score_from_stats(totals_S).score),
        f"{name}|{metric.get_signature()}",
    )


def _rouge_l(predictions: Sequence[str], targets: Sequence[str]) -> Measured:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(targets, predictions, strict=True)
    values = [float(scorer.score(target, prediction)["rougeL"].fmeasure) for target, prediction in pairs]
    version = importlib.metadata.version("rouge-score")
    return _mean(values, f"rougeL|value:fmeasure|stemmer:porter|version:{version}")


def _accuracy(predictions: Sequence[str], targets: Sequence[str]) -> Measured:
    right = []
    for position, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        wanted = extract_answer(target) if ANSWER_MARK in target else parse_number(target)
        if wanted is None:
            raise SkdError(
                f"the reference holds no number: {target[-80:]!r}",
                where=f"metric `accuracy`, example {position}",
                hint=f"end every target with `{ANSWER_MARK} NUMBER`, or choose another metric",
            )
        right.append(float(extract_answer(prediction) == wanted))
    return _mean(right, f"accuracy|answer:after {ANSWER_MARK}|match:numeric")


def _mean(values: list[float], signature: str) -> Measured:
    statistics_NS = np.stack([np.array(values, dtype=np.float64), np.ones(len(values))], axis=1)
    return Measured(statistics_NS, lambda totals_S: float(100 * totals_S[0] / totals_S[1]), signature)


_METRICS: dict[MetricName, Callable[[Sequence[str], Sequence[str]], Measured]] = {
    "chrf": _chrf,
    "bleu": _bleu,
    "rougeL": _rouge_l,
    "accuracy": _accuracy,
}
