"""The convergence study: its plan, that it goes on where it stopped, and what its results allow to say."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from scipy import stats
from typer.testing import CliRunner

import study
from evidence import app
from records import CURVE_COLUMNS, CURVES, RUN_COLUMNS, RUNS, SCORE, Curve, Run, append, read_curves, read_runs
from skd_lib.errors import SkdError
from skd_lib.evaluation.statistics import holm
from study_plan import (
    AGAIN,
    AGAIN_SEEDS,
    ALL_ARMS,
    ARMS,
    CLAIMS,
    CONVERGED_CLAIMS,
    CORE,
    LEARNING_RATES,
    LONG_CLAIMS,
    OTHER_CLAIMS,
    OTHERS,
    RECIPE,
    RECIPE_CLAIMS,
    REFERENCE,
    RULES,
    RULES_AGAIN,
    RULES_ARM,
    SEEDS,
    STUDENT_TRAINING,
    VARIANTS,
    Cell,
    cells,
)
from study_results import (
    BUDGETS,
    NOT_JUDGED,
    budget_differences,
    claim_differences,
    claim_tests,
    draw_study,
    early_differences,
    rule_differences,
    seconds,
    study_tables,
    verdict,
)

STEPS = STUDENT_TRAINING.model_copy(update={"max_steps": 2, "eval_steps": 1, "batch_size": 4})
CLAIM = CLAIMS[0]


def _run(variant: str, seed: int, score: float) -> Run:
    return Run(CLAIM.arm.name, "accuracy", variant, "skd", "sft", "", seed, {SCORE: score})


def _runs(better: tuple[float, ...], worse: tuple[float, ...]) -> list[Run]:
    pairs = ((CLAIM.better, better), (CLAIM.worse, worse))
    return [
        _run(variant, seed, score)
        for variant, scores in pairs
        for seed, score in zip(CLAIM.seeds, scores, strict=False)
    ]


def test_every_run_is_planned_once_and_every_claim_has_its_runs() -> None:
    planned = list(cells())
    assert len(planned) == len(set(planned)) == len({cell.key for cell in planned})
    assert {cell.arm for cell in planned} == set(ALL_ARMS)
    assert {cell.variant for cell in planned} == {*CORE, *OTHERS, *RULES, *RECIPE} == set(VARIANTS)
    again = [cell for cell in planned if cell.seed in AGAIN_SEEDS]
    claimed = {(c.arm, name) for c in AGAIN for name in (c.better, c.worse)}
    assert len(again) == len(AGAIN_SEEDS) * (len(claimed) + len(RULES_AGAIN))
    assert {(RULES_ARM, REFERENCE)} <= claimed
    assert set(LEARNING_RATES) <= set(RECIPE)
    assert {claim.worse for claim in (*RECIPE_CLAIMS, *OTHER_CLAIMS)} == {REFERENCE}
    for claims in (CLAIMS, AGAIN, LONG_CLAIMS, CONVERGED_CLAIMS, RECIPE_CLAIMS, OTHER_CLAIMS):
        assert len({claim.number for claim in claims}) == len(claims)
        for claim in claims:
            pairs = claim.pairs()
            assert len(set(pairs)) == len(pairs) >= len(SEEDS)
            keys = {(arm, name, seed) for arm, seed in pairs for name in (claim.better, claim.worse)}
            assert keys <= {cell.key for cell in planned}
    # The methods of the first round are in the others' table with all of its seeds.
    assert [len(claim.pairs()) for claim in OTHER_CLAIMS if claim.better == "imitkd"] == [6, 4, 4, 3]
    arms = [{cell.arm for cell in planned if cell.variant == rule} for rule in RULES]
    assert all(RULES_ARM in each for each in arms)


def test_runs_are_compared_under_one_teacher() -> None:
    claim = OTHER_CLAIMS[0]
    assert claim.second is not None
    first, second = claim.arm.name, claim.second[0].name

    def run(arm: str, variant: str, seed: int, score: float) -> Run:
        return replace(_run(variant, seed, score), comparison=arm)

    runs = [
        *(run(first, claim.better, 10, 60.0), run(first, REFERENCE, 10, 50.0)),
        *(run(second, claim.better, 30, 95.0), run(second, REFERENCE, 30, 90.0)),
        *(run(second, claim.better, 10, 1.0), run(first, REFERENCE, 30, 2.0)),  # each without its pair
    ]
    assert claim_differences(runs, OTHER_CLAIMS)[claim.number] == [10.0, 5.0]
    row = study_tables(runs)["others"].splitlines()[2]
    assert row.startswith(f"| {claim.number} | {claim.text} | sft, 1,000 | 2 of 4 | +7.5 [")


def test_a_claim_is_judged_by_a_paired_test_corrected_for_all_claims() -> None:
    better, worse = (60.0, 64.0, 61.0, 63.0, 62.0, 61.0), (50.0, 53.0, 52.5, 52.0, 51.0, 52.0)
    test = claim_tests(_runs(better, worse))[CLAIM.number]
    theirs = stats.ttest_rel(better, worse)
    assert test.p_value == pytest.approx(theirs.pvalue)
    assert test.p_holm == pytest.approx(holm([theirs.pvalue] + [1.0] * (len(CLAIMS) - 1))[0])
    planned = len(CLAIM.pairs())
    assert verdict(test, planned) == "shown"
    assert verdict(claim_tests(_runs(worse, better))[CLAIM.number], planned) == "the opposite is shown"
    equal = claim_tests(_runs(better, (61.0, 60.0, 64.0, 62.0, 61.0, 62.0)))[CLAIM.number]
    assert verdict(equal, planned) == "not shown"
    # Not before all that was planned has been run.
    assert verdict(claim_tests(_runs(better[:-1], worse[:-1]))[CLAIM.number], planned) == NOT_JUDGED
    assert verdict(claim_tests(_runs(better[:1], worse[:1])).get(CLAIM.number), planned) == NOT_JUDGED


def test_runs_that_are_not_planned_and_runs_that_failed_count_for_nothing() -> None:
    runs = _runs((60.0, 64.0), (50.0, 53.0))
    others = [_run(CLAIM.better, 99, 1.0), _run(CLAIM.worse, 99, 2.0)]
    failed = [replace(_run(name, CLAIM.seeds[2], 1.0), failed="no memory", figures={}) for name in ("skd", CLAIM.worse)]
    assert claim_differences([*runs, *others, *failed]) == claim_differences(runs)
    assert claim_differences(runs, list(CLAIMS)) == claim_differences(runs)


def test_equal_differences_show_nothing() -> None:
    """Scores are multiples of 0.2: two pairs with the same difference have no spread to measure it by."""
    test = claim_tests(_runs((60.0, 50.5), (59.5, 50.0)))[CLAIM.number]
    assert (test.difference.mean, test.p_value) == (0.5, 1.0)
    rounded = claim_tests(_runs((69.6, 70.2, 65.4), (60.2, 60.8, 56.0)))[CLAIM.number]
    assert rounded.p_value == 1.0


def test_the_second_round_has_seeds_and_a_correction_of_its_own() -> None:
    claim = AGAIN[0]

    def runs(seed: int, better: float, worse: float) -> list[Run]:
        return [_run(claim.better, seed, better), _run(claim.worse, seed, worse)]

    first = [run for seed in SEEDS for run in runs(seed, 50.0 + seed, 60.0)]
    second = [run for index, seed in enumerate(AGAIN_SEEDS) for run in runs(seed, 70.0 + index % 2, 60.0)]
    test = claim_tests([*first, *second], AGAIN)[claim.number]
    assert (test.seeds, test.difference.mean) == (len(AGAIN_SEEDS), 10.5)
    assert test.p_holm == pytest.approx(min(1, test.p_value * len(AGAIN)))
    assert claim_tests([*first, *second])[claim.number] == claim_tests(first)[claim.number]
    assert claim.number not in claim_tests(first, AGAIN)


def test_the_tables_say_how_much_has_been_run() -> None:
    tables = study_tables(_runs((60.0, 64.0), (50.0, 53.0)))
    assert f"| `{CLAIM.arm.name}` | 4 of 52 | " in tables["progress"]
    rows = tables["claims"].splitlines()[2:]
    assert len(rows) == len(CLAIMS)
    assert f"| {CLAIM.text} | sft, 1,000 | 2 of 6 | +10.5 [" in rows[0]
    assert all(re.search(r"\| 0 of [36] \|  \|  \|  \| not judged yet \|  \|$", row) for row in rows[1:])
    assert "| 1 of 6 | +10.0 |  |  | not judged yet |" in study_tables(_runs((60.0,), (50.0,)))["claims"]


def test_the_tables_say_which_runs_validation_ended() -> None:
    limit = CLAIM.arm.horizon
    steps = (limit, limit - 20, limit, limit - 40)
    runs = [
        replace(_run("skd", seed, 50.0), figures={SCORE: 50.0, "steps": float(each)})
        for seed, each in zip(CLAIM.seeds, steps, strict=False)
    ]
    row = next(line for line in study_tables(runs)["progress"].splitlines() if f"`{CLAIM.arm.name}`" in line)
    assert row.endswith(f"| {limit:,} | 2 of 4 |  |  |  |")


def test_the_points_of_a_run_that_was_cut_off_give_way_to_those_of_its_second_try(tmp_path: Path) -> None:
    key = {"comparison": "study", "variant": "skd", "seed": 1, "figure": "accuracy"}
    for values in ((1.0, 2.0, 3.0), (1.0, 5.0)):
        append(
            tmp_path / CURVES,
            CURVE_COLUMNS,
            [key | {"step": step, "value": value} for step, value in enumerate(values)],
        )
    (curve,) = read_curves(tmp_path)
    assert (curve.steps, curve.values) == ([0, 1], [1.0, 5.0])
    append(tmp_path / RUNS, RUN_COLUMNS, [{"comparison": "study", "seed": 1, SCORE: 1 / 3}])
    append(tmp_path / RUNS, RUN_COLUMNS, [{"comparison": "study", "seed": 2}])
    assert [(run.seed, run.figures) for run in read_runs(tmp_path)] == [(1, {SCORE: 0.333333}), (2, {})]


def test_rules_are_judged_at_the_compute_of_the_reference_at_its_best_checkpoint() -> None:
    def curves(variant: str, seed: int, cost: float, accuracy: list[float]) -> list[Curve]:
        steps = [20 * index for index in range(len(accuracy))]
        figures = {
            "accuracy": accuracy,
            "student_tokens": [cost * step for step in steps],
            "teacher_tokens": [0.0 for _ in steps],
            "validation_loss": [1.0, 0.5, 0.7][: len(steps)],
        }
        return [Curve(RULES_ARM.name, variant, seed, name, steps, values) for name, values in figures.items()]

    rule, (one, two, *_) = RULES[0], SEEDS
    found = [
        *curves(REFERENCE, one, 10.0, [0.0, 40.0, 90.0]),  # best at step 20: 200 positions
        *curves(rule, one, 20.0, [0.0, 60.0, 60.0]),  # 200 positions at step 10: half way to 60
        *curves(REFERENCE, two, 10.0, [0.0, 40.0, 90.0]),
        *curves(rule, two, 5.0, [0.0, 50.0]),  # ended at 100 positions
        *curves(RULES[1], one, 10.0, [0.0, 41.0]),
    ]
    differences = rule_differences(found)
    assert differences[rule] == pytest.approx([-10.0, 10.0])
    assert differences[RULES[1]] == pytest.approx([1.0])
    assert all(not differences[name] for name in RULES[2:])
    runs = [
        replace(_run(name, seed, score), comparison=RULES_ARM.name)
        for name, scores in ((rule, (30.0, 33.0)), (REFERENCE, (31.0, 32.0)))
        for seed, score in zip(SEEDS, scores, strict=False)
    ]
    first, second = study_tables(runs, found)["rules"].splitlines()[2:4]
    assert first.startswith(f"| `{rule}` | 2 of 3 | +0.0 [")
    assert "| not judged yet | +0.0 [" in first
    assert second == f"| `{RULES[1]}` | 1 of 3 | +1.0 |  |  | not judged yet |  |"


def test_what_runs_would_have_been_with_fewer_steps() -> None:
    claim = CONVERGED_CLAIMS[0]

    def curves(variant: str, losses: list[float], accuracy: list[float]) -> list[Curve]:
        key = claim.arm.name, variant, claim.seeds[0]
        steps = [20 * index for index in range(len(losses))]
        return [Curve(*key, "validation_loss", steps, losses), Curve(*key, "accuracy", steps, accuracy)]

    found = [
        *curves(claim.better, [9.0, 2.0, 3.0, 1.0], [0.0, 50.0, 60.0, 70.0]),
        *curves(claim.worse, [9.0, 1.0, 2.0], [0.0, 40.0, 45.0]),
    ]
    assert early_differences(found, CONVERGED_CLAIMS, 40)[claim.number] == [10.0]
    assert early_differences(found, CONVERGED_CLAIMS, 60)[claim.number] == [30.0]
    assert early_differences(found[:3], CONVERGED_CLAIMS, 60)[claim.number] == []


def test_a_budget_is_a_share_of_what_the_reference_spends_to_its_best_checkpoint() -> None:
    def of(variant: str, seed: int, losses: list[float], accuracy: list[float], spent: list[float]) -> list[Curve]:
        steps = [20 * (number + 1) for number in range(len(losses))]
        tokens = dict.fromkeys(("student_tokens", "teacher_tokens"), spent)
        figures = {"validation_loss": losses, "accuracy": accuracy, "cpu_seconds": spent, **tokens}
        return [Curve(ARMS[0].name, variant, seed, name, steps, values) for name, values in figures.items()]

    found = [
        *of(REFERENCE, 1, [0.9, 0.5, 0.1, 0.3], [10, 20, 60, 70], [1.0, 2.0, 6.0, 9.0]),  # its best at 6 s
        *of(REFERENCE, 2, [0.9, 0.2], [30, 50], [3.0, 10.0]),  # its best at 10 s: a budget of 8 s
        *of("sft", 1, [0.2, 0.4], [40, 99], [1.0, 2.0]),
    ]
    assert BUDGETS == (0.25, 0.5, 1.0)
    assert budget_differences(found, ARMS[0].name, "sft", seconds) == [[20 - 40], [20 - 40], [60 - 40]]
    tables = study_tables([], found)
    (row,) = tables["budgets-seconds"].splitlines()[2:]
    assert tables["budgets-positions"] == tables["budgets-seconds"]  # which are in proportion here
    assert row == f"| `{ARMS[0].name}` | `sft` | 1 | -20.0 | -20.0 | +20.0 |"


def test_a_claim_says_what_later_rounds_found() -> None:
    claim = AGAIN[0]
    scores = {claim.better: 50.0, claim.worse: 40.0}
    again = [
        Run(claim.arm.name, "accuracy", variant, "skd", "sft", "", seed, {SCORE: score + seed % 3 * (variant == "skd")})
        for variant, score in scores.items()
        for seed in claim.seeds
    ]
    rows = {row.split(" | ")[0]: row for row in study_tables(again)["claims"].splitlines()[2:]}
    assert rows[f"| {claim.number}"].endswith("| second: +11.0, shown |")
    assert rows["| 6a"].endswith("|  |")


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_row_that_was_cut_off_in_writing_is_none(tmp_path: Path, cut: int) -> None:
    for seed in (1, 2):
        append(tmp_path / RUNS, RUN_COLUMNS, [{"comparison": "study", "seed": seed, SCORE: 69.6}])
    whole = (tmp_path / RUNS).read_text(encoding="utf-8")
    (tmp_path / RUNS).write_text(whole[:-cut], encoding="utf-8")
    assert [run.seed for run in read_runs(tmp_path)] == [1]
    append(tmp_path / RUNS, RUN_COLUMNS, [{"comparison": "study", "seed": 2, SCORE: 69.6}])
    assert (tmp_path / RUNS).read_text(encoding="utf-8") == whole


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(SkdError, match=r"(?s)another process runs the study.*give this one a folder of its own"),
    ):
        next(study.run_study(tmp_path, tmp_path))


def test_a_study_that_is_complete_says_so(tmp_path: Path) -> None:
    rows = [dict(zip(("comparison", "variant", "seed"), cell.key, strict=True)) for cell in cells()]
    append(tmp_path / RUNS, RUN_COLUMNS, rows)
    (line,) = study.run_study(tmp_path, tmp_path)
    assert line == f"all {len(rows)} runs are stored in {tmp_path}; --out NEW-FOLDER runs them all again"


@pytest.mark.slow
def test_the_study_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"TEACHER_PROBLEMS": 40, "BASE_PROBLEMS": 40, "VALIDATION": 4, "TEST": 8, "INIT_EPOCHS": 0.1}
    for name, value in {**sizes, "TRAINING": STEPS, "STUDENT_TRAINING": STEPS}.items():
        monkeypatch.setattr(study, name, value)
    arm = replace(ARMS[0], horizon=2)
    monkeypatch.setattr(study, "cells", lambda: [Cell(arm, variant, SEEDS[0]) for variant in CORE])
    out = tmp_path / "study"
    asked = ["study", str(tmp_path / "models"), "--out", str(out), "--runs"]
    for number, expected in ((1, CORE[:1]), (3, CORE)):
        done = CliRunner().invoke(app, [*asked, str(number)], catch_exceptions=False)
        assert [line.split()[:3] for line in done.stdout.splitlines()] == [
            [ARMS[0].name, variant, f"{SEEDS[0]}:"] for variant in expected[-number:]
        ]
        runs = read_runs(out)
        assert [run.variant for run in runs] == list(expected)
    assert all(0 <= run.figures[SCORE] <= 100 and run.figures["steps"] == 2 for run in runs)
    by_variant = {run.variant: run.figures for run in runs}
    assert by_variant["sft"]["teacher_tokens"] == 0 < by_variant["skd"]["teacher_tokens"]
    curves = read_curves(out)
    assert {curve.figure for curve in curves} == set(study.POINTS)
    assert all(curve.steps == [0, 1, 2] for curve in curves)
    assert [path.name for path in draw_study(runs, curves, tmp_path)] == [f"{ARMS[0].name}-curves.svg"]
    again = ["check", str(tmp_path / "models"), "--stored", str(out), "--runs", "9"]
    same = CliRunner().invoke(app, again, catch_exceptions=False).stdout.splitlines()
    assert len(same) == len(CORE)
    assert all(line.endswith("figures are the stored ones") for line in same)
    text = (out / RUNS).read_text()
    (out / RUNS).write_text(text.replace(",2,", ",3,"))
    assert "steps 2, stored 3" in CliRunner().invoke(app, again, catch_exceptions=False).stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    (out / RUNS).unlink()
    append(out / RUNS, RUN_COLUMNS, [row | {"teacher": "99.5"} for row in rows[:1]])
    for command in (again, [*asked, "9"]):
        with pytest.raises(SkdError, match=r"of the problems, those of the stored runs 99\.5 %"):
            CliRunner().invoke(app, command, catch_exceptions=False)
    assert len(read_runs(out)) == 1
