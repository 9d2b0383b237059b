"""From comparisons to CSV files, and from these to tables and plots."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from analysis import EQUAL, FR_EN, FR_EN_EQUAL, METHODS, RULES, at_equal_compute, trained_positions, variants_of
from evidence import app
from page import tables, tables_over_examples, with_tables
from plots import draw
from records import Run, collect, read_curves, read_examples, read_runs
from skd_lib.comparison.config import load_compare
from skd_lib.comparison.plan import plan
from skd_lib.comparison.table import Comparison, TrialResult, VariantResult, VariantScore, VariantTest
from skd_lib.errors import SkdError
from skd_lib.evaluation.statistics import holm
from skd_lib.results import Course, Score, Scores
from tiny_models import forward_cost

DOCS = Path(__file__).parents[2] / "docs"
CONFIGS = Path(__file__).parents[2] / "docs/evidence/configs"
SCORES = {"skd-top_k-25": (50, 54, 52), "skd-top_k-5": (53, 56, 58), "min-prob": (40, 45, 41)}


def _scores(accuracy: float) -> Scores:
    score = Score(score=accuracy, low=accuracy - 2, high=accuracy + 2, signature="exact")
    return Scores.model_validate({"accuracy": score.model_dump(), "examples": 500, "seconds": 1.0})


def _comparison(name: str = RULES) -> Comparison:
    trials = [
        TrialResult(
            variant=variant,
            seed=seed,
            scores=_scores(accuracy),
            rejection_rate=0.25,
            figures={"student_tokens": 1000.0, "teacher_tokens": 500.0},
            course=Course(
                steps=(1, 2), rejection_rate=(0.3, 0.2), validation_steps=(0, 2), validation_loss=(0.9, 0.1 * seed)
            ),
        )
        for variant, accuracies in SCORES.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    lost = TrialResult(variant="mixture", seed=0, reason="out of memory")
    return Comparison(
        name=name,
        reference="skd-top_k-25",
        metrics=["accuracy"],
        teacher=_scores(99.0).metrics,
        variants=[],
        trials=[*trials, lost],
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The CSV files of two comparisons."""
    files = []
    for name in (METHODS, RULES):
        files.append(tmp_path / name / "comparison.json")
        files[-1].parent.mkdir()
        files[-1].write_text(_comparison(name).to_json(), encoding="utf-8")
    collect(files, tmp_path / "evidence")
    return tmp_path / "evidence"


def test_a_comparison_takes_its_own_place_alone(folder: Path) -> None:
    before, curves = read_runs(folder), read_curves(folder)
    again = _comparison(RULES)
    again.trials[0] = again.trials[0].model_copy(update={"scores": _scores(12.0)})
    (folder / "comparison.json").write_text(again.to_json(), encoding="utf-8")
    collect([folder / "comparison.json"], folder)
    after = read_runs(folder)
    assert [run for run in after if run.comparison == METHODS] == [run for run in before if run.comparison == METHODS]
    changed = [run.figures["score"] for run in after if run not in before]
    assert changed == [12.0]
    assert len(after) == len(before)
    assert read_curves(folder) == curves


def test_runs_come_back_as_they_went(folder: Path) -> None:
    runs = [run for run in read_runs(folder) if run.comparison == RULES]
    assert {(run.variant, run.seed): run.figures.get("score") for run in runs if not run.failed} == {
        (variant, seed): accuracy for variant, found in SCORES.items() for seed, accuracy in enumerate(found)
    }
    (lost,) = (run for run in runs if run.failed)
    assert (lost.variant, lost.failed, lost.figures) == ("mixture", "out of memory", {"teacher": 99.0})
    curves = [each for each in read_curves(folder) if each.comparison == RULES and each.figure == "validation_loss"]
    assert [curve.values for curve in curves if curve.variant == "min-prob"] == [[0.9, 0.0], [0.9, 0.1], [0.9, 0.2]]


def test_variants_are_tested_pairwise_by_seed(folder: Path) -> None:
    variants = {variant.name: variant for variant in variants_of(read_runs(folder), RULES)}
    assert variants["skd-top_k-25"].test is None
    assert variants["mixture"].runs == {}
    p_values = {}
    for name in ("skd-top_k-5", "min-prob"):
        theirs = stats.ttest_rel(SCORES[name], SCORES["skd-top_k-25"])
        test = variants[name].test
        assert test is not None
        assert test.p_value == pytest.approx(theirs.pvalue)
        interval = theirs.confidence_interval()
        assert (test.difference.low, test.difference.high) == pytest.approx((interval.low, interval.high))
        p_values[name] = test.p_value
    assert [variants[name].test.p_holm for name in p_values] == pytest.approx(holm(list(p_values.values())))  # type: ignore[union-attr]


