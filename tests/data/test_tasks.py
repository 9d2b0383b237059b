"""Tasks by name: those that come along, one of a user's own, and how fields beside a name win."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from skd_lib.config import HeldOutConfig, RunConfig, TaskConfig, load_config, parse_section
from skd_lib.config.parameters import from_parameters, to_parameters
from skd_lib.config.tasks import known_tasks
from skd_lib.errors import SkdError

BASE: dict[str, Any] = {
    "name": "run",
    "teacher": "teacher",
    "student": "student",
    "data": {"source": {"type": "files", "train": ["train.jsonl"]}},
}


def run_config(task: dict[str, Any], **data: Any) -> RunConfig:
    return parse_section(RunConfig, {**BASE, "task": task, "data": {**BASE["data"], **data}}, where="run.yaml")


def test_the_tasks_of_the_paper_and_more_come_along() -> None:
    assert known_tasks() == (
        "asdiv", "gsm8k", "gsm_plus", "instruction", "math", "summarization", "svamp", "translation"
    )  # fmt: skip


@pytest.mark.parametrize("name", known_tasks())
def test_a_known_task_is_valid_and_survives_its_way_through_the_pipeline(name: str) -> None:
    config = run_config({"name": name})
    assert config.task.name == name
    again = from_parameters(**to_parameters(config))
    assert again.task == config.task
    assert TaskConfig.model_validate_json(config.task.model_dump_json()) == config.task


def test_fields_beside_the_name_win() -> None:
    task = run_config({"name": "gsm8k", "max_new_tokens": 99, "metrics": ["accuracy", "chrf"]}).task
    assert (task.answer, task.max_prompt_tokens) == ("hash", 256)
    assert (task.max_new_tokens, task.metrics) == (99, ["accuracy", "chrf"])


def test_a_task_of_ones_own_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "riddles.yaml"
    path.write_text('prompt: "Riddle: {source}"\nanswer: last_number\nmetrics: [accuracy]\nsystem_prompt: Be brief.\n')
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(BASE | {"task": {"name": str(path), "system_prompt": None}}))
    task = load_config(config).task
    assert (task.name, task.prompt, task.answer, task.system_prompt) == (
        "riddles",
        "Riddle: {source}",
        "last_number",
        "",
    )
    # Handed from step to step the file is not looked up again.
    path.unlink()
    assert TaskConfig.model_validate(task.model_dump()) == task


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("metrcs: [chrf]\n", "field `metrcs`: unknown field"),
        ("metrics: [f1]\n", "field `metrics.0`"),
        ("prompt: no place\n", "must contain {source}"),
        ("- a\n", "must be a mapping"),
        ("a: [\n", "not YAML"),
        (None, "No such file"),
    ],
)
def test_a_broken_task_file_is_named(tmp_path: Path, content: str | None, what: str) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SkdError) as caught:
        run_config({"name": str(path)})
    assert what in str(caught.value)
    assert str(path) in str(caught.value)
    assert "run.yaml, field `task`" in str(caught.value)


def test_an_unknown_task_says_which_there_are() -> None:
    with pytest.raises(SkdError, match=r"unknown task 'gsm9k'(.|\n)*known tasks: asdiv, gsm8k"):
        run_config({"name": "gsm9k"})


@pytest.mark.parametrize("date", ["2026-02-30", "26-01-01", "20260131", "2026-01-31 10:00", "tomorrow", 20260131])
def test_a_date_that_is_none_is_refused(date: Any) -> None:
    with pytest.raises(SkdError, match=r"field `task\.date`"):
        run_config({"date": date})


def test_a_date_may_stand_unquoted_in_yaml() -> None:
    assert run_config(yaml.safe_load("date: 2026-01-31")).task.date == "2026-01-31"
    assert run_config({"date": None}).task.date == run_config({}).task.date == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(SkdError, match=r"field `task\.stop`: an empty string"):
        run_config({"stop": [""]})


def held_out(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "source": {"type": "files", "files": [f"{name}.jsonl"]}, **fields}


def test_a_held_out_set_is_asked_as_the_model_was_taught() -> None:
    config = run_config(
        {"name": "math", "chat_template": False, "stop": ["\n\n"]},
        held_out=[
            held_out("svamp", task={"name": "svamp"}),
            held_out("other", task={"prompt": "Q: {source}"}),
            held_out("same"),
        ],
    )
    svamp, other, same = (each.task for each in config.data.held_out)
    assert (svamp.answer, svamp.metrics) == ("marked", ["accuracy"])
    assert (svamp.prompt, svamp.max_new_tokens) == (config.task.prompt, config.task.max_new_tokens)
    assert (svamp.chat_template, svamp.stop) == (False, ["\n\n"])
    assert (other.prompt, other.answer) == ("Q: {source}", "boxed")
    assert same == config.task
    assert from_parameters(**to_parameters(config)) == config


def test_held_out_sets_are_asked_on_the_date_that_preflight_gives_the_run() -> None:
    sets = [
        held_out("same"),
        held_out("other", task={"prompt": "Q: {source}"}),
        held_out("own", task={"date": "2020-02-02"}),
    ]
    config = run_config({}, held_out=sets)
    dated = config.task.model_copy(update={"date": "2026-01-31"})
    # As JSON, in which they go from step to step, all fields are given.
    data = type(config.data).model_validate_json(config.data.model_dump_json())
    dates = [dated.with_fields_of(each.task).date for each in data.held_out]
    assert dates == ["2026-01-31", "2026-01-31", "2020-02-02"]


@pytest.mark.parametrize(
    ("sets", "what"),
    [
        ([held_out("a"), held_out("a")], "given twice: a"),
        ([held_out("A b")], "field `data.held_out.0.name`"),
        ([held_out("a", source={"type": "files", "file": []})], "did you mean `files`?"),
        ([held_out("a", source={"type": "sql"})], "one of `files`, `hub`"),
        ([held_out("a", task={"name": "nope"})], "unknown task 'nope'"),
        ([held_out("a", task={"stop": ["\n", ""]})], "field `data.held_out.0.task.stop`: an empty string"),
        ([held_out("a", examples=0)], "greater than or equal to 1"),
    ],
)
def test_a_wrong_held_out_set_is_named(sets: list[dict[str, Any]], what: str) -> None:
    with pytest.raises(SkdError) as caught:
        run_config({}, held_out=sets)
    assert what in str(caught.value)


@pytest.mark.parametrize("where", ["run", "held_out"])
def test_a_judge_must_be_there_to_be_asked(where: str) -> None:
    judged = {"metrics": ["judge"]}
    with pytest.raises(SkdError, match=r"needs `evaluation\.judge\.url`"):
        run_config(judged if where == "run" else {}, held_out=[held_out("a", task=judged)])


def test_a_held_out_set_alone_is_complete() -> None:
    assert HeldOutConfig.model_validate(held_out("a")).task == TaskConfig()


def test_the_examples_of_the_documentation_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs/guides/tasks.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    parts = [part for part in re.split(r"(?m)^(?=task:)", examples[0]) if part.strip()]
    own, run = examples[-2:]
    for name in ("riddles", "raetsel"):
        (tmp_path / f"tasks/{name}.yaml").write_text(own, encoding="utf-8")
    for example in [*parts, *examples[1:-2], run]:
        parse_section(RunConfig, BASE | yaml.safe_load(example), where=example)
    for name in known_tasks():
        assert f"`{name}`" in text
