"""Run the convergence study (docs/evidence/plan.md), one run after another; each is appended to the stored results."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from problems import distinct
from records import CURVE_COLUMNS, CURVES, RUN_COLUMNS, RUNS, SCORE, Run, append, read_runs, short
from skd_lib.config import EvaluationConfig, TrainingConfig
from skd_lib.data.examples import Example, make_example
from skd_lib.data.tokenize import TokenizedExample, encode_all
from skd_lib.distillation.methods import METHODS
from skd_lib.errors import Preempted, SkdError
from skd_lib.evaluation.evaluate import evaluate
from skd_lib.models.loading import load_model, save_model
from skd_lib.models.student_init import prune_layers
from skd_lib.training.checkpoints import Checkpoints
from skd_lib.training.run import TrainResult, train
from study_plan import (
    ALL_ARMS,
    BASE_PROBLEMS,
    INIT_EPOCHS,
    LEARNING_RATES,
    PATIENCE,
    REFERENCE,
    SCHEDULED,
    SMALL_ADDENDS,
    SPACE,
    STUDENT_LAYERS,
    STUDENT_TRAINING,
    TASK,
    TEACHER_LAYERS,
    TEACHER_PROBLEMS,
    TEST,
    TRAINING,
    VALIDATION,
    VARIANTS,
    WIDTH,
    Arm,
    Cell,
    cells,
)
from tiny_models import random_model, tokenizer_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 64
SEED = 0
"""Of the problems and of the teacher."""
COUNTS = ("student_tokens", "teacher_tokens")
POINTS = ("validation_loss", "accuracy", *COUNTS, "cpu_seconds")
"""Figures of a student at each validation."""
log = logging.getLogger(__name__)


@dataclass
class Start:
    """What all runs share: problems, the teacher, and the base of the students `sft`; both are kept in a folder."""

    folder: Path
    tokenizer: Any = field(default_factory=lambda: tokenizer_for(SPACE, CONTEXT))

    def __post_init__(self) -> None:
        """Draw the problems, and train both models unless they are there."""
        drawn = distinct(SPACE, TEST + VALIDATION + TEACHER_PROBLEMS, SEED)
        problems = [make_example(*problem) for problem in drawn]
        self.test, self.validation = problems[:TEST], problems[TEST : TEST + VALIDATION]
        self.train = problems[TEST + VALIDATION :]
        easy = [make_example(*problem) for problem in distinct(SPACE.with_addends(SMALL_ADDENDS), BASE_PROBLEMS, SEED)]
        self.teacher = self._trained("teacher", TEACHER_LAYERS, self.train)
        self.base = self._trained("base", STUDENT_LAYERS, easy)
        self.teacher_score = self.accuracy(self.teacher, self.test)

    def _trained(self, name: str, layers: int, examples: Sequence[Example]) -> PreTrainedModel:
        if not (self.folder / name).is_dir():
            log.info("training the %s", name)
            model = self.random(layers, SEED)
            self.fit(model, "sft", examples, TRAINING, seed=SEED)
            save_model(model, self.tokenizer, self.folder / name)
        return load_model(self.folder / name)

    def random(self, layers: int, seed: int) -> PreTrainedModel:
        """Return a model of random weights."""
        return random_model({**WIDTH, "num_hidden_layers": layers}, self.tokenizer, CONTEXT, seed)

    def student(self, arm: Arm, seed: int) -> PreTrainedModel:
        """Return the student of an arm before distillation."""
        if arm.init == "cut":
            return prune_layers(self.teacher, 1, STUDENT_LAYERS - 1)
        if arm.init == "random":
            return self.random(STUDENT_LAYERS, seed)
        student = copy.deepcopy(self.base)
        training = STUDENT_TRAINING.model_copy(update={"epochs": INIT_EPOCHS})
        self.fit(student, "sft", self.train[: arm.examples], training, seed=seed + 1000)
        return student

    def accuracy(self, model: PreTrainedModel, examples: Sequence[Example]) -> float:
        """Return the share of problems that greedy decoding solves, in percent."""
        found = evaluate(model.eval(), self.tokenizer, examples, TASK, EvaluationConfig(batch_size=len(examples)))
        return found.scores.metrics["accuracy"].score

    def fit(
        self, student: PreTrainedModel, variant: str, examples: Sequence[Example], training: TrainingConfig, **more: Any
    ) -> TrainResult:
        """Train a student in place."""
        distill = VARIANTS[variant]
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        try:
            with tempfile.TemporaryDirectory() as folder:
                return train(
                    method=distill.method,
                    student=student,
                    teacher=self.teacher if METHODS[distill.method].needs_teacher else None,
                    train=self._encoded(examples),
                    validation=self._encoded(self.validation),
                    training=training,
                    distill=distill,
                    max_new_tokens=TASK.max_new_tokens,
                    eos_ids=(eos,),
                    pad_id=pad,
                    checkpoints=Checkpoints(Path(folder)),
                    **more,
                )
        except Preempted:  # its checkpoint went with the folder
            hint = "start the same command again"
            raise Preempted(
                "stopped in the middle of a run, which starts from its beginning next time", hint=hint
            ) from None

    def _encoded(self, examples: Sequence[Example]) -> list[TokenizedExample]:
        return encode_all(self.tokenizer, TASK, examples, self.tokenizer.eos_token_id)


class Curve(TrainerCallback):
    """Measures the student at every validation: accuracy on the validation problems, and what it has cost so far.

    Seconds are of the processor, without what this measuring takes itself.
    """

    def __init__(self, start: Start) -> None:
        self.start, self.points = start, list[dict[str, float]]()
        self._began, self._measuring = time.process_time(), 0.0

    def on_evaluate(self, _args: Any, state: Any, _control: Any, *, model: Any, metrics: Any, **_: Any) -> None:
        """Append a point."""
        now = time.process_time()
        spent = {name: sum(entry.get(name, 0) for entry in state.log_history) for name in COUNTS}
        accuracy = self.start.accuracy(model, self.start.validation)
        self.points.append(
            {
                "step": state.global_step,
                "validation_loss": metrics["eval_loss"],
                "accuracy": accuracy,
                **spent,
                "cpu_seconds": now - self._began - self._measuring,
            }
        )
        self._measuring += time.process_time() - now


def run_cell(start: Start, cell: Cell) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train and measure one student; return its row and the points of its curve."""
    student = start.student(cell.arm, cell.seed)
    curve = Curve(start)
    stop = [] if cell.variant in SCHEDULED else [EarlyStoppingCallback(PATIENCE)]
    examples = start.train[: cell.arm.examples]
    rate = LEARNING_RATES.get(cell.variant, STUDENT_TRAINING.learning_rate)
    asked = {"max_steps": cell.arm.horizon, "warmup_ratio": cell.arm.warmup, "learning_rate": rate}
    training = STUDENT_TRAINING.model_copy(update=asked)
    result = start.fit(student, cell.variant, examples, training, seed=cell.seed, callbacks=[curve, *stop])
    rejected = [entry["rejection_rate"] for entry in result.history if "rejection_rate" in entry]
    tenths = result.course("rejection_rate")
    row = {
        SCORE: start.accuracy(result.student, start.test),
        "teacher": start.teacher_score,
        "rejection_rate": fmean(rejected) if rejected else "",
        "rejection_rate_last_tenth": tenths[1] if tenths else "",
        "steps": result.steps,
        "best_step": result.best_step,
        "first_validation_loss": result.first_validation_loss,
        "best_validation_loss": result.best_validation_loss,
        **{name: int(result.total(name)) for name in ("response_tokens", *COUNTS)},
    }
    return row, curve.points


