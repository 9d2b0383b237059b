from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_lib._core.ascii_json import ascii_json
from skd_lib.comparison.config import load_compare
from skd_lib.config import (
    Columns,
    FilesSource,
    RunConfig,
    TaskConfig,
    load_config,
    parse_section,
)
from skd_lib.config.parameters import (
    PLACES,
    Form,
    changed_on_the_way,
    fill,
    from_parameters,
    short,
    to_parameters,
    to_struct,
)
from skd_lib.distillation.divergences import DIVERGENCES
from skd_lib.distillation.methods import METHODS
from skd_lib.errors import SkdError

ROOT = Path(__file__).parents[2]
SECTIONS = ("data", "task", "teacher_sft", "student_init", "distill", "evaluation", "specdec", "registry")
FILLED: dict[str, Any] = {"data_train": "x.jsonl", "model_teacher": "t", "model_student": "s"}
ODD = [
    "$$x^2$$",
    "$(HOME)",
    "{{= 1 + 1 }}",
    "{{$}}",
    "{% if a %}",
    "\U0001f600",
    "日本",
    "\n\x1b",
    "a, b",
    " x ",
    "{",
    "\\frac{1}{2}",
]
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1) | st.sampled_from(ODD)
PLACE = TEXT.filter(str.strip)

SOURCES: list[dict[str, Any]] = [
    {"type": "files", "train": ["a.jsonl"], "columns": {"source": "question"}},
    {"type": "files", "train": ["a.jsonl", "gs://b/*.csv"], "test": ["t,1.jsonl"], "validation": ["v.jsonl"]},
    {"type": "hub", "dataset": "openai/gsm8k", "test_split": None, "subset": "main"},
    {"type": "hub", "dataset": "openai/gsm8k"},
    {
        "type": "gettext",
        "language": "fr",
        **{split: [{"requirement": "x==1", "sha256": "0" * 64}] for split in ("train", "validation", "test")},
    },
]
TRAININGS = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.floats(1e-9, 1),
        "max_steps": st.none() | st.integers(1, 10**6),
        "micro_batch_size": st.none() | st.integers(1, 64),
        "epochs": st.floats(0.1, 10),
        "gradient_checkpointing": st.booleans(),
    },
)


