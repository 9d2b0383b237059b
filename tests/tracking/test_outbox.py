"""What a store does not take waits on disk: in order, once, whatever gets lost on the way."""

from __future__ import annotations

import json
import math
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND
from typer.testing import CliRunner

from skd_kfp.pipelines.cli import app
from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.steps import finish
from skd_lib.tracking import outbox
from skd_lib.tracking.entries import Artifact, Metrics, Tags
from skd_lib.tracking.locate import RunLocation
from skd_lib.tracking.outbox import OutboxFile, read_location, replay, resend, waiting_files
from skd_lib.tracking.runs import step_run

from .conftest import EXPERIMENT, Runs

CALLS = ("log_batch", "log_artifact", "set_terminated", "create_run", "set_tag")


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """Where files are left; named to the steps by the fixture of all tests here."""
    return tmp_path / "left"


@pytest.fixture
def break_store(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], str]], None]:
    """Make calls of MLflow's client fail: `before` they do anything, `after`, or not (empty)."""
    calls: dict[str, Any] = {name: getattr(MlflowClient, name) for name in CALLS}

    def install(failure: Callable[[], str]) -> None:
        def broken(call: Any) -> Any:
            def perform(*args: Any, **kwargs: Any) -> Any:
                moment = failure()
                if moment == "before":
                    raise ConnectionError("no route to host")
                answer = call(*args, **kwargs)
                if moment == "after":
                    raise ConnectionError("connection reset by peer")
                return answer

            return perform

        for name, call in calls.items():
            monkeypatch.setattr(MlflowClient, name, broken(call))

    return install


