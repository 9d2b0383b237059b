from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skd_kfp.components import build
from skd_kfp.components.images import Image, read_images
from skd_kfp.pipelines import compiling
from skd_kfp.pipelines.compile_checks import find_problems
from skd_kfp.pipelines.compiling import (
    PIPELINES,
    Documents,
    check_compiled,
    compiled_path,
    pipeline_for,
    profile_of,
    to_text,
    write_compiled,
)
from skd_kfp.pipelines.graph import read_steps
from skd_lib.config import RunConfig
from skd_lib.config.step import DEPENDS
from skd_lib.errors import SkdError
from tests.conftest import Skd

ROOT = Path(__file__).parents[2]
TORCH_STEPS = {
    "teacher_sft",
    "student_init",
    "distill",
    "evaluate",
    "evaluate_teacher",
    "evaluate_student",
    "evaluate_champion",
    "specdec_benchmark",
}


@pytest.fixture(scope="module")
def documents(compile_once: Callable[..., Documents]) -> Documents:
    return compile_once()


@pytest.fixture
def spec(documents: Documents) -> dict[str, Any]:
    return copy.deepcopy(documents[0])


def tasks_of(spec: dict[str, Any], component: str) -> dict[str, Any]:
    return spec["components"][f"comp-{component}"]["dag"]["tasks"]


def all_tasks(spec: dict[str, Any]) -> dict[str, Any]:
    """Every container's task, by its component, which is unique."""
    tasks = [task for part in spec["components"].values() for task in part.get("dag", {}).get("tasks", {}).values()]
    tasks += spec["root"]["dag"]["tasks"].values()
    named = {task["componentRef"]["name"].removeprefix("comp-"): task for task in tasks}
    assert len(named) == len(tasks)
    return {name: task for name, task in named.items() if "executorLabel" in spec["components"][f"comp-{name}"]}


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


def test_a_readme_that_is_not_current_fails_the_check(tmp_path: Path, skd: Skd, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "show").mkdir()
    (tmp_path / "show/component.py").touch()
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    done = skd("compile", "--check", "--pipeline", "distillation", "--profile", "l4")
    assert "distillation.yaml is up to date" in done.stdout
    assert "show/README.md: differs from the options of its step" in done.stderr
    assert done.returncode == 2


def test_compilation_does_not_depend_on_hash_seeds(documents: Documents):
    code = "from skd_kfp.pipelines.compiling import *; print(to_text(compile_pipeline()))"
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
    documents = compile_once("registry.example/skd:7", "registry.example/comet:7", name="distillation_comet")
    executors = documents[0]["deploymentSpec"]["executors"]
    images = {label: executor["container"]["image"] for label, executor in executors.items()}
    assert images.pop("exec-comet-score") == "registry.example/comet:7"
    assert set(images.values()) == {"registry.example/skd:7"}
    with pytest.raises(SkdError, match="neither version nor digest"):
        compile_once("registry.example/skd:latest")


def test_published_image_is_pinned_by_digest(compile_once: Callable[..., Documents]):
    digest = "sha256:" + "0" * 64
    assert Image(image="r/skd", version="1", digest=digest).reference == f"r/skd@{digest}"
    assert Image(image="r/skd", version="1").reference == "r/skd:1"
    with pytest.raises(ValueError, match="digest"):
        Image(image="r/skd", version="1", digest="sha256:short")
    executors = compile_once(name="distillation_comet")[0]["deploymentSpec"]["executors"]
    images = {label: executor["container"]["image"] for label, executor in executors.items()}
    assert images.pop("exec-comet-score") == read_images()["comet"].reference
    assert set(images.values()) == {read_images()["train"].reference}


# --- the shape of the pipeline ------------------------------------------------------------------------------------

UNCACHED = {"preflight", "show-data", "evaluate_champion", "report", "register_model", "finish"}
PLACES = {"tracking_uri", "experiment", "checkpoint_root", "mlflow_experiment", "settings", "node_selector", "run_name"}


