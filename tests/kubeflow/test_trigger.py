"""Triggering starts exactly one run for the same data, after any number of announcements in any order."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skd_kfp.pipelines.kubeflow import claims as claims_module
from skd_kfp.pipelines.kubeflow.api import KubeflowPipelines, Unsettled
from skd_kfp.pipelines.kubeflow.claims import Busy, claim, remembered
from skd_kfp.pipelines.kubeflow.submit import Target
from skd_kfp.pipelines.kubeflow.trigger import Decision, Trigger, reading_from
from skd_lib import storage
from skd_lib.config import HubSource, RunConfig, load_config
from skd_lib.errors import SkdError
from tests.kubeflow import small
from tests.kubeflow.fake_kfp import ROOT, FakeKfp, Fault
from tests.kubeflow.test_submit import in_parallel, skd
from tests.support.storage_server import Server

BUCKET = "bucket"


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
    yield server
    server.stop()


@pytest.fixture(params=["local", "gs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "root")
    request.getfixturevalue("emulator")
    return f"gs://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def config(config_file: Path) -> RunConfig:
    return load_config(config_file)


@pytest.fixture
def trigger(api: KubeflowPipelines, config: RunConfig, root: str) -> Trigger:
    return Trigger(config, small.package(), Target(), api, claims=f"{root}/claims")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., None]:
    """Writes a file or an object, `age` seconds ago where that can be set."""

    def write(uri: str, text: str = "", age: float = 0.0) -> None:
        path = tmp_path / "written"
        path.write_text(text, encoding="utf-8")
        storage.upload(path, uri)
        if not storage.is_remote(uri):
            os.utime(uri, (time.time() - age,) * 2)

    return write


@pytest.fixture
def source(root: str, write: Callable[..., None]) -> str:
    """Complete data."""
    write(f"{root}/data/day-1/train.jsonl", '{"source": "a", "target": "b"}\n', age=10)
    write(f"{root}/data/day-1/_SUCCESS", age=5)
    return f"{root}/data/day-1"


def test_new_data_starts_a_run_once(kfp: FakeKfp, trigger: Trigger, source: str):
    assert trigger.explain(source).reason == "there is no run for this data yet"
    assert not [request for request in kfp.requests if request[0] == "POST"]
    first, second = trigger.fire(source), trigger.fire(source)
    (run,) = kfp.runs
    assert first == Decision(True, "there is no run for this data yet", run["display_name"], run["run_id"])
    assert second == Decision(False, "there is a run for this data already, pending", first.name, run["run_id"])
    assert first.name == trigger.explain(source).name
    assert re.fullmatch(r"skd trigger .*day-1; submission \w{32}; pipeline sha256:\w{64}", run["description"])
    assert f"{source}/train.jsonl" in json.dumps(run["runtime_config"]["parameters"])


def test_data_in_a_folder_or_by_a_glob_is_looked_for(
    kfp: FakeKfp, trigger: Trigger, source: str, root: str, write: Callable[..., None]
):
    for pattern in ("{source}", "{source}/*.jsonl"):
        files = trigger.config.data.source.model_copy(update={"train": [pattern]})
        data = trigger.config.data.model_copy(update={"source": files})
        each = replace(trigger, config=trigger.config.model_copy(update={"data": data}))
        assert each.explain(source).fire
        write(f"{root}/data/day-2/_SUCCESS")
        assert "the data is not complete" in each.explain(f"{root}/data/day-2").reason


def test_twenty_identical_events_start_one_run(kfp: FakeKfp, trigger: Trigger, source: str):
    decisions = in_parallel(20, lambda: trigger.fire(source))
    assert len(kfp.runs) == 1
    assert sum(decision.fire for decision in decisions) == 1
    assert {decision.run_id for decision in decisions} == {kfp.runs[0]["run_id"]}


def forget_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Kubeflow list no runs."""
    monkeypatch.setattr(KubeflowPipelines, "runs_named", lambda *_: [])


@pytest.mark.slow
def test_kubeflows_list_alone_lets_twenty_events_start_one_run(kfp: FakeKfp, trigger: Trigger, source: str):
    alone = replace(trigger, claims="")
    decisions = in_parallel(20, lambda: alone.fire(source))
    assert sum(decision.fire for decision in decisions) == len(kfp.runs) == 1


