"""How large a run of the compiled pipelines grows in the cluster's records, with real settings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from skd_kfp.pipelines.compiling import PIPELINES, compiled_path
from skd_kfp.pipelines.kubeflow.sizes import (
    ARGUMENT,
    KEPT,
    SHOWN,
    Sizes,
    expected,
    measure,
    notice,
    of_compiled,
    too_large,
)
from skd_lib._core.ascii_json import ascii_json
from skd_lib._core.documents import parse_yaml_documents, read_text
from skd_lib.config.parameters import Form
from skd_lib.steps.preflight import read

FORM = {
    "data_train": "gs://bucket/folder/train.jsonl",
    "model_teacher": "google/gemma-7b-it",
    "model_student": "google/gemma-2b-it",
}


def documents(name: str) -> list[dict[str, Any]]:
    return parse_yaml_documents(read_text(compiled_path(name)), where=name)


def sizes(name: str, *, wrapped: bool = False, **form: Any) -> Sizes:
    """Measure a run with these fields of the form."""
    given = {**FORM, **form}
    fields = {key: value for key, value in given.items() if key in Form.__dataclass_fields__}
    config, plan = read(Form(**fields), given.get("comparison", ""), "a run")
    return measure(documents(name), given, expected(config, plan), wrapped=wrapped)


def comparison(runs: int) -> str:
    return json.dumps({"methods": ["skd", "supervised_kd"], "seeds": list(range(1, runs // 2 + 1))})


def test_kubeflow_s_page_follows_a_distillation_to_its_end() -> None:
    """Commit 9e44b4e: 1,125 kB of nodes alone, for the smallest run there is."""
    found = sizes("distillation")
    assert found.workflow < SHOWN
    assert notice(found) == ""


def test_distillation_is_small() -> None:
    assert sizes("distillation").nodes < 400_000


def test_kubeflow_s_page_follows_a_distillation_where_all_nodes_are_kept_twice() -> None:
    """As with the manifests of 2.17.0."""
    assert sizes("distillation", wrapped=True).workflow < SHOWN


def test_a_comparison_of_16_runs() -> None:
    """Commit 9e44b4e: 12 to 15 runs at the most, with curves of 400 points 4 or 5."""
    found = sizes("compare_methods", wrapped=True, comparison=comparison(16))
    assert found.compressed < KEPT
    assert too_large(found) == []
    assert "Kubeflow's page" in notice(found)


@pytest.mark.parametrize("name", PIPELINES)
def test_no_step_s_output_grows_with_the_training(name: str) -> None:
    """Curves and samples are files: no parameter but lists of runs and short texts is declared."""
    lists = {
        (component, key)
        for component, spec in documents(name)[0]["components"].items()
        for key, declared in spec.get("outputDefinitions", {}).get("parameters", {}).items()
        if declared["parameterType"] in ("LIST", "STRUCT") and "executorLabel" in spec
    }
    assert lists <= {("comp-preflight", "trials")}


@pytest.mark.parametrize("name", PIPELINES)
def test_no_long_argument(name: str) -> None:
    more: dict[str, Any] = {"comparison": comparison(16)} if name == "compare_methods" else {}
    assert sizes(name, **more).argument < ARGUMENT / 2


def test_what_skd_compile_says() -> None:
    one, four, sixteen = (
        int(of_compiled(documents(name), trials).partition(" kB")[0].rpartition(" ")[2].replace(",", ""))
        for name, trials in (("distillation", 1), ("compare_methods", 4), ("compare_methods", 16))
    )
    assert 400 < one < four < 1049 < sixteen  # the page follows a run up to 1,049 kB


def test_a_long_prompt_is_refused() -> None:
    long = ascii_json({"task": {"prompt": "Translate: {source} " + "at once " * 9_000}})
    (problem,) = [each for each in too_large(sizes("distillation", config=long)) if "argument" in each.what]
    assert "URI" in (problem.hint or "")


def test_more_runs_than_argo_keeps_are_refused() -> None:
    found = sizes("compare_methods", wrapped=True, comparison=comparison(120))
    assert "several comparisons" in str([problem.hint for problem in too_large(found)])


def test_a_value_costs_as_often_as_it_is_stored() -> None:
    """Seen: some 12 times with the manifests of 2.17.0. The driver's output, two nodes of the step, its pod; each
    has it in the executor input and in the arguments; all twice where nodes are wrapped."""
    spec = tiny("x" * 1000)
    plain, wrapped = (measure(spec, {}, wrapped=wrapped).nodes for wrapped in (False, True))
    none = tiny("")
    base, wrapped_base = (measure(none, {}, wrapped=wrapped).nodes for wrapped in (False, True))
    assert (plain - base) // 1000 == 3 * 2 + 2  # a constant is in the task and in the DAG, too
    assert (wrapped - wrapped_base) // 1000 == 6 * 2 + 4


def tiny(value: str) -> list[dict[str, Any]]:
    """A pipeline of one step with one parameter."""
    parameter = {"runtimeValue": {"constant": value}}
    return [
        {
            "pipelineInfo": {"name": "p"},
            "root": {
                "dag": {"tasks": {"a": {"componentRef": {"name": "a"}, "inputs": {"parameters": {"x": parameter}}}}}
            },
            "components": {"a": {"executorLabel": "a", "inputDefinitions": {"parameters": {"x": {}}}}},
            "deploymentSpec": {
                "executors": {"a": {"container": {"image": "i", "args": ["{{$.inputs.parameters['x']}}"]}}}
            },
        }
    ]
