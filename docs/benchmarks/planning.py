"""Compare plans with real trainings: three sizes and lengths, each measured, planned and trained on this CPU.

    OMP_NUM_THREADS=1 python docs/benchmarks/planning.py --output runs/planning.json

Teachers are layers of the demo's SmolLM2-135M, students some of theirs; data are the demo's. Speed is measured
before and after each training, and a plan is the mean of both. Seconds are those that one thread worked: the
machine may have other work. Planned with the data's lengths, and with those that the responses then had.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from skd_lib._core.terminal import Console, run_command
from skd_lib.config import RunConfig, load_config
from skd_lib.data.tokenize import answer_end_id
from skd_lib.models.files import load_tokenizer
from skd_lib.models.loading import load_model
from skd_lib.models.references import resolve_model
from skd_lib.models.student_init import prune_layers
from skd_lib.planning.assumptions import Assumptions
from skd_lib.planning.machines import load_machine
from skd_lib.planning.measure import measure, read_splits, tokens_of
from skd_lib.planning.plan import make_plan
from skd_lib.planning.sizes import run_sizes
from skd_lib.training.checkpoints import Checkpoints
from skd_lib.training.run import TrainResult, train

DEMO = Path(__file__).resolve().parents[2] / "pipelines/configs/demo.yaml"
SIZES = {"small": (6, 3, 12), "medium": (14, 5, 24), "large": (30, 10, 40)}
"""Layers of the teacher and of the student, longest response."""
STEPS = {"teacher_sft": 16, "distill": 8}
"""Optimiser steps."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run_file(name: str, folder: Path) -> Path:
    """Write the YAML file of a run, and its teacher."""
    layers, kept, new_tokens = SIZES[name]
    values: dict[str, Any] = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    whole = resolve_model(values["teacher"])
    teacher = folder / f"teacher-{name}"
    model = load_model(whole)
    if layers < model.config.num_hidden_layers:
        model = prune_layers(model, layers - 1, 1)
    model.save_pretrained(teacher)
    for file in whole.glob("token*"):
        shutil.copy(file, teacher)
    values |= {"name": f"plan-{name}", "teacher": str(teacher)}
    values["data"] |= {"validation_examples": 16, "test_examples": 32}
    values["task"]["max_new_tokens"] = new_tokens
    values["student_init"] = {"mode": "prune", "keep_first": kept - 1, "keep_last": 1}
    for step, steps in STEPS.items():
        values[step]["training"] |= {"max_steps": steps, "eval_steps": steps}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def trained(config: RunConfig, folder: Path) -> tuple[dict[str, float], float]:
    """Train teacher and student; return the seconds of each, and the mean length of the student's responses."""
    where = Path(config.teacher)
    tokenizer, splits = load_tokenizer(where), read_splits(config)
    end = answer_end_id(tokenizer, config.task)
    validation = tokens_of(config, tokenizer, splits.validation)
    seconds = {}

    def run(step: str, method: str, model: Any, examples: Sequence[Any], section: Any, **others: Any) -> TrainResult:
        tokens = tokens_of(config, tokenizer, examples)
        start = time.process_time()
        result = train(
            method=method,
            student=model,
            train=tokens,
            validation=validation,
            training=section.training,
            seed=config.seed,
            max_new_tokens=config.task.max_new_tokens,
            eos_ids=(end,),
            pad_id=end,
            checkpoints=Checkpoints(folder / step),
            name=step,
            **others,
        )
        seconds[step] = time.process_time() - start
        return result

    teacher = run(
        "teacher_sft", "sft", load_model(where), splits.train_teacher, config.teacher_sft, teacher=None
    ).student
    first, last = config.student_init.keep_first or 0, config.student_init.keep_last or 0
    student = prune_layers(teacher, first, last)
    distilled = run(
        "distill", "skd", student, splits.train_student, config.distill, teacher=teacher, distill=config.distill
    )
    lengths = [entry["response_length_mean"] for entry in distilled.history if "response_length_mean" in entry]
    return seconds, fmean(lengths)


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Measure, train and measure again; return planned and taken seconds by step."""
    config, machine = load_config(run_file(name, folder)), load_machine("cpu")

    def measured() -> dict[str, Any]:
        return measure(config, machine, lambda _: None, clock=time.process_time)

    before = measured()
    seconds, length = trained(config, folder / name)
    after = measured()

    def planned(**others: float) -> dict[str, float]:
        plans = [
            make_plan(config, machine, Assumptions(**(figures | others | {"start_seconds": 0})), *run_sizes(config))
            for figures in (before, after)
        ]
        return {step: fmean(next(s.seconds for s in plan.steps if s.name == step) for plan in plans) for step in STEPS}

    longest = float(config.task.max_new_tokens)
    return {
        "measured": [before, after],
        "response_tokens": length,
        "planned": planned(),
        # Fine-tuning reads the data's answers.
        "planned_with_lengths": planned()
        | {"distill": planned(response_tokens=length, longest_tokens=longest)["distill"]},
        "taken": seconds,
    }


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help="Name of a size; again for more.", show_default="all")] = None,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("runs/planning.json"),
) -> None:
    """Compare plans with real trainings, and print planned and taken seconds."""
    found: dict[str, Any] = {}
    table = Table("run", "step", "taken", "planned / taken", "with the responses' lengths", box=None)
    with TemporaryDirectory(prefix="skd-plan-") as scratch:
        for name in only or SIZES:
            one = found[name] = compare(name, Path(scratch))
            for step, taken in one["taken"].items():
                ratios = [f"{one[plan][step] / taken:.2f}" for plan in ("planned", "planned_with_lengths")]
                table.add_row(name, step, f"{taken:.0f} s", *ratios)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    Console().print(table)


if __name__ == "__main__":
    run_command(app)
