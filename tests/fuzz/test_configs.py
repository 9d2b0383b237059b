"""Run configurations: what is accepted is accepted by every step that gets a part of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format, struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from skd_lib._core.ascii_json import ascii_json
from skd_lib.config import (
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    RegistryConfig,
    RunConfig,
    SpecdecConfig,
    TaskConfig,
    load_config,
    parse_section,
)
from skd_lib.config.models import StudentInitConfig, TeacherSftConfig
from skd_lib.config.parameters import from_parameters, short, to_parameters
from skd_lib.distillation.loss import loss_for
from skd_lib.distillation.rollouts import interleaving_rule, value_at
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.models import check_unread
from skd_lib.sampling.distributions import check_params
from tests.fuzz.conftest import accepted, fuzz

VALID: dict[str, Any] = {
    "name": "tiny",
    "teacher": "models/teacher",
    "student": "models/student",
    "seed": 1,
    "data": {
        "source": {"type": "files", "train": ["rows.jsonl"], "columns": {"source": "{a} {b}", "target": "c"}},
        "held_out": [{"name": "other", "source": {"type": "files", "files": ["other.csv"]}, "task": {"stop": ["\n"]}}],
    },
    "task": {"prompt": "translate: {source}", "metrics": ["bleu"], "stop": ["END"]},
    "distill": {
        "method": "skd",
        "selective": {"top": 3},
        "sampling": {"top_k": {"start": 50, "end": 5}, "gamma": 4, "min_prob": {"start": 0.5, "end": 0.1}},
        "training": {"max_steps": 5, "lora": {"rank": 4, "target_modules": ["q_proj"]}},
    },
    "specdec": {"temperatures": [0, 1], "gammas": [1, 2]},
    "registry": {"model_name": "tiny"},
}
SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "task": TaskConfig,
    "teacher_sft": TeacherSftConfig,
    "student_init": StudentInitConfig,
    "distill": DistillConfig,
    "evaluation": EvaluationConfig,
    "specdec": SpecdecConfig,
    "registry": RegistryConfig,
}


def _paths(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all fields and items."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [found for key, value in items for found in ((*path, key), *_paths(value, (*path, key)))]


WHOLE = json.loads(json.dumps(RunConfig.model_validate(copy.deepcopy(VALID)).model_dump(mode="json")))
PATHS = sorted(_paths(WHOLE), key=str)
NUMBERS = [
    0,
    1,
    -1,
    2**31 - 1,
    2**31,
    2**53 + 1,
    10**400,
    0.0,
    -0.0,
    1e-300,
    1e300,
    0.001,
    0.5,
    1.0,
    math.inf,
    math.nan,
]
TEXTS = [
    "",
    " ",
    "\n",
    "\0",
    "no",
    "1:30",
    "010",
    "~",
    "..",
    "{",
    "{}",
    "{source}",
    "a/b",
    "é\u2028\ud7ff",
    "\x1b[2J",
    "x" * 5000,
]
ODD = st.one_of(
    st.sampled_from([None, True, False, [], {}, [None], {"": 1}, [[]], *NUMBERS, *TEXTS]),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.sampled_from([*NUMBERS, *TEXTS]), max_size=3),
    st.builds(lambda depth: json.loads("[" * depth + "]" * depth), st.integers(1, 60)),
    st.builds(
        lambda start, end, shape: {"start": start, "end": end, "shape": shape},
        *[st.one_of(st.floats(0, 1), st.integers(0, 40))] * 2,
        st.sampled_from(["linear", "cosine", "step"]),
    ),
    # As like the real thing as can be.
    st.sampled_from([1, 2, 3, 5, 8, 0.1, 0.25, "sft", "seqkd", "on_policy", "two_stage", "stored"]),
)
SNIPPETS = [
    "\n",
    "  ",
    ":",
    "- ",
    "'",
    '"',
    "&a ",
    "*a",
    "<<: ",
    "!!python/object:os.system ",
    "\t",
    "#",
    "|",
    "seed: 1\n",
]
SNIPPETS += ["---\n", "? ", "2026-13-45", "{", "[", "0x_", "\ufeff", "name: again\n", "é", "\x00", ",", "%YAML 1.1\n"]


def _changed(values: Any, path: tuple[Any, ...], value: Any, how: str) -> None:
    for key in path[:-1]:
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            return
    try:
        if how == "set":
            values[path[-1]] = value
        elif how == "delete":
            del values[path[-1]]
        elif isinstance(values, dict):
            values[f"{path[-1]}_"] = value
        elif isinstance(values, list):
            values.append(value)
    except (KeyError, IndexError, TypeError):
        return


HOWS = st.sampled_from(["set"] * 6 + ["delete", "add"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@fuzz(350)
@given(changes=st.lists(st.tuples(st.sampled_from(PATHS), ODD, HOWS), min_size=1, max_size=3), whole=st.booleans())
def test_fields(folder: Path, changes: list[tuple[tuple[Any, ...], Any, str]], whole: bool) -> None:
    values = copy.deepcopy(WHOLE if whole else VALID)
    for path, value, how in changes:
        _changed(values, path, value, how)
    check(folder, yaml.safe_dump(values, allow_unicode=True))


@fuzz(250)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 2000), st.sampled_from(["cut", "put", "twice"]), st.sampled_from(SNIPPETS)),
        min_size=1,
        max_size=3,
    )
)
def test_text(folder: Path, edits: list[tuple[int, str, str]]) -> None:
    text = yaml.safe_dump(VALID, allow_unicode=True)
    for place, how, snippet in edits:
        at = place % (len(text) + 1)
        if how == "twice":
            lines = text.splitlines(keepends=True)
            text = "".join([*lines[: at % (len(lines) + 1)], *lines[at % (len(lines) + 1) - 1 :]])
        else:
            text = text[:at] + (snippet if how == "put" else "") + text[at + (how == "cut") :]
    check(folder, text)


def check(folder: Path, text: str) -> None:
    file = folder / "run.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    config = accepted(lambda: load_config(file))
    if config is None:
        return
    # As it travels through Kubeflow, in whose structures every number is a float and nothing is null.
    parameters = to_parameters(config)
    struct = json_format.ParseDict(json.loads(json.dumps(parameters, allow_nan=False)), struct_pb2.Struct())
    again = json.loads(json_format.MessageToJson(struct))
    assert from_parameters(**{**again, "training_steps": int(again["training_steps"])}) == config
    for name, section in SECTIONS.items():
        assert parse_section(section, ascii_json(short(getattr(config, name))), where=name) == getattr(config, name)
    # Everything that follows from the settings alone.
    check_unread(Checks(), config)
    loss_for(config.distill)
    sampling = config.distill.sampling
    for params in (sampling.student, sampling.teacher):
        check_params(params, where="sampling")
    for step in (0, 3, 9):
        assert interleaving_rule(sampling, step, 10).name
        assert round(value_at(sampling.gamma, step, 10)) >= 1
        for share in (config.distill.on_policy_fraction, config.distill.sampled_fraction):
            assert 0 <= value_at(share, step, 10) <= 1
