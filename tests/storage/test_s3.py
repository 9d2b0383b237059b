"""Buckets that speak S3, Kubeflow's own among them: by which names, at which address, and what is said of failures."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.models.references import StoredFolder, parse_reference
from skd_lib.storage import fsspec_store


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """Takes the place of s3fs, and notes with what it is made."""

    protocol = ("s3", "s3a")
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012 - as in the class above
    made: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.made.append(options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(f"memory://{path.removeprefix('s3://').lstrip('/')}"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of all file systems that are made."""
    monkeypatch.setitem(_registry, "s3", Bucket)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setattr(Bucket, "made", [])
    monkeypatch.setattr(Bucket, "store", {})
    return Bucket.made


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Exception | None]]:
    """What a connection to each of a cluster's names and ports gives; those that it has not are not known."""
    there: dict[str, Exception | None] = {}

    def connect(address: tuple[str, int], timeout: float) -> Mock:
        error = there.get("{}:{}".format(*address), socket.gaierror(-2, "Name or service not known"))
        if error:
            raise error
        return Mock()

    monkeypatch.setattr("socket.create_connection", connect)
    fsspec_store.kubeflows_own.cache_clear()
    yield there
    fsspec_store.kubeflows_own.cache_clear()


def testkubeflows_own_storage_is_read_and_written(
    made: list[dict[str, Any]], services: dict[str, Exception | None], tmp_path: Path
) -> None:
    services["seaweedfs.kubeflow:9000"] = None
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    uri = "minio://mlpipeline/v2/artifacts/student"
    storage.upload(tmp_path / "model", uri)
    assert storage.file_sizes(uri) == {"config.json": 2}
    assert [found.uri for found in storage.list_objects(uri)] == [f"{uri}/config.json"]
    assert (storage.download(uri, tmp_path / "copy") / "config.json").read_text() == "{}"
    assert storage.read_bytes("s3://mlpipeline/v2/artifacts/student/config.json") == b"{}"
    assert made[0]["endpoint_url"] == "http://seaweedfs.kubeflow:9000"
    assert "endpoint_url" not in made[-1]
    assert {options["config_kwargs"]["retries"]["total_max_attempts"] for options in made} == {1}


@pytest.mark.parametrize(
    ("there", "endpoint"),
    [
        ({"seaweedfs.kubeflow:9000": None}, "http://seaweedfs.kubeflow:9000"),  # since 2.16
        ({"minio-service.kubeflow:9000": None}, "http://minio-service.kubeflow:9000"),
        # 2.15: the first service is there without this port
        (
            {"seaweedfs.kubeflow:9000": TimeoutError(), "minio-service.kubeflow:9000": None},
            "http://minio-service.kubeflow:9000",
        ),
        ({"seaweedfs.kubeflow:9000": ConnectionRefusedError()}, "http://seaweedfs.kubeflow:9000"),  # away for now
    ],
)
def testkubeflows_own_storage_has_two_names(
    made: list[dict[str, Any]],
    services: dict[str, Exception | None],
    there: dict[str, Exception | None],
    endpoint: str,
) -> None:
    services.update(there)
    assert not storage.exists("minio://mlpipeline/nothing")
    assert made[0]["endpoint_url"] == endpoint


def test_where_neither_name_is_known_both_are_named(
    made: list[dict[str, Any]], services: dict[str, Exception | None]
) -> None:
    with pytest.raises(
        SkdError, match=r"seaweedfs\.kubeflow:9000 and no http://minio-service\.kubeflow:9000"
    ) as caught:
        storage.exists("minio://mlpipeline/nothing")
    assert "`aws-endpoint-url`" in caught.value.hint
    services["minio-service.kubeflow:9000"] = None
    assert not storage.exists("minio://mlpipeline/nothing")  # it is looked for again


def test_it_may_be_elsewhere(made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    assert not storage.exists("minio://mlpipeline/nothing")
    assert [options["endpoint_url"] for options in made] == ["http://localhost:9000"]


def test_a_model_may_be_there() -> None:
    uri = "minio://mlpipeline/v2/artifacts/student"
    assert parse_reference(uri) == StoredFolder(uri)


@pytest.mark.parametrize("scheme", ["s3", "minio"])
def test_a_missing_package_is_named_by_its_extra(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SkdError, match=f"{scheme}:// needs another package: s3fs") as caught:
        storage.exists(f"{scheme}://bucket/file")
    assert caught.value.hint == "pip install 'skd-lib[s3]'"


def test_what_the_package_raises_is_a_sentence(made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials botocore raises errors of its own, which are no `OSError`."""
    exceptions = pytest.importorskip("botocore.exceptions")

    def refused(*_: object, **__: object) -> None:
        raise exceptions.NoCredentialsError

    monkeypatch.setattr(Bucket, "find", refused)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    words = "minio:// failed at http://localhost:9000: Unable to locate credentials"
    with pytest.raises(SkdError, match=words) as caught:
        storage.file_sizes("minio://mlpipeline/v2")
    assert "credentials" in caught.value.hint


def test_what_others_write_is_seen(made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs looks for an object in the last listing of its folder first, if it has one."""
    asked: list[str] = []
    monkeypatch.setattr(Bucket, "invalidate_cache", lambda *_: asked.append("forget"))
    monkeypatch.setattr(Bucket, "exists", lambda *_, **__: asked.append("exists"))
    storage.exists("s3://bucket/marker")
    assert asked == ["forget", "exists"]
