"""Storage that takes connections and does not answer: preflight waits for half a minute, steps for minutes."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.preflight.checks import Checks

T = TypeVar("T")
PATIENCE = 30.0
"""Seconds."""


def bounded(look: Callable[[], T], uri: str) -> T:
    """Return what `look` finds in storage.

    Args:
        look: What is done; it is left to itself when it takes too long.
        uri: What it looks at.

    Raises:
        SkdError: it took too long, or what `look` raises.
    """
    return _begun(look, uri)()


def check_answers(checks: Checks, uris: Iterable[str]) -> bool:
    """Whether object storage answers at all, in whatever words; what does not is an error.

    Args:
        checks: Takes what is found.
        uris: What will be read and written. Of those of one kind the first is looked for; paths are left out.
    """
    first = {uri.partition("://")[0]: uri for uri in reversed(list(uris)) if storage.is_remote(uri)}
    answers = True
    for wait in [_begun(partial(_any_answer, uri), uri) for uri in first.values()]:
        try:
            wait()
        except SkdError as error:
            checks.failed("storage", error)
            answers = False
    return answers


def texts(value: Any) -> Iterator[str]:
    """Yield all texts in a section of a configuration."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)


def _any_answer(uri: str) -> None:
    try:
        storage.exists(uri)
    except SkdError:  # the checks that need it say what is wrong
        return


def _begun(look: Callable[[], T], uri: str) -> Callable[[], T]:
    """Begin `look` in a thread that does not keep the process from ending; the result waits for it."""
    future: Future[T] = Future()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            future.set_result(context.run(look))
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()

    def wait() -> T:
        try:
            return future.result(PATIENCE)
        except TimeoutError as error:
            if future.done():
                raise
            what = f"the storage has not answered for {PATIENCE:.0f} seconds"
            hint = "check that it works, its address (in a cluster the Secret `skd-storage`), and network policies"
            raise SkdError(what, where=uri, hint=hint) from error

    return wait
