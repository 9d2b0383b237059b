"""Beside Kubeflow's own MLflow integration (KFP 2.17, `plugins.mlflow`): one tree, and each server its credentials."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from threading import Thread

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from skd_lib.steps.environment import SECRETS
from skd_lib.tracking.client import check_tracking, use_credentials
from skd_lib.tracking.locate import children_of
from skd_lib.tracking.runs import close_pipeline_run, pipeline_record, step_run
from skd_lib.tracking.triggered import note, run_for
from tests.support import http

from .conftest import EXPERIMENT

KFP = "https://kfp-mlflow.example/mlflow"
OURS = {"MLFLOW_TRACKING_USERNAME": "u", "MLFLOW_TRACKING_PASSWORD": "p"}


class Plugin:
    """Makes the runs that KFP's API server, drivers and launchers make, in an experiment of its own."""

    def __init__(self, client: MlflowClient) -> None:
        self.client = client
        self.experiment = client.create_experiment("KFP-Default")
        self.root = client.create_run(self.experiment, run_name="demo", tags={"kfp.pipeline_run_id": "run-1"})

    def nest(self, name: str, above: Run) -> Run:
        tags = {"mlflow.parentRunId": above.info.run_id}
        return self.client.create_run(self.experiment, run_name=name, tags=tags)

    def chapter(self, name: str) -> Run:
        """A nested DAG: root > exit-handler-1 > NAME."""
        return self.nest(name, self.nest("exit-handler-1", self.root))


@pytest.fixture
def plugin(client: MlflowClient) -> Plugin:
    return Plugin(client)


def statuses(client: MlflowClient, root: Run) -> dict[str, str]:
    return {str(run.info.run_name): run.info.status for run in children_of(client, root)}


def test_what_goes_to_the_parent_goes_to_the_root(
    plugin: Plugin, store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = plugin.nest("distill", plugin.chapter("distil"))
    monkeypatch.setenv("MLFLOW_RUN_ID", task.info.run_id)
    monkeypatch.setenv("SKD_IMAGE", "image@sha256:1")
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT) as run:
        assert run.run_id == task.info.run_id
        assert run.parent.run_id == plugin.root.info.run_id
        run.parent.log_metrics({"student_after/chrf": 32.0})
    assert client.get_run(plugin.root.info.run_id).data.metrics == {"student_after/chrf": 32.0}
    assert client.get_run(task.info.run_id).data.tags["skd.image"] == "image@sha256:1"
    assert client.get_experiment_by_name(EXPERIMENT) is None


def test_without_its_variables_steps_go_below_its_root(plugin: Plugin, store: str, client: MlflowClient) -> None:
    for step in ("preflight", "distill"):
        with step_run(step=step, tracking_uri=store, experiment=EXPERIMENT) as run:
            assert run.parent.run_id == plugin.root.info.run_id
    note("skd-1", pipeline_run_id="run-1", run_name="demo", tracking_uri=store, experiment=EXPERIMENT)
    found = run_for("skd-1", tracking_uri=store)
    assert found is not None
    assert found.info.run_id == plugin.root.info.run_id
    assert client.get_experiment_by_name(EXPERIMENT) is None


