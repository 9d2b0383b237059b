"""Storage: the same behaviour on local paths and on gs://, the latter against an emulator that speaks its protocol."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from botocore.exceptions import ClientError
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from s3fs.errors import translate_boto_error

from skd_lib import storage
from skd_lib.config import FilesSource
from skd_lib.data import sources
from skd_lib.errors import SkdError, Transient
from skd_lib.storage import gcs
from skd_lib.storage.fsspec_store import _opened
from skd_lib.storage.objects import relative
from tests.support import http
from tests.support.gcs_emulator import emulated

BUCKET = "bucket"


@pytest.fixture(scope="module")
def emulator() -> Iterator[None]:
    with emulated(BUCKET):
        yield


@pytest.fixture(params=["local", "gs", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, locally and in the emulator."""
    if request.param == "local":
        (tmp_path / "root").mkdir()
        return str(tmp_path / "root")
    if request.param == "memory":
        return f"memory://{BUCKET}/{tmp_path.name}"
    request.getfixturevalue("emulator")
    return f"gs://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local folder with files to copy."""
    path = tmp_path / "folder"
    (path / "sub").mkdir(parents=True)
    (path / "a.txt").write_text("a", encoding="utf-8")
    (path / "sub" / "b é.bin").write_bytes(bytes(range(256)) * 1000)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_file_goes_there_and_back(root: str, folder: Path, tmp_path: Path) -> None:
    uri = f"{root}/deep/er/file.bin"
    assert not storage.exists(uri)
    storage.upload(folder / "sub" / "b é.bin", uri)
    assert storage.exists(uri)
    assert storage.exists(f"{root}/deep")
    assert not storage.exists(f"{root}/dee")
    expected = (folder / "sub" / "b é.bin").read_bytes()
    assert storage.read_bytes(uri) == expected
    assert storage.download(uri, tmp_path / "new" / "copy").read_bytes() == expected
    with storage.open_binary(uri) as stream:
        stream.seek(len(expected) - 10)
        assert stream.read() == expected[-10:]


def test_a_folder_goes_there_and_back_and_replaces_what_was_there(root: str, folder: Path, tmp_path: Path) -> None:
    storage.upload(folder, f"{root}/folder")
    storage.upload(folder / "a.txt", f"{root}/folder-not")
    to = tmp_path / "to"
    to.mkdir()
    (to / "old.txt").touch()
    assert storage.download(f"{root}/folder", to) == to
    assert content(to) == content(folder)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_objects_are_listed_with_what_tells_their_content(root: str, folder: Path) -> None:
    storage.upload(folder, f"{root}/folder")
    first = storage.list_objects(f"{root}/folder")
    assert [(item.uri, item.size) for item in first] == [
        (f"{root}/folder/a.txt", 1),
        (f"{root}/folder/sub/b é.bin", 256_000),
    ]
    assert storage.list_objects(f"{root}/folder/a.txt") == first[:1]
    (folder / "a.txt").write_text("b", encoding="utf-8")
    storage.upload(folder / "a.txt", f"{root}/folder/a.txt")
    second = storage.list_objects(f"{root}/folder")
    assert second[0] != first[0]
    assert second[0].checksum != first[0].checksum
    assert second[1] == first[1]


def test_a_folder_is_measured_and_deleted(root: str, folder: Path) -> None:
    assert storage.file_sizes(f"{root}/folder") == {}
    storage.upload(folder, f"{root}/folder", last="a.txt")
    storage.upload(folder / "a.txt", f"{root}/folder-not")
    assert storage.file_sizes(f"{root}/folder") == {"a.txt": 1, "sub/b é.bin": 256_000}
    if root.startswith("gs://"):  # the last object is the newest
        assert max(storage.list_objects(f"{root}/folder"), key=lambda item: int(item.generation)).uri.endswith("a.txt")
    storage.delete(f"{root}/folder/a.txt")
    assert set(storage.file_sizes(f"{root}/folder")) == {"sub/b é.bin"}
    for _ in range(2):
        storage.delete(f"{root}/folder")
    assert not storage.exists(f"{root}/folder")
    assert storage.exists(f"{root}/folder-not")


def test_checkpoints_go_to_folders_and_buckets() -> None:
    for root in ("", "/mnt/checkpoints", "gs://bucket/checkpoints", "s3://bucket/checkpoints"):
        storage.check_checkpoint_root(root)
    with pytest.raises(SkdError, match="checkpoint_root ftp://bucket/x: checkpoints cannot be kept there"):
        storage.check_checkpoint_root("ftp://bucket/x")
    assert storage.checkpoint_folder("/mnt/checkpoints") == Path("/mnt/checkpoints")
    assert storage.checkpoint_folder("gs://bucket/x") == storage.checkpoint_folder("")


def test_a_writable_folder_is_left_as_it_was(root: str) -> None:
    storage.check_writable(f"{root}/new/checkpoints")
    if not storage.is_remote(root):
        assert list((Path(root) / "new" / "checkpoints").iterdir()) == []
    else:
        assert not storage.exists(f"{root}/new")


