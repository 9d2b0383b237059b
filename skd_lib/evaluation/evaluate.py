"""Evaluation of a model on a task: greedy answers, the task's metrics, and intervals of the scores."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skd_lib.config import EvaluationConfig, MetricName, TaskConfig
from skd_lib.data.examples import Example
from skd_lib.errors import SkdError
from skd_lib.evaluation.generate import generate
from skd_lib.evaluation.judge import JudgeUnavailable, grade, mean_rating
from skd_lib.evaluation.metrics import CorpusMetric, measure, scorable
from skd_lib.evaluation.perplexity import reference_losses
from skd_lib.evaluation.predictions import Prediction, perplexity
from skd_lib.evaluation.served import served_answers, served_losses
from skd_lib.evaluation.statistics import scored
from skd_lib.results import Score, Scores
from skd_lib.served.teacher import RemoteTeacher, Unreadable

_UNANSWERED = "the examples have no answers to compare with"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation: scores without those of held-out sets, and a prediction for each example."""

    scores: Scores
    predictions: list[Prediction]

    def figures(self) -> dict[str, float]:
        """Return the numbers alone, flat, for trackers and KFP's metrics."""
        figures: dict[str, float] = {}
        for name, score in self.scores.metrics.items():
            figures |= {name: score.score, f"{name}_low": score.low, f"{name}_high": score.high}
        figures |= {"examples": float(self.scores.examples), "seconds": self.scores.seconds}
        if not self.predictions:
            return figures
        return figures | {
            "tokens_per_answer": fmean(prediction.tokens for prediction in self.predictions),
            "truncated_fraction": fmean(prediction.truncated for prediction in self.predictions),
        }


@dataclass(frozen=True)
class HeldOutSet:
    """Examples and the task they belong to; where there are no examples, `missing` says why."""

    task: TaskConfig
    examples: Sequence[Example] = field(default_factory=list)
    missing: str = ""


def evaluate(
    model: PreTrainedModel | RemoteTeacher,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: TaskConfig,
    config: EvaluationConfig,
    *,
    seed: int = 0,
    private: bool = False,
    what: str = "evaluating",
) -> Evaluation:
    """Answer the examples and score the answers with every metric of the task but COMET.

    A metric that cannot be computed (references without answers, a model that yields NaN) is reported as missing, as
    long as there is another one; all are where no example has a reference. A judge that is down may be up again later:
    without it there is no result. With `private` data errors quote no words of the judge, who may quote a row. `what`
    names the work in its progress.

    Raises:
        JudgeUnavailable: the judge cannot be reached or refuses.
        SkdError: no examples, no metric that can be computed, or a prompt that does not fit the model.
    """
    missing = _unscorable(task, examples)  # before any work is done
    answered = any(example.target for example in examples)
    started = time.perf_counter()
    questions, references = [example.question for example in examples], [example.target for example in examples]
    if isinstance(model, RemoteTeacher):
        answers = served_answers(model, questions, task, references)
    else:
        answers = generate(
            model, tokenizer, questions, task, batch_size=config.batch_size, references=references, what=what
        )
    predictions = [
        Prediction(example.id, example.source, example.target, answer.text, answer.tokens, answer.truncated)
        for example, answer in zip(examples, answers, strict=True)
    ]
    if "perplexity" in task.metrics and answered:
        try:
            losses = (
                served_losses(model, examples, task)
                if isinstance(model, RemoteTeacher)
                else reference_losses(model, tokenizer, examples, task, batch_size=config.batch_size)
            )
        except Unreadable as error:
            missing["perplexity"] = error
        else:
            predictions = [
                replace(row, reference_tokens=loss.tokens, reference_nll=loss.nll if math.isfinite(loss.nll) else None)
                for row, loss in zip(predictions, losses, strict=True)
            ]
    seconds = time.perf_counter() - started

    scores: dict[str, Score] = {}
    for name in task.own_metrics:
        if name in missing:
            continue
        try:
            measured = _measure(name, predictions, task, config, private=private)
        except JudgeUnavailable:
            raise
        except SkdError as error:
            missing[name] = error
            continue
        scores[name] = scored(measured, resamples=config.bootstrap_samples, seed=seed)
        if len(measured.scored_N) < len(predictions):
            scores[name] = scores[name].model_copy(update={"scored": len(measured.scored_N)})
            log.warning("%s: %d of %d examples could be scored", name, len(measured.scored_N), len(predictions))
        alone = measured.by_example()
        predictions = [
            replace(row, scores={**row.scores, name: alone[position]}) if position in alone else row
            for position, row in enumerate(predictions)
        ]
    if missing and not scores and answered:
        raise next(iter(missing.values()))
    reasons: dict[str, str] = {name: error.brief for name, error in missing.items()}
    if reasons:
        log.warning("metrics that could not be computed: %s", reasons)
    found = Scores(metrics=scores, missing=reasons, examples=len(examples), seconds=round(seconds, 3))
    return Evaluation(found, predictions)


