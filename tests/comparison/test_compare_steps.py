"""The steps of a comparison, as KFP calls them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from skd_lib.comparison.table import Comparison
from skd_lib.comparison.trials import Trial
from skd_lib.errors import SkdError
from skd_lib.models.records import write_record
from skd_lib.report.folders import write_drafts
from skd_lib.steps import compare_table, compare_variant
from skd_lib.steps.kfp_call import called, take_call
from tests.comparison.test_build import RIGHT, accuracy, answers
from tests.comparison.test_trials import BASE
from tests.report.evaluations import evaluation, evaluations

TRIALS = [{"variant": variant, "seed": float(seed)} for variant, seed in RIGHT]
SKIPPED = {"variant": "hot", "seed": 0, "reason": "it exploded"}
DRAFT = {
    "acceptance_rate": 0.5,
    "tokens_per_teacher_call": 2.0,
    "speedup": 1.5,
    "settings": [],
    "acceptance_by_position": [0.5, 0.25],
}
SCORE = {"score": 90, "low": 80, "high": 95}


def label(number: int) -> str:
    return Trial.model_validate(TRIALS[number]).label


def student(folder: Path, number: int) -> Path:
    """Write the evaluation of one trial's student, with the record of its training."""
    right = RIGHT[TRIALS[number]["variant"], int(TRIALS[number]["seed"])]
    scores = {name: score.model_dump() for name, score in accuracy(right).metrics.items()} | {"examples": 40}
    out = evaluation(folder / f"evaluation-{number}", "student_after", scores, answers(right, number), label(number))
    course = {"rejection_rate": [0.5, 0.25], "steps": [1, 2]}
    figures = {"steps": 5.0, "tokens_per_teacher_call_last_tenth": 2.5, "seconds_loss": 2.0}
    write_record(out, lineage={"method": "skd", "divergence": "forward_kl"}, course=course, figures=figures)
    return out


def draft(folder: Path, number: int) -> Path:
    """Write what one trial's student is worth as a draft; only the first was measured."""
    write_drafts(folder / f"drafts-{number}", label(number), {} if number else {"before": DRAFT, "after": DRAFT})
    return folder / f"drafts-{number}"


def table(folder: Path, students: Sequence[Path], drafts: Sequence[Path] = (), **plan: Any) -> dict[str, Any]:
    """Run `compare_table` on lists of artifacts, as they come from a loop; its executor output."""
    lists = {"evaluations": students, "drafts": drafts}
    artifacts = {name: {"artifacts": [{"uri": str(path)} for path in paths]} for name, paths in lists.items()}
    words = ["--kfp-executor-input", json.dumps({"inputs": {"artifacts": artifacts}})]
    words += ["--kfp-output-file", str(folder / "executor_output.json")]
    with called(take_call(words)[1]):
        compare_table.main(
            **{f"{name}_out": folder / name for name in ("report", "page", "figures", "comparison")},
            plan=json.dumps({"reference": "skd", "trials": TRIALS, "skipped": [SKIPPED], **plan}),
            config=json.dumps(
                {"name": "test", "evaluation": {"bootstrap_samples": 100}, "task": {"metrics": ["accuracy"]}}
            ),
            teacher_evaluations=evaluations(folder / "teachers", {"teacher": {"accuracy": SCORE}}),
        )
    output: dict[str, Any] = json.loads((folder / "executor_output.json").read_text())
    return output


def test_table_of_collected_trials(tmp_path: Path):
    """Whatever the order in which the two lists come: each folder says whose it is."""
    numbers = range(len(TRIALS))
    output = table(
        tmp_path, [student(tmp_path, n) for n in reversed(numbers)], [draft(tmp_path, n) for n in (2, 0, 1, 4, 3)]
    )
    comparison = Comparison.model_validate_json((tmp_path / "comparison" / "comparison.json").read_text())
    assert [each.variant for each in comparison.variants] == ["skd", "sft", "seqkd", "hot"]
    skd, sft, _, hot = comparison.variants
    assert (skd.costs["rejection_rate"], skd.costs["steps"], skd.costs["tokens_per_teacher_call"]) == (0.375, 5, 2.5)
    assert skd.scores["accuracy"].mean == pytest.approx(77.5)
    assert skd.draft == {"acceptance_rate": 0.5, "tokens_per_teacher_call": 2, "speedup": 1.5}
    assert sft.draft == {}
    assert sft.tests["accuracy"].seeds == 2
    assert (hot.runs, hot.failed) == (0, 1)
    assert comparison.teacher["accuracy"].score == 90
    assert "| hot | 0 | it exploded |" in (tmp_path / "report").read_text()
    assert len((tmp_path / "comparison" / "runs.csv").read_text().splitlines()) == 1 + len(RIGHT) + 1
    assert "it exploded" in (tmp_path / "page").read_text(encoding="utf-8")
    first = comparison.trials[0]
    assert (first.objective, first.acceptance_by_position) == ("forward_kl", (0.5, 0.25))
    course = first.course
    assert course is not None
    assert (course.steps, course.rejection_rate) == ((1, 2), (0.5, 0.25))
    assert {name: value["artifacts"][0]["metadata"] for name, value in output["artifacts"].items()} == {
        "report": {},
        "page": {},
        "figures": {"skd/accuracy": 77.5, "skd/draft_speedup": 1.5, "sft/accuracy": 27.5, "seqkd/accuracy": 77.5},
        "comparison": {},
    }
    assert output["parameterValues"] == {}


