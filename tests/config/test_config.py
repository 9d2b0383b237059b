"""What a wrong configuration is told: the file, the field, what is wrong with it and what to do."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from skd_lib.config import (
    Count,
    DataConfig,
    DistillConfig,
    InterleavedConfig,
    RunConfig,
    SamplingParams,
    Schedule,
    apply,
    load_config,
    parse_overrides,
    parse_section,
)
from skd_lib.errors import SkdError, SkdErrors

GOOD: dict[str, Any] = {
    "name": "my-run",
    "teacher": "org/teacher",
    "student": "org/student",
    "data": {"source": {"type": "files", "train": ["train.jsonl"]}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The good configuration with one field set, e.g. `task.prompt`; None removes it."""
    config = copy.deepcopy(GOOD)
    *sections, name = path.split(".")
    holder = config
    for section in sections:
        holder = holder.setdefault(section, {})
    if value is None:
        del holder[name]
    else:
        holder[name] = value
    return config


def errors_of(config: dict[str, Any]) -> list[SkdError]:
    with pytest.raises(SkdErrors) as caught:
        parse_section(RunConfig, config, where="run.yaml")
    return caught.value.errors


def test_a_good_file_is_loaded_with_the_papers_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"distill": {"training": {"learning_rate": "1e-4"}}}), encoding="utf-8")
    config = load_config(path)
    assert config.name == "my-run"
    assert (config.distill.method, config.distill.sampling.top_k, config.distill.sampling.gamma) == ("skd", 25, 5)
    assert config.distill.training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("path", "value", "field", "what", "hint"),
    [
        ("nmae", "x", "nmae", "unknown field", "did you mean `name`?"),
        ("distill.training.learning_rat", 1, "distill.training.learning_rat", "unknown field", "`learning_rate`"),
        ("distill.sampling.student.beam", 1, "distill.sampling.student.beam", "unknown field", "temperature, top_p"),
        (
            "training",
            {"fsdp": True},
            "training",
            "unknown field",
            "`student_init.training.fsdp`, `distill.training.fsdp`?",
        ),
        ("learning_rate", 1, "learning_rate", "unknown field", "`distill.training.learning_rate`?"),
        ("distill.epochs", 1, "distill.epochs", "unknown field", "did you mean `distill.training.epochs`?"),
        ("data.source.trian", ["a"], "data.source.trian", "unknown field", "did you mean `train`?"),
        ("data.source.train", None, "data.source.train", "required", "add it"),
        ("data.source.columns.sorce", "a", "data.source.columns.sorce", "unknown field", "did you mean `source`?"),
        ("data.source.type", None, "data.source.type", "required", "`files`, `hub`, `gettext`"),
        ("teacher_sft.training.learning_rate", float("inf"), "teacher_sft.training.learning_rate", "finite number", ""),
        ("teacher_sft.training.epochs", "nan", "teacher_sft.training.epochs", "finite number", ""),
        ("teacher_sft.training.epochs", 1e18, "teacher_sft.training.epochs", "less than or equal to 100000", ""),
        ("distill.training.learning_rate", 1e300, "distill.training.learning_rate", "less than or equal to 10", ""),
        ("distill.training.learning_rate", 1e-300, "distill.training.learning_rate", "greater than or equal to", ""),
        ("distill.training.weight_decay", float("inf"), "distill.training.weight_decay", "finite number", ""),
        ("distill.training.lora", {"rank": 10**9}, "distill.training.lora.rank", "less than or equal to 4096", ""),
        ("distill.training.fsdp", 2, "distill.training.fsdp", "valid boolean", ""),
        ("distill.replaced_weight", float("nan"), "distill.replaced_weight", "finite number", ""),
        ("distill.temperature", 1e-300, "distill.temperature", "greater than or equal to 0.001", ""),
        ("distill.sampling.student.temperature", 1e-7, "distill.sampling.student.temperature", "0 is greedy", ""),
        ("distill.sampling.mixture", float("nan"), "distill.sampling.mixture", "finite number", ""),
        (
            "distill.sampling.min_prob",
            {"start": 0.5, "end": float("nan")},
            "distill.sampling.min_prob.end",
            "finite number",
            "",
        ),
        ("distill.sampling.gamma", 10**6, "distill.sampling.gamma", "less than or equal to 256", ""),
        ("specdec.temperatures", [0, float("inf")], "specdec.temperatures.1", "finite number", ""),
        ("specdec.temperatures", [1e-9], "specdec.temperatures.0", "logits overflow", ""),
        ("specdec.gammas", [1, 1000], "specdec.gammas.1", "less than or equal to 256", ""),
        ("specdec.batch_sizes", [0], "specdec.batch_sizes.0", "greater than or equal to 1", ""),
        ("evaluation.bootstrap_samples", 10**9, "evaluation.bootstrap_samples", "less than or equal to 100000", ""),
        ("registry.min_improvement", float("inf"), "registry.min_improvement", "finite number", ""),
        ("registry.model_name", "a\0", "registry", "model_name: text with the character U+0000", ""),
        ("data.source.train", ["a\0"], "data.source", "train: text with the character U+0000", ""),
        ("registry.model_name", "", "registry.model_name", "must not be blank", ""),
        ("registry.model_name", " ", "registry.model_name", "must not be blank", ""),
        ("registry.model_name", "name ", "registry.model_name", "begin or end with a space", ""),
        ("registry.model_name", "a\nb", "registry.model_name", "one line", ""),
        ("registry.model_name", "a\x1b[2J", "registry.model_name", "printable", ""),
        ("registry.model_name", "a/b", "registry.model_name", "must not contain", ""),
        ("registry.model_name", "a@b", "registry.model_name", "must not contain", ""),
        ("registry.model_name", "..", "registry.model_name", "a folder", ""),
        ("registry.model_name", "a'b\"c", "registry.model_name", "both kinds of quotes", ""),
        ("registry.model_name", "x" * 5000, "registry.model_name", "5000 characters, the limit is 250", ""),
        ("data.source.type", "sql", "data.source.type", "unknown type 'sql'", "`files`, `hub`, `gettext`"),
        ("data.source.train", [], "data.source.train", "at least 1 item wanted, got []", ""),
        (
            "data.source.train",
            "gs://b/a",
            "data.source.train",
            "a list is wanted, got 'gs://b/a'",
            "`train: [gs://b/a]`",
        ),
        ("data.source", "gs://b/a", "data.source", "a section", "`source: {type: files, train: [gs://b/a]}`"),
        ("data.held_out", "svamp", "data.held_out", "a list is wanted", "`held_out: [{name: svamp}]`"),
        (
            "data.source.train",
            ["https://h/a"],
            "data.source.train.0",
            "https:// URIs are not read, got https://h/a",
            "",
        ),
        ("data.source", {"type": "hub", "dataset": "https://h/o/n"}, "data.source.dataset", "by its id (org/name)", ""),
        ("task", "summarization", "task", "a section (fields with values) is wanted", "`task: {name: summarization}`"),
        ("student_init", "prune", "student_init", "a section", "`student_init: {mode: prune}`"),
        ("evaluation", "x", "evaluation", "a section", "`evaluation: {FIELD: x}`; fields there: batch_size, "),
        ("specdec.gammas", 4, "specdec.gammas", "a list is wanted, got 4", "`gammas: [4]`: Draft lengths"),
        ("data.source.columns", {"cast": "text"}, "data.source.columns.cast", "a section", "`cast: {NAME: text}`"),
        ("data", None, "data", "required", "add it"),
        ("teacher", None, "teacher", "required", "local folder"),
        ("name", "My Run", "name", "got 'My Run'", "lower case, digits and dashes"),
        ("seed", 1.5, "seed", "integer", ""),
        ("seed", "one", "seed", "integer", ""),
        ("specdec.examples", 2.6e16, "specdec", "examples: a whole number of more than 15 digits", ""),
        ("specdec.gammas", [1, 1e15], "specdec", "gammas: a whole number of more than 15 digits", ""),
        ("seed", True, "seed", "integer, unable to parse string", ""),
        ("seed", 2**70, "seed", "less than 2147483648", ""),
        ("seed", float("inf"), "seed", "finite number", ""),
        ("distill.method", "gkd", "distill.method", "`supervised_kd`", ""),
        (
            "distill.sampling.gamma",
            0,
            "distill.sampling.gamma",
            "greater than or equal to 1, got 0",
            "per teacher call",
        ),
        ("distill.sampling.top_k", 2.5, "distill.sampling.top_k", "fractional part, got 2.5", "K most likely"),
        ("distill.sampling.top_k", {"start": 9}, "distill.sampling.top_k.end", "required", "last optimiser step"),
        (
            "distill.sampling.gamma",
            {"start": 9, "end": 0},
            "distill.sampling.gamma.end",
            "greater than or equal to 1, got 0",
            "last optimiser step",
        ),
        (
            "distill.on_policy_fraction",
            {"start": 0, "end": 1, "shape": "step"},
            "distill.on_policy_fraction.shape",
            "'linear' or 'cosine', got 'step'",
            "",
        ),
        ("distill.selective", {"topp": 1}, "distill.selective.topp", "unknown field", "did you mean `top`?"),
        ("distill.alpha", 1, "distill.alpha", "less than 1, got 1", "skew_kl"),
        ("distill.sampling.student.top_p", 0, "distill.sampling.student.top_p", "greater than 0", "Nucleus"),
        ("distill", 3, "distill", "a section", "`distill: {FIELD: 3}`; fields there: method, "),
        ("task.prompt", "no place", "task.prompt", "must contain {source}", ""),
        ("task.metrics", ["chrf", "f1"], "task.metrics.1", "got 'f1'", ""),
        ("task.metrics", ["chrf", "chrf"], "task.metrics", "must be unique, got chrf, chrf", ""),
        ("specdec.batch_sizes", [True], "specdec.batch_sizes.0", "valid integer", ""),
        ("data.source.train", ["a.jsonl", ""], "data.source.train.1", "must not be blank", ""),
        ("data.source.validation", ["\n"], "data.source.validation.0", "must not be blank", ""),
        ("evaluation.judge.url", "http://", "evaluation.judge.url", "HOST[:PORT]", ""),
        ("evaluation.judge.url", "http://a b/v1", "evaluation.judge.url", "HOST[:PORT]", ""),
        ("evaluation.judge.url", "http://h:99999", "evaluation.judge.url", "ort out of range", ""),
        ("student_init", {"mode": "prune"}, "student_init", "needs both keep_first and keep_last", ""),
        ("student_init", {"mode": "prune_sft", "keep_first": 2}, "student_init", "`prune_sft` needs both", ""),
        ("student_init", {"keep_first": 2}, "student_init", "to modes `prune` and `prune_sft`, not to `as_is`", ""),
    ],
)
def test_a_wrong_field_is_named(path: str, value: Any, field: str, what: str, hint: str) -> None:
    (error,) = errors_of(changed(path, value))
    assert error.where == f"run.yaml, field `{field}`"
    assert what in error.what
    assert hint in error.hint