def test_order_of_the_steps(spec: dict[str, Any]):
    steps = read_steps(spec)
    names = [step.name for step in steps]
    expected = ["preflight", "prepare_data", "show-data", "teacher_sft", "student_init", "distill"]
    expected += ["evaluate_teacher", "evaluate_student", "specdec_benchmark", "evaluate_champion", "report"]
    expected += ["register_model", "finish"]
    assert sorted(names) == sorted(expected)
    assert names[0] == "preflight"
    assert names[-1] == "finish"
    assert [step.name for step in steps if step.is_exit] == ["finish"]
    place = {name: index for index, name in enumerate(names)}
    assert all(place[other] < place[step.name] for step in steps for other in step.waits_for)
    assert place["report"] < place["register_model"]


def test_kubeflows_page_opens_on_the_chapters(spec: dict[str, Any]):
    boxes = [task["taskInfo"]["name"] for task in tasks_of(spec, "exit-handler-1").values()]
    assert sorted(boxes) == sorted(["prepare", "teacher", "student", "distil", "measure", "release"])
    assert {task["taskInfo"]["name"] for task in spec["root"]["dag"]["tasks"].values()} == {"distillation", "finish"}


def test_cached_are_all_steps_but_those_about_this_very_run(spec: dict[str, Any]):
    assert {step.name for step in read_steps(spec) if not step.cached} == UNCACHED


def test_comet_judges_when_every_model_has_answered(compile_once: Callable[..., Documents]):
    steps = {step.name: step for step in read_steps(compile_once(name="distillation_comet")[0])}
    assert not steps["comet_score"].cached
    assert {"evaluate_student", "evaluate_champion"} < set(steps["comet_score"].waits_for)
    assert "comet_score" in steps["report"].waits_for


def test_a_run_has_comets_step_where_its_task_asks_for_it():
    form = {"name": "x", "teacher": "org/a", "student": "org/b", "data": {"source": {"type": "files", "train": ["x"]}}}
    plain, judged = ({**form, "task": {"metrics": metrics}} for metrics in (["chrf"], ["chrf", "comet"]))
    assert pipeline_for(RunConfig.model_validate(plain)) == "distillation"
    assert pipeline_for(RunConfig.model_validate(judged)) == "distillation_comet"


@pytest.mark.parametrize("name", PIPELINES)
def test_steps_that_use_the_hub_or_the_judge_have_its_key(name: str, compile_once: Callable[..., Documents]):
    documents = compile_once(name=name)
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    fetch = {step for step, fields in DEPENDS.items() if {"teacher", "student", "data"} & set(fields)}
    fetch = {*fetch, "preflight", "comet_score"} - {"compare_variant"}
    for label, settings in executors.items():
        step = documents[0]["deploymentSpec"]["executors"][label]["container"]["command"][-1].rpartition(".")[2]
        secrets = {each["secretName"] for each in settings.get("secretAsVolume", [])}
        assert ("skd-hub" in secrets) == (step in fetch), step
        assert ("skd-judge" in secrets) == (step == "preflight" or step.startswith("evaluate")), step


@pytest.mark.parametrize("name", PIPELINES)
def test_no_cached_step_depends_on_places_or_on_the_runs_name(name: str, compile_once: Callable[..., Documents]):
    for step, task in all_tasks(compile_once(name=name)[0]).items():
        if task.get("cachingOptions", {}).get("enableCache"):
            assert not task["inputs"]["parameters"].keys() & PLACES, step


def test_steps_that_make_servers_know_their_image(documents: Documents):
    executors = documents[0]["deploymentSpec"]["executors"]
    env = {"name": "SKD_ENGINE_IMAGE", "value": read_images()["vllm"].reference}
    told = {name for name, each in executors.items() if env in each.get("container", {}).get("env", [])}
    assert told == {"exec-preflight", "exec-distill"}


def test_torch_steps_have_shared_memory_and_a_gpu_and_all_steps_know_their_run(compile_once: Callable[..., Documents]):
    documents = compile_once(name="distillation_comet")
    spec, kubernetes = documents[0], documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert kubernetes.keys() == spec["deploymentSpec"]["executors"].keys()
    for label, executor in spec["deploymentSpec"]["executors"].items():
        container, settings = executor["container"], kubernetes[label]
        assert settings["fieldPathAsEnv"] == [{"name": "KFP_RUN_ID", "fieldPath": "metadata.labels['pipeline/runid']"}]
        step = container["command"][-1].removeprefix("skd_lib.steps.")
        on_gpu = step in TORCH_STEPS or label == "exec-comet-score"
        mounts = [mount["mountPath"] for mount in settings.get("emptyDirMounts", [])]
        assert mounts == (["/dev/shm", "/tmp"] if on_gpu else ["/tmp"])  # noqa: S108
        assert ("accelerator" in container["resources"]) == on_gpu
        assert ("nodeSelector" in settings) == on_gpu
        assert container["resources"]["resourceMemoryLimit"]


