"""Run torchrun with an exit code that tells how its processes ended.

    python3 -m skd_lib.multinode.launch -m skd_lib.steps.distill ...

torchrun's own is always 1, by which Kubernetes could not tell refused work from a lost machine.
"""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from skd_lib.errors import SkdError


def exit_code(codes: list[int]) -> int:
    """Choose the exit code of processes that have failed, from theirs, oldest first; negative: a signal.

    It is `SkdError.exit_code` if one of them refused its work, which Kubernetes does not start again; else the first
    one's as a shell has it: of what may pass by itself that is `Transient.exit_code`, and all nodes start again.
    """
    if SkdError.exit_code in codes:
        return SkdError.exit_code
    return codes[0] if codes[0] > 0 else 128 - codes[0]


def main(words: list[str]) -> int:
    """Run torchrun with these arguments, and return the exit code."""
    try:
        run.main(words)
    except ChildFailedError as error:
        return exit_code(
            [each.exitcode for each in sorted(error.failures.values(), key=lambda failure: failure.timestamp)]
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