@pytest.mark.parametrize("seed", range(3))
def test_each_entry_arrives_once_through_any_failures(
    seed: int,
    store: str,
    client: MlflowClient,
    children: Runs,
    parents: Runs,
    left: Path,
    break_store: Callable[[Callable[[], str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    chance = random.Random(seed)
    break_store(lambda: chance.choice(["before", "after", "", ""]))
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT, params={"lr": 1}) as run:
        for step in range(30):
            run.log_metrics({"loss": float(step), "rate": math.nan if step == 3 else 0.5}, step=step)
            run.parent.set_tags({"latest": step})
        run.log_text("x", "a.txt")
        break_store(lambda: "")
    (child,) = children()
    (parent,) = parents()
    for key in ("loss", "rate"):
        assert [point.step for point in client.get_metric_history(child.info.run_id, key)] == list(range(30))
    assert math.isnan(client.get_metric_history(child.info.run_id, "rate")[3].value)
    assert parent.data.tags["latest"] == "29"
    assert child.info.status == "FINISHED"
    assert not list(left.iterdir())


def _leave(store: str, break_store: Callable[[Callable[[], str]], None], steps: range, *, fails: bool = False) -> None:
    """An attempt at a step whose records the store does not take."""
    break_store(lambda: "before")
    try:
        with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT) as run:
            for step in steps:
                run.log_metrics({"loss": float(step)}, step=step)
            if fails:
                raise RuntimeError("pre-empted")
    except RuntimeError:
        pass
    break_store(lambda: "")


def test_a_later_attempt_has_the_last_word(
    store: str,
    client: MlflowClient,
    children: Runs,
    left: Path,
    break_store: Callable[[Callable[[], str]], None],
) -> None:
    _leave(store, break_store, range(10), fails=True)
    (file,) = left.iterdir()
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT) as run:
        for step in range(6, 15):  # from the checkpoint of step 5
            run.log_metrics({"loss": float(step)}, step=step)
    result = CliRunner().invoke(app, ["track", "replay", str(file)])
    assert "12 entries sent" in result.output, result.output
    (child,) = children()
    assert child.info.status == "FINISHED"
    assert "skd.error" not in child.data.tags
    history = client.get_metric_history(child.info.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(15))


def test_a_replay_that_is_interrupted_can_be_repeated(
    store: str,
    client: MlflowClient,
    children: Runs,
    left: Path,
    break_store: Callable[[Callable[[], str]], None],
) -> None:
    _leave(store, break_store, range(10))
    (file,) = left.iterdir()
    moments = iter(["", "", "", "", "after"])
    break_store(lambda: next(moments, "before"))
    with pytest.raises(SkdError, match="stopped answering after") as caught:
        replay(file)
    assert f"skd track replay {file}" in caught.value.hint
    break_store(lambda: "")
    assert replay(file) == replay(file) == (11, 0)
    (child,) = children()
    assert [point.step for point in client.get_metric_history(child.info.run_id, "loss")] == list(range(10))
    assert child.info.status == "FINISHED"


def test_a_step_that_was_killed_leaves_what_it_had(
    store: str, client: MlflowClient, children: Runs, left: Path, break_store: Callable[[Callable[[], str]], None]
) -> None:
    _leave(store, break_store, range(3))
    (file,) = left.iterdir()
    file.write_bytes(file.read_bytes()[:-30])  # in the middle of the last line
    assert replay(file) == (3, 0)
    (child,) = children()
    assert child.info.status == "RUNNING"
    assert len(client.get_metric_history(child.info.run_id, "loss")) == 3


def test_one_refused_entry_does_not_stop_the_others(
    store: str, children: Runs, left: Path, break_store: Callable[[Callable[[], str]], None]
) -> None:
    break_store(lambda: "before")
    with step_run(step="s", tracking_uri=store, experiment=EXPERIMENT) as run:
        run.log_metrics({"no\nsuch key": 1.0})
        run.log_metrics({"fine": 2.0})
    break_store(lambda: "")
    (file,) = left.iterdir()
    result = CliRunner().invoke(app, ["track", "replay", str(file)])
    assert "3 entries sent, 1 of them refused" in result.output
    (child,) = children()
    assert child.data.metrics == {"fine": 2.0}


def test_the_file_may_go_to_object_storage(
    store: str,
    children: Runs,
    break_store: Callable[[Callable[[], str]], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SKD_TRACKING_BUFFER", "memory://bucket/left")
    _leave(store, break_store, range(3))
    (found,) = storage.list_objects("memory://bucket/left")
    assert f"`skd track replay {found.uri}`" in caplog.text
    result = CliRunner().invoke(app, ["track", "replay", found.uri])
    assert result.exit_code == 0, result.output
    assert not storage.exists(found.uri)
    assert [child.data.metrics for child in children()] == [{"loss": 2.0}]


def test_finish_sends_what_its_run_left_in_order_and_closes_it(
    store: str,
    client: MlflowClient,
    children: Runs,
    parents: Runs,
    left: Path,
    tmp_path: Path,
    break_store: Callable[[Callable[[], str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with step_run(step="preflight", tracking_uri=store, experiment=EXPERIMENT):
        pass
    order: list[str] = []
    names = ["teacher_sft", "distill", "evaluate"]
    break_store(lambda: "before")
    for number, name in enumerate(names):
        monkeypatch.setattr(time, "time", lambda number=number: 2e9 + number)
        with step_run(step=name, tracking_uri=store, experiment=EXPERIMENT) as run:
            run.log_metrics({"loss": 1.0}, step=1)
    monkeypatch.setenv("KFP_RUN_ID", "another run")
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT):
        pass
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    break_store(lambda: "")
    monkeypatch.setattr(outbox, "replay", lambda path, uri: order.append(read_location(path).step) or replay(path, uri))
    monkeypatch.chdir(tmp_path)  # a step by hand writes its outputs there
    for _ in range(2):  # the second time nothing is left to send
        app = typer.Typer()
        app.command()(finish.main)
        status = ["--status", '{"state": "SUCCEEDED"}', "--tracking-uri", store, "--experiment", EXPERIMENT]
        result = CliRunner().invoke(app, status)
        assert result.exit_code == 0, result.output
    assert order == names
    (parent,) = parents()
    assert parent.info.status == "FINISHED"
    assert {child.data.tags["kfp.task"]: child.info.status for child in children()} == dict.fromkeys(
        ["preflight", *names], "FINISHED"
    )
    for child in children():
        if child.info.run_name != "preflight":
            assert len(client.get_metric_history(child.info.run_id, "loss")) == 1
    assert [read_location(file).pipeline_run_id for file in left.iterdir()] == ["another run"]


def test_what_the_store_still_does_not_take_is_named_and_stays(
    store: str, left: Path, break_store: Callable[[Callable[[], str]], None]
) -> None:
    _leave(store, break_store, range(3))
    _leave(store, break_store, range(3))
    break_store(lambda: "before")
    assert sorted(resend(str(left), store)) == sorted(map(str, left.iterdir()))
    assert resend(str(left), "http://another.example") == []
    assert len(list(left.iterdir())) == 2
    break_store(lambda: "")
    assert resend(str(left), store) == []
    assert not list(left.iterdir())


def test_what_an_older_server_does_not_know_is_left_out_but_a_proxys_404_is_silence(
    store: str, children: Runs, left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(outbox, "SILENCE_FACTOR", 0)
    away = [False]

    def answered(name: str, known: bool) -> None:
        call = getattr(MlflowClient, name)

        def answer(*args: Any, **kwargs: Any) -> Any:
            if away[0] or not known:
                raise MlflowException("404 page not found", error_code=ENDPOINT_NOT_FOUND)
            return call(*args, **kwargs)

        monkeypatch.setattr(MlflowClient, name, answer)

    for name in ("log_batch", "get_run", "get_experiment", "get_experiment_by_name", "search_runs", "set_terminated"):
        answered(name, known=True)
    answered("log_inputs", known=False)
    with step_run(step="s", tracking_uri=store, experiment=EXPERIMENT) as run:
        run.log_dataset("train", "ab" * 32, "gs://bucket/train.jsonl")
        run.log_metrics({"a": 1.0})
        away[0] = True
        run.log_metrics({"b": 2.0})
        run.log_params({"c": 3})
        away[0] = False
    (child,) = children()
    assert child.data.metrics == {"a": 1.0, "b": 2.0}
    assert child.data.params == {"skd/c": "3"}
    assert child.info.status == "FINISHED"
    assert not list(left.iterdir())


def test_a_silent_store_takes_a_twentieth_of_the_time_at_most(
    store: str, break_store: Callable[[Callable[[], str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, asked = [0.0], [0]

    def wait() -> str:
        clock[0] += 10.0  # of a server that takes connections and never answers
        asked[0] += 1
        return "before"

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with step_run(step="s", tracking_uri=store, experiment=EXPERIMENT) as run:
        break_store(wait)
        for _ in range(100):
            clock[0] += 20.0
            run.log_metrics({"loss": 1.0}, step=1)
        assert asked[0] <= 12
        break_store(lambda: "")


def _place(uri: str) -> RunLocation:
    return RunLocation(
        tracking_uri=uri,
        experiment="e",
        pipeline_run_id="it's/a run",
        step="s",
        run_name=None,
        mlflow_run_id="",
        started=1,
    )


def test_the_file_is_private_and_holds_no_credentials(left: Path) -> None:
    waiting = OutboxFile(_place("https://user:secret@mlflow.example:5000/x"))
    waiting.append(Tags(values={"a": "b"}))
    (file,) = left.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    assert "secret" not in file.read_text(encoding="utf-8")
    assert read_location(file).tracking_uri == "https://mlflow.example:5000/x"


def test_memory_does_not_grow_with_what_waits(left: Path) -> None:
    waiting = OutboxFile(_place("http://mlflow"))
    tracemalloc.start()
    for number in range(100):
        waiting.append(Artifact.of(bytes(100_000), f"{number}.bin", None, "step"))
    assert sum(1 for _ in waiting.take()) == 100
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    assert not list(left.iterdir())
    waiting.append(Metrics(values={"x": 1.0}, step=None))  # a second outage begins a new file
    assert [entry.kind for entry in waiting.take()] == ["metrics"]


def test_a_disk_that_takes_nothing_does_not_end_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SKD_TRACKING_BUFFER", str(tmp_path / "file"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with step_run(step="s", tracking_uri="http://127.0.0.1:9", experiment=EXPERIMENT) as run:
        run.log_metrics({"x": 1.0})
    assert "cannot be kept either, and is lost" in caplog.text
    assert "2 entries of step s for MLflow could not be kept" in caplog.text


def test_an_empty_file_of_a_full_disk_is_nothing_that_waits(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").touch()
    assert waiting_files(str(tmp_path)) == []


@pytest.mark.parametrize("content", [None, "", "{}\n", '{"kind": "tags"}\n'])
def test_other_files_are_refused(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(SkdError, match="cannot read what was kept for MLflow") as caught:
        replay(file)
    assert caught.value.where == (str(file) if content is None else f"{file}:1")


def test_a_line_that_is_no_entry_is_named(store: str, tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    lines = [_place(store).model_dump_json(), json.dumps({"kind": "other"})]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(SkdError) as caught:
        replay(file)
    assert caught.value.where == f"{file}:2"


def test_a_file_of_an_earlier_version_is_sent(store: str, client: MlflowClient, children: Runs, tmp_path: Path) -> None:
    file = tmp_path / "left.jsonl"
    common = '"which":"step","at":1700000000000'
    lines = [
        json.dumps({"tracking_uri": store, "experiment": EXPERIMENT, "pipeline_run_id": "run-1", "step": "distill"})[
            :-1
        ]
        + ', "run_name": null, "mlflow_run_id": "", "started": 1700000000000}',
        f'{{{common},"kind":"params","values":{{"skd/lr":"0.1"}}}}',
        f'{{{common},"kind":"metrics","values":{{"loss":NaN}},"step":3}}',
        f'{{{common},"kind":"dataset","name":"d","digest":"ab","source":"gs://b/d","context":"train","rows":7}}',
        f'{{{common},"kind":"artifact","name":"a.txt","folder":null,"content":"eA=="}}',
        f'{{{common},"kind":"table","columns":{{"x":[1]}},"path":"t-1.json"}}',
        f'{{{common},"kind":"tags","values":{{"a":"b"}}}}',
        f'{{{common},"kind":"closing","status":"FAILED"}}',
        '{"kind":"pipeline_closing","at":1700000000000,"state":"FAILED","error":"x","seen":{"told":"x: y"}}',
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert replay(file) == (8, 0)
    (child,) = children()
    assert (child.info.status, child.data.params, child.data.tags["a"]) == ("FAILED", {"skd/lr": "0.1"}, "b")
    assert {artifact.path for artifact in client.list_artifacts(child.info.run_id)} == {"a.txt", "t-1.json"}


@pytest.mark.parametrize("named", [True, False])
def test_a_training_step_leaves_its_file_with_its_checkpoints_unless_another_place_is_named(
    named: bool, store: str, left: Path, tmp_path: Path, break_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not named:
        monkeypatch.delenv("SKD_TRACKING_BUFFER")
    break_store(lambda: "before")
    checkpoints = tmp_path / "checkpoints"
    with step_run(step="distill", tracking_uri=store, experiment=EXPERIMENT, checkpoint_root=f"{checkpoints}/") as run:
        run.log_metrics({"loss": 1.0}, step=1)
    (file,) = (left if named else checkpoints / "tracking").iterdir()
    assert read_location(file).step == "distill"
    assert checkpoints.exists() is not named
