from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.images import Image, read_images
from pipelines import compiling
from pipelines.compiling import (
    PIPELINES,
    Documents,
    check_compiled,
    compiled_path,
    to_text,
    write_compiled,
)
from pipelines.graph import count_steps, read_steps
from pipelines.lint_platform import lint_documents
from skd_lib.config import load_config
from skd_lib.errors import SkdError
from skd_lib.parameters import from_parameters, to_parameters
from skd_lib.steps.preflight import SECTIONS

ROOT = Path(__file__).parents[2]
TORCH_STEPS = {"teacher_sft", "student_init", "distill", "evaluate", "evaluate_champion", "specdec_benchmark"}
COMET_STEPS = ["comet_score", "comet_score-off"]


@pytest.fixture(scope="module")
def documents(compile_once: Callable[..., Documents]) -> Documents:
    return compile_once()


@pytest.fixture
def spec(documents: Documents) -> dict[str, Any]:
    return copy.deepcopy(documents[0])


def body(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]


@pytest.mark.parametrize("name", PIPELINES)
def test_committed_file_is_what_the_definition_compiles_to(
    name: str, compile_once: Callable[..., Documents], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compiling, "compile_pipeline", compile_once)
    check_compiled(compiled_path(name), name=name)


def test_drift_is_found_and_named(
    tmp_path: Path, compile_once: Callable[..., Documents], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compiling, "compile_pipeline", compile_once)
    path = tmp_path / "pipeline.yaml"
    with pytest.raises(SkdError, match="is missing"):
        check_compiled(path)
    write_compiled(path)
    text = path.read_text()
    path.write_text(text.replace("sdkVersion: kfp-", "sdkVersion: kfp-0."))
    check_compiled(path)
    path.write_text(text.replace("maxRetryCount: 2", "maxRetryCount: 3", 1))
    with pytest.raises(SkdError, match=r"differs from its definition at components\.[\w-]+\.dag\.tasks\..*maxRetry"):
        check_compiled(path)
    path.write_text(text.split("\n---\n")[0])
    with pytest.raises(SkdError, match="number of documents"):
        check_compiled(path)


def test_compilation_does_not_depend_on_hash_seeds(documents: Documents):
    code = "from pipelines.compiling import *; print(to_text(compile_pipeline()))"
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": other},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == to_text(documents) + "\n"


def test_another_image(compile_once: Callable[..., Documents]):
    documents = compile_once("registry.example/skd:7", "registry.example/comet:7")
    executors = documents[0]["deploymentSpec"]["executors"]
    images = {label: executor["container"]["image"] for label, executor in executors.items()}
    assert images.pop("exec-comet-score") == "registry.example/comet:7"
    assert set(images.values()) == {"registry.example/skd:7"}
    with pytest.raises(SkdError, match="neither version nor digest"):
        compile_once("registry.example/skd:latest")


def test_published_image_is_pinned_by_digest(spec: dict[str, Any]):
    digest = "sha256:" + "0" * 64
    assert Image(image="r/skd", version="1", digest=digest).reference == f"r/skd@{digest}"
    assert Image(image="r/skd", version="1").reference == "r/skd:1"
    with pytest.raises(ValueError, match="digest"):
        Image(image="r/skd", version="1", digest="sha256:short")
    images = {label: executor["container"]["image"] for label, executor in spec["deploymentSpec"]["executors"].items()}
    assert images.pop("exec-comet-score") == read_images()["comet"].reference
    assert set(images.values()) == {read_images()["train"].reference}


# --- the shape of the pipeline ------------------------------------------------------------------------------------


