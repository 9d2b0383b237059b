"""The record of a training in its model's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from skd_lib.errors import SkdError
from skd_lib.models.records import COURSE, RECORD, copy_record, read_record, write_record

TOKENS = '[{"text": "a", "by": "student"}]'
SAMPLES = f'{{"step": 1, "row": 0, "prompt": "p", "tokens": {TOKENS}}}\n'


def test_a_record_goes_with_the_model(tmp_path: Path) -> None:
    lineage = {"method": "skd", "top_k": 25, "mlflow_run_id": "abc", "losses": {"train": {"rows": 3, "lost": {}}}}
    course = {"training_steps": [1, 123456], "training_loss": [1 / 3, 2.0], "seconds": {"loss": 1.23456789}}
    write_record(tmp_path / "model", lineage=lineage, course=course, figures={"steps": 2 / 3}, samples=SAMPLES)
    copy_record(tmp_path / "model", tmp_path / "evaluation")
    for folder in ("model", "evaluation"):
        record = read_record(tmp_path / folder)
        assert record.lineage == lineage
        assert record.mlflow_run_id == "abc"
        assert record.course.training_steps == (1, 123456)
        assert record.course.training_loss == (0.33333, 2.0)
        assert record.course.seconds == {"loss": 1.2346}
        assert record.figures == {"steps": 2 / 3}
        assert [sequence.prompt for sequence in record.samples()] == ["p"]


def test_a_model_of_somebody_else_has_none(tmp_path: Path) -> None:
    copy_record(tmp_path / "model", tmp_path / "evaluation")
    record = read_record(tmp_path / "evaluation")
    assert (record.lineage, record.mlflow_run_id, record.figures, record.samples()) == ({}, "", {}, [])


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    write_record(tmp_path, lineage={})
    (tmp_path / RECORD / "course.json").write_text('{"steps": ["first"]}')
    with pytest.raises(SkdError, match=r"course\.json, field `steps\.0`"):
        read_record(tmp_path)


def test_a_curve_of_2000_points_takes_few_bytes(tmp_path: Path) -> None:
    curve = {"steps": list(range(2000)), "rejection_rate": [step / 7 for step in range(2000)]}
    write_record(tmp_path, lineage={}, course=curve)
    assert (tmp_path / RECORD / COURSE).stat().st_size < 40_000