def run_study(folder: Path, out: Path, most: int | None = None) -> Iterator[str]:
    """Run what is missing of the study, in the plan's order, and say of each run what came of it.

    Args:
        folder: Where the teacher and the base are kept.
        out: Where `runs.csv` and `curves.csv` are; each run is appended when it has ended.
        most: Runs at most; None: all.

    Raises:
        SkdError: the teacher is not that of what is missing, or another process runs the study with these results.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", blocking=False):
            yield from _run_missing(folder, out, most)
    except Timeout as error:
        hint = "let it end, or give this one a folder of its own with --out"
        raise SkdError("another process runs the study with these results", where=str(out), hint=hint) from error


def _run_missing(folder: Path, out: Path, most: int | None) -> Iterator[str]:
    stored = read_runs(out) if (out / RUNS).is_file() and "\n" in (out / RUNS).read_text(encoding="utf-8") else []
    done = {(run.comparison, run.variant, run.seed) for run in stored}
    missing = [cell for cell in cells() if cell.key not in done]
    if not missing:
        yield f"all {len(done)} runs are stored in {out}; --out NEW-FOLDER runs them all again"
        return
    transformers_logging.disable_progress_bar()
    start = Start(folder)
    for cell in _under_this_teacher(missing, start, stored, known_only=False)[:most]:
        row, points = run_cell(start, cell)
        key = dict(zip(("comparison", "variant", "seed"), cell.key, strict=True))
        named = {"metric": "accuracy", "reference": REFERENCE, "init": cell.arm.init, "failed": ""}
        long = [{"figure": name, "step": point["step"], "value": point[name]} for point in points for name in POINTS]
        # The row comes last: a run that was cut off in between is run again, and the points of its last run count.
        append(out / CURVES, CURVE_COLUMNS, [key | point for point in long])
        append(out / RUNS, RUN_COLUMNS, [key | named | row])
        yield f"{cell.arm.name} {cell.variant} {cell.seed}: {row[SCORE]:.1f} % after {row['best_step']} steps"


def check_study(folder: Path, stored: Path, most: int, seed: int) -> Iterator[str]:
    """Run some of the stored runs again, and say of each whether its figures are the stored ones.

    Args:
        folder: Where the teacher and the base are kept.
        stored: Where `runs.csv` is; it stays as it is.
        most: Runs at most, drawn at random.
        seed: Of the draw.

    Raises:
        SkdError: the teacher is none of those of the stored runs.
    """
    runs = read_runs(stored)
    by_key = {(run.comparison, run.variant, run.seed): run.figures for run in runs}
    transformers_logging.disable_progress_bar()
    start = Start(folder)
    known = _under_this_teacher([cell for cell in cells() if cell.key in by_key], start, runs, known_only=True)
    for index in np.random.default_rng(seed).permutation(len(known))[:most]:
        cell = known[index]
        row, _ = run_cell(start, cell)
        there = by_key[cell.key]
        now = {name: float(short(value)) for name, value in row.items() if name in there}
        differing = [f"{name} {now[name]:g}, stored {there[name]:g}" for name in now if now[name] != there[name]]
        yield f"{' '.join(map(str, cell.key))}: {'; '.join(differing) or f'all {len(now)} figures are the stored ones'}"


def _under_this_teacher(asked: Sequence[Cell], start: Start, stored: Sequence[Run], *, known_only: bool) -> list[Cell]:
    """Return the cells whose teacher is this one, by its score; on another CPU it may solve one problem more or less.

    Without `known_only` also those of a teacher of which nothing is stored.
    """
    numbers = {arm.name: arm.teacher for arm in ALL_ARMS}
    scores = {numbers[run.comparison]: run.figures["teacher"] for run in stored if run.comparison in numbers}
    here, one = start.teacher_score, 100 / len(start.test) + 1e-3
    other = math.inf if known_only else here
    found = [cell for cell in asked if abs(scores.get(cell.arm.teacher, other) - here) <= one]
    if asked and not found:
        theirs = ", ".join(f"{score:g} %" for score in sorted(set(scores.values())))
        raise SkdError(
            f"this teacher solves {here:g} % of the problems, those of the stored runs {theirs}: "
            "no run under it can be put beside theirs",
            where=str(start.folder),
            hint="give no folder, for the stored teacher; or run the whole study with --out NEW-FOLDER",
        )
    return found
