"""Chat templates: missing, endless, or changing rows; and the date that some print."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from skd_kfp.pipelines.local.folder import RunFolder
from skd_lib.config import RunConfig
from skd_lib.preflight import templates
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.models import Model, check_model
from skd_lib.steps import preflight
from tests.conftest import SaveTinyModel
from tests.preflight.support import check, executor_output, only
from tests.support.gcs_emulator import emulated


def without_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)


def test_a_missing_chat_template_is_told_once_for_each_model(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    student = save_tiny_model(tmp_path / "student")
    without_template(student)
    values |= {"student": str(student)}
    found = only(check(values, tmp_path), "error")
    assert (found.name, found.what) == ("student", "the tokenizer has no chat template")
    values["task"] |= {"chat_template": False}
    assert check(values, tmp_path).errors() == []


def test_a_chat_template_that_never_ends_or_changes_rows_is_an_error(
    values: dict[str, Any], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    student = save_tiny_model(tmp_path / "student")
    template = (student / "chat_template.jinja").read_text(encoding="utf-8")
    values |= {"student": str(student)}

    reads = "message['content'].replace('fichier 3', '').replace('file 1', '')"
    (student / "chat_template.jinja").write_text(template.replace("message['content']", reads), encoding="utf-8")
    report = check(values, tmp_path)
    assert {(found.level, found.what.split(" of ")[0]) for found in report.checks if found.name == "train rows"} == {
        ("error", "the chat template changes the question"),
        ("warning", "the chat template changes the answer"),
    }
    refusing = "{% if 'fichier 3' in messages[0]['content'] %}{{ raise_exception('no threes') }}{% endif %}"
    (student / "chat_template.jinja").write_text(refusing + template, encoding="utf-8")
    refused = [found for found in check(values, tmp_path).checks if found.name == "train rows"]
    assert [found.level for found in refused] == ["error"]
    assert "no threes" in refused[0].what
    assert "row " in refused[0].where
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (student / "chat_template.jinja").write_text(endless + template, encoding="utf-8")
    found = [found for found in check(values, tmp_path).checks if found.level == "error"]
    assert [(error.name, error.what) for error in found] == [
        ("student", "the chat template does not end: given up after 1 s")
    ]


def printing_the_date(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The configuration, with a student whose chat template prints the date."""
    student = tmp_path / "dated"
    shutil.copytree(values["student"], student)
    template = (student / "chat_template.jinja").read_text()
    dated = template.replace("{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%d %B %Y') }}\n")
    (student / "chat_template.jinja").write_text(dated)
    return values | {"student": str(student)}


def test_a_date_that_is_printed_is_fixed_for_a_run_and_its_repetitions(
    values: dict[str, Any], tmp_path: Path, today: Callable[[str], None]
) -> None:
    config = RunConfig.model_validate(printing_the_date(values, tmp_path))
    plain, dated = (check_model(Checks(), "student", str(each), config) for each in (values["student"], config.student))
    assert plain is not None
    assert dated is not None
    checks, root = Checks(), str(tmp_path / "checkpoints")

    def date(root: str = root, model: Model = dated, config: RunConfig = config) -> str:
        return templates.check_date(checks, [plain, model], config, root)

    assert date(model=plain) == ""
    assert not Path(root).exists()
    assert date() == "2024-01-31"
    (found,) = checks.found
    assert (found.level, found.where) == ("warning", "task.date")
    assert "in all prompts of this run it is 2024-01-31" in found.what
    assert "set it, e.g. to 2024-01-31" in found.hint
    today("2024-02-01")
    assert date() == "2024-01-31"  # as the checkpoints there
    assert date(str(tmp_path / "elsewhere")) == date("") == "2024-02-01"
    pinned = config.model_copy(update={"task": config.task.model_copy(update={"date": "2020-02-02"})})
    assert date(config=pinned) == "2020-02-02"
    with emulated("dates"):
        assert date("gs://dates/checkpoints") == "2024-02-01"
        today("2024-02-02")
        assert date("gs://dates/checkpoints") == "2024-02-01"
    (tmp_path / "checkpoints" / templates.DATE_FILE).write_text("no date")
    assert date() == "2024-02-02"
    RunFolder(tmp_path).forget()  # --fresh
    today("2024-02-03")
    assert date() == "2024-02-03"


def test_a_held_out_set_alone_may_print_the_date(
    values: dict[str, Any], tmp_path: Path, today: Callable[[str], None]
) -> None:
    rows = tmp_path / "held_out.jsonl"
    rows.write_text('{"source": "a", "target": "b"}\n')
    held_out = {"name": "other", "source": {"type": "files", "files": [str(rows)]}, "task": {"chat_template": True}}
    values = printing_the_date(values, tmp_path)
    values["task"] = values["task"] | {"chat_template": False}
    assert check(values, tmp_path).date == ""
    values["data"] = values["data"] | {"held_out": [held_out]}
    assert check(values, tmp_path).date == "2024-01-31"


def test_preflight_hands_on_the_date(values: dict[str, Any], tmp_path: Path, today: Callable[[str], None]) -> None:
    preflight.main(
        config=json.dumps(printing_the_date(values, tmp_path)),
        comparison="{}",
        checkpoint_root=str(tmp_path / "checkpoints"),
        report_out=tmp_path / "preflight" / "report.md",
    )
    parameters = executor_output(tmp_path / "preflight")["parameterValues"]
    steps = ("teacher_sft", "evaluate_teacher", "compare_variant", "compare_table")
    assert {json.loads(parameters[name])["task"]["date"] for name in steps} == {"2024-01-31"}
    assert "2024" not in parameters["prepare_data"]
