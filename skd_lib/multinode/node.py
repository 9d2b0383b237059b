"""The command of each node of a `TrainJob`: fetch the inputs, then run the step's own command under torchrun.

    python3 -m skd_lib.multinode.node EXCHANGE_URI

torchrun reads the numbers of nodes and processes, this node's rank and the first one's address from the variables that
Trainer's torch runtime sets: PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from skd_lib import storage
from skd_lib.errors import Preempted, SkdError
from skd_lib.multinode.exchange import EXECUTOR_OUTPUT, Exchange, Request
from skd_lib.steps.environment import RESULT_VARIABLE
from skd_lib.steps.kfp_call import Call
from skd_lib.steps.runtime import run_step

log = logging.getLogger(__name__)
LAST_SECONDS = 45.0
"""Seconds that a node waits after a failure before it ends, unless it has refused its work.

Most nodes fail since another one has: the exit code of that one tells Kubernetes whether starting again helps. It comes
up to half a minute later, since torchrun ends its other processes first."""


def main(exchange: Annotated[str, typer.Argument(help="URI of the job's exchange folder.")]) -> None:
    """Do this node's part of a training step on several nodes; see `skd_lib.multinode`."""
    place = Exchange(exchange)
    if place.is_complete():
        # Another node failed on its way out, and Kubernetes has started this one again.
        log.info("the result is there already")
        return
    with _sigterm_reaches_the_child() as child, tempfile.TemporaryDirectory(prefix="skd-node-") as folder:
        request = place.request()
        for name, uri in request.inputs.items():
            log.info("fetching %s from %s", name, uri)
            storage.download(uri, Path(folder) / "inputs" / name)
        command = [sys.executable, "-m", "skd_lib.multinode.launch", *step_command(request, Path(folder))]
        code = child.run(command, {RESULT_VARIABLE: exchange})
        if code not in (0, SkdError.exit_code):
            child.wait_for_signal(LAST_SECONDS)
    if child.was_terminated():
        raise Preempted("stopped by SIGTERM", hint="started again, the job goes on from its last checkpoint")
    if code:
        sys.exit(code)


def step_command(request: Request, folder: Path) -> list[str]:
    """Return the step's module and its options, with inputs under `folder`/inputs and outputs beside them."""
    call = Call(folder / EXECUTOR_OUTPUT, request.artifacts, inputs=request.inputs)
    options = {
        **request.options,
        **{name: str(folder / "inputs" / name) for name in request.inputs},
        **{option: str(folder / "outputs" / name) for option, name in request.outputs.items()},
    }
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    return ["-m", f"skd_lib.steps.{request.step}", *words, *call.words()]


class Child:
    """A process that gets this one's SIGTERM, which only the container's first process gets."""

    def __init__(self) -> None:
        self._terminated = False
        self._process: subprocess.Popen[bytes] | None = None

    def was_terminated(self) -> bool:
        """Return whether SIGTERM came, at any moment: a method, since the handler changes it between two statements."""
        return self._terminated

    def run(self, command: list[str], environment: dict[str, str]) -> int:
        """Run a command, and return its exit code; 1 if a signal ended it."""
        if self.was_terminated():
            return 1
        self._process = subprocess.Popen(command, env={**os.environ, **environment})
        if self.was_terminated():
            self._process.terminate()
        return max(self._process.wait(), 0) or int(self._process.returncode != 0)

    def wait_for_signal(self, seconds: float) -> None:
        """Wait for SIGTERM, `seconds` at most."""
        limit = time.monotonic() + seconds
        while not self._terminated and time.monotonic() < limit:
            time.sleep(0.1)

    def take(self, _number: int, _frame: FrameType | None) -> None:
        """Handle the signal."""
        self._terminated = True
        if self._process is not None:
            self._process.terminate()


@contextmanager
def _sigterm_reaches_the_child() -> Iterator[Child]:
    child = Child()
    before = signal.signal(signal.SIGTERM, child.take)
    try:
        yield child
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    run_step(main)
