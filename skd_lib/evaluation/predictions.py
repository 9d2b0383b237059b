"""One row an example: what was asked, what was expected, what the model said. Kept so that people can look."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from skd_lib.config import MetricName
from skd_lib.errors import SkdError
from skd_lib.evaluation.metrics import measure
from skd_lib.evaluation.significance import Comparison, paired_bootstrap
from skd_lib.storage import write_text_atomic


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one example; `tokens` and `truncated` as in `generate.Answer`."""

    id: str
    source: str
    target: str
    prediction: str
    tokens: int
    truncated: bool


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write JSONL, atomically."""
    text = "".join(json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions)
    # A lone surrogate (broken text that came in as JSON) has no UTF-8 form; `\udXXX` is how JSON itself writes it.
    write_text_atomic(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


def read_predictions(path: Path) -> list[Prediction]:
    """Read what `write_predictions` wrote.

    Raises:
        SkdError: the file cannot be read, or a row is not a prediction.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SkdError(f"cannot read the predictions: {error}", where=str(path), hint="run `evaluate` again") from error
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line]


def compare(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    metrics: Sequence[MetricName],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[MetricName, Comparison]:
    """Paired test between two models' answers to the same examples, in any order, for each metric.

    Raises:
        SkdError: the two did not answer the same examples.
    """
    others = {prediction.id: prediction for prediction in second}
    if len(first) != len(second) or any(p.id not in others or others[p.id].target != p.target for p in first):
        raise SkdError("the two models answered different examples", hint="evaluate both on the same test split")
    targets = [prediction.target for prediction in first]
    ours = [prediction.prediction for prediction in first]
    theirs = [others[prediction.id].prediction for prediction in first]
    return {
        name: paired_bootstrap(
            measure(name, ours, targets), measure(name, theirs, targets), resamples=resamples, seed=seed
        )
        for name in metrics
    }


def _parse(line: str, where: str) -> Prediction:
    hint = "run `evaluate` again"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SkdError(f"not JSON: {error}", where=where, hint=hint) from error
    if not isinstance(row, dict) or set(row) != {field.name for field in fields(Prediction)}:
        raise SkdError("not a prediction's row", where=where, hint=hint)
    return Prediction(**row)
