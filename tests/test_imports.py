"""Imports go one way: pipelines (command line, runners, DAGs) -> components -> skd_lib.steps -> the library."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for folder in ("skd_lib", "components") for path in (ROOT / folder).rglob("*.py"))
COMMAND_LINES = ("skd_lib/steps/", "skd_lib/multinode/node.py")
"""Where typer may be imported: processes of their own."""
CORE = (
    "skd_lib/sampling/",
    "skd_lib/distillation/divergences.py",
    "skd_lib/distillation/loss.py",
    "skd_lib/distillation/teacher_signal.py",
)
"""The algorithm: for people who want nothing else."""
CORE_NEEDS = {"torch", "transformers", "numpy", "typing_extensions", "skd_lib"}


def imported(path: Path) -> Iterator[str]:
    """Names of the modules that a module imports, within functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    above = {"pipelines"} if place.startswith("components/") else {"pipelines", "components", "kfp"}
    if place.startswith("skd_lib/") and not place.startswith(COMMAND_LINES):
        above.add("typer")
    assert {name.partition(".")[0] for name in imported(path)} & above == set()


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.relative_to(ROOT).as_posix().startswith(CORE)], ids=lambda path: path.stem
)
def test_the_algorithm_needs_torch_and_transformers_only(path: Path) -> None:

    outside = {name.partition(".")[0] for name in imported(path)} - sys.stdlib_module_names - CORE_NEEDS
    assert outside == set()
