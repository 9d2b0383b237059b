"""What all fuzz tests share.

Without more, few examples are tried, always the same ones. SKD_FUZZ_EXAMPLES=2000 tries so many of each, other ones
each time; a failure prints the example, and how to repeat it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings

from skd_lib._core.bugs import Bug
from skd_lib.errors import SkdError, SkdErrors

T = TypeVar("T")
WANTED = int(os.environ.get("SKD_FUZZ_EXAMPLES", "0"))
SECONDS = 60
"""CPU time of all threads that one example may take: far more than any needs, even the first one of a process."""


def fuzz(examples: int) -> Any:
    """How many examples a test tries in the suite."""
    return settings(
        max_examples=WANTED or examples,
        derandomize=not WANTED,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        # To shrink is for people who look at a failure.
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if WANTED else [])],
    )


@contextmanager
def bounded() -> Iterator[None]:
    """Fail where what is done takes too much CPU time, or waits for something that never comes."""

    def stop(*_: object) -> None:
        raise AssertionError("it does not end")

    before = {name: signal.signal(name, stop) for name in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for name, handler in before.items():
            signal.signal(name, handler)


def accepted(call: Callable[[], T]) -> T | None:
    """Return what the call returns; None where it refuses with a sentence. Anything else that is raised is a bug."""
    try:
        with bounded():
            return call()
    except SkdErrors as several:
        for error in several.errors:
            assert_sentence(error)
    except SkdError as error:
        assert_sentence(error)
    return None


def assert_sentence(error: SkdError) -> None:
    """A bug of ours that was explained is still one."""
    assert not isinstance(error, Bug), str(error)
    assert error.what.strip()
    assert "this is a bug" not in error.what, str(error)
    assert len(str(error)) < 5_000
