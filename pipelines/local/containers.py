"""Run steps in containers on this machine: in the pipeline's images, as a cluster does.

kfp's own Docker runner lets the engine remove a container when it ends, and takes a container that is gone before its
exit code was read for a successful one (`kfp/local/docker_task_handler.py`). Here a container stays until its exit code
is known, and one that was removed from outside has failed.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import DeviceRequest, Mount

from skd_kfp.pipelines.local.process import STOP_SECONDS, OnEvent, Outcome, Start, follow
from skd_lib._core.uris import is_sqlite
from skd_lib.config import FilesSource, HeldOutFiles, RunConfig
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.models.references import LocalFolder, LocalGguf, parse_reference
from skd_lib.storage import cache, is_remote

PASSED_ON = ("GOOGLE_", "HF_", "MLFLOW_", "PIP_", "SKD_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""Prefixes of the variables that steps in containers get from this process's environment."""
CREDENTIALS = "GOOGLE_APPLICATION_CREDENTIALS"
SHARED_MEMORY = "8g"
OWNER = "skd.run"
"""Label of our containers: the folder of their run."""


@dataclass(frozen=True)
class Inputs:
    """The models, data and stores that a run reads: of this machine, and those that need the network."""

    local: tuple[Path, ...]
    remote: tuple[str, ...]


def inputs_of(config: RunConfig, tracking_uri: str) -> Inputs:
    """Return where the run's models, data and records are."""
    local: list[Path] = []
    remote: list[str] = []
    comet = config.evaluation.comet.model if config.task.wants_comet else None
    for model in filter(None, [config.teacher, config.student, comet]):
        match parse_reference(model):
            case LocalFolder(path) | LocalGguf(path):
                local.append(path)
            case _:
                remote.append(model)
    for source in [config.data.source, *(held_out.source for held_out in config.data.held_out)]:
        match source:
            case FilesSource():
                files = [*source.train, *source.validation, *source.test]
            case HeldOutFiles():
                files = source.files
            case _:
                files = []
                remote.append(f"data of type {source.type}")
        local += [Path(file) for file in files if not is_remote(file)]
        remote += [file for file in files if is_remote(file)]
    if tracking_uri and not is_sqlite(tracking_uri):
        remote.append(tracking_uri)
    if config.evaluation.judge.url:
        remote.append(config.evaluation.judge.url)
    return Inputs(tuple(path.absolute() for path in local), tuple(remote))


@dataclass(frozen=True)
class Containers:
    """The engine, images and folders with which steps run in containers.

    `images` has the digest or id of each image of the pipeline, so that a rebuilt one does not reuse the outputs of an
    older one. Steps write to `folder`, the run's, and to `writable` only; without remote inputs they have no network.
    """

    client: docker.DockerClient
    images: Mapping[str, str]
    folder: Path
    inputs: Inputs
    writable: tuple[Path, ...] = ()

    def starter(self, settings: Mapping[str, str]) -> Start:
        """Return what runs the steps; containers that a killed process left behind are removed first."""
        arguments = self._arguments()
        owned = {"label": f"{OWNER}={self.folder}"}
        for left in self.client.containers.list(all=True, ignore_removed=True, filters=owned):
            _remove(left)
        kept = {name: value for name, value in os.environ.items() if name.upper().startswith(PASSED_ON)}
        caches = {"SKD_CACHE": str(cache.default_cache_dir()), "HF_HOME": str(_hub_home())}

        def start(image: str, command: list[str], env: Mapping[str, str], log: Path, on_event: OnEvent) -> Outcome:
            environment = {**kept, **caches, **settings, **env}
            return run_container(
                self.client, image, command, log=log, on_event=on_event, environment=environment, **arguments
            )

        return start

    def _arguments(self) -> dict[str, Any]:
        """Return a container's arguments: as restricted as a cluster's pods, so that what fails there fails here."""
        temporary = self.folder / ".tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        written = {self.folder, *self.writable, cache.default_cache_dir(), _hub_home(), temporary}
        for path in written:
            path.mkdir(parents=True, exist_ok=True)
        read = {*self.inputs.local}
        if credentials := os.environ.get(CREDENTIALS):
            read.add(Path(credentials).absolute())
        missing = [SkdError("no such file or folder", where=str(path)) for path in sorted(read) if not path.exists()]
        if missing:
            raise SkdErrors(missing)
        return {
            "mounts": [
                *(Mount(str(path), str(path), type="bind", read_only=True) for path in sorted(read)),
                *(Mount(str(path), str(path), type="bind") for path in sorted(written - {temporary})),
                Mount("/tmp", str(temporary), type="bind"),  # noqa: S108 - in the container
            ],
            "labels": {OWNER: str(self.folder)},
            "user": f"{os.getuid()}:{os.getgid()}",
            "working_dir": str(Path.cwd()),
            "network_mode": "host" if self.inputs.remote else "none",
            "read_only": True,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "shm_size": SHARED_MEMORY,
            "device_requests": (
                [DeviceRequest(count=-1, capabilities=[["gpu"]])] if "nvidia" in self.client.info()["Runtimes"] else []
            ),
        }


