"""Evaluations and drafts as folders, and the step that shows two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skd_lib.errors import SkdError
from skd_lib.report.folders import read_drafts, read_evaluation, read_evaluations, write_drafts
from skd_lib.steps.show import main
from tests.report.evaluations import evaluation

CHRF: dict[str, Any] = {"chrf": {"score": 30.123456789, "low": 28, "high": 32}, "examples": 50, "seconds": 2}


def test_scores_of_both_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation(tmp_path / "both" / "student_before", "student_before", CHRF)
    evaluation(
        tmp_path / "both" / "student_after", "student_after", CHRF | {"chrf": {"score": 40, "low": 38, "high": 42}}
    )
    main(artifact=tmp_path / "both")
    found = read_evaluations(tmp_path / "both")
    assert list(found) == ["student_before", "student_after"]
    assert found["student_before"].scores.figures() == {"chrf": 30.123456789}
    assert found["student_after"].predictions.is_file()
    shown = capsys.readouterr().out
    assert "30.1 [28.0, 32.0]" in shown
    assert "40.0 [38.0, 42.0]" in shown
    main(artifact=tmp_path / "both" / "student_after")
    shown = capsys.readouterr().out
    assert "40.0 [38.0, 42.0]" in shown
    assert "30.1" not in shown


def test_what_is_wrong_with_a_folder_is_told(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "one", "teacher", CHRF)
    with pytest.raises(SkdError, match="the input `artifact` is gone from storage"):
        main(artifact=tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").touch()
    with pytest.raises(SkdError, match="holds neither prepared data nor evaluations"):
        main(artifact=tmp_path / "other")
    with pytest.raises(SkdError, match="name a folder that step `evaluate` wrote"):
        read_evaluation(tmp_path)
    with pytest.raises(SkdError, match="name a folder that step `evaluate_student` wrote"):
        read_evaluations(one)
    with pytest.raises(SkdError, match="field `role`"):
        read_evaluation(evaluation(tmp_path / "odd", "nobody", CHRF))
    with pytest.raises(SkdError, match="name a folder that step `specdec_benchmark` wrote"):
        read_drafts(one)
    write_drafts(tmp_path / "drafts", "", {"after": {"speedup": 1.5}})
    with pytest.raises(SkdError, match=r"after\.json, field `acceptance_rate`"):
        read_drafts(tmp_path / "drafts")
