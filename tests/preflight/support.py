"""Runs that preflight is asked about, and the ways to ask it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skd_lib.config import RunConfig
from skd_lib.preflight import Check, PreflightReport, run_checks

ROWS = [{"source": f"le fichier {i} et {i * i}", "target": f"the file {i} and {i * i}"} for i in range(40)]


def check(values: dict[str, Any], tmp_path: Path, **options: Any) -> PreflightReport:
    options = {"checkpoint_root": str(tmp_path / "checkpoints"), "tracking_uri": "", **options}
    return run_checks(RunConfig.model_validate(values), **options)


def only(report: PreflightReport, level: str) -> Check:
    (found,) = [found for found in report.checks if found.level == level]
    return found


def executor_output(folder: Path) -> dict[str, Any]:
    output: dict[str, Any] = json.loads((folder / "executor_output.json").read_text(encoding="utf-8"))
    return output


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
