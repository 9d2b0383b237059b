"""Scores of models' answers by COMET: of each answer, of each model with its 95 % interval, and paired tests."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from skd_lib._core import events
from skd_lib.errors import SkdError
from skd_lib.evaluation.comet import worker
from skd_lib.evaluation.comet.checkpoint import Checkpoint
from skd_lib.evaluation.metrics import mean_of
from skd_lib.evaluation.predictions import Prediction
from skd_lib.evaluation.statistics import paired_bootstrap, scored
from skd_lib.results import Difference, Score
from skd_lib.storage import sha256

Row = tuple[str, str, str]
"""Source, translation, reference."""

_PAIRS = (("student_after", "student_before"), ("student_after", "teacher"))
_SWITCHES = {False: "TORCH_FORCE_WEIGHTS_ONLY_LOAD", True: "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"}


@dataclass(frozen=True)
class CometScores:
    """COMET's scores of several models' answers: of each answer, their mean, and paired tests by `FIRST-SECOND`.

    All are 100 times COMET's own, like those of other metrics.
    """

    segments: dict[str, list[float]]
    scores: dict[str, Score]
    comparisons: dict[str, Difference]


def score_models(
    answers: Mapping[str, Sequence[Prediction]],
    checkpoint: Checkpoint,
    python: Path,
    *,
    batch_size: int,
    trust_pickle: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> CometScores:
    """Score several models' answers with one load of the COMET model; equal answers are scored once.

    All models answered the same examples in the same order. `trust_pickle` loads a checkpoint that holds more than
    tensors and plain values.
    """
    ids = [prediction.id for prediction in next(iter(answers.values()), [])]
    if not ids:
        raise SkdError("there are no predictions to score", where="metric `comet`", hint="give the test split examples")
    if any([prediction.id for prediction in given] != ids for given in answers.values()):
        raise SkdError("the models answered different examples", hint="evaluate all on the same test split")
    rows = {model: [_row(prediction) for prediction in given] for model, given in answers.items()}
    unique = list(dict.fromkeys(row for given in rows.values() for row in given))
    version, values = ask_worker(checkpoint, python, unique, batch_size=batch_size, trust_pickle=trust_pickle)
    by_row = dict(zip(unique, values, strict=True))
    signature = f"comet|model:{checkpoint.reference}|sha256:{sha256(checkpoint.weights)[:16]}|version:{version}"
    segments = {model: [100 * by_row[row] for row in given] for model, given in rows.items()}
    measured = {model: mean_of(values, signature) for model, values in segments.items()}
    scores = {model: scored(found, resamples=resamples, seed=seed) for model, found in measured.items()}
    comparisons = {
        f"{first}-{second}": paired_bootstrap(measured[first], measured[second], resamples=resamples, seed=seed)
        for first, second in _PAIRS
        if first in measured and second in measured
    }
    return CometScores(segments, scores, comparisons)


def _row(prediction: Prediction) -> Row:
    # A lone surrogate has no UTF-8 form, which is what tokenizers work on.
    source, translation, reference = (
        text.encode("utf-8", "replace").decode("utf-8")
        for text in (prediction.source, prediction.prediction, prediction.target)
    )
    return source, translation, reference


def ask_worker(
    checkpoint: Checkpoint, python: Path, rows: Sequence[Row], *, batch_size: int, trust_pickle: bool
) -> tuple[str, list[float]]:
    """Ask the worker for COMET's version and its score of each row."""
    progress = events.Progress("scoring with COMET", len(rows))
    version, scores = "", list[float]()
    with TemporaryDirectory() as scratch:
        request = Path(scratch) / "request.json"
        content = {
            "checkpoint": str(checkpoint.stage(Path(scratch))),
            "batch_size": batch_size,
            "rows": [dict(zip(("src", "mt", "ref"), row, strict=True)) for row in rows],
        }
        request.write_text(json.dumps(content), encoding="utf-8")
        for reply in _replies(python, request, trust_pickle=trust_pickle):
            if "error" in reply:
                raise _explained(str(reply["error"]), checkpoint)
            version = str(reply.get("version", version))
            scores += reply.get("scores", [])
            progress.update(len(scores))
    if len(scores) != len(rows):
        raise SkdError("COMET ended before it had scored everything", where=checkpoint.reference, hint="see the log")
    return version, scores


def _replies(python: Path, request: Path, *, trust_pickle: bool) -> Iterator[dict[str, Any]]:
    # The checkpoint and all it needs are local files; torch's own switches decide what its pickle may hold.
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    env.pop(_SWITCHES[not trust_pickle], None)
    env[_SWITCHES[trust_pickle]] = "1"
    # -I: no module of this environment may get into COMET's.
    command = [str(python), "-I", worker.__file__, str(request)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, encoding="utf-8", env=env
    ) as child:
        assert child.stdout is not None  # noqa: S101 - PIPE was asked for
        for line in child.stdout:
            yield json.loads(line)


def _explained(error: str, checkpoint: Checkpoint) -> SkdError:
    if error.startswith("UnpicklingError"):
        return SkdError(
            "the checkpoint holds more than tensors and plain values, and loading it could run any code",
            where=checkpoint.reference,
            hint="if you trust where it came from: evaluation.comet.trust_pickle: true",
        )
    return SkdError(f"COMET failed: {error}", where=checkpoint.reference, hint="the whole message is in the log")
