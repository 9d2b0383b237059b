"""An MLflow store in a sqlite file of the test's own folder, and what a pipeline run's environment holds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from skd_lib.tracking import locate
from skd_lib.tracking.client import connect
from skd_lib.tracking.locate import PARENT_TAG

EXPERIMENT = "skd-test"
_CLUSTER = ("KF_PIPELINES_ENDPOINT", "KUBERNETES_SERVICE_HOST", "ML_PIPELINE_SERVICE_HOST", "KFP_POD_NAME")
"""By which `finish` would find Kubeflow's API."""
Runs = Callable[[], list[Run]]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SKD_TRACKING_BUFFER", str(tmp_path / "left"))
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "RANK", "SKD_CODE_VERSION", *_CLUSTER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    monkeypatch.setattr(locate, "SETTLE_SECONDS", 0.0)  # tests without competitors need not wait for them


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh database: made once, since MLflow takes seconds to make its tables."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> str:
    """The URI of a store nobody has written to."""
    path = tmp_path / "runs" / "mlflow.db"
    path.parent.mkdir()
    shutil.copyfile(empty_store, path)
    return f"sqlite:///{path}"


@pytest.fixture
def client(store: str) -> MlflowClient:
    return connect(store)


@pytest.fixture
def parents(client: MlflowClient) -> Runs:
    return lambda: [run for run in _runs(client) if PARENT_TAG not in run.data.tags]


@pytest.fixture
def children(client: MlflowClient) -> Runs:
    return lambda: [run for run in _runs(client) if PARENT_TAG in run.data.tags]


def _runs(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []
