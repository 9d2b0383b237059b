"""Profiles of machines: what their files may say, and what becomes of it in a compiled pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from skd_kfp.pipelines.compiling import compile_pipeline
from skd_kfp.pipelines.profiles import FOLDER, KINDS, load_profile, profile_names
from skd_lib.errors import SkdError

SMALLEST: dict[str, Any] = {
    "description": "mine",
    "small": {"cpu": "1", "memory": "1Gi"},
    "data": {"cpu": "2", "memory": "2Gi"},
    "model": {"cpu": "4", "memory": "8Gi", "gpus": 1, "shared_memory": "1Gi", "retry": {"count": 5}},
}


def written(folder: Path, **fields: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**SMALLEST, **fields}))
    return str(path)


def test_the_profiles_that_there_are():
    assert profile_names() == ["a100", "cpu", "h100x8", "l4"]
    for name in profile_names():
        profile = load_profile(name)
        assert all(profile.resources(step).scratch for step in KINDS)
        assert profile.resources("preflight").retry.count == 0
        assert profile.resources("distill").retry.count == 2


def test_every_step_of_the_pipelines_has_a_kind():
    assert KINDS.keys() == {path.parent.name for path in FOLDER.parents[1].glob("components/*/component.py")}


def test_a_step_has_its_kinds_fields_but_for_its_own(tmp_path: Path):
    steps = {"distill": {"gpus": 4, "retry": {"wait": "5m"}, "node_selector": {"pool": "big"}}}
    profile = load_profile(written(tmp_path, steps=steps))
    distill, other = profile.resources("distill"), profile.resources("evaluate-teacher")
    assert (distill.gpus, distill.memory, distill.retry.count, distill.retry.wait) == (4, "8Gi", 5, "5m")
    assert (other.gpus, other.memory, other.retry.wait, other.node_selector) == (1, "8Gi", "60s", {})
    assert not profile.in_shared_pool("distill")
    assert profile.in_shared_pool("evaluate-teacher")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"modle": {}}, r"mine.yaml, field `modle`: unknown field\n  hint: did you mean `model`"),
        ({"small": {"cpu": "1"}}, r"field `small.memory`: this field is required"),
        ({"small": {"cpu": "1", "memory": "4 GB"}}, r"field `small.memory`: .*got '4 GB'"),
        ({"model": {**SMALLEST["model"], "timeout": "2 days"}}, r"field `model.timeout`"),
        ({"model": {**SMALLEST["model"], "shared_memory": None}}, r"field `model`: a step with GPUs needs `shared_mem"),
        ({"model": {**SMALLEST["model"], "gpus": 2}}, r"step evaluate uses one GPU, not 2\n  hint: set `gpus: 1` for"),
        ({"steps": {"train": {}}}, r"field `steps`: there is no step 'train'\n  hint: one of preflight,"),
        ({"steps": {"distill": {"gpu": 2}}}, r"steps.distill, field `gpu`: unknown field\n  hint: did you mean `gpus`"),
        ({"small": {**SMALLEST["small"], "tolerations": [{"operator": "Equal"}]}}, r"`Equal` needs a `key`"),
        (
            {"small": {**SMALLEST["small"], "tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}},
            r"`Exists` goes by the key alone",
        ),
        (
            {"small": {**SMALLEST["small"], "scratch": {"size": "1Gi", "kind": "volume"}}},
            r"small.scratch.kind`: unknown field\n  hint: fields here: size",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, fields: dict[str, Any], problem: str):
    with pytest.raises(SkdError, match=problem):
        load_profile(written(tmp_path, **fields))


def test_there_is_no_such_profile():
    with pytest.raises(SkdError, match=r"no profile 'v100'\n  hint: one of a100, cpu, h100x8, l4, or a YAML file"):
        load_profile("v100")
    with pytest.raises(SkdError, match=r"nowhere/mine.yaml: cannot be read"):
        load_profile("nowhere/mine.yaml")


@pytest.mark.slow
def test_a_profile_of_ones_own_in_the_compiled_pipeline(tmp_path: Path):
    taint = {"key": "team", "operator": "Equal", "value": "nlp"}
    model = {
        **SMALLEST["model"],
        "scratch": {"size": "1Ti"},
        "node_selector": {"pool": "gpu"},
        "tolerations": [taint],
        "timeout": "90m",
    }
    steps = {"distill": {"gpus": 2, "node_selector": {"pool": "big"}, "tolerations": [taint]}}
    profile = written(tmp_path, model=model, small={**SMALLEST["small"], "retry": {"count": 0}}, steps=steps)
    spec, platform = compile_pipeline(profile=profile)
    defaults = {name: each["defaultValue"] for name, each in spec["root"]["inputDefinitions"]["parameters"].items()}
    assert (defaults["node_selector"], defaults["node_tolerations"]) == ({"pool": "gpu"}, [taint])

    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    pool = {"nodeSelectorJson": {"componentInputParameter": "pipelinechannel--node_selector"}}
    assert pods["exec-student-init"]["nodeSelector"] == pods["exec-teacher-sft"]["nodeSelector"] == pool
    own = {"nodeSelectorJson": {"componentInputParameter": "node_selector"}}  # a nested pipeline's own parameter
    assert pods["exec-specdec-benchmark"]["nodeSelector"] == own
    assert pods["exec-distill"]["nodeSelector"] == {"labels": {"pool": "big"}}
    assert pods["exec-distill"]["tolerations"] == [taint]
    assert pods["exec-distill"]["activeDeadlineSeconds"] == "5400"
    scratch = {"volumeName": "scratch", "mountPath": "/tmp", "sizeLimit": "1Ti"}  # noqa: S108
    assert scratch in pods["exec-distill"]["emptyDirMounts"]
    assert "nodeSelector" not in pods["exec-report"]

    containers = {label: each["container"] for label, each in spec["deploymentSpec"]["executors"].items()}
    assert containers["exec-distill"]["resources"]["accelerator"]["resourceCount"] == "2"
    assert containers["exec-distill"]["command"][2:6] == [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    ]
    assert containers["exec-teacher-sft"]["command"] == ["python3", "-m", "skd_lib.steps.teacher_sft"]
    assert "retryPolicy" not in spec["components"]["comp-measure"]["dag"]["tasks"]["report"]
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert tasks["distill"]["retryPolicy"]["maxRetryCount"] == 5


@pytest.mark.slow
def test_where_a_step_runs_is_no_part_of_its_cache_key():
    spec, _ = compile_pipeline()
    for component in spec["components"].values():
        if "executorLabel" in component:
            assert (
                not {"node_selector", "node_tolerations"}
                & component.get("inputDefinitions", {}).get("parameters", {}).keys()
            )
