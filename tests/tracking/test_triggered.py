"""The second guard of `skd trigger`: what Kubeflow has forgotten MLflow still knows, and it stands in nobody's way."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from skd_kfp.pipelines.kubeflow.api import KubeflowPipelines
from skd_kfp.pipelines.kubeflow.auth import anonymous
from skd_kfp.pipelines.kubeflow.submit import Target
from skd_kfp.pipelines.kubeflow.trigger import Trigger
from skd_lib.config import RunConfig
from skd_lib.errors import SkdError
from skd_lib.tracking.ending import Seen
from skd_lib.tracking.locate import PARENT_TAG
from skd_lib.tracking.runs import close_pipeline_run, step_run
from skd_lib.tracking.triggered import TRIGGER_TAG, note, run_for
from tests.kubeflow import small
from tests.kubeflow.conftest import DEMO
from tests.kubeflow.fake_kfp import FakeKfp, running
from tests.kubeflow.test_submit import in_parallel

from .conftest import EXPERIMENT, Runs

NAME = "skd-0123456789ab"


def found(store: str, failed: list[str] | None = None) -> str | None:
    """The pipeline run that MLflow knows under the name."""
    run = run_for(NAME, tracking_uri=store, failed=failed or [])
    return run.data.tags["kfp.pipeline_run_id"] if run else None


def noted(store: str, pipeline_run_id: str, name: str = NAME) -> None:
    note(name, pipeline_run_id=pipeline_run_id, run_name="demo", tracking_uri=store, experiment=EXPERIMENT)


def test_the_newest_run_that_may_count_is_found(store: str, client: MlflowClient, parents: Runs) -> None:
    assert found(store) is None
    assert client.get_experiment_by_name(EXPERIMENT) is None  # looking makes nothing
    for pipeline_run_id in ("a", "b", "c"):
        noted(store, pipeline_run_id)
        time.sleep(0.01)
    noted(store, "other", "skd-ba9876543210")
    assert found(store) == "c"
    assert found(store, failed=["c"]) == "b"
    ids = {run.data.tags["kfp.pipeline_run_id"]: run.info.run_id for run in parents()}
    client.create_run(parents()[0].info.experiment_id, tags={TRIGGER_TAG: NAME, PARENT_TAG: ids["c"]})
    assert found(store) == "c"
    client.set_terminated(ids["c"], "FAILED")
    assert found(store) == "b"
    client.set_terminated(ids["b"], "KILLED")  # maybe by a person
    assert found(store) == "b"
    assert found(store, failed=["b"]) == "a"
    client.set_terminated(ids["a"], "FINISHED")
    assert found(store, failed=["a", "b"]) == "a"  # Kubeflow may mean the step that told MLflow
    client.delete_run(ids["a"])
    assert found(store, failed=["b"]) is None


def test_a_run_without_the_tag_or_its_experiment_does_not_count(
    store: str, client: MlflowClient, parents: Runs
) -> None:
    noted(store, "a")
    client.delete_tag(parents()[0].info.run_id, TRIGGER_TAG)
    assert found(store) is None
    noted(store, "a")
    assert found(store) == "a"
    client.delete_experiment(parents()[0].info.experiment_id)
    assert found(store) is None


def test_whoever_comes_first_makes_the_parent(store: str, parents: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    for first, second in ((noted, track), (track, noted)):
        pipeline_run_id = first.__name__
        monkeypatch.setenv("KFP_RUN_ID", pipeline_run_id)
        first(store, pipeline_run_id)
        second(store, pipeline_run_id)
        noted(store, pipeline_run_id)
        assert found(store) == pipeline_run_id
    assert [run.info.run_name for run in parents()] == ["demo", "demo"]


def track(store: str, _: str) -> None:
    """A step of the pipeline run that the environment names."""
    with step_run(step="preflight", tracking_uri=store, experiment=EXPERIMENT, run_name="demo"):
        pass


def test_a_sqlite_file_of_the_cluster_is_not_made_here(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/volume/mlflow.db"
    for ask in (lambda: found(uri), lambda: noted(uri, "a")):
        with pytest.raises(SkdError, match="no such file on this machine"):
            ask()
    assert not list(tmp_path.glob("volume*"))


# --- the trigger --------------------------------------------------------------------------------------------------


@pytest.fixture
def kfp() -> Iterator[FakeKfp]:
    with running(FakeKfp()) as fake:
        yield fake


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Complete data."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"source": "a", "target": "b"}\n')
    (folder / "_SUCCESS").touch()
    os.utime(folder / "train.jsonl", (time.time() - 10,) * 2)
    return str(folder)


@pytest.fixture
def trigger(kfp: FakeKfp, store: str, tmp_path: Path) -> Trigger:
    values = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    values["data"] = {"source": {"type": "files", "train": ["{source}/train.jsonl"]}}
    api = KubeflowPipelines(kfp.host, anonymous, backoff=0.01)
    claims = str(tmp_path / "claims")
    place = Target(EXPERIMENT, mlflow_experiment=EXPERIMENT)
    return Trigger(RunConfig.model_validate(values), small.package(), place, api, claims=claims, tracking_uri=store)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def close(store: str, pipeline_run_id: str, state: str) -> None:
    """What the pipeline's last step does."""
    assert close_pipeline_run(tracking_uri=store, experiment=EXPERIMENT, pipeline_run_id=pipeline_run_id, state=state)


