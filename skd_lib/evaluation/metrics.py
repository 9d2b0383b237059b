"""Corpus metrics, each as example statistics whose sum gives the score.

A metric first counts something in every example (matched n-grams, right answers); the score is a function of the
summed counts. Keeping both apart lets `statistics` resample examples without scoring any text twice.

chrF and BLEU are sacrebleu's own code with its default settings (Post 2018, arXiv 1804.08771), ROUGE is rouge-score's
with its Porter stemmer, as the numbers of summarisation papers are (Lin 2004); accuracy is that of GSM8K (Cobbe et al.
2021, arXiv 2110.14168) and MATH (Hendrycks et al. 2021, arXiv 2103.03874).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from skd_lib.config import AnswerKind, MetricName
from skd_lib.errors import SkdError
from skd_lib.evaluation.answers import ANSWER_MARK, predicted_answer, reference_answer

FloatArray = npt.NDArray[np.float64]

_FORMS: dict[AnswerKind, str] = {
    "hash": f"after {ANSWER_MARK}",
    "boxed": "in boxed",
    "marked": f"after {ANSWER_MARK} or in boxed",
    "last_number": "last number",
}


@dataclass(frozen=True)
class CorpusMetric:
    """One metric over one corpus.

    Attributes:
        statistics_NS: What was counted in each of the N scored examples, (N, S).
        corpus_score: The score of statistics summed over examples, (S,).
        signature: Everything another person needs to get the same number.
        scored_N: Positions of the N scored examples among those given; the others have nothing to be scored against.
        share: The score is the share of examples that are right, in per cent; each is right or wrong.
    """

    statistics_NS: FloatArray
    corpus_score: Callable[[FloatArray], float]
    signature: str
    scored_N: tuple[int, ...] = ()
    share: bool = False

    @property
    def score(self) -> float:
        """The corpus score: 0 to 100, or what the metric's own unit is."""
        return self.corpus_score(self.statistics_NS.sum(axis=0))

    def by_example(self) -> dict[int, float]:
        """Return the score of each scored example alone, by its position among those given."""
        rows = zip(self.scored_N, self.statistics_NS, strict=True)
        return {position: self.corpus_score(statistics_S) for position, statistics_S in rows}


def measure(
    name: MetricName, predictions: Sequence[str], targets: Sequence[str], *, answer: AnswerKind = "hash"
) -> CorpusMetric:
    """Measure predictions against one reference each.

    An example without a reference (a blank one; for `accuracy`, one that holds no answer) is not scored; an empty
    prediction is an answer with nothing right.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets")
    scored = scorable(name, targets, answer)
    kept = [predictions[position] for position in scored], [targets[position] for position in scored]
    measured = _accuracy(*kept, answer) if name == "accuracy" else _TEXT_METRICS[name](*kept)
    return replace(measured, scored_N=scored)


def scorable(name: MetricName, targets: Sequence[str], answer: AnswerKind) -> tuple[int, ...]:
    """Return the positions of the references that predictions can be scored against."""
    if name == "accuracy":
        scored = tuple(i for i, target in enumerate(targets) if reference_answer(target, answer) is not None)
        if not scored:
            raise SkdError(
                f"no reference holds an answer: the first ends with {targets[0][-80:]!r}",
                where="metric `accuracy`",
                hint=f"end every target with `{ANSWER_MARK} NUMBER` or `\\boxed{{...}}`, or choose another metric",
            )
        return scored
    scored = tuple(i for i, target in enumerate(targets) if target.strip())
    if not scored:
        raise SkdError("every reference is empty", where=f"metric `{name}`", hint="give the examples' targets")
    return scored


def ratio(
    numerators: Sequence[float], denominators: Sequence[float], score: Callable[[float], float], signature: str
) -> CorpusMetric:
    """Measure a function of one sum over another: a mean, a perplexity."""
    statistics_NS = np.stack([np.array(numerators, np.float64), np.array(denominators, np.float64)], axis=1)
    return CorpusMetric(
        statistics_NS,
        lambda totals_S: score(float(totals_S[0] / totals_S[1])),
        signature,
        tuple(range(len(numerators))),
    )


def mean_of(values: Sequence[float], signature: str, *, factor: float = 1.0) -> CorpusMetric:
    """Measure the mean over the examples, times a factor."""
    return ratio(values, [1.0] * len(values), lambda mean: factor * mean, signature)


def summed(measured: Sequence[CorpusMetric]) -> CorpusMetric:
    """Add up the counts of several models' answers to each example."""
    return replace(measured[0], statistics_NS=np.sum([each.statistics_NS for each in measured], axis=0))


def _sacrebleu(name: str) -> Callable[[Sequence[str], Sequence[str]], CorpusMetric]:
    def measured(predictions: Sequence[str], targets: Sequence[str]) -> CorpusMetric:
        from sacrebleu import metrics

        # sacrebleu's own significance tests are made of the underscored methods (sacrebleu/significance.py).
        metric = getattr(metrics, name)()
        statistics_NS = np.array(metric._extract_corpus_statistics(predictions, [targets]), dtype=np.float64)
        shown = metric._compute_score_from_stats(statistics_NS[0]).name
        return CorpusMetric(
            statistics_NS,
            lambda totals_S: float(metric._compute_score_from_stats(totals_S).score),
            f"{shown}|{metric.get_signature()}",
        )

    return measured


def _rouge(kind: str) -> Callable[[Sequence[str], Sequence[str]], CorpusMetric]:
    def measured(predictions: Sequence[str], targets: Sequence[str]) -> CorpusMetric:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=True)
        pairs = zip(targets, predictions, strict=True)
        values = [float(scorer.score(target, prediction)[kind].fmeasure) for target, prediction in pairs]
        version = importlib.metadata.version("rouge-score")
        return mean_of(values, f"{kind}|value:fmeasure|stemmer:porter|version:{version}", factor=100)

    return measured


def _accuracy(predictions: Sequence[str], targets: Sequence[str], answer: AnswerKind) -> CorpusMetric:
    pairs = zip(predictions, targets, strict=True)
    right = [float(predicted_answer(said, answer) == reference_answer(wanted, answer)) for said, wanted in pairs]
    signature = f"accuracy|answer:{_FORMS[answer]}|match:{'value' if answer == 'boxed' else 'numeric'}"
    return replace(mean_of(right, signature, factor=100), share=True)


_TEXT_METRICS: dict[MetricName, Callable[[Sequence[str], Sequence[str]], CorpusMetric]] = {
    "chrf": _sacrebleu("CHRF"),
    "bleu": _sacrebleu("BLEU"),
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
}