def test_figures_on_kubeflows_page_are_few(tmp_path: Path):
    trials = [{"variant": f"{number}-".ljust(63, "v"), "seed": 0} for number in range(60)]
    lost = [Trial.model_validate(trial) for trial in trials]
    scores = {"accuracy": SCORE, "chrf": SCORE, "examples": 40}
    folders = [evaluation(tmp_path / one.variant, "student_after", scores, label=one.label) for one in lost]
    output = table(tmp_path, folders, trials=trials, skipped=[], reference="")
    figures = output["artifacts"]["figures"]["artifacts"][0]["metadata"]
    assert len(figures) == 24
    assert len(json.dumps(figures)) < 4000
    assert len(json.loads((tmp_path / "comparison" / "comparison.json").read_text())["variants"]) == 60


def test_a_trial_without_an_evaluation_stands_in_the_table(tmp_path: Path):
    table(tmp_path, [student(tmp_path, 0)], skipped=[{**TRIALS[1], "reason": "it exploded"}])
    page = (tmp_path / "report").read_text()
    assert "| sft | 1 | no evaluation of its student came to the table |" in page
    assert [line for line in page.splitlines() if line.startswith("| skd | 1 |")] == ["| skd | 1 | it exploded |"]


def test_table_without_a_trial_or_with_a_folder_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(SkdError, match="there is no trial to compare"):
        table(tmp_path, [])
    with pytest.raises(SkdError, match="the input `evaluations` is gone from storage") as raised:
        table(tmp_path, [student(tmp_path, 0), tmp_path / "nowhere"])
    assert str(tmp_path / "nowhere") in str(raised.value)
    with pytest.raises(SkdError, match="an evaluation is of trial `sft-seed-0`, which the comparison does not have"):
        table(tmp_path, [student(tmp_path, 0), student(tmp_path, 2)], trials=TRIALS[:1])


def handed_on(trial: dict[str, object], config: dict[str, object], known: dict[str, str] | None = None):
    """What the steps of a trial get as `config`."""
    compare_variant.main(json.dumps(trial), json.dumps(config), json.dumps(known or {}))
    written = json.loads(Path("executor_output.json").read_text())["parameterValues"]
    return {step: json.loads(value) for step, value in written.items()}


def test_variant_hands_on_its_own_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    overrides = {"distill.method": "sft", "student_init": {"mode": "prune", "keep_first": 1.0, "keep_last": 2.0}}
    trial = {"variant": "a", "seed": 3.0, "init": "cut", "overrides": overrides}
    own = {"seed": 3, "label": "a-seed-3"}
    initial = {"mode": "prune", "keep_first": 1, "keep_last": 2}
    # All are measured alike, with the seed that they share.
    assert handed_on(trial, {**BASE, "seed": 7, "specdec": {"gamma": 2}, "drafts": False}) == {
        "student_init": own | {"student_init": initial},
        "distill": own | {"distill": {"method": "sft"}},
        "evaluate": {"seed": 7, "label": "a-seed-3"},
        "specdec_benchmark": {"seed": 7, "label": "a-seed-3", "specdec": {"gamma": 2}, "drafts": False},
    }


@pytest.mark.parametrize("own", ["", "org/other"])
def test_variant_hands_on_its_students_fingerprint(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    trial = {"variant": "a", "seed": 3, "overrides": {"student": own} if own else {}}
    known = {"org/teacher": "commit:1", "org/student": "commit:2", "org/other": "commit:3"}
    config = BASE | {"student": "org/student", "student_init": {"mode": "as_is"}}
    initial = handed_on(trial, config, known)["student_init"]
    assert (initial["student"], initial["fingerprint"]) == (own or "org/student", known[own or "org/student"])