def test_the_end_of_the_tree(plugin: Plugin, store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step was killed; its run and those of the nested DAGs above it are still open, and the last step's own is."""
    chapter = plugin.chapter("distil")
    for name, error in (("student-init", ""), ("distill", "killed")):
        task = plugin.nest(name, chapter)
        monkeypatch.setenv("MLFLOW_RUN_ID", task.info.run_id)
        with step_run(step=name.replace("-", "_"), tracking_uri=store, experiment=EXPERIMENT):
            pass
        if error:
            client.update_run(task.info.run_id, status="RUNNING")
    last = plugin.nest("finish", plugin.root)
    monkeypatch.setenv("MLFLOW_RUN_ID", last.info.run_id)
    where = {"tracking_uri": store, "experiment": EXPERIMENT, "pipeline_run_id": "run-1"}
    assert close_pipeline_run(**where, state="RUNNING")
    record = pipeline_record(**where)
    assert record.state == "FAILED"
    assert record.error.startswith("distill: its process was killed")
    assert client.get_run(plugin.root.info.run_id).info.status == "FAILED"
    assert statuses(client, plugin.root) == {
        "exit-handler-1": "FAILED",
        "distil": "FAILED",
        "student-init": "FINISHED",
        "distill": "FAILED",
        "finish": "RUNNING",
    }


def test_a_task_that_never_came_to_log_is_named(plugin: Plugin, store: str, client: MlflowClient) -> None:
    chapter = plugin.chapter("teacher")
    client.set_terminated(plugin.nest("import-model", chapter).info.run_id, "FINISHED")
    client.set_terminated(plugin.nest("teacher-sft", chapter).info.run_id, "FAILED")
    where = {"tracking_uri": store, "experiment": EXPERIMENT, "pipeline_run_id": "run-1"}
    assert close_pipeline_run(**where, state="FAILED")
    assert pipeline_record(**where).error == "teacher-sft: it failed, or could not start; the reason is in its log"


def test_a_success_with_a_nested_dag_left_open(
    plugin: Plugin, store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = plugin.nest("register-model", plugin.chapter("release"))
    monkeypatch.setenv("MLFLOW_RUN_ID", task.info.run_id)
    with step_run(step="register_model", tracking_uri=store, experiment=EXPERIMENT):
        pass
    monkeypatch.delenv("MLFLOW_RUN_ID")
    assert close_pipeline_run(tracking_uri=store, experiment=EXPERIMENT, pipeline_run_id="run-1", state="RUNNING")
    assert set(statuses(client, plugin.root).values()) == {"FINISHED"}


def test_a_second_attempt_takes_away_the_firsts_error(
    plugin: Plugin, store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both go on in the run that the driver made once; the first one's launcher may tell its end late."""
    task = plugin.nest("distill", plugin.chapter("distil"))
    monkeypatch.setenv("MLFLOW_RUN_ID", task.info.run_id)
    with (
        pytest.raises(RuntimeError),
        step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT),
    ):
        raise RuntimeError("out of memory")
    assert client.get_run(task.info.run_id).data.tags["skd.error"] == "RuntimeError: out of memory"
    client.set_terminated(task.info.run_id, "FAILED")
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT):
        again = client.get_run(task.info.run_id)
        assert again.info.status == "RUNNING"
        assert "skd.error" not in again.data.tags  # or it would be told if this attempt is killed without a word
        client.set_tag(task.info.run_id, "skd.error", "RuntimeError: told late")
    ended = client.get_run(task.info.run_id)
    assert ended.info.status == "FINISHED"
    assert "skd.error" not in ended.data.tags


def test_steps_find_the_run_that_preflight_made_in_the_forms_experiment(store: str, client: MlflowClient) -> None:
    with step_run(step="preflight", tracking_uri=store, experiment="of the form", run_name="demo") as run:
        parent = run.parent.run_id
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT) as run:
        assert run.parent.run_id == parent
    assert client.get_experiment_by_name(EXPERIMENT) is None
    where = {"tracking_uri": store, "experiment": EXPERIMENT, "pipeline_run_id": "run-1"}
    assert close_pipeline_run(**where, state="COMPLETE")
    assert client.get_run(parent).info.status == "FINISHED"
    assert len(children_of(client, client.get_run(parent))) == 2


def test_the_run_is_found_among_thousands_of_experiments(
    store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skd_lib.tracking.locate.PAGE_ROWS", 2)
    experiments = [client.create_experiment(f"e{number}") for number in range(5)]
    parent = client.create_run(experiments[0], tags={"kfp.pipeline_run_id": "run-1"})
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT) as run:
        assert run.parent.run_id == parent.info.run_id