def test_order_of_the_steps(spec: dict[str, Any]):
    steps = read_steps(spec)
    names = [step.name for step in steps]
    assert sorted(names) == sorted(
        ["preflight", "import_model", "prepare_data", "teacher_sft", "student_init", "distill"]
        + [f"evaluate-{role}" for role in ("teacher_base", "teacher", "student_before", "student_after")]
        + ["specdec_benchmark", "evaluate_champion", "report", "gate", "register_model", "finish"]
        + COMET_STEPS
    )
    assert names[0] == "preflight"
    assert names[-1] == "finish"
    assert [step.name for step in steps if step.is_exit] == ["finish"]
    place = {name: index for index, name in enumerate(names)}
    assert all(place[other] < place[step.name] for step in steps for other in step.waits_for)
    assert place["report"] < place["gate"] < place["register_model"]


def test_cached_are_all_steps_but_those_about_this_very_run(spec: dict[str, Any]):
    uncached = {step.name for step in read_steps(spec) if not step.cached}
    assert uncached == {"preflight", "evaluate_champion", "report", "gate", "register_model", "finish", *COMET_STEPS}


def test_one_of_the_two_comet_steps_runs_when_every_model_has_answered(spec: dict[str, Any]):
    steps = {step.name: step for step in read_steps(spec)}
    evaluations = {name for name in steps if name.startswith("evaluate")}
    choices = {steps[name].choice for name in COMET_STEPS}
    assert len(choices) == 1
    assert "" not in choices
    assert [step.name for step in steps.values() if step.choice] == COMET_STEPS
    assert all(set(steps[name].waits_for) == {"preflight", *evaluations} for name in COMET_STEPS)
    assert set(COMET_STEPS) < set(steps["report"].waits_for)
    assert count_steps(list(steps.values())) == len(steps) - 1


def test_no_cached_step_depends_on_the_runs_name_or_on_all_of_its_configuration(spec: dict[str, Any]):
    for task in body(spec).values():
        inherited = {
            value.get("componentInputParameter", "").removeprefix("pipelinechannel--")
            for value in task["inputs"]["parameters"].values()
        }
        if task.get("cachingOptions", {}).get("enableCache"):
            assert not inherited & {"run_name", "config", "method", "divergence", "top_k", "gamma", "max_steps"}


def test_another_k_repeats_the_distillation_and_what_needs_its_student(spec: dict[str, Any]):
    """The inputs of a cached task are its cache key: what another K changes, and what then has other artifacts."""
    demo = load_config(ROOT / "pipelines/configs/demo.yaml")
    parameters = to_parameters(demo)
    other = from_parameters(**{**parameters, "top_k": parameters["top_k"] + 1})
    changed = {f"{name}_config" for name in SECTIONS if getattr(other, name) != getattr(demo, name)}
    assert changed == {"distill_config"}
    tasks, repeated = body(spec), set[str]()
    while True:
        found = {
            name
            for name, task in tasks.items()
            for kind, key in (("parameters", "Parameter"), ("artifacts", "Artifact"))
            for value in task["inputs"].get(kind, {}).values()
            if (source := value.get(f"taskOutput{key}"))
            if source["producerTask"] in repeated or source[f"output{key}Key"] in changed
        }
        if found == repeated:
            break
        repeated = found
    cached = {name for name in tasks if tasks[name].get("cachingOptions", {}).get("enableCache")}
    names = {tasks[name]["taskInfo"]["name"] for name in repeated & cached}
    assert names == {"distill", "evaluate-student_after", "specdec_benchmark"}


def test_torch_steps_have_shared_memory_and_a_gpu_and_all_steps_know_their_run(documents: Documents):
    spec, kubernetes = documents[0], documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for label, executor in spec["deploymentSpec"]["executors"].items():
        container, settings = executor["container"], kubernetes[label]
        assert settings["fieldPathAsEnv"] == [{"name": "KFP_RUN_ID", "fieldPath": "metadata.labels['pipeline/runid']"}]
        step = container["command"][-1].removeprefix("skd_lib.steps.")
        on_gpu = step in TORCH_STEPS or label == "exec-comet-score"
        mounts = [mount["mountPath"] for mount in settings.get("emptyDirMounts", [])]
        assert mounts == (["/dev/shm", "/tmp"] if on_gpu else ["/tmp"])  # noqa: S108
        assert ("accelerator" in container["resources"]) == on_gpu
        assert container["resources"]["resourceMemoryLimit"]


