"""What runs again, and what is taken from Kubeflow's cache: keys hold content, not places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skd_kfp.pipelines.compiling import PIPELINES
from tests.kubeflow.backend import NEXT, V2_17, VERSIONS, Records, Run, Version
from tests.kubeflow.backend.steps import Steps
from tests.kubeflow.test_backend_runs import COMPARISON, documents, fails, form, run

TRAINING = {"prepare-data", "teacher-sft", "student-init", "distill", "specdec-benchmark"}


def again(name: str, *, version: Version = V2_17, content: dict[str, str] | None = None, **changes: Any) -> Run:
    """Run a pipeline, and then once more with changes."""
    records = Records()
    run(name, records=records, version=version)
    steps = Steps(run_id="run-2", content=content or {})
    return run(name, steps, records, version=version, given=form(name, **changes), run_name="another")


def trained(result: Run) -> list[str]:
    """The steps that really ran among those that cost GPU time or downloads."""
    return [
        task
        for task in result.ran()
        if task in TRAINING or (task.startswith("evaluate-") and task != "evaluate-champion")
    ]


SAME: dict[str, dict[str, Any]] = {
    "nothing": {},
    "another bucket and tracking server": {"settings": "others"},
    "another MLflow experiment": {"mlflow_experiment": "another"},
    "another pool": {"node_selector": {"pool": "b"}, "node_tolerations": []},
    "another name": {"config": '{"name": "renamed"}'},
}


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize("name", PIPELINES)
def test_places_are_in_no_key(name: str, version: Version) -> None:
    """Commit 9e44b4e: another checkpoint_root trained all again."""
    changes = {key: value for changed in SAME.values() for key, value in changed.items()}
    assert trained(again(name, version=version, **changes)) == []


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_each_place_alone(change: dict[str, Any]) -> None:
    assert trained(again("distillation", **change)) == []


@pytest.mark.parametrize("name", PIPELINES)
def test_a_run_from_the_cache_ends_as_complete(name: str) -> None:
    """A DAG whose last step is cached stays RUNNING: the last of each is never cached."""
    result = again(name)
    assert (result.state, result.told["state"]) == ("SUCCEEDED", "COMPLETE")


def test_a_run_from_the_cache_ends_well_without_metadata() -> None:
    assert again("distillation", version=NEXT).told["state"] == "SUCCEEDED"


@pytest.mark.parametrize("name", PIPELINES)
def test_past_the_cache(name: str) -> None:
    result = again(name, reuse=False)
    assert set(trained(result)) == {
        task for task in result.done if task in TRAINING or task.startswith("evaluate-")
    } - {"evaluate-champion"}


@pytest.mark.parametrize("name", PIPELINES)
def test_what_was_made_past_the_cache_is_taken_from_then_on(name: str, tmp_path: Path) -> None:
    """Otherwise the third run takes the first one's artifacts, whose files may be deleted."""
    records, results = Records(), []
    for number, reuse in enumerate((True, False, True, True)):
        steps = Steps(run_id=f"run-{number}", checkpoint_root=str(tmp_path))
        results.append(run(name, steps, records, given=form(name, reuse=reuse)))
    made = [result.done["prepare-data"][0].artifacts for result in results]
    assert made[0] != made[1] == made[2] == made[3]
    assert trained(results[1])
    assert trained(results[2]) == trained(results[3]) == []


@pytest.mark.parametrize(("first", "later"), [("distillation", "compare_methods"), ("distillation", "distillation")])
def test_a_run_past_the_cache_that_made_nothing_changes_nothing(first: str, later: str, tmp_path: Path) -> None:
    """Nor does one of another pipeline: a pipeline's cache is its own."""
    records = Records()
    run(later, Steps(run_id="run-1", checkpoint_root=str(tmp_path)), records)
    ends = {"prepare-data": fails} if first == later else {}
    run(first, Steps("run-2", checkpoint_root=str(tmp_path), instead=ends), records, given=form(first, reuse=False))
    assert trained(run(later, Steps(run_id="run-3", checkpoint_root=str(tmp_path)), records)) == []


def test_another_content_of_the_data() -> None:
    result = again("distillation", content={"data": "other"})
    assert {"prepare-data", "teacher-sft", "distill"} <= set(trained(result))


