"""Fingerprints follow all of a model that counts and nothing else, and a model that changed since is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.models import fingerprint
from skd_lib.models.fingerprint import file_digest, folder_fingerprint, objects_fingerprint, short
from skd_lib.models.references import check_unchanged, model_fingerprint, resolve_model
from skd_lib.storage import StoredObject
from tests.conftest import SaveTinyModel

OLD = 1_600_000_000
COUNT = (
    "model.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "modeling_own.py",
)
DO_NOT_COUNT = (
    *("README.md", "LICENSE", "pytorch_model.bin", "consolidated.safetensors", "mlflow.db", "rows.jsonl"),
    *("onnx/config.json", "checkpoint-10/model.safetensors"),
)


def write(folder: Path, name: str, text: str) -> None:
    """Write a file, of a size and a time that stay the same."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (OLD, OLD))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in (*COUNT, *DO_NOT_COUNT):
        write(tmp_path / "model", name, "a")
    return tmp_path / "model"


@pytest.mark.parametrize("name", COUNT)
def test_each_file_of_a_folder_counts(model: Path, name: str) -> None:
    before = folder_fingerprint(model)
    write(model, name, "b")
    changed = folder_fingerprint(model)
    (model / name).unlink()
    assert len({before, changed, folder_fingerprint(model)}) == 3
    write(model, name, "a")
    assert folder_fingerprint(model) == before


def test_neither_the_place_nor_other_files_count(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    for name in DO_NOT_COUNT:
        write(tmp_path / "copy", name, "b")
    assert folder_fingerprint(tmp_path / "copy") == folder_fingerprint(model)


def test_a_big_files_digest_is_kept_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "BIG_FILE", 1)
    read: list[Path] = []
    monkeypatch.setattr(storage, "sha256", lambda path: read.append(path) or storage.local.sha256(path))
    write(tmp_path, "weights", "a")
    # It was written a moment ago: another change might not show in its times.
    assert file_digest(tmp_path / "weights") == file_digest(tmp_path / "weights")
    assert len(read) == 2
    monkeypatch.setattr(fingerprint, "SETTLED", -1.0)
    assert file_digest(tmp_path / "weights") == file_digest(tmp_path / "weights")
    assert len(read) == 3
    write(tmp_path, "weights", "b")  # the same size, and the same time of modification
    changed = file_digest(tmp_path / "weights")
    assert changed == storage.local.sha256(tmp_path / "weights")
    assert len(read) == 4
    for entry in (tmp_path / "cache" / "digests").iterdir():
        entry.write_text("cut off")
    assert file_digest(tmp_path / "weights") == changed
    monkeypatch.setenv("SKD_CACHE", str(tmp_path / "weights"))  # no folder
    assert file_digest(tmp_path / "weights") == changed


def test_objects_count_by_name_size_generation_and_checksum() -> None:
    def of(name: str = "config.json", size: int = 1, generation: str = "1", checksum: str = "crc32c:x") -> str:
        objects = [StoredObject(f"gs://bucket/model/{name}", size, generation, checksum, 0.0)]
        readme = StoredObject(f"gs://bucket/model/README.md{generation}", size, generation, checksum, 0.0)
        return objects_fingerprint("gs://bucket/model/", [*objects, readme])

    assert len({of(), of("tokenizer.json"), of(size=2), of(generation="2"), of(checksum="crc32c:y")}) == 5


def test_short_form() -> None:
    assert short("commit:" + "ab" * 20) == "commit abababababab"
    assert short("") == ""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_tiny_model: SaveTinyModel) -> Callable[[str], None]:
    """Puts a commit of the one model of the hub's cache at its default branch; there is no network."""
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def push(commit: str) -> None:
        save_tiny_model(repository / "snapshots" / commit, seed=int(commit[0]))
        (repository / "refs" / "main").write_text(commit)

    return push


def test_a_hub_model_is_fetched_at_the_commit_that_preflight_saw(hub: Callable[[str], None]) -> None:
    hub("1" * 40)
    seen = model_fingerprint("org/name")
    assert seen == f"commit:{'1' * 40}"
    hub("2" * 40)
    assert model_fingerprint("org/name@main") == f"commit:{'2' * 40}"
    assert resolve_model("org/name", fingerprint=seen).name == "1" * 40
    assert resolve_model("org/name").name == "2" * 40
    check_unchanged("org/name", seen)


def test_a_commit_is_asked_for_by_the_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[SimpleNamespace] = []

    def record(repository: str, *, revision: str | None, allow_patterns: list[str], **_: object) -> str:
        asked.append(SimpleNamespace(repository=repository, revision=revision, wanted=allow_patterns))
        return str(tmp_path / ("f" * 40))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    assert model_fingerprint("org/name@v1") == f"commit:{'f' * 40}"
    assert asked == [SimpleNamespace(repository="org/name", revision="v1", wanted=["config.json"])]


def test_a_folder_that_changed_since_preflight_is_refused(tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    folder = str(save_tiny_model(tmp_path / "model"))
    seen = model_fingerprint(folder)
    assert str(resolve_model(folder, fingerprint=seen)) == folder
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    now = model_fingerprint(folder)
    with pytest.raises(SkdError, match="the model changed after preflight looked at it") as caught:
        resolve_model(folder, fingerprint=seen)
    assert caught.value.where == folder
    assert short(seen) in caught.value.what
    assert short(now) in caught.value.what
    assert caught.value.hint == "start the run again"
    with pytest.raises(SkdError, match="changed after preflight"):
        resolve_model(folder, fingerprint=f"commit:{'1' * 40}")  # of a hub model of that name


def test_a_gguf_file_and_a_wheels_member(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF1")
    before = model_fingerprint(str(file))
    file.write_bytes(b"GGUF2")
    assert model_fingerprint(str(file)) != before
    wheels = {
        model_fingerprint(f"wheel://a==1/{name}.gguf?sha256={content * 64}")
        for name in ("b", "c")
        for content in ("0", "1")
    }
    assert len(wheels) == 4


def test_a_bucket_that_is_written_to_while_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_tiny_model: SaveTinyModel
) -> None:
    folder = save_tiny_model(tmp_path / "model")
    generations = iter("11212222222")
    real_download = storage.download

    def objects(uri: str) -> list[StoredObject]:
        return [StoredObject(f"{uri}/config.json", 1, next(generations), "crc32c:x", 0.0)]

    monkeypatch.setattr(storage, "list_objects", objects)
    monkeypatch.setattr(storage, "download", lambda _uri, to: real_download(str(folder), to))
    uri, cache = "gs://bucket/model", tmp_path / "cache"
    monkeypatch.setenv("SKD_CACHE", str(cache))
    seen = model_fingerprint(uri)
    with pytest.raises(SkdError, match="written to while it was fetched"):
        resolve_model(uri)
    assert not list(cache.glob("models/*/model"))  # nothing is kept under a wrong name
    next(generations)
    with pytest.raises(SkdError, match="changed after preflight looked at it"):
        resolve_model(uri, fingerprint=seen)