def test_what_is_missing_is_named(root: str, tmp_path: Path) -> None:
    uri = f"{root}/missing"
    for action in (
        lambda: storage.read_bytes(uri),
        lambda: storage.download(uri, tmp_path / "to"),
        lambda: storage.list_objects(uri),
        lambda: storage.open_binary(uri).__enter__(),
    ):
        with pytest.raises(SkdError) as caught:
            action()
        assert caught.value.where == uri
        assert "o such" in caught.value.what
    assert not (tmp_path / "to").exists()
    with pytest.raises(SkdError, match="no such file or folder"):
        storage.upload(tmp_path / "missing", uri)


def test_unwritable_places_say_why(tmp_path: Path, emulator: None) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SkdError, match="cannot write into: ") as caught:
        storage.check_writable(str(tmp_path / "file" / "folder"))
    assert caught.value.where == str(tmp_path / "file" / "folder")
    with pytest.raises(SkdError, match="no such bucket") as caught:
        storage.check_writable("gs://no-such-bucket/folder")
    assert caught.value.where == "gs://no-such-bucket/folder"
    with pytest.raises(SkdError, match="names no bucket"):
        storage.check_writable("gs:///folder")
    with pytest.raises(SkdError, match="a whole bucket is not deleted"):
        storage.delete(f"gs://{BUCKET}/")


def test_an_object_cannot_be_written_outside_its_folder() -> None:
    with pytest.raises(SkdError, match="outside the folder"):
        relative("folder/../../evil", "folder")


def test_a_device_or_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    path, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(path)
    link.symlink_to("/dev/null")
    for place in (path, link):
        with pytest.raises(FileExistsError, match="device or pipe"):
            storage.write_text_atomic(place, "text")
    assert path.is_fifo()
    assert link.is_char_device()


def test_missing_credentials_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    with pytest.raises(SkdError, match="no valid Google credentials") as caught:
        storage.exists("gs://bucket/file")
    assert "gcloud auth application-default login" in caught.value.hint


def test_credentials_that_cannot_be_had_now_may_be_had_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Busy(http.Handler):
        def do_POST(self) -> None:
            self.send_error(503)

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    with http.Server(Busy) as server:
        account = {
            "type": "service_account",
            "project_id": "mine",
            "client_email": "me@mine.iam.gserviceaccount.com",
            "private_key": pem,
            "token_uri": f"{server.url}/token",
        }
        (tmp_path / "key.json").write_text(json.dumps(account), encoding="utf-8")
        monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
        monkeypatch.setenv("SKD_STORAGE_DEADLINE", "1")
        gcs._client_for.cache_clear()
        with pytest.raises(Transient, match="credentials cannot be had now"):
            storage.exists("gs://bucket/file")
        gcs._client_for.cache_clear()  # the next test has other credentials


def test_other_storage_that_fails_may_be_tried_again() -> None:
    with pytest.raises(Transient, match=r"memory:// failed.*connection reset"), _opened("memory://bucket/file"):
        raise ConnectionResetError("connection reset")
    with pytest.raises(SkdError, match="access denied") as refused, _opened("memory://bucket/file"):
        raise PermissionError("no")
    assert not isinstance(refused.value, Transient)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here.bin"), r"here\.bin: cannot be written(.|\n)*free some"),
        (translate_boto_error(ClientError({"Error": {"Code": "InvalidBucketName"}}, "Head")), "memory:// refuses"),
        (translate_boto_error(ClientError({"Error": {"Code": "PermanentRedirect"}}, "Head")), "memory:// refuses"),
    ],
)
def test_what_stays_wrong_is_not_to_be_tried_again(error: Exception, said: str) -> None:
    with pytest.raises(SkdError, match=said) as found, _opened("memory://bucket/file"):
        raise error
    assert not isinstance(found.value, Transient)


def test_an_address_that_is_none_is_not_to_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "localhost:9")
    with pytest.raises(SkdError, match="No connection adapters") as found:
        storage.exists("gs://bucket/file")
    assert not isinstance(found.value, Transient)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    storage.write_text_atomic(path, "old é")
    with pytest.raises(UnicodeEncodeError):
        storage.write_text_atomic(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old é"
    assert names(tmp_path) == ["file.txt"]
    # As readable as any other new file, since other users' processes read it.
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_interrupted_folder_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "parent" / "folder"
    with storage.atomic_directory(path) as temporary:
        (temporary / "a").touch()
        assert not path.exists()

    def fail() -> None:
        with storage.atomic_directory(path) as temporary:
            (temporary / "b").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(path) == ["a"]
    assert names(path.parent) == ["folder"]
    (tmp_path / "plain").mkdir()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_takes_the_place_of_another_or_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "one" / "sub").mkdir(parents=True)
    (tmp_path / "two").touch()
    for name in ("one", "two"):
        with storage.atomic_directory(tmp_path / name) as temporary:
            (temporary / "new").touch()
        assert names(tmp_path / name) == ["new"]
    assert names(tmp_path) == ["one", "two"]