def test_one_seed_is_judged_over_the_examples(tmp_path: Path) -> None:
    test = VariantTest(difference=-3.25, low=-10.2, high=3.9, p_value=0.4, p_holm=0.8, examples=128, seeds=1)
    variants = [
        VariantResult(
            variant=name,
            runs=runs,
            failed=0,
            scores={"accuracy": VariantScore(mean=mean, low=mean - 5, high=mean + 6, runs=runs)},
            tests={} if name == "skd" else {"accuracy": test},
        )
        for name, runs, mean in (("skd", 1, 21.875), ("sft", 1, 18.625), ("of-two-seeds", 2, 30.0))
    ]
    one = _comparison("one-seed").model_copy(update={"reference": "skd", "variants": variants})
    for name, comparison in (("one-seed", one), (RULES, _comparison())):
        (tmp_path / f"{name}.json").write_text(comparison.to_json(), encoding="utf-8")
        collect([tmp_path / f"{name}.json"], tmp_path)
    (table,) = tables_over_examples(read_examples(tmp_path)).values()
    assert table.splitlines()[0] == "| variant | accuracy | minus `skd` | p | p (Holm) |"
    assert table.splitlines()[2:] == [
        "| `skd` | 21.9 [16.9, 27.9] |  |  |  |",
        "| `sft` | 18.6 [13.6, 24.6] | -3.2 [-10.2, +3.9] | 0.400 | 0.800 |",
    ]


def test_compute_counts_the_teacher_by_its_size(folder: Path) -> None:
    (variant, *_) = variants_of(read_runs(folder), RULES)
    assert variant.compute() == pytest.approx(1000 + 500 * forward_cost("teacher") / forward_cost("student"))
    for name, expected in ((FR_EN, 1000 + 500 * 134.5 / 106.2), ("mine", None)):
        (variant, *_) = variants_of([replace(run, comparison=name) for run in read_runs(folder)], name)
        assert variant.compute() == (expected and pytest.approx(expected, rel=1e-3))


def test_compute_is_drawn_for_both_accounts(folder: Path, tmp_path: Path) -> None:
    runs = [replace(run, comparison=name) for run in read_runs(folder) for name in (FR_EN, FR_EN_EQUAL)]
    assert tmp_path / "compute-fr-en.svg" in draw(runs, [], tmp_path, set())
    assert tmp_path / "compute.svg" not in draw(runs, [], tmp_path, set())


def test_scores_are_drawn_where_a_page_shows_them(folder: Path, tmp_path: Path) -> None:
    written = draw(read_runs(folder), [], tmp_path, {f"{METHODS}-scores.svg"})
    assert [file.name for file in written if file.name.endswith("-scores.svg")] == [f"{METHODS}-scores.svg"]