def test_another_content_of_the_student() -> None:
    result = again("distillation", content={"org/small": "other"})
    assert {"student-init", "distill", "evaluate-student"} <= set(trained(result))
    assert not {"teacher-sft", "evaluate-teacher"} & set(trained(result))


def test_another_setting_of_the_distillation() -> None:
    result = again("distillation", training_steps=7)
    assert "distill" in trained(result)
    assert not {"teacher-sft", "student-init", "evaluate-teacher"} & set(trained(result))


def test_comet_afterwards_trains_nothing() -> None:
    """Kubeflow's cache is for each pipeline's name; training does not depend on the metrics."""
    records = Records()
    run("distillation", records=records, given=form("distillation", config=_measured()))
    config = _measured(metrics=["chrf", "bleu", "comet"])
    result = run("distillation_comet", Steps(run_id="run-2"), records, given=form("distillation_comet", config=config))
    assert trained(result) == []
    assert "comet-score" in result.ran()


@pytest.mark.parametrize(("task", "own"), [({"metrics": ["bleu"]}, {}), ({}, {"answer": "boxed"})], ids=["run", "set"])
@pytest.mark.parametrize("name", PIPELINES)
def test_another_measure_trains_nothing(name: str, task: dict[str, Any], own: dict[str, Any]) -> None:
    """Of the run or of one held-out set: the data is the same, and the models answer again."""
    records = Records()
    run(name, records=records, given=form(name, config=_measured()))
    result = run(name, Steps(run_id="run-2"), records, given=form(name, config=_measured(own, **task)))
    assert not TRAINING & set(trained(result))
    assert "evaluate-teacher" in trained(result)


def _measured(own: dict[str, Any] | None = None, **task: Any) -> str:
    """A configuration with a held-out set, the set's own task, and the run's."""
    source = {"type": "files", "files": ["gs://b/further.jsonl"]}
    held_out = {"name": "further", "source": source, "task": {"max_new_tokens": 64, **(own or {})}}
    return json.dumps({"task": task, "data": {"held_out": [held_out]}})


def test_a_comparison_again_trains_nothing() -> None:
    """Commit 9e44b4e: equal inits side by side are other artifacts, and two of four students were trained again."""
    assert trained(again("compare_methods")) == []


def test_one_more_trial_trains_one() -> None:
    more = json.dumps({**json.loads(COMPARISON), "methods": ["skd"], "seeds": [1, 2, 3]})
    assert trained(again("compare_methods", comparison=more)).count("distill") == 1


def test_equal_steps_side_by_side_have_artifacts_of_their_own() -> None:
    """The rule of the backend that makes this so: a later run finds the newest of them, for all."""
    spec = {
        "pipelineInfo": {"name": "p"},
        "root": {"dag": {"tasks": {"loop": {"componentRef": {"name": "loop"}, "parameterIterator": {
            "itemInput": "item", "items": {"raw": "[1, 2]"}}}}}},
        "components": {
            "loop": {"dag": {"tasks": {
                "init": _task("init"),
                "train": {**_task("train"), "dependentTasks": ["init"], "inputs": {
                    "parameters": {"setting": {"componentInputParameter": "item"}},
                    "artifacts": {"model": {"taskOutputArtifact": {
                        "producerTask": "init", "outputArtifactKey": "model"}}}}},
            }}},
            "init": _component("init"),
            "train": _component("train"),
        },
        "deploymentSpec": {"executors": {name: {"container": {"image": name}} for name in ("init", "train")}},
    }  # fmt: skip
    records = Records()
    first, second = (Run(records, [spec], {}, Steps()) for _ in range(2))
    assert first.ran() == ["init", "init", "train", "train"]
    assert second.ran() == ["train"]


def _task(name: str) -> dict[str, Any]:
    return {"componentRef": {"name": name}, "cachingOptions": {"enableCache": True}}


def _component(name: str) -> dict[str, Any]:
    kind = {"model": {"artifactType": {"schemaTitle": "system.Model"}}}
    return {"executorLabel": name, "outputDefinitions": {"artifacts": kind}}


def test_the_compiled_pipelines_are_what_is_tested() -> None:
    assert {document[0]["pipelineInfo"]["name"] for document in map(documents, PIPELINES)} == {
        "skd-distillation",
        "skd-compare-methods",
    }
