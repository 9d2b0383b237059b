"""`skd runs`: the runs and comparisons on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from skd_kfp.pipelines.cli.options import AsJson, RunsDir, say_json
from skd_lib._core.terminal import say
from skd_lib.errors import SkdError

State = Literal["finished", "running", "stopped"]


@dataclass(frozen=True)
class LocalRun:
    """A run's folder, as `skd runs` lists it.

    `changed` is the time of its end or its last start, UTC; `scores` are by the model's role, by the task's metric; a
    `stopped` run failed or was stopped, and the same command goes on with it.
    """

    name: str
    kind: Literal["run", "comparison"]
    state: State
    folder: str
    changed: str
    seconds: float | None = None
    method: str = ""
    teacher: str = ""
    metric: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    acceptance_rate: float | None = None
    tokens_per_teacher_call: float | None = None
    problem: str = ""


def runs(
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """List the runs on this machine: state, figures, age; the latest first.

    Scores are by the task's first metric, the student's before and after distillation; `accepted` is the share of its
    drafts that the teacher accepts afterwards. A `stopped` run goes on where it was when its command is run again.
    To delete a run, delete its folder; models that it registered in MLflow are there, too.

    Example: `skd runs`, `skd runs --runs-dir /data/runs --json`.
    """
    if not runs_dir.is_dir():
        hint = "name the folder that `skd run` was given by --runs-dir, or start a run: `skd run CONFIG`"
        raise SkdError("there is no such folder", where=str(runs_dir), hint=hint)
    folders = (file.parent for file in runs_dir.glob("*/run.json"))
    found = sorted(map(_look_at, folders), key=lambda each: each.changed, reverse=True)
    if as_json:
        say_json(found)
    elif not found:
        say(f"there are no runs in {runs_dir}; `skd run CONFIG` starts one")
    else:
        _show(found)


def _look_at(folder: Path) -> LocalRun:
    from skd_kfp.pipelines.cli.compare import COMPARISON
    from skd_kfp.pipelines.local.folder import RunFolder
    from skd_lib.config import read_yaml

    run = RunFolder(folder)
    comparison = folder / COMPARISON
    started, results = folder / "run.json", comparison if comparison.is_file() else run.summary
    finished = results.is_file() and results.stat().st_mtime >= started.stat().st_mtime
    state: State = "running" if run.in_use() else "finished" if finished else "stopped"
    last = (results if state == "finished" else started).stat().st_mtime
    found = LocalRun(
        folder.name,
        "comparison" if comparison.is_file() else "run",
        state,
        str(folder),
        datetime.fromtimestamp(last, UTC).isoformat(timespec="seconds"),
    )
    try:
        values = read_yaml(folder / "config.yaml")
        found = replace(found, teacher=str(values.get("teacher", "")))
        if found.kind == "comparison":
            return found
        distill = values.get("distill")
        found = replace(found, method=str(distill.get("method", "")) if isinstance(distill, dict) else "")
        return _with_figures(found, run.summary) if state == "finished" else found
    except SkdError as error:
        return replace(found, problem=error.brief)


def _with_figures(run: LocalRun, file: Path) -> LocalRun:
    from skd_lib.report.summary import Summary

    summary = Summary.read(file)
    metric, draft = summary.task_metric, summary.specdec.get("after")
    return replace(
        run,
        seconds=summary.seconds.get("total", sum(summary.seconds.values())),
        metric=metric,
        scores={role: scores[metric] for role, scores in summary.models.items() if metric in scores},
        acceptance_rate=None if draft is None else draft.acceptance_rate,
        tokens_per_teacher_call=None if draft is None else draft.tokens_per_teacher_call,
    )


def _show(found: list[LocalRun]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from skd_lib._core.format import percent
    from skd_lib._core.terminal import Console
    from skd_lib.report.names import metric_name

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold", min_width=10)
    for name in ("state", "method"):
        table.add_column(name, no_wrap=True)
    for name in ("student", "teacher", "accepted", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    colours = {"finished": "green", "running": "cyan", "stopped": "yellow"}
    for run in found:
        before, after, teacher = (
            "-" if (score := run.scores.get(role)) is None else f"{score:.1f}"
            for role in ("student_before", "student_after", "teacher")
        )
        table.add_row(
            Text(run.name),
            Text(run.state, style=colours[run.state]),
            Text(run.method or run.kind),
            f"{metric_name(run.metric)} {before} → {after}" if run.metric else "",
            teacher if run.metric else "",
            "" if run.acceptance_rate is None else percent(run.acceptance_rate),
            _age(time.time() - datetime.fromisoformat(run.changed).timestamp()),
        )
    console = Console()
    console.print(table)
    for run in found:
        if run.problem:
            console.print(f"{run.name}: {run.problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _age(seconds: float) -> str:
    """Return an age in its largest unit: `3 d`, `5 h`, `12 min`."""
    for unit, length in {"d": 86400, "h": 3600, "min": 60}.items():
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "now"
