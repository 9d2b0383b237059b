"""How well a model does a task: greedy answers, the task's metrics, and how sure the scores are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skd_lib.config import EvaluationConfig, TaskConfig
from skd_lib.data.examples import Example
from skd_lib.evaluation.generate import generate
from skd_lib.evaluation.metrics import measure
from skd_lib.evaluation.predictions import Prediction
from skd_lib.evaluation.significance import bootstrap_interval


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        scores: `{METRIC: {"score", "low", "high", "signature"}, ..., "examples", "seconds"}`; scores and their 95 %
            intervals are 0 to 100, seconds are those of decoding.
        predictions: One an example, in the order of the examples.
    """

    scores: dict[str, Any]
    predictions: list[Prediction]

    def figures(self) -> dict[str, float]:
        """The numbers alone, flat, as trackers and KFP's metrics want them."""
        figures: dict[str, float] = {}
        for name, value in self.scores.items():
            if isinstance(value, dict):
                figures |= {name: value["score"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
            else:
                figures[name] = float(value)
        tokens = sum(prediction.tokens for prediction in self.predictions)
        truncated = sum(prediction.truncated for prediction in self.predictions)
        return figures | {
            "tokens_per_answer": tokens / len(self.predictions),
            "truncated_fraction": truncated / len(self.predictions),
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: TaskConfig,
    config: EvaluationConfig,
    *,
    seed: int = 0,
) -> Evaluation:
    """Answer the examples and score the answers with every metric of the task but COMET.

    Args:
        model: In eval mode, on the device it is to run on.
        tokenizer: The model's.
        examples: At least one.
        task: Prompt, stop strings, length limit and metrics.
        config: Batch size and number of bootstrap resamples.
        seed: Of the bootstrap; decoding is greedy.

    Raises:
        SkdError: no examples, a reference without a number (`accuracy`), or a prompt that does not fit the model.
    """
    started = time.perf_counter()
    answers = generate(model, tokenizer, [example.source for example in examples], task, batch_size=config.batch_size)
    seconds = time.perf_counter() - started
    scores: dict[str, Any] = {}
    for name in task.own_metrics:
        measured = measure(name, [answer.text for answer in answers], [example.target for example in examples])
        low, high = bootstrap_interval(measured, resamples=config.bootstrap_samples, seed=seed)
        scores[name] = {"score": measured.score, "low": low, "high": high, "signature": measured.signature}
    predictions = [
        Prediction(example.id, example.source, example.target, answer.text, answer.tokens, answer.truncated)
        for example, answer in zip(examples, answers, strict=True)
    ]
    return Evaluation({**scores, "examples": len(examples), "seconds": round(seconds, 3)}, predictions)
