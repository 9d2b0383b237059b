"""Rows, splits and lengths of the data against the limits of the run and its models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from skd_lib.config import RunConfig
from skd_lib.data.examples import make_example
from skd_lib.preflight import Check
from skd_lib.preflight.data import sample_of
from tests.preflight.support import check, only


def test_long_examples_are_warned_about_and_refused_if_none_fits(values: dict[str, Any], tmp_path: Path) -> None:
    lines = [json.dumps({"source": "mot " * length, "target": "word " * length}) for length in [*range(1, 30), 200]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    values["data"]["near_duplicate_threshold"] = 1
    report = check(values, tmp_path)
    assert report.errors() == []
    assert any(found.level == "warning" and "left out" in found.hint for found in report.checks)
    assert any(found.level == "warning" and "longer answers are cut" in found.hint for found in report.checks)
    values["task"]["max_prompt_tokens"] = 3
    assert {found.name for found in check(values, tmp_path).checks if found.level == "error"} == {
        "train lengths",
        "validation lengths",
        "test lengths",
    }


def test_rows_of_one_form_are_kept_and_what_splits_lose_is_told(values: dict[str, Any], tmp_path: Path) -> None:
    def losses(texts: list[str]) -> dict[str, Check]:
        rows = [json.dumps({"source": f"{text}, 12 Harbour Road.", "target": f"SELECT '{text}'"}) for text in texts]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
        report = check(values, tmp_path)
        return {found.name: found for found in report.checks if found.name.endswith((" left out", "data"))}

    form = "Please convert this order of Miller and Sons Ltd for the table of orders into a statement, number"
    found = losses([f"{form} {i}" for i in range(40)])
    assert found.keys() == {"data"}
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [f"{form} {letter}" for letter in letters]
    found = losses(texts)
    assert found["train left out"].level == "error"
    assert "20 of 20 rows (100%) are left out: 20 resemble a held-out row" in found["train left out"].what
    assert found["train left out"].what.count("is like") == 3
    assert "near_duplicate_threshold" in found["train left out"].hint
    distinct = [f"{letter * 20} {i} {letter * 30}" for i, letter in enumerate(letters)]
    found = losses([*distinct, *distinct[:20]])
    assert (found["train left out"].level, "20 repeated" in found["train left out"].what) == ("warning", True)
    found = losses([*distinct, distinct[0]])
    assert (found["train left out"].level, found["train left out"].what) == (
        "ok",
        "1 of 21 rows (5%) are left out: 1 repeated",
    )
    assert "train 20, validation 3, test 3" in found["data"].what


def test_special_tokens_in_inputs_are_counted(values: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(values["teacher"])
    end = tokenizer.eos_token
    rows = [{"source": f"row {i} {end if i < 3 else ''}", "target": f"row {i} {end}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (found,) = [found for found in check(values, tmp_path).checks if found.name == "special tokens"]
    assert (found.level, found.what) == (
        "warning",
        f"3 of 40 inputs hold special tokens of the tokenizer as text: {end} in 3",
    )


def test_long_rows_are_tokenised_in_part(values: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"source": f"{i} " + "mot " * 20_000, "target": "word " * 20_000} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    values["data"]["near_duplicate_threshold"] = 1
    found = {found.name: found for found in check(values, tmp_path).checks}
    assert found["train lengths"].level == "error"
    assert "10 have prompts over 96 tokens" in found["train lengths"].what
    endless = [make_example("x" * 4_000_000, "y" * 4_000_000)] * 300
    sample = sample_of(endless, RunConfig.model_validate(values).task)
    assert len(sample) == 200
    assert sum(len(row.source) + len(row.target) for row in sample) < 1_000_000


def test_batches_that_do_not_divide_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    values["distill"] = {"training": {"batch_size": 8, "micro_batch_size": 3}}
    found = only(check(values, tmp_path), "error")
    assert (found.name, found.where) == ("distill", "training.micro_batch_size")


def test_a_held_out_set_that_is_missing_is_a_warning(values: dict[str, Any], tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text('{"source": "a", "target": "b"}\n', encoding="utf-8")
    sets = [
        {"name": path.stem, "source": {"type": "files", "files": [str(path)]}}
        for path in (good, tmp_path / "nowhere.jsonl")
    ]
    sets[0]["task"] = {"max_new_tokens": 4096}
    report = check(values | {"data": values["data"] | {"held_out": sets}}, tmp_path)
    assert report.errors() == []
    assert len(report.data_fingerprint) == 64
    found = {(each.name, each.level): each for each in report.checks if each.name.startswith("held-out")}
    assert found["held-out good", "ok"].what == "1 rows"
    assert "context of 512" in found["held-out good", "warning"].what
    assert "No such file" in found["held-out nowhere", "warning"].what
    assert "reports this set as missing" in found["held-out nowhere", "warning"].hint


def test_the_stored_teacher_signal_is_estimated(values: dict[str, Any], tmp_path: Path) -> None:
    values["distill"] = {"method": "supervised_kd", "teacher_signal": {"mode": "stored", "top_k": 100_000}}
    (found,) = [found for found in check(values, tmp_path).checks if found.name == "teacher_signal"]
    assert found.what.startswith("top 100000 tokens of ")
