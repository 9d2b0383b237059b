"""Run torchrun so that its exit code says how its processes ended.

    python3 -m skd_lib.multinode.launch -m skd_lib.steps.distill ...

torchrun's own is 1 whatever happened, by which Kubernetes could not tell what a step refuses from a lost machine.
"""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from skd_lib.errors import SkdError


def exit_code(codes: list[int]) -> int:
    """Choose the exit code of processes that have failed.

    Args:
        codes: Theirs, oldest first; negative: the signal that ended one.

    Returns:
        `SkdError.exit_code` if one of them refused what it was asked to do, else the first one's as a shell has it.
    """
    if SkdError.exit_code in codes:
        return SkdError.exit_code
    return codes[0] if codes[0] > 0 else 128 - codes[0]


def main(words: list[str]) -> int:
    """Run torchrun with these arguments; the exit code."""
    try:
        run.main(words)
    except ChildFailedError as error:
        return exit_code(
            [each.exitcode for each in sorted(error.failures.values(), key=lambda failure: failure.timestamp)]
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