def test_a_long_wrong_value_is_shortened() -> None:
    (error,) = errors_of(changed("data.source.train", "x" * 5000))
    assert len(str(error)) < 300
    (error,) = errors_of(changed("seed", "x" * 10_000))
    assert len(str(error)) < 300


@pytest.mark.parametrize("path", ["data.source.type", "task.date", "x" * 99_999])
def test_a_message_is_no_longer_than_people_read(path: str) -> None:
    (error,) = errors_of(changed(path, "x" * 99_999))
    assert len(str(error)) < 9_000


def test_an_empty_student_is_unset() -> None:
    (error,) = errors_of(GOOD | {"student": ""})
    assert "needed for `student_init.mode: as_is`" in error.what


def test_everything_wrong_is_told_at_once() -> None:
    config = changed("task.prompt", "no place") | {"seed": -1, "nmae": "x"}
    del config["teacher"]
    fields = {error.where.removeprefix("run.yaml, field ") for error in errors_of(config)}
    assert fields == {"`task.prompt`", "`seed`", "`nmae`", "`teacher`"}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (changed("student", None), "student: needed for `student_init.mode: as_is`"),
        (changed("student_init", {"mode": "prune", "keep_first": 1, "keep_last": 1}), "student: leave it out"),
    ],
)
def test_the_student_is_named_or_cut_but_not_both(config: dict[str, Any], what: str) -> None:
    (error,) = errors_of(config)
    assert error.where == "run.yaml"
    assert what in error.what


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"distill": {"sampling": {"gamma": 13}}}, "distill.sampling.gamma: 13 is beyond task.max_new_tokens"),
        ({"distill": {"sampling": {"gamma": {"start": 2, "end": 13}}}}, "distill.sampling.gamma: 13 is beyond"),
        ({"specdec": {"gamma": 13}}, "specdec.gamma: 13 is beyond task.max_new_tokens, which is 12"),
        ({"specdec": {"gammas": [1, 13]}}, "specdec.gammas: 13 is beyond task.max_new_tokens, which is 12"),
    ],
)
def test_a_draft_is_no_longer_than_a_response(values: dict[str, Any], what: str) -> None:
    (error,) = errors_of(GOOD | {"task": {"max_new_tokens": 12}} | values)
    assert what in error.what
    parse_section(RunConfig, GOOD | {"task": {"max_new_tokens": 13}} | values, where="run.yaml")
    # The defaults do for short answers too, also where every field is spelled out.
    short = parse_section(RunConfig, GOOD | {"task": {"max_new_tokens": 3}}, where="run.yaml")
    parse_section(RunConfig, short.model_dump(), where="run.yaml")


