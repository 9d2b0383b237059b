"""`skd compare`: train several students of one teacher on one data set, and compare them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skd_kfp.pipelines.cli.inputs import check_inputs, check_places
from skd_kfp.pipelines.cli.options import Local, Set, say_json
from skd_lib._core.terminal import say
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from skd_kfp.pipelines.graph import Step
    from skd_kfp.pipelines.local.folder import RunFolder
    from skd_kfp.pipelines.local.runner import LocalRun
    from skd_lib._core.terminal import Console
    from skd_lib.comparison.config import CompareConfig
    from skd_lib.comparison.plan import Plan

TABLES, PAGE, COMPARISON, TRIALS = "comparison.md", "comparison.html", "comparison.json", "runs.csv"
"""Files of a comparison, in its folder as among the artifacts of its MLflow run."""


def compare(
    config: Annotated[
        Path, typer.Argument(help="The comparison's YAML file, e.g. pipelines/configs/compare-demo.yaml.")
    ],
    local: Local,
    changes: Set = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: the parameters of the pipeline `compare_methods`, as JSON.")
    ] = False,
) -> None:
    """Train by several methods, settings, student inits and seeds under one teacher, and compare the students.

    The pipeline `compare_methods`, run on this machine. Running again reuses every step whose inputs have not changed:
    a comparison that was stopped goes on, and if you add a variant or a seed, only the new runs are trained. A run that
    fails does not keep the others from the table; it is tried again when the comparison is run again.

    Example: `skd compare compare.yaml --dry-run`.
    """
    from skd_lib._core.terminal import Console
    from skd_lib.comparison.config import load_compare
    from skd_lib.comparison.plan import plan, to_parameters
    from skd_lib.config import parse_overrides

    local.check()
    settings, base = load_compare(config, parse_overrides(changes or ()))
    planned = plan(settings, base, where=str(config))
    console = Console(file=sys.stdout)  # this very stream: kfp's own output is redirected from `sys.stdout`
    if local.dry_run:
        if as_json:
            say_json(to_parameters(settings, base))
        else:
            _print_plan(console, planned, local.runs_dir / settings.name)
    elif as_json:
        raise SkdError("it prints the plan of a dry run", where="--json", hint="add --dry-run")
    runs = [trial.config(base) for trial in planned.trials]
    if local.dry_run:
        check_inputs(base, runs)
        return
    check_places(base, runs)

    from skd_kfp.pipelines.local.stopping import explain_end, same_command

    with explain_end(same_command()):
        from skd_kfp.pipelines.compiling import compile_pipeline
        from skd_kfp.pipelines.local.comparison import run_comparison
        from skd_kfp.pipelines.local.folder import RunFolder
        from skd_kfp.pipelines.local.progress import display_for

        folder = RunFolder.create(local.runs_dir, settings.name)
        finished = run_comparison(
            planned,
            folder,
            compile_pipeline(name="compare_methods"),
            lambda steps: display_for(console, settings.name, steps),
            say=say,
            tracking_uri=local.store,
            experiment=local.experiment,
            fresh=local.fresh,
        )
        _conclude(console, finished, folder, local.store, local.experiment)


def _print_plan(console: Console, plan: Plan, folder: Path) -> None:
    from rich.table import Table

    from skd_kfp.pipelines.compiling import compile_pipeline
    from skd_kfp.pipelines.graph import read_steps

    settings, base, trials = plan.compare, plan.base, plan.trials
    table = Table("variant", "method", "student from", "what differs", title=f"comparison {settings.name}", box=None)
    table.title_justify = "left"
    first = {trial.variant: trial for trial in reversed(trials)}
    for variant in dict.fromkeys(trial.variant for trial in trials):
        trial = first[variant]
        run = trial.config(base)
        differs = ", ".join(
            f"{path.rpartition('.')[2]} {json.dumps(value)}"
            for path, value in trial.overrides.items()
            if path not in ("distill.method", "student_init", "student")
        )
        init = run.student_init.mode
        table.add_row(variant, run.distill.method, f"{init}: {run.student}" if run.student else init, differs)
    console.print(table)
    steps = read_steps(compile_pipeline(name="compare_methods")[0])
    of_each = ", ".join(f"{step.name}{_remark(step, settings)}" for step in steps if step.loop)
    for name, text in {
        "teacher": base.teacher,
        "seeds": ", ".join(map(str, settings.seeds)),
        "runs": f"{len(trials)}: {of_each} of each",
        "once": ", ".join(step.name for step in steps if not step.loop),
        "against": plan.reference,
        "files": str(folder),
    }.items():
        say(f"{name:<8} {text}")


def _remark(step: Step, settings: CompareConfig) -> str:
    idle = step.name == "specdec_benchmark" and not settings.drafts
    return " (measures nothing: `drafts` is not set)" if idle else ""


def _conclude(console: Console, run: LocalRun, folder: RunFolder, tracking_uri: str, experiment: str) -> None:
    """Print the tables, the places of the results, and the next command."""
    from skd_lib.comparison.render import render
    from skd_lib.comparison.table import Comparison
    from skd_lib.tracking.view import where_to_look

    outputs = {name: Path(uri) for name, uri in run.outputs["compare_table"].items()}
    shutil.copyfile(outputs["report"], folder.root / TABLES)
    shutil.copyfile(outputs["page"], folder.root / PAGE)
    for name in (TRIALS, COMPARISON):
        shutil.copyfile(outputs["comparison"] / name, folder.root / name)
    file = folder.root / COMPARISON
    console.print()
    console.print(render(Comparison.read(file)))
    for name in (PAGE, TABLES, TRIALS, COMPARISON):
        say(f"{folder.root / name}")
    if tracking_uri:
        for what, line in where_to_look(tracking_uri, experiment).items():
            say(f"{what:<8} {line}")
