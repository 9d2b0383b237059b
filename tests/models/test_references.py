from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils._paths import filter_repo_objects

from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.models.references import (
    HubModel,
    LocalFolder,
    LocalGguf,
    StoredFolder,
    WheelMember,
    parse_reference,
    resolve_model,
)
from skd_lib.storage import StoredObject
from tests.conftest import SaveTinyModel

DIGEST = "ab" * 32


def test_grammar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "local").mkdir(parents=True)
    (tmp_path / "model.gguf").touch()
    assert parse_reference(str(tmp_path)) == LocalFolder(tmp_path)
    assert parse_reference("org/local") == LocalFolder(Path("org/local"))
    assert parse_reference("model.gguf") == LocalGguf(Path("model.gguf"))
    assert parse_reference("org/name") == HubModel("org/name", None)
    assert parse_reference("google/gemma-2b-it@v1.0") == HubModel("google/gemma-2b-it", "v1.0")
    assert parse_reference("gs://bucket/a/b") == StoredFolder("gs://bucket/a/b")
    assert parse_reference(f"wheel://a-b==1.0/c/d.gguf?sha256={DIGEST.upper()}") == WheelMember(
        "a-b==1.0", "c/d.gguf", DIGEST
    )


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("", "no such folder"),
        ("./missing", "no such folder"),
        ("/missing/folder", "no such folder"),
        ("a/b/c", "no such folder"),
        ("missing.gguf", "no such file"),
        ("ftp://bucket/model", "unknown kind of model reference: ftp://"),
        ("wheel://a==1/b.gguf", "not a reference to a GGUF file in a wheel"),
        (f"wheel://a/b.gguf?sha256={DIGEST}", "not a reference to a GGUF file in a wheel"),
        (f"wheel://a==1/b.bin?sha256={DIGEST}", "not a reference to a GGUF file in a wheel"),
        ("wheel://a==1/b.gguf?sha256=abc", "not a reference to a GGUF file in a wheel"),
    ],
)
def test_what_is_no_reference(ref: str, message: str) -> None:
    with pytest.raises(SkdError, match=message) as caught:
        parse_reference(ref)
    assert caught.value.hint


def test_local_folder_is_itself(tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    folder = save_tiny_model(tmp_path / "model")
    assert resolve_model(str(folder)) == folder


def test_errors_name_the_reference(tmp_path: Path) -> None:
    with pytest.raises(SkdError, match=r"no config\.json") as caught:
        resolve_model(str(tmp_path))
    assert caught.value.where == str(tmp_path)


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_tiny_model: SaveTinyModel) -> Path:
    """The hub's cache with one model in it, and no network."""
    repository = tmp_path / "hub" / "models--org--name"
    save_tiny_model(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


def test_hub_model_comes_from_the_hubs_cache(hub_cache: Path) -> None:
    folder = resolve_model("org/name")
    assert folder == hub_cache / "snapshots" / ("0" * 40)
    assert resolve_model(f"org/name@{'0' * 40}") == folder


def test_hub_out_of_reach(hub_cache: Path) -> None:
    with pytest.raises(SkdError, match="cannot reach the Hugging Face hub") as caught:
        resolve_model("org/other")
    assert caught.value.where == "org/other"
    assert "HF_ENDPOINT" in caught.value.hint


def hub_error(kind: type[errors.HfHubHTTPError]) -> Exception:
    request = httpx2.Request("GET", "https://huggingface.co/api/models/org/name")
    return kind("from the hub", response=httpx2.Response(404, request=request))


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (hub_error(errors.GatedRepoError), "licence", "huggingface.co/org/name"),
        (hub_error(errors.RepositoryNotFoundError), "no such model on the hub", "spelling"),
        (hub_error(errors.RevisionNotFoundError), "no revision v9", "revision"),
        (hub_error(errors.HfHubHTTPError), "cannot reach", "HF_ENDPOINT"),
        (httpx2.ConnectError("refused"), "cannot reach .*: refused", "network"),
    ],
)
def test_hub_errors_are_sentences(error: Exception, message: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SkdError, match=message) as caught:
        resolve_model("org/name@v9")
    assert hint in caught.value.hint


def test_hub_fetches_no_pickle_no_code_no_other_formats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[SimpleNamespace] = []

    def record(repository: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(SimpleNamespace(revision=revision, allow=allow_patterns, ignore=ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    for trust_remote_code, weights in ((False, True), (True, True), (False, False)):
        with pytest.raises(SkdError, match=r"no config\.json"):
            resolve_model("org/name@v1", trust_remote_code=trust_remote_code, weights=weights)

    def fetched(request: SimpleNamespace) -> set[str]:
        names = ["config.json", "model.safetensors", "pytorch_model.bin", "modeling.py", "onnx/config.json"]
        return set(filter_repo_objects(names, allow_patterns=request.allow, ignore_patterns=request.ignore))

    plain, with_code, without_weights = asked
    assert plain.revision == "v1"
    assert fetched(plain) == {"config.json", "model.safetensors"}
    assert fetched(with_code) == {"config.json", "model.safetensors", "modeling.py"}
    assert fetched(without_weights) == {"config.json"}


# --- object storage --------------------------------------------------------------------------------------------------


def test_stored_folder_is_fetched_anew_only_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_tiny_model: SaveTinyModel
) -> None:
    folder = save_tiny_model(tmp_path / "model")
    generation, downloads = ["1"], []

    def objects(uri: str) -> list[StoredObject]:
        return [StoredObject(f"{uri}/model.safetensors", 1, generation[0], "crc32c:x", 0.0)]

    real_download = storage.download

    def download(uri: str, to: Path) -> Path:
        downloads.append(uri)
        return real_download(str(folder), to)

    monkeypatch.setattr(storage, "list_objects", objects)
    monkeypatch.setattr(storage, "download", download)
    monkeypatch.setenv("SKD_CACHE", str(tmp_path / "cache"))
    first = resolve_model("gs://bucket/model")
    assert (first / "config.json").is_file()
    assert resolve_model("gs://bucket/model") == first
    assert len(downloads) == 1
    generation[0] = "2"
    assert resolve_model("gs://bucket/model") != first
    assert len(downloads) == 2