def evaluate_held_out(
    model: PreTrainedModel | RemoteTeacher,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, HeldOutSet],
    config: EvaluationConfig,
    *,
    seed: int = 0,
    private: bool = False,
) -> dict[str, Evaluation]:
    """Evaluate on several test sets; one that cannot be scored does not keep the others from it.

    Returns:
        By name; a set that could not be scored has no predictions, and its reason under `missing` for every metric.

    Raises:
        JudgeUnavailable: the judge cannot be reached or refuses.
    """
    results = {}
    for name, each in sets.items():
        reason = each.missing
        if not reason:
            log.info("held-out set %s: %d examples", name, len(each.examples))
            try:
                results[name] = evaluate(
                    model,
                    tokenizer,
                    each.examples,
                    each.task,
                    config,
                    seed=seed,
                    private=private,
                    what=f"evaluating on {name}",
                )
                continue
            except JudgeUnavailable:
                raise
            except SkdError as error:
                reason = error.brief
        log.warning("held-out set %s is missing, everything else goes on: %s", name, reason)
        results[name] = Evaluation(Scores(missing=dict.fromkeys(each.task.own_metrics, reason)), [])
    return results


def check_answers(examples: Sequence[Example], *, where: str) -> None:
    """Check that examples can be scored at all."""
    if examples and not any(example.target for example in examples):
        raise SkdError(_UNANSWERED, where=where, hint="give rows with answers: prompts alone cannot be scored")


def _unscorable(task: TaskConfig, examples: Sequence[Example]) -> dict[MetricName, SkdError]:
    """Find the metrics that the references alone rule out."""
    if not examples:
        raise SkdError(
            "there are no predictions to score", where=f"metric `{task.metrics[0]}`", hint="give the set examples"
        )
    if not any(example.target for example in examples):
        hint = "give them answers, or add a held-out set that has some"
        return {name: SkdError(_UNANSWERED, where=f"metric `{name}`", hint=hint) for name in task.own_metrics}
    missing = {}
    for name in task.own_metrics:
        try:
            scorable(name, [example.target for example in examples], task.answer)
        except SkdError as error:
            missing[name] = error
    if missing and len(missing) == len(set(task.own_metrics)):
        raise next(iter(missing.values()))
    return missing


def _measure(
    name: MetricName, predictions: Sequence[Prediction], task: TaskConfig, config: EvaluationConfig, *, private: bool
) -> CorpusMetric:
    if name == "perplexity":
        return perplexity(predictions)
    if name == "judge":
        rows = [(row.source, row.target, row.prediction) for row in predictions]
        ratings = grade(config.judge, rows, private=private)
        graded = {position: rating for position, rating in enumerate(ratings) if rating is not None}
        return replace(mean_rating(config.judge, list(graded.values())), scored_N=tuple(graded))
    texts = [row.prediction for row in predictions], [row.target for row in predictions]
    return measure(name, *texts, answer=task.answer)