def test_tables_of_own_results_are_printed_and_no_page_is_touched(folder: Path) -> None:
    pages = {page: page.read_bytes() for page in (DOCS / "evidence.md", DOCS / "evidence/diary.md")}
    done = CliRunner().invoke(app, ["plot", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "| `skd-top_k-5` | 3 | 55.7 [" in done.output
    assert {page: page.read_bytes() for page in pages} == pages


def test_pages_are_written_all_or_none(folder: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text(f"<!-- table {RULES} -->\n<!-- end -->\n", encoding="utf-8")
    bad.write_text("<!-- table missing -->\n<!-- end -->\n", encoding="utf-8")
    before = good.read_bytes()
    with pytest.raises(SkdError, match="there are no runs of it"):
        CliRunner().invoke(app, ["plot", str(folder), "--page", str(good), "--page", str(bad)], catch_exceptions=False)
    assert good.read_bytes() == before


def test_backward_passes_cost_those_more_that_sample_less() -> None:
    def run(comparison: str, variant: str, steps: int, student: float, score: float, teacher: float = 0.0) -> Run:
        figures = {
            "steps": steps,
            "response_tokens": 10.0 * steps,
            "student_tokens": student,
            "teacher_tokens": teacher,
        }
        return Run(comparison, "accuracy", variant, "skd", "", "", 0, {**figures, "score": score})

    # A step has 5 positions of prompts and 10 of responses; skd's student reads the 10 once more to sample.
    cost = forward_cost("teacher") / forward_cost("student")
    runs = [
        run(METHODS, "skd", 10, 250, 50.0, 10 * 15 / cost),
        run(METHODS, "sft", 10, 150, 40.0),
        run(EQUAL, "skd", 10, 250, 50.0, 10 * 15 / cost),
        run(EQUAL, "sft", 40, 600, 70.0),
    ]
    assert trained_positions(runs[0], runs) == trained_positions(runs[1], runs) == 150
    for backward, skd, fewer, more in ((0.0, 400, 150, 600), (2.0, 700, 450, 1800)):
        (sft,) = (each for each in at_equal_compute(runs, METHODS, EQUAL, backward=backward) if each.name == "sft")
        (score,) = (each.figures["score"] for each in sft.runs.values())
        assert score == pytest.approx(40 + 30 * (skd - fewer) / (more - fewer))


def test_one_seed_has_no_interval_and_no_test(folder: Path) -> None:
    runs = [run for run in read_runs(folder) if run.comparison == RULES and run.seed == 0]
    variants = variants_of(runs, RULES)
    assert all(variant.test is None for variant in variants)
    assert math.isnan(variants[0].mean("score").low)  # type: ignore[union-attr]


def test_tables_go_between_their_marks(folder: Path) -> None:
    page = f"before\n<!-- table {RULES} -->\nold\n<!-- end -->\nafter\n"
    written = with_tables(page, tables(read_runs(folder)))
    assert "old" not in written
    assert written.startswith("before")
    assert written.endswith("after\n")
    rows = [line for line in written.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["skd-top_k-5", "skd-top_k-25", "min-prob", "mixture"]
    mean = np.mean(SCORES["min-prob"])
    assert f"| {mean:.1f} [" in rows[2]
    assert with_tables(written, tables(read_runs(folder))) == written
    with pytest.raises(SkdError, match="no runs"):
        with_tables("<!-- table other -->\n<!-- end -->", {})


def test_commands_make_the_same_files_again(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"<!-- table {RULES} -->\n<!-- end -->\n", encoding="utf-8")
    contents = []
    for _ in range(2):
        done = CliRunner().invoke(app, ["plot", str(folder), "--page", str(page)])
        assert done.exit_code == 0, done.output
        contents.append({file.name: file.read_bytes() for file in folder.glob("*.svg")})
    assert contents[0] == contents[1]
    assert contents[0].keys() >= {"k.svg", "rejection-rate.svg", "validation-loss.svg"}
    assert "min-prob" in page.read_text(encoding="utf-8")


def test_what_is_no_comparison_is_told(tmp_path: Path) -> None:
    with pytest.raises(SkdError, match="cannot be read"):
        collect([tmp_path / "comparison.json"], tmp_path)
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(SkdError, match="columns are missing"):
        read_runs(tmp_path)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_comparisons_can_be_planned(file: Path) -> None:
    if "base:" in file.read_text(encoding="utf-8"):
        assert plan(*load_compare(file), where=file.name).trials


def test_scores_at_equal_compute_are_between_those_of_fewer_and_of_more_steps(folder: Path) -> None:
    known = [run for run in read_runs(folder) if run.comparison == RULES and not run.failed]

    def of(name: str, factors: dict[str, float], more: float) -> list[Run]:
        return [
            replace(
                run, comparison=name, figures={"score": run.figures["score"] + more, "student_tokens": 1000 * factor}
            )
            for run in known
            if (factor := factors.get(run.variant))
        ]

    reference = "skd-top_k-25"
    steps = of(METHODS, {reference: 1.0, "min-prob": 0.5}, 0.0)
    equal = of(EQUAL, {reference: 1.0, "min-prob": 2.5}, 8.0)
    moved = {variant.name: variant for variant in at_equal_compute([*steps, *equal], METHODS, EQUAL)}
    assert [run.figures["score"] for run in moved["min-prob"].runs.values()] == [40 + 2, 45 + 2, 41 + 2]
    assert [run.figures["score"] for run in moved[reference].runs.values()] == [50 + 8, 54 + 8, 52 + 8]


def test_the_pages_have_the_tables_and_plots_of_their_runs(tmp_path: Path) -> None:
    pages = [DOCS / "evidence.md", DOCS / "evidence" / "diary.md"]
    again = shutil.copytree(DOCS / "evidence", tmp_path / "evidence", ignore=shutil.ignore_patterns("*.svg"))
    copies = [Path(shutil.copy(page, tmp_path / f"copy-{page.name}")) for page in pages]
    options = [option for copy in copies for option in ("--page", str(copy))]
    assert CliRunner().invoke(app, ["plot", str(again), *options], catch_exceptions=False).exit_code == 0
    for page, copy in zip(pages, copies, strict=True):
        assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http)([^()#]+\.svg)\)", page.read_text(encoding="utf-8")):
            assert (again / (page.parent / link).relative_to(DOCS / "evidence")).is_file()
    names, stored = (
        {str(file.relative_to(place)) for file in place.rglob("*.svg")} for place in (again, DOCS / "evidence")
    )
    assert names == stored