def connect() -> docker.DockerClient:
    """Connect to the engine that `DOCKER_HOST` names, or to this machine's."""
    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        raise SkdError(
            f"no container engine answers: {error}", where="--docker", hint="start Docker, or set DOCKER_HOST"
        ) from error
    return client


def find_image(client: docker.DockerClient, name: str) -> str:
    """Return an image's digest in a registry, or its id if it was built here; pull the image if it is missing."""
    try:
        image = client.images.get(name)
    except ImageNotFound:
        try:
            image = client.images.pull(name)
        except APIError as error:
            raise SkdError(
                f"there is no such image here, and it cannot be pulled: {error.explanation or error}",
                where=name,
                hint="build it (images/README.md), and name it with --image or --comet-image",
            ) from error
    return str(next(iter(image.attrs.get("RepoDigests") or []), image.id))


def run_container(
    client: docker.DockerClient, image: str, command: list[str], *, log: Path, on_event: OnEvent, **arguments: Any
) -> Outcome:
    """Run a command in a new container to its end, and remove the container.

    Output and events are handled as by `process.run_logged`. If the caller is interrupted, the container is stopped.
    `arguments` are those of docker's `containers.create`.
    """
    try:
        container = client.containers.create(image, command, **arguments)
    except APIError as error:
        return Outcome(1, f"the container cannot be made: {error.explanation or error}", ())
    try:
        container.start()
        sentence, tail = follow(_lines(_output(container)), log, on_event)
        return Outcome(_code(int(container.wait()["StatusCode"])), sentence, tail)
    except APIError as error:
        # The engine's answers for a container that is gone, and for one that is "dead or marked for removal".
        if isinstance(error, NotFound) or error.status_code == HTTPStatus.CONFLICT:
            return Outcome(1, "the container was removed before it was known how it ended", ())
        return Outcome(1, f"the container cannot be run: {error.explanation or error}", ())
    except requests.RequestException as error:
        return Outcome(1, f"the container engine does not answer any more: {error}", ())
    except BaseException:
        with contextlib.suppress(APIError, requests.RequestException):
            container.stop(timeout=int(STOP_SECONDS))
        raise
    finally:
        _remove(container)


def _output(container: Any) -> Iterator[bytes]:
    """Yield all output of a container, while it runs.

    A stream that follows the output may end before the container's last lines (seen with Docker 28).
    """
    seen = 0
    for chunk in container.logs(stream=True, follow=True):
        seen += len(chunk)
        yield chunk
    container.wait()
    for chunk in container.logs(stream=True, follow=False):
        missed = chunk[max(seen, 0) :]
        seen -= len(chunk)
        if missed:
            yield missed


def _remove(container: Any) -> None:
    """Remove a container that may be gone already; one that stays is removed before the folder's next run."""
    with contextlib.suppress(APIError, requests.RequestException):
        container.remove(force=True)


def _code(status: int) -> int:
    """Return a container's exit status as `Outcome` has it: a signal, 128 + its number there, is negative here."""
    return 128 - status if status - 128 in signal.valid_signals() else status


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield whole lines of a stream of bytes, whose chunks end anywhere."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    rest = ""
    for chunk in chunks:
        *lines, rest = (rest + decode(chunk)).split("\n")
        yield from (f"{line}\n" for line in lines)
    if rest := rest + decode(b"", final=True):
        yield rest


def _hub_home() -> Path:
    """Return the folder of the Hugging Face hub's models."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME)
