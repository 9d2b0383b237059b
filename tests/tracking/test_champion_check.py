"""Preflight looks whether this run can be compared with the champion, and later runs with this one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import RestException

from skd_lib import storage
from skd_lib.config import RunConfig
from skd_lib.preflight import Check, run_checks
from skd_lib.steps import kfp_call, preflight
from skd_lib.tracking.registry import register
from tests.conftest import SaveTinyModel

CONFIG = RunConfig.model_validate(
    {
        "name": "small",
        "teacher": "/nowhere/teacher",
        "student": "/nowhere/student",
        "data": {"source": {"type": "files", "train": ["/nowhere/train.jsonl"]}},
    }
)
"""Nothing of it is there: the other checks take no time."""
NODES: dict[str, Any] = {"multinode": {"nodes": 2}, "training": {"micro_batch_size": 4}}
Look = Callable[..., list[Check]]


@pytest.fixture
def look(store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Look:
    """Returns preflight's words on the champion and the artifacts."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))

    def look(config: RunConfig = CONFIG, **options: Any) -> list[Check]:
        found = run_checks(config, **{"checkpoint_root": "", "tracking_uri": store, **options}).checks
        return [check for check in found if check.name in ("champion", "artifacts")]

    return look


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("champion") / "student")


@pytest.fixture
def crowned(store: str) -> Callable[[str], None]:
    def crown(uri: str) -> None:
        common: dict[str, Any] = {"weights_sha256": "c" * 64, "run_id": "", "figures": {}, "tags": {}}
        register(tracking_uri=store, model_name="skd-student", student_uri=uri, promote=True, **common)

    return crown


def test_a_champion_that_is_there(
    look: Look, crowned: Callable[[str], None], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert look() == []
    storage.upload(model, "memory://champions/student")
    crowned("memory://champions/student")
    monkeypatch.setattr(storage, "download", None)  # nothing is fetched
    assert look() == [Check("champion", "ok", "version 1: its files are there")]
    assert look(tracking_uri="") == look(variants=[CONFIG, CONFIG]) == []


def test_a_champion_in_a_folder(look: Look, crowned: Callable[[str], None], model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "student"))
    crowned(str(folder))
    assert [check.level for check in look()] == ["ok"]
    (folder / "model.safetensors").unlink()
    assert [check.level for check in look()] == ["error"]


@pytest.mark.parametrize("uri", ["/nowhere/student", "memory://champions/gone", ""])
def test_a_champion_that_is_gone(look: Look, crowned: Callable[[str], None], uri: str) -> None:
    """Otherwise it is step evaluate_champion that finds it, after the training."""
    crowned(uri)
    (found,) = look()
    assert (found.level, found.where) == ("error", uri or "registered model `skd-student`")
    assert found.what.startswith("the champion (version 1) cannot be compared with: ")
    assert "skd promote" in found.hint


@pytest.mark.parametrize(
    ("uri", "hint"),
    [("oci://bucket/student", "pip install ocifs; or put its files back"), ("hf://x/y", "object storage")],
)
def test_a_champion_in_storage_that_is_not_read_here(
    look: Look, crowned: Callable[[str], None], uri: str, hint: str
) -> None:
    crowned(uri)
    (found,) = look()
    assert (found.level, found.where) == ("error", uri)
    assert hint in found.hint


def test_a_registry_that_does_not_answer_is_another_check_s_business(look: Look) -> None:
    assert look(tracking_uri="http://localhost:9") == []


@pytest.mark.parametrize(
    ("code", "levels"), [("PERMISSION_DENIED", ["error"]), ("UNAUTHENTICATED", ["error"]), ("INTERNAL_ERROR", [])]
)
def test_a_registry_that_refuses(look: Look, monkeypatch: pytest.MonkeyPatch, code: str, levels: list[str]) -> None:
    """Otherwise it is step evaluate_champion that is refused, after the training."""

    def answers(*_: object) -> None:
        raise RestException({"error_code": code, "message": "Permission denied"})

    monkeypatch.setattr("mlflow.MlflowClient.get_model_version_by_alias", answers)
    monkeypatch.setattr("time.sleep", lambda _: None)
    found = look()
    assert [check.level for check in found] == levels
    for check in found:
        assert "Permission denied" in check.what
        assert "`skd-student`" in check.where
        assert "`skd-mlflow`" in check.hint


def test_this_run_s_artifacts_must_be_read_by_later_runs(look: Look) -> None:
    assert look(artifacts="memory://bucket/v2/report") == look(artifacts="/local/report") == []
    (found,) = look(artifacts="oci://bucket/v2/report")
    assert (found.level, found.where, found.hint) == ("warning", "oci://bucket/v2/report", "pip install ocifs")
    assert "later runs, which compare with the registered student, cannot read" in found.what
    assert look(artifacts="oci://bucket/v2/report", tracking_uri="") == []  # nothing is registered


def test_nodes_read_this_run_s_artifacts_at_once(look: Look) -> None:
    config = RunConfig.model_validate({**CONFIG.model_dump(), "distill": NODES})
    (found,) = look(config, artifacts="oci://bucket/v2/report", tracking_uri="")
    assert found.level == "error"
    assert "the nodes of a TrainJob cannot read" in found.what


def test_step_preflight_says_where_its_artifacts_are(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "a-pod")
    monkeypatch.setitem(kfp_call.SCHEMES, tmp_path.parts[1], "oci")  # as if /oci were a mounted bucket
    report = tmp_path / "task" / "findings"
    preflight.main(report, config=CONFIG.model_dump_json(), tracking_uri=store)
    assert f"oci://{'/'.join(report.parts[2:])}: later runs" in report.read_text(encoding="utf-8")