@pytest.mark.slow
def test_the_claim_alone_lets_twenty_events_start_one_run(
    kfp: FakeKfp, trigger: Trigger, source: str, monkeypatch: pytest.MonkeyPatch
):
    forget_runs(monkeypatch)
    decisions = in_parallel(20, lambda: trigger.fire(source))
    assert sum(decision.fire for decision in decisions) == len(kfp.runs) == 1


def test_without_any_guard_the_same_events_start_more(
    kfp: FakeKfp, trigger: Trigger, source: str, monkeypatch: pytest.MonkeyPatch
):
    """The tests above can fail."""
    forget_runs(monkeypatch)
    careless = replace(trigger, claims="")
    in_parallel(3, lambda: careless.fire(source))
    assert len(kfp.runs) == 3


def test_a_lost_answer_does_not_start_a_second_run(kfp: FakeKfp, trigger: Trigger, source: str):
    kfp.faults = [Fault("POST", f"{ROOT}/runs", 504, after=True)]
    in_parallel(5, lambda: trigger.fire(source))
    assert len(kfp.runs) == 1


def test_while_it_is_not_known_whether_a_run_was_started_nobody_starts_one(
    kfp: FakeKfp, trigger: Trigger, source: str, root: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(claims_module, "WAIT_SECONDS", 0.0)
    kfp.faults = [Fault("POST", f"{ROOT}/runs", 500, orphan=True)] * 4
    with pytest.raises(Unsettled):
        trigger.fire(source)
    assert len(kfp.workflows) == 1
    name = trigger.explain(source).name
    with pytest.raises(Busy, match="another process is at work on it"):
        trigger.fire(source)
    with claim(trigger.claims, name, valid=-1.0):
        pass
    with claim(trigger.claims, name):
        pass


@pytest.mark.parametrize("state", ["RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "PAUSED", "SUCCEEDED"])
def test_data_that_was_seen_to_starts_nothing(kfp: FakeKfp, trigger: Trigger, source: str, state: str):
    trigger.fire(source)
    kfp.runs[0]["state"] = state
    decision = trigger.fire(source)
    assert (decision.fire, decision.reason) == (False, f"there is a run for this data already, {state.lower()}")
    assert len(kfp.runs) == 1


@pytest.mark.parametrize(
    ("state", "history"),
    [("FAILED", ["RUNNING", "CANCELING", "FAILED"]), ("CANCELING", ["RUNNING"]), ("CANCELED", ["RUNNING", "CANCELED"])],
)
def test_what_a_person_stopped_is_not_started_again(
    kfp: FakeKfp, trigger: Trigger, source: str, state: str, history: list[str]
):
    """A cancelled run ends as FAILED; its history tells it from one that failed by itself."""
    first = trigger.fire(source)
    kfp.runs[0] |= {"state": state, "state_history": [{"state": each} for each in history]}
    decision = replace(trigger, attempts=5).fire(source)
    assert (decision.fire, decision.run_id) == (False, first.run_id)
    assert decision.reason == "there is a run for this data already, cancelled by a person"


@pytest.mark.slow
def test_what_kubeflow_forgets_the_claims_remember(kfp: FakeKfp, trigger: Trigger, source: str, root: str):
    first = trigger.fire(source)
    kfp.runs.clear()
    decision = replace(trigger, attempts=5).fire(source)
    uri = f"{root}/claims/{first.name}"
    assert decision == trigger.explain(source)
    assert decision.reason == (
        f"a run for this data was started, {first.run_id}, which Kubeflow no longer knows; "
        f"to run it again, delete {uri}"
    )
    storage.delete(uri)
    assert trigger.fire(source).fire


def test_a_server_that_is_too_old_starts_nothing(kfp: FakeKfp, trigger: Trigger, source: str):
    kfp.version = "2.14.4"
    with pytest.raises(SkdError, match=r"Kubeflow Pipelines 2.14.4: 2.15.0 or newer is needed"):
        trigger.fire(source)
    assert not [method for method, _, _ in kfp.requests if method != "GET"]


def test_what_the_server_changes_is_said(kfp: FakeKfp, trigger: Trigger, source: str, caplog: pytest.LogCaptureFixture):
    kfp.changes = {"settings": "another"}
    decision = trigger.fire(source)
    assert f"run {decision.run_id} has started, but the server changed its parameters settings" in caplog.text


def test_targets_make_no_other_run(trigger: Trigger, source: str):
    elsewhere = replace(trigger, target=Target("skd", "another", "team-settings", "gs://b/root", "runner", reuse=False))
    assert elsewhere.explain(source).name == trigger.explain(source).name


def test_a_server_that_is_away_is_said_to_be_waited_for(kfp: FakeKfp, config_file: Path, source: str):
    kfp.faults = [Fault("GET", f"{ROOT}/experiments", 503)]
    done = skd("trigger", source, "--config", config_file, "--host", kfp.host, "--pipeline", small.package().path)
    assert "note: the server does not answer (HTTP 503): asking again for a minute or two\n" in done.output
    assert done.exit_code == 0


@pytest.mark.slow
def test_a_failed_run_is_repeated_as_often_as_allowed(kfp: FakeKfp, trigger: Trigger, source: str):
    twice = Trigger(trigger.config, small.package(), Target(), trigger.api, trigger.claims, attempts=2)
    twice.fire(source)
    kfp.runs[0]["state"] = "FAILED"
    assert trigger.explain(source).reason == "1 run on this data failed: correct it, or raise --attempts"
    assert twice.fire(source).reason == "there is no run for this data yet, but failed ones"
    assert not twice.fire(source).fire
    kfp.runs[1]["state"] = "FAILED"
    assert twice.fire(source).reason.startswith("2 runs on this data failed")
    assert len(kfp.runs) == 2


def test_incomplete_data_starts_nothing(kfp: FakeKfp, trigger: Trigger, root: str, write: Callable[..., None]):
    source = f"{root}/data/day-2"
    write(f"{source}/train.jsonl", "1\n", age=20)
    assert trigger.fire(source).reason == f"the data is not complete: there is no {source}/_SUCCESS"
    write(f"{source}/_SUCCESS", age=10)
    storage.delete(f"{source}/train.jsonl")
    assert trigger.fire(source).reason == f"the data is not complete: there is no {source}/train.jsonl"
    time.sleep(0.01)
    write(f"{source}/train.jsonl", "2\n")
    assert trigger.fire(source).reason == (
        f"the data is being replaced: {source}/train.jsonl is newer than {source}/_SUCCESS"
    )
    assert not kfp.runs
    write(f"{source}/_SUCCESS")
    assert trigger.fire(source).fire


def test_a_marker_is_a_file(trigger: Trigger, root: str, write: Callable[..., None]):
    write(f"{root}/data/day-3/train.jsonl", "1\n")
    write(f"{root}/data/day-3/_SUCCESS/part", "1\n")
    with pytest.raises(SkdError, match="day-3/_SUCCESS: the marker is a folder, not a file"):
        trigger.fire(f"{root}/data/day-3")


def test_other_data_settings_or_pipeline_are_another_run(
    trigger: Trigger, source: str, write: Callable[..., None], config: RunConfig
):
    names = [trigger.explain(source).name]
    other = config.model_copy(update={"seed": config.seed + 1})
    names.append(Trigger(other, small.package(), Target(), trigger.api).explain(source).name)
    package = replace(small.package(), digest="0" * 64)
    names.append(Trigger(config, package, Target(), trigger.api).explain(source).name)
    write(f"{source}/train.jsonl", '{"source": "c", "target": "d"}\n', age=4)
    write(f"{source}/_SUCCESS")
    names.append(trigger.explain(source).name)
    assert len(set(names)) == 4
    assert all(len(name) == len("skd-") + 12 for name in names)


def test_a_config_has_to_read_from_the_source(config: RunConfig):
    fixed = reading_from(config, "gs://b/data")
    assert reading_from(fixed, "gs://b/data/") == fixed
    for source in ("gs://b/dat", "gs://other"):
        with pytest.raises(SkdError, match="does not read its data from there"):
            reading_from(fixed, source)
    hub = config.model_copy(
        update={"data": config.data.model_copy(update={"source": HubSource(type="hub", dataset="o/d")})}
    )
    assert reading_from(hub, "o/d") == hub
    with pytest.raises(SkdError, match="its dataset is o/d"):
        reading_from(hub, "o/other")


def test_a_claim_of_the_dead_is_taken_over_by_one(emulator: Server, tmp_path: Path):
    folder = f"gs://{BUCKET}/{tmp_path.name}"
    slow = claim(folder, "name")
    held = slow.__enter__()
    with pytest.raises(Busy), claim(folder, "name", wait=0.0):
        pass
    emulator.store.written[f"{tmp_path.name}/name"] -= 3600
    taken: list[str] = []
    refused = threading.Semaphore(0)

    def take(run_id: str) -> None:
        try:
            with claim(folder, "name", wait=0.0) as ours:
                taken.append(run_id)
                ours.run_id = run_id
                assert all(refused.acquire(timeout=30) for _ in range(9))
        except Busy:
            refused.release()

    names = iter(f"run-{number}" for number in range(10))
    in_parallel(10, lambda: take(next(names)))
    assert len(taken) == 1
    # If the first holder was not dead but slow: it overwrites nothing that is another's.
    held.run_id = "late"
    slow.__exit__(None, None, None)
    assert remembered(folder, "name") == taken[0]


def test_a_claim_remembers_the_run_that_was_started(root: str):
    with claim(f"{root}/claims", "name") as held:
        assert remembered(f"{root}/claims", "name") == ""
        held.run_id = "a"
    with claim(f"{root}/claims", "name", wait=0.0) as held:
        assert held.run_id == "a"
    assert remembered(f"{root}/claims", "name") == "a"


@pytest.mark.parametrize("folder", ["", "claims"])
def test_a_claim_is_given_back_after_an_error(root: str, folder: str):
    for _ in range(2):
        with pytest.raises(ValueError, match="x"), claim(folder and f"{root}/{folder}", "name", wait=0.0):
            raise ValueError("x")


def test_a_claim_whose_answer_was_lost_is_ours(emulator: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The storage writes it, is asked again after a lost answer, and says that another wrote it."""
    create = storage.create_object
    monkeypatch.setattr(storage, "create_object", lambda *a, **k: create(*a, **k) and None)
    folder = f"gs://{BUCKET}/{tmp_path.name}"
    with claim(folder, "name", wait=5.0) as held:
        monkeypatch.setattr(storage, "create_object", create)
        held.run_id = "ours"
    assert remembered(folder, "name") == "ours"


def test_a_misspelt_source_in_a_bucket_is_an_error(kfp: FakeKfp, config_file: Path, source: str):
    arguments = ("--config", config_file, "--host", kfp.host, "--pipeline", small.package().path)
    assert skd("trigger", f"{source}/", *arguments, "--dry-run").exit_code == 0
    error = skd("trigger", f"{source}x", *arguments).exception
    assert f"SOURCE {source}x: there is no such folder" in str(error)
    assert not kfp.runs


def test_the_command_explains_and_starts(kfp: FakeKfp, config_file: Path, source: str, root: str, monkeypatch: Any):
    monkeypatch.setenv("SKD_CLAIMS", f"{root}/claims")
    arguments = ["trigger", source, "--config", config_file, "--host", kfp.host, "--pipeline", small.package().path]
    done = skd(*arguments, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "would start: there is no run for this data yet\nrun skd-" in done.output
    assert not kfp.runs
    decision = json.loads(skd(*arguments, "--json").output)
    assert decision["run_id"] == kfp.runs[0]["run_id"]
    done = skd(*arguments)
    assert done.output.startswith("nothing to start: there is a run for this data already, pending\n")
    assert f"{kfp.host}/#/runs/details/{decision['run_id']}\n" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "SOURCE: must not be empty"),
        (["data", "--marker", ""], "--marker: '' is not the name of a file"),
        (["data", "--marker", "../x"], "--marker: '../x' is not the name of a file"),
        (["data"], "SOURCE data: the cluster cannot read a relative path of this machine\n  hint: give a gs:// URI"),
        (["./data/"], "SOURCE ./data/: the cluster cannot read a relative path"),
        (["/no/such/day"], "SOURCE /no/such/day: there is no such folder\n  hint: check the spelling"),
        (["https://h/data"], "https://h/data: https:// URIs are not read"),
    ],
)
def test_errors_say_what_to_do(config_file: Path, arguments: list[str], message: str):
    done = skd("trigger", *arguments, "--config", config_file, "--host", "http://h", "--pipeline", small.package().path)
    assert isinstance(done.exception, SkdError)
    assert message in str(done.exception)
