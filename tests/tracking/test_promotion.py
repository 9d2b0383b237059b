"""The champion's alias moved by hand, from the command line: forth, back, and not where it makes no sense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from skd_kfp.pipelines.cli import app
from skd_lib.errors import SkdError
from skd_lib.tracking.registry import champion, history, register, set_champion

MODEL = "skd-student"


@pytest.fixture
def versions(store: str, tmp_path: Path) -> list[Path]:
    """Three registered students, the first of them champion by the gate."""
    students = []
    for number in range(1, 4):
        student = tmp_path / f"student-{number}"
        student.mkdir()
        register(
            tracking_uri=store,
            model_name=MODEL,
            student_uri=str(student),
            weights_sha256=str(number) * 64,
            run_id="",
            promote=number == 1,
            figures={},
            tags={"gate": "first champion"},
        )
        students.append(student)
    return students


def skd(store: str, *arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--tracking-uri", store])
    if isinstance(result.exception, SkdError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def promote(store: str, version: int, why: str = "because") -> str:
    return skd(store, "promote", MODEL, str(version), "--why", why, "--by", "ada")


def rollback(store: str) -> str:
    return skd(store, "rollback", MODEL, "--why", "it fails on names", "--by", "ada")


def present(store: str) -> str:
    found = champion(tracking_uri=store, model_name=MODEL)
    assert found is not None
    return found.version


def test_forth_and_back(store: str, client: MlflowClient, versions: list[Path]) -> None:
    assert "version 2 is the champion now; before, version 1 was" in promote(store, 2, "reads better")
    moved = json.loads(skd(store, "promote", MODEL, "3", "--why", "because", "--by", "ada", "--json"))
    assert moved == {"model": MODEL, "version": "3", "before": "2"}
    assert promote(store, 1)
    assert [record.version for record in history(client, MODEL)] == ["1", "2", "3", "1"]
    tags = {number: client.get_model_version(MODEL, str(number)).tags for number in (1, 2)}
    assert (tags[2]["champion.by"], tags[2]["champion.why"]) == ("ada", "reads better")
    assert (tags[2]["champion.until_by"], tags[2]["champion.until_why"]) == ("ada", "because")
    assert tags[2]["champion.since"] <= tags[2]["champion.until"]
    assert "champion.until" not in tags[1]  # again champion
    assert [(rollback(store), present(store))[1] for _ in range(3)] == ["3", "2", "1"]
    back = client.get_model_version(MODEL, "2").tags
    assert back["champion.until_why"] == "it fails on names"
    (first,) = history(client, MODEL)
    assert (first.version, first.by, first.why) == ("1", "ada", "it fails on names")
    with pytest.raises(SkdError, match="version 1 is the first champion that is known"):
        rollback(store)
    assert client.get_registered_model(MODEL).aliases["challenger"] == 3


def test_the_gates_champions_are_known(store: str, client: MlflowClient, versions: list[Path]) -> None:
    for _ in range(2):  # a step that is retried
        register(
            tracking_uri=store,
            model_name=MODEL,
            student_uri=str(versions[1]),
            weights_sha256="2" * 64,
            run_id="",
            promote=True,
            figures={},
            tags={"gate": "chrf 31.00 against 30.00: better"},
        )
    assert [(record.version, record.by, record.why) for record in history(client, MODEL)] == [
        ("1", "the pipeline's gate", "first champion"),
        ("2", "the pipeline's gate", "chrf 31.00 against 30.00: better"),
    ]
    rollback(store)
    assert present(store) == "1"


def test_an_alias_moved_in_mlflows_page_is_gone_on_from(store: str, client: MlflowClient, versions: list[Path]) -> None:
    client.set_registered_model_alias(MODEL, "champion", "3")
    rollback(store)
    assert present(store) == "1"
    client.set_registered_model_alias(MODEL, "champion", "3")
    assert "before, version 3 was" in promote(store, 3)  # gives the move its who and why
    assert [(record.version, record.by) for record in history(client, MODEL)] == [("1", "ada"), ("3", "ada")]


@pytest.mark.parametrize("command", ["promote", "rollback"])
@pytest.mark.parametrize("call", [0, 3, 7, 10])
def test_a_move_that_is_interrupted_is_completed_by_the_next(
    command: str, call: int, store: str, client: MlflowClient, versions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever change is the one that does not come through."""
    promote(store, 2)
    calls = iter(range(100))
    for name in (
        "set_registered_model_alias",
        "set_registered_model_tag",
        "set_model_version_tag",
        "delete_model_version_tag",
    ):
        original = getattr(MlflowClient, name)

        def once(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            if next(calls) == call:
                raise ConnectionError("no route to host")
            return original(*args, **kwargs)

        monkeypatch.setattr(MlflowClient, name, once)
    if command == "promote":
        promote(store, 3)
    else:
        rollback(store)
    assert present(store) == ("3" if command == "promote" else "1")
    assert [record.version for record in history(client, MODEL)] == (["1", "2", "3"] if command == "promote" else ["1"])
    assert client.get_model_version(MODEL, "2").tags["champion.until_by"] == "ada"


def test_what_makes_no_sense_is_refused(store: str, client: MlflowClient, versions: list[Path]) -> None:
    with pytest.raises(SkdError, match="version 1 is the champion already"):
        promote(store, 1)
    with pytest.raises(SkdError, match="no version 7") as caught:
        promote(store, 7)
    assert caught.value.hint == "its versions are: 1, 2, 3"
    with pytest.raises(SkdError, match="no such registered model") as caught:
        skd(store, "promote", "studnet", "1", "--why", "x")
    assert caught.value.hint == "registered are: skd-student"
    with pytest.raises(SkdError, match="a reason is needed"):
        promote(store, 2, " ")
    shutil.rmtree(versions[1])
    with pytest.raises(SkdError, match=r"its weights are gone: there is nothing at .*student-2"):
        promote(store, 2)
    client.delete_model_version_tag(MODEL, "3", "weights_sha256")
    with pytest.raises(SkdError, match="no student that the pipeline registered"):
        promote(store, 3)
    with pytest.raises(SkdError, match="no champion to roll back from"):
        skd(store, "rollback", "nobody", "--why", "x")
    assert present(store) == "1"
    client.set_model_version_tag(MODEL, "3", "weights_sha256", "3" * 64)
    promote(store, 3)
    shutil.rmtree(versions[0])
    with pytest.raises(SkdError, match="its weights are gone"):
        rollback(store)
    client.delete_model_version(MODEL, "1")
    with pytest.raises(SkdError, match="no version 1"):
        rollback(store)
    assert present(store) == "3"


def test_without_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = CliRunner().invoke(app, ["lineage", MODEL, "--runs-dir", str(tmp_path)])
    assert isinstance(result.exception, SkdError)
    assert "there is no MLflow store" in result.exception.what
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_the_history_of_champions_fits_into_a_tag(store: str, client: MlflowClient, versions: list[Path]) -> None:
    for number in range(2, 42):
        set_champion(client, MODEL, str(1 + number % 2), by="b" * 150, why='"why" ' * 100)
    set_champion(client, MODEL, "3", by="b" * 300, why="last")
    assert 3000 < len(client.get_registered_model(MODEL).tags["skd.champions"]) <= 5000
    last = history(client, MODEL)[-1]
    assert (last.version, last.by, last.why) == ("3", "b" * 300, "last")


def test_files_in_a_clusters_own_storage_are_taken_on_trust(store: str, versions: list[Path]) -> None:
    """People move aliases from their own machines, which cannot look there."""
    uri = "minio://mlpipeline/v2/artifacts/student"
    common: dict[str, Any] = {"weights_sha256": "4" * 64, "run_id": "", "figures": {}, "tags": {}, "promote": False}
    register(tracking_uri=store, model_name=MODEL, student_uri=uri, **common)
    assert "version 4 is the champion now" in promote(store, 4)