@pytest.mark.parametrize(
    ("distill", "what"),
    [
        ({"method": "skd"}, "cannot be stored for `skd`: its responses are written again in every step"),
        ({"method": "imitkd"}, "use `mode: online`, or method `supervised_kd` or `seqkd`"),
        (
            {"method": "supervised_kd", "selective": {"top": 100}},
            "selective.top is 100, but only the teacher's 64 most likely tokens are stored",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused_with_the_reason(distill: dict[str, Any], what: str) -> None:
    stored = {"teacher_signal": {"mode": "stored"}}
    (error,) = errors_of(changed("distill", distill | stored))
    assert error.where == "run.yaml, field `distill`"
    assert what in error.what
    # What the method does not read is no error: one file can be run with each method.
    for method in ("sft", "seqkd"):
        parse_section(DistillConfig, {**distill, **stored, "method": method}, where="run.yaml")


def test_integers_may_come_as_floats_in_schedules_too() -> None:
    section = {"sampling": {"top_k": {"start": 50.0, "end": 5.0, "shape": "cosine"}, "gamma": 4.0}}
    sampling = parse_section(DistillConfig, section, where="--config").sampling
    assert sampling.top_k == Schedule[Count](start=50, end=5, shape="cosine")
    assert (sampling.gamma, type(sampling.gamma)) == (4, int)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"name: [unclosed", "not YAML"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"- a\n- b\n", "must be a mapping"),
        (b"", "must be a mapping"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(SkdError, match=what) as caught:
        load_config(path)
    assert caught.value.where.startswith(str(path))


def test_a_key_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(GOOD) + "distill: {method: sft}\ndistill: {beta: 1}\n", encoding="utf-8")
    with pytest.raises(SkdError, match="`distill` is there twice") as caught:
        load_config(path)
    lines = len(yaml.safe_dump(GOOD).splitlines())
    assert caught.value.where == f"{path}, line {lines + 2}, field `distill`"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(SkdError, match="No such file") as caught:
        load_config(path)
    assert caught.value.where == str(path)
    assert caught.value.hint == "check the path"
    with pytest.raises(SkdError, match="give the path of a file of this machine"):
        load_config(Path("https://host/run.yaml"))


def test_a_section_is_parsed_from_json_in_which_all_numbers_are_floats() -> None:
    text = json.dumps(GOOD["data"] | {"student_examples": 100.0})
    assert parse_section(DataConfig, text, where="--data-config").student_examples == 100
    with pytest.raises(SkdError, match="not JSON") as caught:
        parse_section(DataConfig, "{", where="--data-config")
    assert caught.value.where == "--data-config"


def test_fields_are_set_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"distill": {"sampling": {"gamma": 3}, "beta": 0.1}}), encoding="utf-8")
    texts = [
        "distill.sampling.top_k=7",
        "distill.training.learning_rate=1e-4",
        'task.stop=["=", "b"]',
        "distill.beta=null",
    ]
    config = load_config(path, parse_overrides([*texts, "name=first", "name=last"]))
    assert (config.distill.sampling.top_k, config.distill.sampling.gamma) == (7, 3)
    assert config.distill.training.learning_rate == 1e-4
    assert config.task.stop == ["=", "b"]
    assert config.distill.beta == load_config(path, {"distill": {}}).distill.beta
    assert config.name == "last"


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("distill.method", "not FIELD=VALUE", "--set distill.method"),
        ("=5", "not FIELD=VALUE", "--set =5"),
        ("seed=[1", "not YAML", "--set seed=[1"),
        ("name.first=1", "`name` has no fields", "field `name.first`"),
        ("distill.sampling.topk=1", "unknown field", "with --set, field `distill.sampling.topk`"),
        ("seed=010", "quote it", "--set seed=010"),
        ("task.stop=[no]", "quote it", "--set task.stop=[no]"),
        ("task={prompt: a, prompt: b}", "there twice", "--set task="),
        ("seed=.inf", "is no value here", "--set seed=.inf"),
        ("distill.training.epochs=inf", "finite number", "with --set, field `distill.training.epochs`"),
        ("seed=-1", "greater than or equal to 0", "with --set, field `seed`"),
    ],
)
def test_what_is_wrong_with_a_set_field_is_named(tmp_path: Path, text: str, what: str, where: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(GOOD), encoding="utf-8")
    with pytest.raises(SkdError, match=what) as caught:
        load_config(path, parse_overrides([text]))
    assert where in str(caught.value)


