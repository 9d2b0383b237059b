"""Compare plans with real runs: three sizes and lengths, each measured, planned and run on this machine.

    OMP_NUM_THREADS=1 python docs/benchmarks/planning.py --output runs/planning.json

Teachers are the first layers of the demo's SmolLM2-135M, students the first and last of theirs; data are the demo's.
The speed is measured before and after each run, so that a machine that others use is seen as it was; a plan is the mean
of both. Each step is a process of its own, as in every run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from skd_lib._core.terminal import Console, run_command
from skd_lib.models.loading import load_model
from skd_lib.models.references import resolve_model
from skd_lib.models.student_init import prune_layers

DEMO = Path(__file__).resolve().parents[2] / "pipelines/configs/demo.yaml"
SIZES = {"small": (6, 3, 12, 8), "medium": (14, 5, 24, 8), "large": (30, 10, 40, 8)}
"""Layers of the teacher and of the student, longest response, rows of a step."""
STEPS = {"teacher_sft": 16, "distill": 12}
"""Optimiser steps."""
COMPARED = ("teacher_sft", "distill")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run_file(name: str, folder: Path) -> Path:
    """Write the YAML file of a run, and its teacher."""
    layers, kept, new_tokens, rows = SIZES[name]
    values: dict[str, Any] = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    whole = resolve_model(values["teacher"])
    teacher = folder / f"teacher-{name}"
    prune_layers(load_model(whole), layers - 1, 1).save_pretrained(teacher)
    for file in whole.glob("token*"):
        shutil.copy(file, teacher)
    values |= {"name": f"plan-{name}", "teacher": str(teacher)}
    values["data"] |= {"validation_examples": 16, "test_examples": 32}
    values["task"]["max_new_tokens"] = new_tokens
    values["student_init"] = {"mode": "prune", "keep_first": kept - 1, "keep_last": 1}
    for step, steps in STEPS.items():
        values[step]["training"] |= {"max_steps": steps, "batch_size": rows, "eval_steps": steps}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def skd(*words: str | Path) -> str:
    """Run a command of `skd`, and return what it prints."""
    command = [sys.executable, "-m", "skd_kfp.pipelines.cli", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Measure, run and measure again; return the seconds of both plans and of the run by step."""
    path = run_file(name, folder)
    options = ("--measure", "--json", "--calibration")
    before = json.loads(skd("plan", path, *options, folder / f"{name}-before.json"))
    skd("run", path, "--runs-dir", folder / "runs", "--tracking-uri", "")
    after = json.loads(skd("plan", path, *options, folder / f"{name}-after.json"))
    summary = json.loads((folder / "runs" / f"plan-{name}" / "summary.json").read_text(encoding="utf-8"))
    plans = [{step["name"]: step["seconds"] for step in plan["steps"]} for plan in (before, after)]
    return {"plans": plans, "run": summary["seconds"], "assumptions": [before["assumptions"], after["assumptions"]]}


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help="Name of a size; again for more.", show_default="all")] = None,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("runs/planning.json"),
) -> None:
    """Compare plans with real runs, and print planned and taken seconds."""
    found: dict[str, Any] = {}
    table = Table("run", "step", "planned", "taken", "planned / taken", box=None)
    with TemporaryDirectory(prefix="skd-plan-") as scratch:
        for name in only or SIZES:
            found[name] = compare(name, Path(scratch))
            for step in COMPARED:
                planned, taken = fmean(plan[step] for plan in found[name]["plans"]), found[name]["run"][step]
                table.add_row(name, step, f"{planned:.0f} s", f"{taken:.0f} s", f"{planned / taken:.2f}")
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    Console().print(table)


if __name__ == "__main__":
    run_command(app)