def test_what_kubeflow_forgets_is_not_run_again(
    kfp: FakeKfp,
    trigger: Trigger,
    source: str,
    store: str,
    client: MlflowClient,
    parents: Runs,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert trigger.explain(source).fire
    assert parents() == []
    started = trigger.fire(source)
    assert started.fire
    (parent,) = parents()
    assert parent.data.tags[TRIGGER_TAG] == started.name
    for state in ("running", "succeeded"):
        kfp.runs.clear()
        decision = trigger.fire(source)
        assert decision == trigger.explain(source)
        assert (decision.fire, decision.name, decision.run_id) == (False, started.name, "")
        assert decision.reason == (
            f"there is a run for this data already, {state}, which MLflow alone still knows: {parent.info.run_id}; "
            "to run it again, delete that MLflow run or its tag skd.trigger"
        )
        assert not kfp.runs
        close(store, started.run_id, "SUCCEEDED")
    client.delete_tag(parent.info.run_id, TRIGGER_TAG)
    assert trigger.fire(source).fire
    kfp.runs.clear()
    client.delete_run(next(run.info.run_id for run in parents() if TRIGGER_TAG in run.data.tags))
    assert trigger.fire(source).fire
    assert not warnings(caplog)


def test_a_forgotten_run_that_failed_may_be_repeated(kfp: FakeKfp, trigger: Trigger, source: str, store: str) -> None:
    first = trigger.fire(source)
    close(store, first.run_id, "FAILED")
    kfp.runs.clear()
    assert trigger.fire(source).fire
    assert not trigger.fire(source).fire
    assert len(kfp.runs) == 1


@pytest.mark.parametrize("forgotten", [True, False])
def test_a_run_that_a_person_stopped_is_not_started_again(
    forgotten: bool, kfp: FakeKfp, trigger: Trigger, source: str, store: str, client: MlflowClient, parents: Runs
) -> None:
    first = trigger.fire(source)
    assert close_pipeline_run(
        tracking_uri=store,
        experiment=EXPERIMENT,
        pipeline_run_id=first.run_id,
        state="RUNNING",
        seen=Seen(known=True, cancelled=True),
    )
    client.set_terminated(parents()[0].info.run_id, "FAILED")  # as Kubeflow's plugin calls it a moment later
    if forgotten:
        kfp.runs.clear()
    else:
        kfp.runs[0]["state"] = "FAILED"
    decision = replace(trigger, attempts=5).fire(source)
    assert not decision.fire
    assert "there is a run for this data already, canceled" in decision.reason


def test_the_run_is_found_in_another_experiment(store: str, client: MlflowClient) -> None:
    """The trigger and the run's form may name different ones."""
    experiment = client.create_experiment("another")
    client.create_run(experiment, tags={TRIGGER_TAG: NAME, "kfp.pipeline_run_id": "a"})
    assert found(store) == "a"


def test_a_run_that_failed_before_it_could_tell_mlflow_is_no_obstacle(
    kfp: FakeKfp, trigger: Trigger, source: str, parents: Runs
) -> None:
    trigger.fire(source)
    kfp.runs[0]["state"] = "FAILED"
    assert not trigger.fire(source).fire
    assert replace(trigger, attempts=2).fire(source).fire
    assert [run.info.status for run in parents()] == ["RUNNING", "RUNNING"]


def test_the_runs_steps_go_on_in_what_the_trigger_made(
    trigger: Trigger, source: str, store: str, parents: Runs, children: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = trigger.fire(source)
    monkeypatch.setenv("KFP_RUN_ID", decision.run_id)
    for step in ("preflight", "distill"):
        with step_run(step=step, tracking_uri=store, experiment=EXPERIMENT, run_name=trigger.config.name):
            pass
    (parent,) = parents()
    assert parent.info.run_name == trigger.config.name
    assert parent.data.tags[TRIGGER_TAG] == decision.name
    assert parent.data.tags["kfp.pipeline_run_id"] == decision.run_id
    assert {child.data.tags[PARENT_TAG] for child in children()} == {parent.info.run_id}
    assert len(children()) == 2


@pytest.mark.slow
def test_events_at_the_same_time_leave_one_note(kfp: FakeKfp, trigger: Trigger, source: str, parents: Runs) -> None:
    decisions = in_parallel(8, lambda: trigger.fire(source))
    assert sum(decision.fire for decision in decisions) == len(kfp.runs) == len(parents()) == 1


@pytest.mark.slow
def test_mlflows_tag_alone_lets_twenty_events_start_one_run(
    kfp: FakeKfp, trigger: Trigger, source: str, parents: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KubeflowPipelines, "runs_named", lambda *_: [])
    alone = replace(trigger, claims="")
    decisions = in_parallel(20, lambda: alone.fire(source))
    assert sum(decision.fire for decision in decisions) == len(kfp.runs) == len(parents()) == 1


@pytest.mark.slow
def test_a_server_that_is_down_loses_no_event_and_starts_no_second_run(
    kfp: FakeKfp, trigger: Trigger, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as nobody:  # bound, but nobody listens
        nobody.bind(("127.0.0.1", 0))
        away = replace(trigger, tracking_uri=f"http://127.0.0.1:{nobody.getsockname()[1]}")
        assert away.fire(source).fire
        (warning,) = warnings(caplog)
        assert warning.startswith("MLflow cannot tell of earlier runs on this data, Kubeflow alone decides: ")
        assert "Connection refused" in warning
        assert not away.fire(source).fire
        assert len(kfp.runs) == 1


@pytest.mark.slow
def test_a_server_that_never_answers_is_waited_for_once(
    trigger: Trigger, source: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(0.1)
        stuck = replace(trigger, tracking_uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert stuck.fire(source).fire
        silent.accept()[0].close()
        with pytest.raises(TimeoutError):
            silent.accept()
    assert len(warnings(caplog)) == 1


def test_what_mlflow_refuses_to_note_runs_all_the_same(
    kfp: FakeKfp, trigger: Trigger, source: str, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.delete_experiment(client.create_experiment(EXPERIMENT))
    decision = trigger.fire(source)
    assert decision.fire
    assert decision.run_id == kfp.runs[0]["run_id"]
    (warning,) = warnings(caplog)
    assert warning.startswith(f"run {decision.run_id} was started, but MLflow does not know of it: ")
    assert f"the MLflow experiment `{EXPERIMENT}` was deleted" in warning


@pytest.mark.parametrize("module", ["mlflow", "sqlalchemy"])
def test_where_mlflow_or_half_of_it_is_not_installed_kubeflow_decides(
    module: str, trigger: Trigger, source: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        bare = replace(trigger, tracking_uri=f"http://127.0.0.1:{nobody.getsockname()[1]}")
        assert bare.fire(source).fire
    (warning,) = warnings(caplog)
    assert ("MLflow is not installed" if module == "mlflow" else "Connection refused") in warning


def test_without_tracking_nobody_is_asked(
    kfp: FakeKfp, trigger: Trigger, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    untracked = replace(trigger, tracking_uri="", claims="")
    assert untracked.fire(source).fire
    kfp.runs.clear()
    assert untracked.fire(source).fire
    assert not warnings(caplog)