@pytest.mark.parametrize("field", ["sed", "distil.method", "data.sources.test", "distill.selective.topp", "seed.x"])
def test_a_field_that_is_unset_must_exist(tmp_path: Path, field: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(GOOD), encoding="utf-8")
    with pytest.raises(SkdError, match="unknown field") as caught:
        load_config(path, parse_overrides([f"{field}="]))
    assert f"field `{field}`" in str(caught.value)
    known = ["seed", "distill.training.lora.rank", "data.source.test", "distill.sampling.gamma.start"]
    config = load_config(path, parse_overrides([f"{each}=null" for each in known]))
    assert config == load_config(path)


def test_apply_leaves_what_it_was_given_alone() -> None:
    values = {"a": {"b": {"c": 1, "d": 2}}, "e": 3}
    before = copy.deepcopy(values)
    assert apply(values, {"a.b.c": 5, "a.x.y": 6, "e": None}, where="") == {"a": {"b": {"c": 5, "d": 2}, "x": {"y": 6}}}
    assert values == before


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"training": {"lora": {}}}, ""),
        ({"training": {"fsdp": True}, "method": "skd_mixed"}, ""),  # the servers have the whole teacher
        ({"multinode": {"nodes": 2}, "vllm": {"urls": ["http://10.0.0.5:8000"]}}, ""),
        ({"multinode": {"nodes": 2}}, "multinode is set and vllm.urls is empty"),
        ({"vllm": {"urls": ["10.0.0.5:8000"]}}, "must begin with http:// or https://"),
        ({"vllm": {"urls": ["http://a:1", "http://a:1/"]}}, "names a server twice"),
        ({"sampling": {"gamma": {"start": 2, "end": 5}}}, "sampling.gamma is a schedule"),
        ({"sampling": {"rule": "mixture"}}, "sampling.rule is `mixture`"),
        ({"teacher_signal": {"mode": "stored"}, "method": "seqkd"}, "teacher_signal.mode is `stored`"),
    ],
)
def test_what_vllm_servers_sample_for(fields: dict[str, Any], refused: str) -> None:
    if not refused:
        assert DistillConfig(engine="vllm", **fields).engine == "vllm"
        return
    with pytest.raises(ValidationError, match=re.escape(refused)):
        DistillConfig(engine="vllm", **fields)


def test_a_sampling_setting_that_is_left_out_has_its_default_beside_one_that_is_given() -> None:
    sampling = InterleavedConfig.model_validate({"student": {"temperature": 0.7}, "teacher": {"top_p": 0.9}})
    assert (sampling.student.temperature, sampling.student.top_p) == (0.7, 0.5)
    assert (sampling.teacher.temperature, sampling.teacher.top_p) == (0.5, 0.9)
    given = InterleavedConfig(student=SamplingParams(temperature=0.7))
    assert (given.student.temperature, given.student.top_p) == (0.7, 1.0)