def scheduled(numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A number, or a schedule between two."""
    shapes = st.sampled_from(["linear", "cosine"])
    return numbers | st.fixed_dictionaries({"start": numbers, "end": numbers}, optional={"shape": shapes})


CONFIGS = st.builds(
    lambda pruned, **values: {
        **values,
        "student_init": {"mode": "prune", "keep_first": 2, "keep_last": 1} if pruned else {"mode": "sft"},
        "student": None if pruned else "some/student",
    },
    pruned=st.booleans(),
    name=st.from_regex(r"\A[a-z0-9][a-z0-9-]{0,10}\Z"),
    teacher=TEXT,
    seed=st.integers(0, 2**31 - 1),
    data=st.fixed_dictionaries(
        {
            "source": st.sampled_from(SOURCES)
            | st.fixed_dictionaries(
                {"type": st.just("files"), "train": st.lists(PLACE, min_size=1, max_size=3)},
                optional={"test": st.lists(PLACE, max_size=2)},
            )
        },
        optional={
            "test_examples": st.none() | st.integers(1, 9),
            "held_out": st.just(
                [{"name": "h", "source": {"type": "files", "files": ["h.csv"]}, "task": {"max_new_tokens": 256}}]
            ),
        },
    ),
    task=st.fixed_dictionaries(
        {},
        optional={
            "name": st.sampled_from(["", "gsm8k", "translation"]),
            "stop": st.lists(TEXT),
            "system_prompt": st.none() | TEXT,
            "max_new_tokens": st.integers(20, 900),
        },
    ),
    teacher_sft=st.fixed_dictionaries({"training": TRAININGS}),
    distill=st.fixed_dictionaries(
        {"training": TRAININGS},
        optional={
            "method": st.sampled_from(list(METHODS)),
            "divergence": st.sampled_from(list(DIVERGENCES)),
            "selective": st.none() | st.just({}),
            "on_policy_fraction": scheduled(st.floats(0, 1)),
            "sampling": st.fixed_dictionaries(
                {"top_k": scheduled(st.integers(0, 500)), "gamma": scheduled(st.integers(1, 20))},
                optional={"student": st.just({"temperature": 1.0}), "teacher": st.just({})},
            ),
        },
    ),
)


@given(CONFIGS)
def test_there_and_back(values: dict[str, Any]):
    config = RunConfig.model_validate(values)
    form = to_parameters(config)
    assert from_parameters(**form) == config
    assert form.keys() == {*PLACES, "config"}
    # Nothing that kubelet, Argo, KFP or its database read as their own.
    for value in form.values():
        assert re.fullmatch("[ -~]*", str(value))
        assert "$" not in str(value)
        assert "{{" not in str(value)
    assert not changed_on_the_way(form)


@given(CONFIGS)
def test_sections_are_short_and_read_back_as_they_were(values: dict[str, Any]):
    config = RunConfig.model_validate(values)
    assert parse_section(RunConfig, json.dumps(short(config)), where="config") == config
    for name in SECTIONS:
        section = getattr(config, name)
        assert parse_section(type(section), ascii_json(short(section)), where=name) == section
        assert len(ascii_json(short(section))) <= len(ascii_json(to_struct(section)))


@pytest.mark.parametrize("file", sorted((ROOT / "pipelines/configs").rglob("*.yaml")), ids=lambda file: file.stem)
def test_all_configurations_here_go_there_and_back(file: Path):
    config = load_compare(file)[1] if "base:" in file.read_text(encoding="utf-8") else load_config(file)
    assert from_parameters(**to_parameters(config)) == config
    for name in SECTIONS:
        section = getattr(config, name)
        assert parse_section(type(section), short(section), where=name) == section


def test_what_is_as_by_default_is_not_said():
    form = to_parameters(example())
    said = {name: value for name, value in form.items() if value}
    assert said == {
        "data_train": "a.jsonl",
        "model_teacher": "t",
        "model_student": "s",
        "training_method": "skd",
        "config": '{"name": "x", "data": {"source": {"columns": {"source": "question"}}}}',
    }


def test_data_models_and_task_are_all_that_is_needed():
    config = from_parameters(
        data_train="gs://b/train.jsonl, gs://b/more/*.csv", model_teacher="org/t", model_student="s"
    )
    assert config.name == "run"
    assert config.data.source == FilesSource(train=["gs://b/train.jsonl", "gs://b/more/*.csv"])
    named = from_parameters(run_name="Überprüfung №2 of “x”!", task="gsm8k", **FILLED)
    assert named.name == "uberprufung-no2-of-x"
    assert named.task.metrics == ["accuracy"]
    assert from_parameters('{"name": "own"}', run_name="other", **FILLED).name == "own"


def test_the_form_goes_before_config():
    config = {"distill": {"method": "sft", "training": {"max_steps": 9, "learning_rate": 0.1}}, "teacher": "other"}
    run = from_parameters(json.dumps(config), training_method="seqkd", training_steps=4, **FILLED)
    assert (run.teacher, run.distill.method, run.distill.training.max_steps) == ("t", "seqkd", 4)
    assert run.distill.training.learning_rate == 0.1
    unsaid = from_parameters(json.dumps(config), **FILLED | {"model_teacher": ""})
    assert (unsaid.teacher, unsaid.distill.method, unsaid.distill.training.max_steps) == ("other", "sft", 9)


def test_files_take_the_place_of_another_source_but_its_columns_stay():
    hub = {"data": {"source": {"type": "hub", "dataset": "a/b", "columns": {"source": "q"}}}}
    source = from_parameters(json.dumps(hub), **FILLED).data.source
    assert source == FilesSource(train=["x.jsonl"], columns=Columns(source="q"))
    with pytest.raises(SkdError, match="data_train: there are no training data"):
        from_parameters(json.dumps(hub), model_teacher="t", model_student="s", data_test="y.jsonl")


def test_another_task_takes_nothing_of_the_one_in_config():
    own = to_parameters(from_parameters('{"task": {"prompt": "{source}!", "stop": ["x"]}}', **FILLED))
    assert from_parameters(**own | {"task": "gsm8k"}).task.prompt == "{source}!"
    other = '{"task": {"name": "svamp", "stop": ["x"]}}'
    assert from_parameters(other, **FILLED, task="gsm8k").task == TaskConfig(name="gsm8k")
    assert from_parameters(other, **FILLED).task == TaskConfig(name="svamp", stop=["x"])


def test_a_task_from_a_file_is_not_looked_for_again(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("prompt: 'Q: {source}'\nmax_new_tokens: 256\n", encoding="utf-8")
    config = from_parameters(task=str(file), **FILLED)
    file.unlink()
    assert config.task.name == "mine"
    assert from_parameters(**to_parameters(config)) == config
    assert parse_section(TaskConfig, short(config.task), where="task") == config.task


def test_config_may_be_a_runs_yaml_file(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("# a comment\nseed: 3\ntask: {prompt: '$$x$$ {source} \U0001f600'}\n", encoding="utf-8")
    config = from_parameters(str(file), **FILLED)
    assert (config.seed, config.task.prompt) == (3, "$$x$$ {source} \U0001f600")
    with pytest.raises(SkdError, match=r"config: .*missing.yaml") as error:
        from_parameters(str(tmp_path / "missing.yaml"), **FILLED)
    assert "JSON in curly braces" in error.value.hint


@pytest.mark.parametrize(
    ("form", "messages"),
    [
        (
            {},
            ["model_teacher: no teacher is named", "model_student: no student", "data_train: there are no training"],
        ),
        (FILLED | {"training_method": "magic"}, ["training_method: unknown method"]),
        (FILLED | {"training_steps": -1}, ["training_steps: Input should be greater"]),
        (FILLED | {"task": "jokes"}, ["task: unknown task 'jokes'"]),
        (FILLED | {"data_train": " , "}, ["data_train: there are no training data"]),
        (
            FILLED | {"config": '{"student_init": {"mode": "prune", "keep_first": 1, "keep_last": 1}}'},
            ["model_student: student: leave it out"],
        ),
        ({"config": '{"distil": {}, "seed": "x"}', "model_teacher": "t"}, ["field `distil`: unknown", "field `seed`"]),
        ({"config": '{"distil": {}}', "model_teacher": "t"}, ["model_student: no student", "data_train: there"]),
        (FILLED | {"config": '{"distill": "skd"}'}, ["config, field `distill`"]),
        (FILLED | {"config": '{"distill": "skd"}', "training_method": "skd"}, ["config, field `distill`"]),
        (FILLED | {"config": '{"data": [1]}'}, ["config, field `data`"]),
        (FILLED | {"config": '{"prompt": "{"inputs": {}}"}'}, ["config: not JSON", "Kubeflow changes `$`"]),
        (FILLED | {"config": "[1]"}, ["config: must be a mapping"]),
    ],
)
def test_what_is_wrong_is_told_at_once_by_the_forms_fields(form: dict[str, Any], messages: list[str]):
    with pytest.raises(SkdError) as error:
        from_parameters(**form)
    for message in messages:
        assert message in str(error.value), str(error.value)


@pytest.mark.parametrize("field", ["config", "task", "data_train", "data_test"])
def test_a_uri_of_another_kind_is_refused_by_the_forms_field(field: str):
    with pytest.raises(SkdError) as error:
        from_parameters(**(FILLED | {field: "https://user:secret@host/a.yaml"}))
    assert str(error.value).count("https:// URIs are not read") == 1
    assert f"{field}: " in str(error.value)
    assert "(gs://, s3://, az://)" in str(error.value)
    assert "secret" not in str(error.value)


def test_what_may_have_been_changed_on_the_way_is_refused_by_name():
    typed = {"config": '{"task": {"prompt": "$x$ {source}"}}', "data_train": "gs://b/$(X)", "task": "gsm8k"}
    told = [str(error) for error in changed_on_the_way(typed)]
    assert told[0].startswith("config, field `task.prompt`: a text with `$`")
    assert told[1].startswith("data_train: a text with `$`")
    assert all("\\u0024" in text for text in told)
    assert len(told) == 2
    assert not changed_on_the_way({"config": '{"task": {"prompt": "Français : {source} \\u0024"}}'})
    assert not changed_on_the_way({"config": "gs://bucket/run.yaml", "training_steps": 3})


def test_input_is_left_alone():
    values = {"teacher": "a", "data": {"source": {"type": "files", "train": ["a"]}}, "student": "s"}
    before = json.dumps(values)
    fill(values, Form(**FILLED))
    assert json.dumps(values) == before


def example() -> RunConfig:
    return RunConfig.model_validate({"name": "x", "teacher": "t", "student": "s", "data": {"source": SOURCES[0]}})
