"""Steps as forks of one process that has imported what they need.

Importing torch, transformers and MLflow takes a step up to ten seconds of a core; a fork has them at once, and shares
their memory. It is a process of its own all the same: its environment, streams, session and end are its own.

Only on Linux, and on machines without a GPU: a process that forks must never have touched one, and some libraries look
for it when they are imported. Elsewhere each step is a new interpreter.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from skd_kfp.pipelines.local.process import Child, die_with_parent
from skd_lib.tracking.client import quieten

IMPORTED = (
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "skd_lib.evaluation.evaluate",
    "skd_lib.training.run",
    "transformers.models.auto.modeling_auto",
    "datasets",
)
"""What most steps need."""
_GPUS = ("/dev/nvidiactl", "/dev/kfd")
_AS_A_PROGRAM: dict[signal.Signals, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
_NUMBER = 8  # bytes of one: how long a request is, a process's id, an exit code


def can_fork() -> bool:
    """Whether steps may be forks on this machine."""
    return sys.platform == "linux" and not any(map(os.path.exists, _GPUS))


class ForkServer:
    """A process that has imported what steps need, and forks one at a time. A context manager: it ends with it.

    Args:
        env: Its environment, which libraries read when they are imported.
        log: File that takes what it says itself, and what libraries say when they are imported.
        imported: Modules; one that is not installed is left out.
    """

    def __init__(self, env: Mapping[str, str], log: Path, imported: Sequence[str] = IMPORTED) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs, log.open("w", encoding="utf-8") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), *imported],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=dict(env),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),
            )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def start(self, module: str, arguments: Sequence[str], env: Mapping[str, str]) -> Child | None:
        """Start `python3 -m MODULE ARGUMENTS` as a fork; None where the server has ended.

        Args:
            module: Run as a script.
            arguments: Of its command line.
            env: Beside the server's environment, or in its place.
        """
        reading, writing = os.pipe()
        output = os.fdopen(reading, encoding="utf-8", errors="replace")
        request = json.dumps({"module": module, "arguments": list(arguments), "env": dict(env)}).encode()
        try:
            socket.send_fds(self._socket, [len(request).to_bytes(_NUMBER, "big")], [writing])
            self._socket.sendall(request)
            pid = _receive_number(self._socket)
        except ConnectionError:
            pid = None
        finally:
            os.close(writing)
        if pid is None:
            output.close()
            return None
        return _Fork(pid, output, self._socket)


class _Fork:
    """A step that was forked: what `process.run_logged` wants to know of a child."""

    def __init__(self, pid: int, stdout: TextIO, server: socket.socket) -> None:
        self.pid, self.stdout, self._server = pid, stdout, server
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative for a signal; where the server was killed, the step was killed with it.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self._code is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("", timeout or 0.0)
            code = _receive_number(self._server)
            self._code = -signal.SIGKILL if code is None else code
        return self._code


def _serve(server: socket.socket) -> tuple[str, list[str]] | None:
    """Fork at each request, and tell how the fork ended.

    Returns:
        In a fork, its module and arguments; None in the server, at the end.
    """
    while request := _receive_request(server):
        module, arguments, env, output = request
        ask_the_kernel = die_with_parent(os.getpid())
        pid = os.fork()
        if pid == 0:
            server.close()
            for number, handler in _AS_A_PROGRAM.items():
                signal.signal(number, handler)
            if ask_the_kernel:
                ask_the_kernel()
            os.setsid()  # as any step: Ctrl-C reaches the runner alone, and it stops the whole group
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            # The streams that are there take their file for the server's log, which can be sought in.
            sys.stdout, sys.stderr = (
                open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
                for descriptor in (1, 2)
            )
            os.environ.update(env)  # beside what the imports have set
            return module, arguments
        os.close(output)
        _send_number(server, pid)
        _send_number(server, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return None


def _receive_request(server: socket.socket) -> tuple[str, list[str], dict[str, str], int] | None:
    """Module, arguments, environment, and the descriptor that takes the output; None at the end."""
    length, descriptors, _, _ = socket.recv_fds(server, _NUMBER, 1)
    if not length:
        return None
    request = json.loads(server.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
    return request["module"], request["arguments"], request["env"], descriptors[0]


def _send_number(to: socket.socket, number: int) -> None:
    with suppress(ConnectionError):  # the caller has ended
        to.sendall(number.to_bytes(_NUMBER, "big", signed=True))


def _receive_number(server: socket.socket) -> int | None:
    """None where the server has ended."""
    received = server.recv(_NUMBER, socket.MSG_WAITALL)
    return int.from_bytes(received, "big", signed=True) if received else None


def main() -> None:
    """Import, then fork until the runner ends; what comes after it in a fork is the step."""
    for number in _AS_A_PROGRAM:
        # One that goes to all processes of a service is for the step: it dies with this process, at once.
        signal.signal(number, signal.SIG_IGN)
    ending = _Ending()
    atexit.register(ending.leave)  # first, so that it is called last
    quieten()
    descriptor, *imported = sys.argv[1:]
    for module in imported:
        with suppress(ImportError):  # a step that needs it will say so
            importlib.import_module(module)
    # Python 3.12 warns of threads. Those that are there by now are of BLAS and of Arrow's allocator, made to be forked.
    warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
    gc.freeze()  # a fork that looked through all these objects for garbage would copy them
    step = _serve(socket.socket(fileno=int(descriptor)))
    if step is not None:
        module, sys.argv[1:] = step
        with ending:
            runpy.run_module(module, run_name="__main__", alter_sys=True)


class _Ending:
    """Leaves without taking the imported libraries apart, which takes a fork seconds and all their memory."""

    code = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, SystemExit):
            self.code = error.code if isinstance(error.code, int) else int(error.code is not None)
        else:
            self.code = int(error is not None)

    def leave(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.code)


if __name__ == "__main__":
    main()
