"""What goes wrong with a store, and when; the model that the tests keep in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from skd_lib import storage
from tests.support.storage_server import Fault, Store

CHUNK = 256 * 1024
LARGE = 700_000  # three chunks of a resumable upload, see `server`
NEW = bytes(range(256)) * (LARGE // 256)
URI = "gs://bucket/models/student.safetensors"
NAME = "models/student.safetensors"
FOLDER = "gs://bucket/model"
SIZES = {"large.safetensors": CHUNK + 1000, "sub/small.safetensors": 2000, "complete": 1}
MARKER = "complete"


def first(kind: str, fault: Fault, times: int = 1) -> Callable[[str, int], Fault]:
    return lambda asked, count: fault if asked == kind and count <= times else None


def always(kind: str, fault: Fault) -> Callable[[str, int], Fault]:
    return lambda asked, _count: fault if asked == kind else None


def nth(store: Store, number: int, fault: Fault, afterwards: Fault = None) -> Callable[[str, int], Fault]:
    """What goes wrong with request `number`, whatever it is, and with those after it."""

    def decide(_kind: str, _count: int) -> Fault:
        asked = store.requests.total()
        return fault if asked == number else afterwards if asked > number else None

    return decide


def nothing_goes_wrong(_kind: str, _count: int) -> Fault:
    return None


def version(text: str) -> dict[str, bytes]:
    """The files of a model, all different and each in one version."""
    return {name: (f"{text} {name} ".encode() * size)[: max(size, 20)] for name, size in SIZES.items()}


def written(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def keep(store: Store, files: dict[str, bytes]) -> None:
    """Make these files of the model all that the store has."""
    store.clear()
    for name, content in files.items():
        store.put(f"model/{name}", content)


def stored(store: Store) -> dict[str, bytes]:
    """What a reader of the model's folder finds."""
    return {name: store.objects[f"model/{name}"][0] for name in storage.file_sizes(FOLDER)}


def kept(store: Store) -> dict[str, bytes]:
    """The same, asked without a request."""
    return {
        name.removeprefix("model/"): content
        for name, (content, _) in dict(store.objects).items()
        if name.startswith("model/")
    }


def tree(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def streamed(uri: str) -> bytes:
    with storage.open_binary(uri) as stream:
        return b"".join(iter(lambda: stream.read(300_000), b""))
