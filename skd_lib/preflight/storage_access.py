"""Checks of storage, which may take connections and never answer: preflight waits half a minute, steps wait minutes."""

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
"""Seconds to wait for an answer."""


def bounded(look: Callable[[], T], uri: str) -> T:
    """Return the result of `look`, which reads or writes `uri`; it is left to itself when it takes too long.

    Raises:
        SkdError: it takes too long; or anything that `look` raises.
    """
    return _started(look, uri)()


def check_answers(checks: Checks, uris: Iterable[str]) -> bool:
    """Return whether object storage answers at all, a refusal included; silence is an error.

    Args:
        checks: Takes the findings.
        uris: Everything that will be read and written; the first URI of each scheme is asked for, paths are not.
    """
    first = {uri.partition("://")[0]: uri for uri in reversed(list(uris)) if storage.is_remote(uri)}
    before = len(checks.found)
    for wait in [_started(partial(_any_answer, uri), uri) for uri in first.values()]:
        checks.attempt("storage", wait)
    return len(checks.found) == before


def check_writable(checks: Checks, name: str, uri: str, usable: Callable[[], object] = lambda: None) -> None:
    """Check that a folder is `usable` and can be written; without a URI, nothing is checked."""
    if uri:
        usable()
        bounded(partial(storage.check_writable, uri), uri)
        checks.add(name, "ok", f"{uri} can be written")


def check_readable(checks: Checks, uri: str, *, by_nodes: bool) -> None:
    """Check that this package can read what Kubeflow writes, by its own means, to the pipeline's root.

    Args:
        checks: Takes the findings.
        uri: An artifact of this run.
        by_nodes: Nodes of a TrainJob read it in this run: an error. Otherwise only later runs do: a warning.
    """
    if "://" not in uri:
        return
    try:
        bounded(partial(storage.file_sizes, uri), uri)
    except SkdError as error:
        who = "the nodes of a TrainJob" if by_nodes else "later runs, which compare with the registered student,"
        what = f"{who} cannot read this run's artifacts: {error.what}"
        checks.add("artifacts", "error" if by_nodes else "warning", what, where=uri, hint=error.hint)


def texts(value: Any) -> Iterator[str]:
    """Yield all texts in a section of a configuration."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts(each)


def _any_answer(uri: str) -> None:
    try:
        storage.exists(uri)
    except SkdError:  # the checks that need it say what is wrong
        return


def _started(look: Callable[[], T], uri: str) -> Callable[[], T]:
    """Start `look` in a thread that does not keep the process from ending, and return what waits for its result."""
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
