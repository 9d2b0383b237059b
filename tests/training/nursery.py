"""Processes that start at once: forked from one that has imported everything, and that never trains itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).parents[2])


class Nursery:
    """Runs `tiny_task.main` in processes of its own.

    Args:
        log: File for what they print.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        with log.open("w") as output:
            self._server = subprocess.Popen(
                [sys.executable, "-m", __name__],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )

    def run_apart(self, *options: dict[str, Any]) -> list[int]:
        """Exit codes of processes that train at the same time, each for itself."""
        return self._start([(each, {}) for each in options])

    def run_on_machines(self, *options: dict[str, Any], **environment: str) -> list[int]:
        """Exit codes of processes that train together, each with options of its own and on a machine of its own."""
        ranks = [{"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} for rank in range(len(options))]
        world = {**self._world(len(options)), **environment}
        return self._start([(each, {**world, **rank}) for each, rank in zip(options, ranks, strict=True)])

    def run(self, options: dict[str, Any], processes: int = 1) -> list[int]:
        """Exit codes of `processes` that train together, with minus the number of a signal that killed one."""
        if processes == 1:
            return self._start([(options, {})])
        world = {**self._world(processes), "LOCAL_WORLD_SIZE": str(processes)}
        return self._start([(options, {**world, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(processes)])

    @staticmethod
    def _world(processes: int) -> dict[str, str]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}

    def _start(self, processes: list[tuple[dict[str, Any], dict[str, str]]]) -> list[int]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(processes), file=self._server.stdin, flush=True)
        codes: list[int] = json.loads(self._server.stdout.readline())
        return codes

    def close(self) -> None:
        """End the server, which has no children left."""
        self._server.communicate()


def _serve() -> None:
    from skd_lib.errors import SkdError
    from tests.training.tiny_task import main

    for line in sys.stdin:
        children = []
        for options, environment in json.loads(line):
            child = os.fork()
            if child == 0:
                os.dup2(2, 1)
                os.environ.update(environment)
                code = 1
                try:
                    main(options)
                    code = 0
                except SkdError as error:
                    print(error, file=sys.stderr)
                    code = error.exit_code
                except BaseException:  # noqa: BLE001 - this copy of the server must end here
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    _serve()
