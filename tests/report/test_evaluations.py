"""Evaluations and drafts as folders, and the step that puts two evaluations into one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skd_lib.errors import SkdError
from skd_lib.report.drafts import read_drafts, write_drafts
from skd_lib.report.evaluations import read_evaluation, read_evaluations
from skd_lib.steps.scores import main
from tests.report.evaluations import evaluation

CHRF: dict[str, Any] = {"chrf": {"score": 30.123456789, "low": 28, "high": 32}, "examples": 50, "seconds": 2}


def test_two_evaluations_become_one_folder_with_all_their_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = evaluation(tmp_path / "a", "student_before", CHRF)
    after = evaluation(tmp_path / "b", "student_after", CHRF | {"chrf": {"score": 40, "low": 38, "high": 42}})
    (after / "skd_record").mkdir()
    (after / "skd_record" / "lineage.json").write_text("{}")
    for _ in range(2):  # a second attempt finds the first one's files
        main(before=before, after=after, evaluations_out=tmp_path / "both")
    found = read_evaluations(tmp_path / "both")
    assert list(found) == ["student_before", "student_after"]
    assert found["student_before"].scores.figures() == {"chrf": 30.123456789}
    assert (found["student_after"].folder / "skd_record" / "lineage.json").is_file()
    assert found["student_after"].predictions.is_file()
    shown = capsys.readouterr().out
    assert "30.1 [28.0, 32.0]" in shown
    assert "40.0 [38.0, 42.0]" in shown
    output = json.loads((tmp_path / "executor_output.json").read_text())
    assert output["parameterValues"] == {}
    assert output["artifacts"].keys() == {"evaluations"}


def test_what_is_wrong_with_a_folder_is_told(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "one", "teacher", CHRF)
    with pytest.raises(SkdError, match="two evaluations have the role teacher"):
        main(before=one, after=one, evaluations_out=tmp_path / "both")
    with pytest.raises(SkdError, match="the input `after` is gone from storage"):
        main(before=one, after=tmp_path / "nowhere", evaluations_out=tmp_path / "both")
    with pytest.raises(SkdError, match="name a folder that step `evaluate` wrote"):
        read_evaluation(tmp_path)
    with pytest.raises(SkdError, match="name a folder that step `scores` wrote"):
        read_evaluations(one)
    with pytest.raises(SkdError, match="field `role`"):
        read_evaluation(evaluation(tmp_path / "odd", "nobody", CHRF))
    with pytest.raises(SkdError, match="name a folder that step `specdec_benchmark` wrote"):
        read_drafts(one)
    write_drafts(tmp_path / "drafts", "", {"after": {"speedup": 1.5}})
    with pytest.raises(SkdError, match=r"after\.json, field `acceptance_rate`"):
        read_drafts(tmp_path / "drafts")
