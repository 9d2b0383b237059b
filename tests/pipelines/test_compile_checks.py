"""Rules about a pipeline as the cluster gets it: each is broken alone, in the compiled pipeline itself."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from skd_kfp.pipelines.compile_checks import find_problems
from skd_kfp.pipelines.compiling import Documents
from skd_lib._core.machine import ENGINE_IMAGE_VARIABLE

DIGEST = "@sha256:" + "0" * 64
Change = Callable[[Documents], object]


@pytest.fixture(scope="module")
def compiled(compile_once: Callable[..., Documents]) -> Documents:
    documents = compile_once("r/train" + DIGEST)
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        for variable in executor["container"].get("env", []):
            if variable["name"] == ENGINE_IMAGE_VARIABLE:  # which a release pins in digests.yaml
                variable["value"] = "r/vllm" + DIGEST
    return documents


@pytest.fixture
def documents(compiled: Documents) -> Documents:
    return copy.deepcopy(compiled)


def kubernetes(documents: Documents, label: str = "exec-distill") -> Any:
    return documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][label]


def container(documents: Documents) -> Any:
    return documents[0]["deploymentSpec"]["executors"]["exec-distill"]["container"]


def dag(documents: Documents) -> Any:
    return documents[0]["components"]["comp-exit-handler-1"]


def parameters(documents: Documents) -> Any:
    return documents[0]["root"]["inputDefinitions"]["parameters"]


def test_what_is_compiled_keeps_all_rules_even_those_of_a_release(documents: Documents):
    assert find_problems(documents, release=True) == []


def test_a_parameter_of_the_platform_that_only_an_outer_dag_has(documents: Documents):
    """As KFP compiles some setters inside of a condition: the driver looks in the inner DAG, and the run fails."""
    del documents[0]["components"]["comp-score"]["inputDefinitions"]["parameters"]["node_selector"]
    del documents[0]["components"]["comp-measure"]["dag"]["tasks"]["score"]["inputs"]["parameters"]["node_selector"]
    problems = find_problems(documents)
    assert (
        "platform spec of task specdec-benchmark in comp-score: comes from 'node_selector', which the enclosing DAG "
        "does not have"
    ) in problems


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d.pop(), "there are 1 documents"),
        (lambda d: dag(d).update(inputDefinition={}), 'pipeline spec: .*"inputDefinition"'),
        (lambda d: container(d).update(shm="8Gi"), 'pipeline spec, deploymentSpec: .*"shm"'),
        (lambda d: container(d).update(command="python3"), "pipeline spec, deploymentSpec: .*command"),
        (lambda d: d[1].update(platform={}), 'platform spec: .*"platform"'),
        (lambda d: kubernetes(d).update(nodeselector={}), 'platform spec, executor exec-distill: .*"nodeselector"'),
        (
            lambda d: kubernetes(d).update(activeDeadlineSeconds="2h"),
            "platform spec, executor exec-distill: .*activeDeadlineSeconds",
        ),
        (
            lambda d: d[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].update({"exec-x": {}}),
            "platform spec: executor 'exec-x' does not exist",
        ),
        (
            lambda d: kubernetes(d)["tolerations"][0]["tolerationJson"].update(componentInputParameter="pool"),
            "platform spec of task distill in comp-exit-handler-1: comes from 'pool', which the enclosing DAG",
        ),
        (
            lambda d: kubernetes(d)["nodeSelector"].update(
                nodeSelectorJson={
                    "taskOutputParameter": {"producerTask": "pool", "outputParameterKey": "labels"},
                }
            ),
            "platform spec of task distill in comp-exit-handler-1: comes from task 'pool', which is not in this DAG",
        ),
        (lambda d: kubernetes(d).pop("emptyDirMounts"), "task distill has a GPU and no /dev/shm of a given size"),
        (
            lambda d: [mount.pop("sizeLimit") for mount in kubernetes(d)["emptyDirMounts"]],
            "task distill has a GPU and no /dev/shm of a given size",
        ),
        (
            lambda d: dag(d)["dag"]["tasks"]["distill"].pop("retryPolicy"),
            "task distill has a GPU and is not tried again after a failure",
        ),
        *(
            (
                lambda d, field=field: container(d)["resources"].pop(field),
                f"task distill has a GPU and no {field}",
            )
            for field in ("resourceCpuRequest", "resourceMemoryRequest", "resourceMemoryLimit")
        ),
        (
            lambda d: container(d)["env"].append({"name": "HF_TOKEN", "value": "x"}),
            "executor exec-distill: environment variable HF_TOKEN holds its value here, not in a Secret",
        ),
        (
            lambda d: parameters(d).update(hub_token={"parameterType": "STRING", "isOptional": True}),
            "pipeline parameter 'hub_token': a secret must not be a parameter",
        ),
        *(
            (
                lambda d, value=value: parameters(d)["config"].update(defaultValue=value),
                r"\.root\.inputDefinitions\.parameters\.config\.defaultValue: looks like a secret",
            )
            for value in (
                "hf_" + "a" * 30,
                "sk-" + "a" * 40,
                "ghp_" + "a" * 36,
                "AKIA" + "A" * 16,
                "xoxb-" + "1" * 12,
                "-----BEGIN PRIVATE KEY-----",
                "https://hooks.slack.com/services/T0/B0/abc",
                "postgresql://mlflow:pw@db/mlflow",
            )
        ),
    ],
)
def test_broken_in_one_way(documents: Documents, change: Change, problem: str):
    change(documents)
    (found,) = find_problems(documents)
    assert re.search(problem, found)


def test_a_release_names_every_image_by_its_digest(documents: Documents):
    container(documents)["image"] = "r/train:1.0"
    assert find_problems(documents) == []
    assert find_problems(documents, release=True) == ["image 'r/train:1.0' is not named by its digest"]


def test_a_release_names_the_image_of_vllm_by_its_digest(documents: Documents):
    (variable,) = (each for each in container(documents)["env"] if each["name"] == ENGINE_IMAGE_VARIABLE)
    variable["value"] = "r/vllm:1.0"
    assert find_problems(documents, release=True) == ["image 'r/vllm:1.0' is not named by its digest"]


# --- images -------------------------------------------------------------------------------------------------------


def images_alone(*images: str) -> Documents:
    """A pipeline with a component for each image."""
    spec = {
        "root": {"dag": {}},
        "components": {f"comp-{number}": {"executorLabel": f"exec-{number}"} for number in range(len(images))},
        "deploymentSpec": {
            "executors": {f"exec-{number}": {"container": {"image": image}} for number, image in enumerate(images)}
        },
    }
    return [spec, {}]


def test_a_wrong_image_is_one_problem():
    """Commit 9e44b4e: one for each component."""
    wrong = "has neither version nor digest; write NAME:VERSION or NAME@sha256:DIGEST"
    assert find_problems(images_alone("reg/train", "reg/train", "reg/comet:1", "reg/train")) == [
        f"component comp-0: image 'reg/train' {wrong} (and 2 further components)"
    ]
    assert find_problems(images_alone("reg/train:latest", "reg/comet")) == [
        f"component comp-0: image 'reg/train:latest' {wrong}",
        f"component comp-1: image 'reg/comet' {wrong}",
    ]


@pytest.mark.parametrize(
    "image", ["bad image:1", "https://reg/train:1", "reg/Train:1", "reg/train:", "reg/train@sha256:0", ""]
)
def test_what_is_no_image_is_said_to_be_none(image: str):
    (problem,) = find_problems(images_alone(image, image))
    assert f"image {image!r} is not the name of an image: REGISTRY/NAME:VERSION or" in problem


@pytest.mark.parametrize(
    "image",
    [
        "skd:1",
        "localhost:5000/skd:1",
        "[::1]:5000/skd:1",
        "europe-docker.pkg.dev/my-project/repo/skd_train:0.1.0-rc.1",
        "REG.example/team/skd@sha256:" + "0" * 64,
        "reg.example/skd:1@sha256:" + "a" * 64,
    ],
)
def test_images_are_taken(image: str):
    assert find_problems(images_alone(image)) == []
