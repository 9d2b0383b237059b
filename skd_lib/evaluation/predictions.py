"""The answers of a model, one row an example, and paired tests between models' answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from skd_lib.config import MetricName
from skd_lib.errors import SkdError
from skd_lib.evaluation.metrics import CorpusMetric, mean_of, measure, ratio, summed
from skd_lib.evaluation.statistics import paired_bootstrap
from skd_lib.results import Difference, PairedTest, Role
from skd_lib.storage import write_text_atomic


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one example.

    Attributes:
        id, source, target: The example.
        prediction, tokens, truncated: The answer (`generate.Answer`).
        scores: The score of this example alone by each metric that it could be scored by.
        reference_tokens: Tokens of the reference; 0 where its likelihood was not measured.
        reference_nll: Its negative log-likelihood in nats; None where not measured, or no finite number.
    """

    id: str
    source: str
    target: str
    prediction: str
    tokens: int
    truncated: bool
    scores: dict[str, float] = field(default_factory=dict)
    reference_tokens: int = 0
    reference_nll: float | None = None


_FIELDS = {each.name for each in fields(Prediction)}
_REQUIRED = {each.name for each in fields(Prediction) if each.default is each.default_factory is MISSING}


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write JSONL, atomically."""
    text = "".join(json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions)
    # A lone surrogate (broken text that came in as JSON) has no UTF-8 form; `\udXXX` is how JSON itself writes it.
    write_text_atomic(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


def read_predictions(path: Path) -> list[Prediction]:
    """Read what `write_predictions` wrote."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SkdError(f"cannot read the predictions: {error}", where=str(path), hint="run `evaluate` again") from error
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line]


def perplexity(predictions: Sequence[Prediction]) -> CorpusMetric:
    """Measure the perplexity of the references that were read, per token."""
    read = {position: row for position, row in enumerate(predictions) if row.reference_tokens}
    if not read:
        raise SkdError(
            "no reference fits the model's context with its prompt",
            where="metric `perplexity`",
            hint="give shorter prompts, or leave this metric out of `task.metrics`",
        )
    broken = [row.id for row in read.values() if row.reference_nll is None]
    if broken:
        raise SkdError(
            f"the likelihood of {len(broken)} of {len(predictions)} references is not a number, first of {broken[0]}",
            where="metric `perplexity`",
            hint="the model's outputs are broken: look at how it was trained",
        )
    measured = ratio(
        [row.reference_nll or 0.0 for row in read.values()],
        [float(row.reference_tokens) for row in read.values()],
        # Beyond e^700 there are no floats: such a model is as bad as any.
        lambda nll: float(np.exp(min(nll, 700.0))),
        "perplexity|per:token|end of answer:included",
    )
    return replace(measured, scored_N=tuple(read))


def compare(
    first: Sequence[Sequence[Prediction]],
    second: Sequence[Sequence[Prediction]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[MetricName, tuple[Difference, int]]:
    """Test the difference between two ways of training, each by the answers of its models to the same examples.

    What was counted in an example is summed over the models, and examples are resampled: the models of one way are not
    independent witnesses of an example.

    Returns:
        For each metric that all were scored by: the difference, and the number of examples it rests on.
    """
    if len(first) != len(second) or not first:
        raise ValueError("a paired test needs as many models of one kind as of the other")
    answers = [{prediction.id: prediction for prediction in model} for model in (*first, *second)]
    targets = {prediction.id: prediction.target for prediction in first[0]}
    if any({id_: row.target for id_, row in model.items()} != targets for model in answers):
        raise SkdError("the two models answered different examples", hint="evaluate both on the same test split")
    results: dict[MetricName, tuple[Difference, int]] = {}
    names: dict[Any, None] = dict.fromkeys(name for prediction in first[0] for name in prediction.scores)
    for name in names:
        ids = [id_ for id_ in targets if all(name in model[id_].scores for model in answers)]
        if ids:
            measured = [_remeasured(name, [model[id_] for id_ in ids]) for model in answers]
            pooled = summed(measured[: len(first)]), summed(measured[len(first) :])
            results[name] = paired_bootstrap(*pooled, resamples=resamples, seed=seed), len(ids)
    return results


def paired_results(predictions: Mapping[Role, Path], *, resamples: int = 1000, seed: int = 0) -> list[PairedTest]:
    """Test the differences between every two models of a run, by each metric; `a` is the later role of a pair."""
    answers = {role: read_predictions(path) for role, path in predictions.items()}
    return [
        PairedTest(a=later, b=earlier, metric=name, n=examples, **difference.model_dump())
        for earlier, later in itertools.combinations(answers, 2)
        for name, (difference, examples) in compare(
            [answers[later]], [answers[earlier]], resamples=resamples, seed=seed
        ).items()
    ]


def _remeasured(name: MetricName, predictions: Sequence[Prediction]) -> CorpusMetric:
    """Measure again from the rows: from texts and likelihoods, or, for a mean over examples, from the scores."""
    if name in ("chrf", "bleu"):
        return measure(name, [p.prediction for p in predictions], [p.target for p in predictions])
    if name == "perplexity":
        return perplexity(predictions)
    return mean_of([p.scores[name] for p in predictions], name)


def _parse(line: str, where: str) -> Prediction:
    hint = "run `evaluate` again"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SkdError(f"not JSON: {error}", where=where, hint=hint) from error
    if not isinstance(row, dict) or not _REQUIRED <= row.keys() <= _FIELDS:
        raise SkdError("not a prediction's row", where=where, hint=hint)
    return Prediction(**row)