def test_of_two_folders_made_at_a_time_the_last_wins(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with storage.atomic_directory(path) as outer:
        (outer / "outer").touch()
        with storage.atomic_directory(path) as inner:
            (inner / "inner").touch()
    assert names(path) == ["outer"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between moving the old one aside and putting the new one there."""
    path, replace = tmp_path / "folder", Path.replace
    with storage.atomic_directory(path) as temporary:
        (temporary / "old").touch()

    def interrupted(source: Path, target: Path) -> Path:
        if source.name == "new":
            raise error
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(type(error)), storage.atomic_directory(path) as temporary:
        (temporary / "new").touch()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("name", ["folder", "file"])
def test_a_process_that_is_killed_while_it_copies_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    """Half of the new content is on disk; the next attempt is not hindered by what is left of it."""
    for version in ("old", "new"):
        (tmp_path / version / "folder").mkdir(parents=True)
        for file in (tmp_path / version / "file", tmp_path / version / "folder" / "a", tmp_path / version / "folder/b"):
            file.write_text(version, encoding="utf-8")
    target = str(tmp_path / "store" / name)
    storage.upload(tmp_path / "old" / name, target)
    script = f"""
import os, shutil, signal
from pathlib import Path
from skd_lib import storage
copies = iter([False, True])
def copyfile(source, target, **_):
    Path(target).write_bytes(b"ne")
    if {name == "file"} or next(copies):
        os.kill(os.getpid(), signal.SIGKILL)
shutil.copyfile = copyfile
storage.upload(Path({str(tmp_path / "new" / name)!r}), {target!r})
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    seen = tmp_path / "store" / ("folder" if name == "folder" else "")
    files = {"folder": ["a", "b"], "file": ["file"]}[name]

    def found() -> dict[str, bytes]:
        return {key: value for key, value in content(seen).items() if not key.startswith(".")}

    assert found() == dict.fromkeys(files, b"old")
    storage.upload(tmp_path / "new" / name, target)
    assert found() == dict.fromkeys(files, b"new")


def test_a_folder_that_is_replaced_in_part_is_without_its_marker(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In storage behind fsspec, too; for gs:// see `test_interruptions`."""
    store, uri = pytest.importorskip("fsspec").filesystem("memory"), f"memory://{BUCKET}/{tmp_path.name}"
    (folder / "complete").touch()
    storage.upload(folder, uri, last="complete")
    moved: list[str] = []

    def interrupted(source: str, target: str, **_: object) -> None:
        if moved:
            raise OSError("connection lost")
        moved.append(target)
        store.copy(source, target)

    monkeypatch.setattr(store, "mv", interrupted)
    (folder / "a.txt").write_text("new", encoding="utf-8")
    with pytest.raises(SkdError, match="connection lost"):
        storage.upload(folder, uri, last="complete")
    assert storage.file_sizes(uri) == {"a.txt": 3, "sub/b é.bin": 256_000}
    monkeypatch.undo()
    storage.upload(folder, uri, last="complete")
    assert content(storage.download(uri, tmp_path / "copy")) == content(folder)


@pytest.mark.parametrize("max_rows", [None, 2])
def test_data_files_are_read_from_the_bucket(emulator: None, tmp_path: Path, max_rows: int | None) -> None:
    rows = [{"source": f"source {i}", "target": f"target {i}"} for i in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    uris = {}
    for split, name in (("train", "train.jsonl"), ("test", "test.parquet")):
        uris[split] = [f"gs://{BUCKET}/{tmp_path.name}/{name}"]
        storage.upload(tmp_path / name, uris[split][0])
    source = FilesSource(**uris)
    splits = sources.load(source, max_rows=max_rows)
    for examples in (splits.train, splits.test or []):
        assert [example.target for example in examples] == [row["target"] for row in rows[:max_rows]]
    before = sources.identify(source)
    storage.upload(tmp_path / "train.jsonl", uris["train"][0])
    # The same bytes in a new generation: the data may have been replaced in between.
    assert [item["checksum"] for item in sources.identify(source)] == [item["checksum"] for item in before]
    assert sources.identify(source) != before


def test_data_files_in_folders_and_by_globs(root: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "_SUCCESS", "notes.md"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"source": name, "target": "x"}) + "\n", encoding="utf-8")
    storage.upload(folder, f"{root}/data")

    def found(uri: str) -> list[str]:
        splits = sources.load(FilesSource(train=[uri]), max_rows=10)
        assert splits == sources.load(FilesSource(train=[uri]))
        assert len(sources.identify(FilesSource(train=[uri]))) == len(splits.train)
        return [example.source for example in splits.train]

    assert found(f"{root}/data") == found(f"{root}/data/") == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert found(f"{root}/data/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert found(f"{root}/data/**/*.jsonl") == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert found(f"{root}/data/a.jsonl") == ["a.jsonl"]
    for nothing in ("data/*.csv", "nowhere", "nowhere/*.jsonl"):
        with pytest.raises(SkdError) as caught:
            sources.load(FilesSource(train=[f"{root}/{nothing}"]))
        assert nothing in str(caught.value)
