from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_lib.config import DivergenceName, Method, RunConfig
from skd_lib.errors import SkdError
from skd_lib.parameters import PLACES, from_parameters, to_parameters

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)

SOURCES: list[dict[str, Any]] = [
    {"type": "files", "train": ["a.jsonl"], "columns": {"source": "question"}},
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
        {"source": st.sampled_from(SOURCES)}, optional={"test_examples": st.none() | st.integers(1, 9)}
    ),
    task=st.fixed_dictionaries({}, optional={"stop": st.lists(TEXT), "system_prompt": st.none() | TEXT}),
    teacher_sft=st.fixed_dictionaries({"training": TRAININGS}),
    distill=st.fixed_dictionaries(
        {"training": TRAININGS},
        optional={
            "method": st.sampled_from(get_args(Method)),
            "divergence": st.sampled_from(get_args(DivergenceName)),
            "selective": st.none() | st.just({}),
            "on_policy_fraction": scheduled(st.floats(0, 1)),
            "sampling": st.fixed_dictionaries(
                {"top_k": scheduled(st.integers(0, 500)), "gamma": scheduled(st.integers(1, 20))}
            ),
        },
    ),
)


def through_kfp(value: Any) -> Any:
    """What KFP's protobuf structs do to a value on its way: numbers become floats; null is refused."""
    if isinstance(value, dict):
        return {key: through_kfp(item) for key, item in value.items()}
    if isinstance(value, list):
        return [through_kfp(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    assert isinstance(value, str | bool | float), f"{value!r} does not fit a KFP parameter"
    return value


@given(CONFIGS)
def test_there_and_back(values: dict[str, Any]):
    config = RunConfig.model_validate(values)
    parameters = to_parameters(config)
    assert from_parameters(**parameters) == config
    assert from_parameters(**{**parameters, "config": through_kfp(parameters["config"])}) == config
    assert from_parameters(**{**parameters, "config": json.dumps(through_kfp(parameters["config"]))}) == config


def test_scalars_are_not_in_the_structured_parameter_too():
    parameters = to_parameters(example())
    assert parameters.keys() == {*PLACES, "config"}
    assert "name" not in parameters["config"]
    assert "method" not in parameters["config"]["distill"]
    assert "top_k" not in parameters["config"]["distill"]["sampling"]


def test_a_schedule_is_no_number_and_stays_in_the_structured_parameter():
    values = example().model_dump(mode="json")
    values["distill"]["sampling"]["top_k"] = {"start": 50, "end": 5, "shape": "cosine"}
    parameters = to_parameters(from_parameters(values))
    assert (parameters["top_k"], parameters["gamma"]) == (-1, 5)
    assert parameters["config"]["distill"]["sampling"]["top_k"] == {"start": 50, "end": 5, "shape": "cosine"}
    assert from_parameters(**{**parameters, "top_k": 7}).distill.sampling.top_k == 7


def test_whole_configuration_needs_no_scalars_and_scalars_win():
    whole = example().model_dump(mode="json")
    assert from_parameters(whole) == example()
    assert from_parameters(whole, method="on_policy", max_steps=7).distill.method == "on_policy"
    assert from_parameters(whole, max_steps=7).distill.training.max_steps == 7
    assert from_parameters(whole, max_steps=0).distill.training.max_steps is None


def test_input_is_left_alone():
    whole = example().model_dump(mode="json")
    from_parameters(whole, method="sft")
    assert whole == example().model_dump(mode="json")


@pytest.mark.parametrize(
    ("config", "scalars", "message"),
    [
        ({"distill": "skd"}, {"method": "skd"}, "field `distill`"),
        ({"distil": {}}, {}, "field `distil`: unknown field"),
        ("{not json", {}, "config: not JSON"),
        ("[1]", {}, "config: Input should be a valid dictionary"),
        ({}, {"method": "magic"}, "field `distill.method`"),
    ],
)
def test_errors_name_the_field(config: Any, scalars: dict[str, Any], message: str):
    with pytest.raises(SkdError) as error:
        from_parameters(config, **scalars)
    assert message in str(error.value)


def example() -> RunConfig:
    return RunConfig.model_validate({"name": "x", "teacher": "t", "student": "s", "data": {"source": SOURCES[0]}})
