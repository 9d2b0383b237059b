"""A container engine, a registry and the images, really built; what is not here skips the tests that need it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any, Protocol

import pytest
from docker import DockerClient

from locks import locked_versions
from skd_kfp.pipelines.local.containers import connect
from skd_lib import __version__
from skd_lib.errors import SkdError
from tests.support.http import Server

ROOT = Path(__file__).parents[2]
BASE = "skd-test-base:bookworm"
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(ready: Any, process: subprocess.Popen[Any], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if ready():
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Host and port of a real registry: Debian's `docker-registry`."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("no registry here: apt-get install docker-registry")
    folder, port = tmp_path_factory.mktemp("registry"), free_port()
    config = folder / "config.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\nlog: {{level: error}}\n"
    )
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen([program, "serve", config], stdout=log, stderr=log) as server,
    ):
        try:
            assert wait_for(lambda: _listens(port), server), (folder / "log").read_text()
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerClient]:
    """The engine that is here, or one that is started for these tests; `DOCKER_HOST` names it to child processes."""
    with ExitStack() as stack:
        try:
            client = connect()
        except SkdError as error:
            if shutil.which("dockerd") is None or os.geteuid() != 0:
                pytest.skip(f"{error.what}, and none can be started: apt-get install docker.io, and be root")
            stack.enter_context(_daemon(tmp_path_factory.mktemp("docker")))
            client = connect()
        stack.callback(client.close)
        yield client


@contextmanager
def _daemon(folder: Path) -> Iterator[None]:
    """Docker's daemon, without a network of its own: needs no rights over the machine's firewall."""
    host = f"unix://{folder}/docker.sock"
    command = [
        *("dockerd", "--host", host, "--data-root", folder / "data", "--exec-root", folder / "exec"),
        *("--pidfile", folder / "pid", "--iptables=false", "--bridge=none"),
    ]
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("w") as log:
        patch.setenv("DOCKER_HOST", host)
        with subprocess.Popen(command, stdout=log, stderr=log) as daemon:
            try:
                if not wait_for(_answers, daemon, 60):
                    pytest.skip("dockerd does not run here:\n" + (folder / "log").read_text()[-2000:])
                yield
            finally:
                daemon.terminate()
                daemon.wait()
                subprocess.run(["umount", "--quiet", folder / "exec/netns/default"])  # the daemon leaves it behind
                # Gigabytes, which pytest would keep for three sessions; on some disks they take minutes to delete.
                subprocess.Popen(["rm", "-rf", folder / "data"], start_new_session=True)


def _answers() -> bool:
    try:
        connect().close()
    except SkdError:
        return False
    return True


@pytest.fixture(scope="session")
def base_image(engine: DockerClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Debian with Python and this machine's certificates, in the place of `python:3.11-slim`: no registry is asked."""
    if engine.images.list(BASE):
        return BASE
    if shutil.which("mmdebstrap") is None:
        pytest.skip("no base image can be made here: apt-get install mmdebstrap")
    archive = tmp_path_factory.mktemp("base") / "base.tar"
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}"]
    if Path(certificates).is_file():  # pip in a build trusts whom this machine trusts
        command.append(f"--customize-hook=copy-in {certificates} /etc/ssl/certs")
    subprocess.run([*command, "bookworm", archive], check=True)
    repository, _, tag = BASE.partition(":")
    with archive.open("rb") as file:
        engine.api.import_image_from_data(file.read(), repository=repository, tag=tag)
    archive.unlink()
    return BASE


@pytest.fixture(scope="session")
def torch_index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An index that has torch alone, the wheel that this machine's pip finds: for an image without CUDA a small one."""
    folder = tmp_path_factory.mktemp("index")
    version = locked_versions((ROOT / "constraints/main.txt").read_text())["torch"]
    subprocess.run(
        ["python3", "-m", "pip", "download", "--quiet", "--no-deps", f"torch=={version}", "--dest", folder / "torch"],
        check=True,
    )
    handler = partial(_Quiet, directory=str(folder))
    with Server(handler) as server:
        yield f"{server.url}/"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


class Build(Protocol):
    """Builds the image of this name, by default from this source tree; its tag."""

    def __call__(self, name: str, tree: Path = ROOT) -> str: ...


@pytest.fixture(scope="session")
def build(engine: DockerClient, base_image: str, torch_index: str) -> Build:
    """Builds an image, once for all tests."""

    @cache
    def make(name: str, tree: Path = ROOT) -> str:
        tag = f"skd-{name}:{'test' if tree == ROOT else 'pinned'}"
        arguments = {"IMAGE": name, "BASE_IMAGE": base_image, "TORCH_INDEX_URL": torch_index, "REVISION": "abc123"}
        command = [
            *("docker", "build", "--network", "host", "--file", "images/Dockerfile", "--tag", tag),
            *(part for key, value in arguments.items() for part in ("--build-arg", f"{key}={value}")),
            ".",
        ]
        environment = {"DOCKER_BUILDKIT": "0", **os.environ}  # Debian's engine has no BuildKit front end
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        assert engine.images.get(tag).labels["org.opencontainers.image.version"] == __version__
        return tag

    return make
