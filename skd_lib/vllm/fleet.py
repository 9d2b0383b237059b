"""The servers of a training: rows are spread over those that answer, each with the training's session and weights.

A training may have several processes. The first one that finds a server without the student's weights brings them, the
others wait for it, and each row goes to any server that is ready. A server that is lost leaves its rows to the others,
and is used again when it is back.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from safetensors import SafetensorError

from skd_lib.errors import SkdError, Transient
from skd_lib.vllm.client import Engine, EngineGone, wait_for_one
from skd_lib.vllm.guard import SHARED_MEMORY

log = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 5
"""Times that a batch is asked for again after a server was lost, or a row after vLLM broke its drafts off."""
_SECONDS_BETWEEN_CLAIMS = 0.1


@dataclass(frozen=True)
class Wanted:
    """What a server has to know before it is asked.

    Attributes:
        settings: `RolloutSettings`.
        version: Name of the student's weights; None if the teacher alone is asked, by any settings.
        length: The longest response.
        gamma: Tokens drafted for each call of the teacher.
        longest: The longest prompt that is asked for now, with its longest response.
        teacher: `weights_sample` of the training's teacher.
        bytes: Size of the student's weights.
        write: Writes them to a file.
    """

    settings: dict[str, Any]
    version: str | None
    length: int
    gamma: int
    longest: int
    teacher: str
    bytes: int
    write: Callable[[Path], None]


@dataclass
class Fleet:
    """One process's view of the servers.

    Attributes:
        session: Name of the training, on all of its processes.
        process: Number of this one.
        exchange: A folder that the servers see, too; None: memory or temporary files of this machine.
    """

    session: str
    process: int
    exchange: Path | None
    _known: set[str] = field(default_factory=set, init=False)
    _away: set[str] = field(default_factory=set, init=False)

    def spread(
        self,
        engines: Sequence[Engine],
        wanted: Wanted,
        ask: Callable[[Engine, Any], T],
        items: Sequence[Any],
        sizes: Sequence[int],
    ) -> list[T]:
        """Ask the servers for all items at once, each for its share, and again for those of a server that was lost.

        Args:
            engines: The servers.
            wanted: What each is brought to first.
            ask: Asks a server for an item.
            items: In the order of the results.
            sizes: Of the items: the longest are dealt out first, one to each server in turn.

        Raises:
            SkdError: no server answers, or one refuses.
            Transient: servers are lost again and again.
        """
        results: dict[int, T] = {}
        for _ in range(TRIES):
            ready = self._ready(engines, wanted)
            left = sorted((index for index in range(len(items)) if index not in results), key=lambda i: -sizes[i])
            with ThreadPoolExecutor(max(len(left), 1)) as pool:
                futures = {
                    # Each process begins with another server.
                    index: pool.submit(ask, ready[(place + self.process) % len(ready)], items[index])
                    for place, index in enumerate(left)
                }
            self._release(ready)
            lost: EngineGone | None = None
            for index, future in futures.items():
                try:
                    results[index] = future.result()
                except EngineGone as error:
                    lost = error
            if lost is None:
                return [results[index] for index in range(len(items))]
            log.warning("a vLLM server was lost: its rows are asked for again (%s)", lost)
        raise Transient(
            f"a vLLM server was lost {TRIES} times while it worked on one batch",
            where=_urls(engines),
            hint="look into its log; with less memory in use (`distill.vllm.max_rows`) it may stay",
        )

    def _ready(self, engines: Sequence[Engine], wanted: Wanted) -> list[Engine]:
        """Return the servers that answer and have what is wanted; wait for one if none does."""
        with _parcel(wanted, self.exchange) as parcel, ThreadPoolExecutor(len(engines)) as pool:
            for _ in range(TRIES):
                prepared = list(pool.map(lambda engine: self._prepared(engine, wanted, parcel), engines))
                ready = [engine for engine, is_so in zip(engines, prepared, strict=True) if is_so]
                self._report(engines, ready)
                if ready:
                    return ready
                wait_for_one(engines)
        raise Transient(
            f"the vLLM servers were lost {TRIES} times while they were set up",
            where=_urls(engines),
            hint="look into their logs",
        )

    def _prepared(self, engine: Engine, wanted: Wanted, parcel: Callable[[], Path]) -> bool:
        """Bring a server to what is wanted, also one that was restarted; return whether it is there."""
        if not engine.answers():
            return False
        settings = None if wanted.version is None else wanted.settings
        deadline = time.monotonic() + engine.wait_s
        try:
            while True:
                said = engine.rpc("skd_claim", self.session, wanted.version, str(self.process), settings)
                if said["state"] == "ready":
                    if wanted.version is not None:
                        _check_start(engine, wanted, said)
                    self._known.add(engine.url)
                    return True
                if said["state"] == "yours":
                    self._bring(engine, wanted, parcel, said["session"])
                    continue
                if time.monotonic() > deadline:
                    what = f"another process of this training has kept the server for {engine.wait_s / 60:g} minutes"
                    raise SkdError(what, where=engine.url, hint="its own messages say why")
                time.sleep(_SECONDS_BETWEEN_CLAIMS)
        except EngineGone:
            return False

    def _bring(self, engine: Engine, wanted: Wanted, parcel: Callable[[], Path], session: str) -> None:
        """Set a server up for the session that it lacks, and load the weights."""
        if session != self.session:
            if session and engine.url in self._known:
                raise SkdError(
                    "another training has taken this server over",
                    where=engine.url,
                    hint="give each training servers of its own: there is one student in a server",
                )
            said = engine.rpc("skd_install", wanted.settings, self.session, wanted.length)
            if error := said.get("error"):
                raise SkdError(error, where=engine.url, hint="`skd engine start` starts a server that fits")
            if said["teacher"] != wanted.teacher:
                raise SkdError(
                    f"the server's teacher, {said['folder']}, has other weights than this training's",
                    where=engine.url,
                    hint="start it with the teacher of this run: its fine-tuned one, where the run tunes it",
                )
        if wanted.version is not None:
            engine.load_student(parcel(), wanted.version)
        engine.rpc("skd_arrived", wanted.version)

    def _release(self, engines: Sequence[Engine]) -> None:
        for engine in engines:
            with suppress(EngineGone):
                engine.rpc("skd_release", str(self.process))

    def _report(self, engines: Sequence[Engine], ready: Sequence[Engine]) -> None:
        away = {engine.url for engine in engines if engine not in ready}
        for url in sorted(away - self._away):
            log.warning("the vLLM server at %s does not answer, %d of %d do", url, len(ready), len(engines))
        for url in sorted(self._away - away):
            log.info("the vLLM server at %s answers again", url)
        self._away = away


def _check_start(engine: Engine, wanted: Wanted, said: dict[str, Any]) -> None:
    """Refuse a server that was started for other drafts, or for shorter rows: near its limit vLLM drafts nonsense.

    Raises:
        SkdError: it was.
    """
    if said["gamma"] != wanted.gamma:
        raise SkdError(
            f"the server drafts {said['gamma']} tokens at once, and distill.sampling.gamma is {wanted.gamma}",
            where=engine.url,
            hint=f"start it with --gamma {wanted.gamma}, or change the setting",
        )
    if said["longest"] < wanted.longest:
        raise SkdError(
            f"the server takes {said['longest']} tokens, and a prompt with its longest response has {wanted.longest}",
            where=engine.url,
            hint=f"start it with --max-len {wanted.longest}; if the models take no more, shorten prompts or responses",
        )


@contextmanager
def _parcel(wanted: Wanted, exchange: Path | None) -> Iterator[Callable[[], Path]]:
    """Give a function that returns a folder with the student's weights, which are written when it is first called.

    Raises:
        SkdError: they cannot be written.
    """
    with ExitStack() as stack:
        lock, made = Lock(), list[Path]()

        def folder() -> Path:
            with lock:
                if not made:
                    made.append(written())
                return made[0]

        def written() -> Path:
            root = exchange or _room_for(wanted.bytes)
            try:
                root.mkdir(parents=True, exist_ok=True)
                path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skd-", dir=root)))
                path.chmod(0o755)  # a server may be another user's
                wanted.write(path / "model.safetensors")
            except (OSError, SafetensorError) as error:
                hint = "make room there, or set `distill.vllm.exchange` to a folder that the servers see, too"
                raise SkdError(
                    f"the student's weights cannot be written: {error}", where=str(root), hint=hint
                ) from error
            return path

        yield folder


def _room_for(size: int) -> Path:
    """Return shared memory, or the folder of temporary files where that is too small: 64 MiB in many containers."""
    fits = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 1.1 * size
    return SHARED_MEMORY if fits else Path(tempfile.gettempdir())


def _urls(engines: Sequence[Engine]) -> str:
    return ", ".join(engine.url for engine in engines)
