"""The runs table of an experiment, with the columns that people look for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from skd_lib.report.summary import headline_columns
from skd_lib.tracking.entries import ENTRY
from skd_lib.tracking.runs import step_run
from skd_lib.tracking.view import VIEW_TAG, View, runs_url, where_to_look
from tests.support.browser import browse

from .conftest import EXPERIMENT
from .server import MlflowServer


def show(store: str, *metrics: str) -> str:
    with step_run(step="report", tracking_uri=store, experiment=EXPERIMENT) as run:
        run.parent.show_metrics(metrics)
        return run.parent.table_url


def columns(client: MlflowClient) -> list[str]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return list(json.loads(experiment.tags[VIEW_TAG])["selectedColumns"])


def test_metrics_are_added_to_the_view(store: str, client: MlflowClient) -> None:
    assert show(store, "student_after/chrf") == ""  # no server that has a page
    show(store, "student_after/bleu", "student_after/chrf")
    show(store, "student_after/chrf")
    metrics = [name for name in columns(client) if name.startswith("metrics.")]
    assert metrics == ["metrics.`student_after/bleu`", "metrics.`student_after/chrf`"]
    assert {"attributes.`Models`", "attributes.`Dataset`"} < set(columns(client))


def test_a_view_of_another_program_is_replaced(store: str, client: MlflowClient) -> None:
    show(store, "a")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, "deflate;xyz")
    show(store, "b")
    assert "metrics.`b`" in columns(client)


def test_a_view_fits_into_its_tag(store: str, client: MlflowClient) -> None:
    show(store, *(f"a-variant-with-a-long-name-{number}/accuracy" for number in range(50)))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    assert 3000 < len(experiment.tags[VIEW_TAG]) <= 5000


def test_addresses() -> None:
    assert runs_url("sqlite:///mlflow.db", "1") == ""
    found = runs_url("https://user:secret@mlflow.example/base/", "7")
    assert found == (
        "https://mlflow.example/base/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=skd"
    )


def test_where_to_look(store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"mlflow ui --backend-store-uri {store}"
    assert where_to_look(store, EXPERIMENT) == {"MLflow": command}  # no such experiment
    show(store, "a")
    page = "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=skd"
    assert where_to_look(store, EXPERIMENT) == {"MLflow": command, "its page": page}
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert where_to_look("http://bob:secret@127.0.0.1:9", EXPERIMENT) == {"MLflow": "http://127.0.0.1:9"}


def test_a_view_can_wait_on_disk() -> None:
    entry = View(metrics=["student_after/chrf"])
    assert ENTRY.validate_json(entry.model_dump_json()) == entry


@pytest.mark.slow
def test_the_link_opens_the_table_with_these_columns(tmp_path: Path, empty_store: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    server = MlflowServer(tmp_path)
    server.start()
    try:
        names = headline_columns(["chrf"])
        with step_run(step="report", tracking_uri=server.uri, experiment=EXPERIMENT, run_name="demo") as run:
            run.parent.log_metrics({name: number + 0.5 for number, name in enumerate(names)})
            run.parent.log_metrics({"draft_before/speedup": 0.25})  # which the page adds to the charts
            run.parent.log_dataset("held", "ab" * 32, "gs://bucket/data", context="test")
            run.parent.log_params({"method": "skd"})
            run.parent.show_metrics(names)
            address = run.parent.table_url
        assert where_to_look(server.uri, EXPERIMENT) == {"MLflow": address}
        look = ("--window-size=3200,800", "--virtual-time-budget=20000", "--dump-dom")
        page, _ = browse(tmp_path, *look, address)
        charts, _ = browse(tmp_path, *look, f"{address}&compareRunsMode=CHART")
    finally:
        server.kill()
    for name in [*names, "skd/method"]:
        assert f"sort-header-{name}" in page
    for number, name in enumerate(names):
        assert page.count(f">{number + 0.5}<") >= 1, name
    assert "held (" in page
    assert page.index(names[0]) < page.index("held (")
    groups = ["student_after", "student_before", "teacher", "worth", "draft_after"]
    places = [charts.index(f">{group}</div>") for group in groups]
    assert places == sorted(places)  # the page's own order is that of names