def test_steps_that_fetch_or_load_models_are_tried_again_with_a_pause(spec: dict[str, Any]):
    tasks = all_tasks(spec)
    small = {"show-data", "report", "register-model", "finish"}
    assert {name for name, task in tasks.items() if "retryPolicy" not in task} == {"preflight", "prepare-data", *small}
    assert tasks["distill"]["retryPolicy"] == {
        "maxRetryCount": 2,
        "backoffDuration": "60s",
        "backoffFactor": 2.0,
        "backoffMaxDuration": "1209600s",  # Argo's maxDuration: from the start of the first attempt, waiting included
    }


@pytest.mark.parametrize("name", PIPELINES)
def test_form_asks_for_data_models_and_task_and_has_a_default_for_the_rest(
    name: str, compile_once: Callable[..., Documents]
):
    parameters = compile_once(name=name)[0]["root"]["inputDefinitions"]["parameters"]
    assert len(parameters) <= 14
    assert {"data_train", "data_test", "data_validation", "model_teacher", "model_student", "task"} <= parameters.keys()
    for field, definition in parameters.items():
        assert definition.get("description"), field
        assert "defaultValue" in definition, field
        assert len(str(definition["defaultValue"])) < 200, field
    assert parameters["config"]["defaultValue"] == "{}"


def test_profile_is_named_in_the_description(documents: Documents, compile_once: Callable[..., Documents]):
    assert profile_of(documents) == "l4"
    assert profile_of(compile_once(profile="cpu")) == "cpu"


# --- the checks: a pipeline that is broken in exactly one way -------------------------------------------------------


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
            _set(*DISTILL, "parameters", "config", value={"componentInputParameter": "pipelinechannel--sed"}),
            "task distill in comp-exit-handler-1: input 'config' comes from 'pipelinechannel--sed', which the",
        ),
        (
            _set(*DISTILL, "artifacts", "teacher", "taskOutputArtifact", "outputArtifactKey", value="model"),
            "input 'teacher' comes from output 'model' of teacher-sft, which does not exist",
        ),
        (
            _set(*DISTILL, "artifacts", "teacher", "taskOutputArtifact", "producerTask", value="absent"),
            "input 'teacher' comes from task 'absent', which is not in this DAG",
        ),
        (
            _set(*DISTILL, "parameters", value={}),
            "task distill in comp-exit-handler-1: input 'config' of comp-distill is not set",
        ),
        (
            lambda spec: (
                tasks_of(spec, "score")["evaluate-teacher"]["inputs"]["parameters"].pop("config"),
                _set(
                    "components",
                    "comp-evaluate-teacher",
                    "inputDefinitions",
                    "parameters",
                    "config",
                    "isOptional",
                    value=True,
                )(spec),
            ),
            "task evaluate-teacher in comp-score: input 'config' of comp-evaluate-teacher is not set",
        ),
        (
            lambda spec: [
                task["cachingOptions"].update(enableCache=True) for task in tasks_of(spec, "prepare").values()
            ],
            "comp-prepare: all its steps are cached; KFP leaves such a DAG in state RUNNING",
        ),
        (
            _set(
                *("components", "comp-exit-handler-1", "inputDefinitions", "parameters"),
                *("pipelinechannel--training_steps", "parameterType"),
                value="STRING",
            ),
            "task prepare in comp-exit-handler-1: input 'training_steps' is STRING, and NUMBER is expected",
        ),
        (
            _set(*TASKS, "distill", "parameterIterator", value={"itemInput": "x"}),
            "task distill in comp-exit-handler-1: a loop must have no name of its own",
        ),
        (_set(*TASKS, "distill", "dependentTasks", value=["absent"]), "waits for task 'absent', which does not exist"),
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
def test_checks_find(documents: Documents, change: Callable[[dict[str, Any]], Any], problem: str):
    broken = copy.deepcopy(documents)
    change(broken[0])
    found = find_problems(broken)
    assert any(problem in each for each in found), found