def test_all_but_the_first_step_are_tried_again_with_a_pause(spec: dict[str, Any]):
    tasks = {name: task for name, task in body(spec).items() if not name.startswith("condition")}
    assert {name for name, task in tasks.items() if "retryPolicy" not in task} == {"preflight"}
    assert tasks["distill"]["retryPolicy"] == {
        "maxRetryCount": 2,
        "backoffDuration": "60s",
        "backoffFactor": 2.0,
        "backoffMaxDuration": "1209600s",  # Argo's maxDuration: from the start of the first attempt, waiting included
    }


def test_every_pipeline_parameter_is_described_and_has_a_default_that_runs(spec: dict[str, Any]):
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert len(parameters) <= 16
    for name, definition in parameters.items():
        assert definition.get("description"), name
        assert "defaultValue" in definition, name
    defaults = {name: definition["defaultValue"] for name, definition in parameters.items()}
    for name in ("tracking_uri", "experiment", "checkpoint_root", "node_selector", "tolerations"):
        defaults.pop(name)
    assert from_parameters(**defaults) == load_config(ROOT / "pipelines/configs/demo.yaml")


# --- the lint: a pipeline that is broken in exactly one way -------------------------------------------------------


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(spec: dict[str, Any]) -> None:
        for key in path[:-1]:
            spec = spec[key]
        spec[path[-1]] = value

    return change


TASKS = ("components", "comp-exit-handler-1", "dag", "tasks")
DISTILL = (*TASKS, "distill", "inputs")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            _set(*DISTILL, "parameters", "seed", value={"componentInputParameter": "pipelinechannel--sed"}),
            "task distill in comp-exit-handler-1: input 'seed' comes from 'pipelinechannel--sed', which the enclosing",
        ),
        (
            _set(*DISTILL, "artifacts", "teacher", "taskOutputArtifact", "outputArtifactKey", value="model"),
            "input 'teacher' comes from output 'model' of teacher-sft, which does not exist",
        ),
        (
            _set(*DISTILL, "artifacts", "teacher", "taskOutputArtifact", "producerTask", value="nobody"),
            "input 'teacher' comes from task 'nobody', which is not in this DAG",
        ),
        (
            _set(*DISTILL, "parameters", value={}),
            "task distill in comp-exit-handler-1: input 'seed' of comp-distill has no value",
        ),
        (
            lambda spec: body(spec)["preflight"]["inputs"]["parameters"].pop("trials"),  # which has a default
            "task preflight in comp-exit-handler-1: input 'trials' of comp-preflight has no value",
        ),
        (_set(*TASKS, "distill", "dependentTasks", value=["nobody"]), "waits for task 'nobody', which does not exist"),
        (_set(*TASKS, "distill", "componentRef", "name", value="comp-x"), "component 'comp-x' does not exist"),
        (
            _set("components", "comp-distill", "executorLabel", value="exec-x"),
            "component comp-distill: executor 'exec-x' does not exist",
        ),
        (
            _set("deploymentSpec", "executors", "exec-distill", "container", "image", value="r:5000/skd"),
            "component comp-distill: image 'r:5000/skd' has neither version nor digest",
        ),
        (
            _set(
                "deploymentSpec",
                "executors",
                "exec-distill",
                "container",
                "resources",
                value={"resourceMemoryLimit": "{{$.inputs.parameters['pipelinechannel--memory']}}"},
            ),
            "component comp-distill: uses parameter 'pipelinechannel--memory', which it does not have",
        ),
    ],
)
def test_lint_finds(documents: Documents, change: Callable[[dict[str, Any]], None], problem: str):
    broken = copy.deepcopy(documents)
    change(broken[0])
    found = lint_documents(broken)
    assert any(problem in each for each in found), found
