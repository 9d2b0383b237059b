"""Rounds of a loop on this machine: in order, on after one has failed, and once more for what comes after them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from skd_kfp.pipelines.local.comparison import run_comparison
from skd_kfp.pipelines.local.folder import RunFolder
from skd_kfp.pipelines.local.progress import Display
from skd_kfp.pipelines.local.runner import LocalRun, StepFailed
from skd_lib.comparison.config import CompareConfig
from skd_lib.comparison.plan import Plan, plan
from skd_lib.config.parameters import short
from tests.pipelines.fakes import looping_pipeline
from tests.pipelines.test_local import config, executed, journal  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow


def compare(folder: Path, behaviours: dict[str, str]) -> tuple[LocalRun, Plan, str]:
    """Run the fake comparison; each variant's student is a behaviour of `fake_step.py`."""
    variants = {variant: {"student": behaviour} for variant, behaviour in behaviours.items()}
    wanted = CompareConfig.model_validate({"name": "fake", "base": "base.yaml", "variants": variants})
    trials = plan(wanted, config(), where="compare.yaml")
    console = Console(file=io.StringIO(), width=200)
    finished = run_comparison(
        trials,
        RunFolder.create(folder / "runs", "fake"),
        looping_pipeline(folder),
        lambda steps: Display(console, steps),
        say=console.print,
        tracking_uri="",
        experiment="skd",
    )
    return finished, trials, console.file.getvalue()


def test_every_round_has_its_item_and_its_results_are_gathered_in_order(tmp_path: Path, journal: Path):  # noqa: F811
    finished, _, screen = compare(tmp_path, {"a": "work", "b": "work"})
    assert executed(journal) == ["expand", "first", "choose", "first", "choose", "gather", "last"]
    # The second round trains on the same inputs as the first.
    assert "train-b-seed-0: unchanged, reused" in screen
    assert "[8/8] finish: done" in screen
    summary = finished.outputs["table"]["summary"]
    assert summary["values"] == [finished.outputs[f"train-{label}"]["result"] for label in ("a-seed-0", "b-seed-0")]
    assert summary["failed"] == []


def test_a_broken_round_is_told_and_keeps_no_other_from_the_table(tmp_path: Path, journal: Path):  # noqa: F811
    finished, trials, screen = compare(tmp_path, {"a": "work", "b": "error", "c": "work"})
    rounds = ["choose", "first", "choose", "first", "choose"]
    assert executed(journal) == [
        "expand",
        "first",
        *rounds,
        "last",
        "expand",
        "gather",
        "last",
    ]  # the second time for the table alone
    assert "1 of 3 runs failed: the table is made without them" in screen
    summary = finished.outputs["table"]["summary"]
    reason = "step train-b-seed-0: the data has an empty row hint: correct row 3"
    assert summary["failed"] == [{**short(trials.trials[1]), "reason": reason}]
    assert len(summary["values"]) == 2
    assert "hello from first" in (tmp_path / "runs/fake/logs/train-b-seed-0.log").read_text()


def test_another_round_is_run_alone(tmp_path: Path, journal: Path):  # noqa: F811
    compare(tmp_path, {"a": "work"})
    finished, *_ = compare(tmp_path, {"new": "error", "a": "work"})
    assert executed(journal)[6:] == ["expand", "choose", "first", "last", "expand", "gather", "last"]
    assert len(finished.outputs["table"]["summary"]["values"]) == 1


def test_an_edited_round_has_records_of_its_own_and_one_that_comes_or_goes_does_not(tmp_path: Path, journal: Path):  # noqa: F811
    for behaviours in (
        {"a": "work"},
        {"a": "work", "b": "other"},
        {"b": "other"},
        {"a": "work", "b": "edited"},
        {"b": "edited"},
        {"a": "edited"},
    ):
        compare(tmp_path, behaviours)
    ids = [line.split()[2] for line in journal.read_text().splitlines() if line.startswith("last")]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(ids))}
    assert [numbers[text] for text in ids] == [0, 0, 0, 1, 1, 2]


def test_where_every_round_fails_the_first_says_why(tmp_path: Path, journal: Path):  # noqa: F811
    with pytest.raises(StepFailed, match="step train-a-seed-0: the data has an empty row"):
        compare(tmp_path, {"a": "error", "b": "error"})
    assert "gather" not in executed(journal)