def test_two_that_make_a_parent_in_different_experiments_keep_one(
    store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skd_lib.tracking.locate.SETTLE_SECONDS", 0.3)
    threads = [
        Thread(
            target=note,
            args=("skd-1",),
            kwargs={
                "pipeline_run_id": "run-1",
                "run_name": "demo",
                "tracking_uri": store,
                "experiment": f"e{number}",
            },
        )
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    experiments = [found.experiment_id for found in client.search_experiments()]
    assert len(client.search_runs(experiments, "tags.`kfp.pipeline_run_id` = 'run-1'")) == 1


# --- credentials ----------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, str]]]:
    """Set the variables of a step's container; what MLflow's client reads once a server was chosen."""
    before = dict(os.environ)
    names = ("USERNAME", "PASSWORD", "TOKEN", "AUTH")

    def choose(tracking_uri: str, **variables: str) -> dict[str, str]:
        for name in [*os.environ]:
            if name.startswith(("MLFLOW_TRACKING_", "SKD_MLFLOW_", "KFP_MLFLOW", "MLFLOW_WORKSPACE")):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        use_credentials(tracking_uri)
        use_credentials(tracking_uri)
        read = [*(f"MLFLOW_TRACKING_{name}" for name in names), "MLFLOW_WORKSPACE"]
        return {name: os.environ[name] for name in read if name in os.environ}

    yield choose
    for name in [*os.environ]:
        if name.startswith("MLFLOW_") and name not in before:
            del os.environ[name]


CONFIG = {"KFP_MLFLOW_CONFIG": json.dumps({"endpoint": KFP, "authType": "bearer"}), "MLFLOW_TRACKING_TOKEN": "kfp's"}


def test_each_server_gets_its_own_credentials(environment: Callable[..., dict[str, str]]) -> None:
    own = {"SKD_MLFLOW_USERNAME": "u", "SKD_MLFLOW_PASSWORD": "p"}
    spaced = {**CONFIG, "MLFLOW_WORKSPACE": "team"}
    assert environment(f"{KFP}/", **CONFIG) == {"MLFLOW_TRACKING_TOKEN": "kfp's"}
    assert environment(f"{KFP.replace('/mlflow', ':443/mlflow')}", **spaced) == {
        "MLFLOW_TRACKING_TOKEN": "kfp's",
        "MLFLOW_WORKSPACE": "team",
    }
    assert environment("https://other.example", **spaced) == {}
    assert environment("https://other.example", **spaced, **own) == OURS
    assert environment(KFP, **spaced, **own) == {**OURS, "MLFLOW_WORKSPACE": "team"}
    assert environment(KFP, **own, MLFLOW_TRACKING_AUTH="kubernetes") == OURS
    assert environment(KFP, SKD_MLFLOW_TOKEN="") == {}
    # By hand, without Kubeflow, MLflow's own variables count.
    assert environment(KFP, **OURS) == OURS
    assert environment("https://other.example", KFP_MLFLOW_CONFIG="no JSON", **OURS) == OURS
    assert environment("sqlite:///a.db", **OURS) == OURS


def test_pods_get_our_secret_under_names_of_our_own() -> None:
    assert set(SECRETS["skd-mlflow"].values()) == {"SKD_MLFLOW_USERNAME", "SKD_MLFLOW_PASSWORD", "SKD_MLFLOW_TOKEN"}


def test_kubeflows_token_is_not_sent_to_another_server(
    environment: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[str] = []

    class Server(http.Handler):
        def do_POST(self) -> None:
            received.append(self.headers.get("Authorization", ""))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST

    with http.Server(Server) as server:
        uri = server.url
        environment(uri, **CONFIG)
        check_tracking(uri)
        environment(uri, **CONFIG, SKD_MLFLOW_TOKEN="ours")
        check_tracking(uri)
    assert received == ["", "Bearer ours"]
