"""Checkpoints that survive a kill at any moment, and that a restarted or re-submitted step finds again.

A checkpoint is complete once it holds `MARKER`, written last, and every file that the marker lists, in its size. Older
ones are deleted only after that. With object storage, each is made in a local folder first and then copied, the marker
last. The folder's name is a hash of the inputs, so the same work finds its checkpoints and other work does not. Each
attempt (`skd_lib.training.attempts`) has a folder in it with all that a later one needs: `KEY/ATTEMPT/checkpoint-STEP`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.training.attempts import Heartbeat, living, new_attempt

MARKER = "complete"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_TRIES = 5
"""Number of attempts to copy the newest checkpoint, whose owner may delete it meanwhile."""
log = logging.getLogger(__name__)


def checkpoint_key(step: str, **inputs: Any) -> str:
    """Return `step/HASH`, the folder of a pipeline step's checkpoints, with a hash of all that the result depends on.

    The inputs are JSON values: configuration sections, seed, digests of the data and of the models.
    """
    canonical = json.dumps({"step": step, **inputs}, sort_keys=True)
    return f"{step}/{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"


@dataclass
class Checkpoints:
    """The checkpoints of all attempts at one piece of work, in a local folder.

    Machines without a common file system have one each. The mirror is the URI of a folder for copies; empty: none.
    """

    folder: Path
    mirror: str = ""
    _begun: set[str] = field(default_factory=set, init=False)

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """Begin an attempt at the work, which counts as running inside; all processes call this together."""
        state = PartialState()
        name = str(gather_object([new_attempt()])[0])
        self._begun.add(name)
        attempt = Attempt(self, name)
        folders = [str(attempt.folder)] if state.is_local_main_process else []
        folders += [attempt.mirror] if self.mirror and state.is_main_process else []
        with Heartbeat(folders):
            yield attempt

    def remove(self) -> None:
        """Delete all but other running attempts' checkpoints; log a warning for those that cannot be deleted."""
        for place in [str(self.folder), *filter(None, [self.mirror])]:
            try:
                for attempt in self._begun:
                    _delete_attempt(place, attempt)
                for attempt in sorted(_delete_attempts(place)):
                    log.info("%s/%s stays: another attempt at the same work is running", place, attempt)
            except SkdError as error:
                log.warning("the checkpoints in %s are left there: %s", place, error)
        with suppress(OSError):
            self.folder.rmdir()


@dataclass(frozen=True)
class Attempt:
    """One attempt at a piece of work: takes over the checkpoint of an earlier one, and makes its own."""

    work: Checkpoints
    name: str

    @property
    def folder(self) -> Path:
        """Local folder of the attempt."""
        return self.work.folder / self.name

    @property
    def mirror(self) -> str:
        """URI of the attempt's folder in object storage; empty: none."""
        return f"{self.work.mirror}/{self.name}" if self.work.mirror else ""

    def take_over(self) -> Path | None:
        """Copy the newest usable checkpoint of any attempt, with the best one that it refers to, into its own folder.

        All processes call this together; several machines take the newest checkpoint that all can read. A warning
        names those that are incomplete. Return the copy of the newest; None if there is none.
        """
        state = PartialState()
        for _ in range(_TRIES):
            offers: dict[str, str] = {}
            if state.is_local_main_process:
                for place in filter(None, [self.work.mirror, str(self.work.folder)]):
                    offers |= {offer: place for offer in _offers(place) if not offer.startswith(f"{self.name}/")}
            everywhere = gather_object([sorted(offers) if state.is_local_main_process else None])
            common = set.intersection(*(set(each) for each in everywhere if each is not None))
            if not common:
                return None
            newest: str = max(common, key=_order)
            name = newest.partition("/")[2]
            copied = not state.is_local_main_process or self._copy_here(newest, offers[newest])
            # Two questions, since on a common file system all machines write the same folder.
            if all(gather_object([copied])) and all(gather_object([_inspect(str(self.folder)).get(name) == ""])):
                if state.is_local_main_process:
                    _delete_attempts(str(self.work.folder), own=self.name, until=_step(name))
                return self.folder / name
        raise SkdError(
            "its checkpoints are deleted as soon as they are found",
            where=str(self.work.folder),
            hint="another training with the same settings is running: wait for its end, and run again",
        )

    def begin(self, step: int) -> Path:
        """Make the empty folder of a checkpoint."""
        folder = self.folder / _name(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def commit(self, step: int, best_step: int, keep: int) -> str:
        """Declare a written checkpoint complete, copy it, and delete all but the best and the `keep` newest ones.

        The best is that of `best_step`; 0: there is none yet. A failed copy does not stop the training: it is logged,
        and the next checkpoint tries again. Return its URI in object storage; its path if it is not there.
        """
        newest = _name(step)
        best = _name(best_step) if best_step else newest
        manifest = {"best": best, "files": storage.file_sizes(str(self.folder / newest))}
        storage.write_text_atomic(self.folder / newest / MARKER, json.dumps(manifest, indent=2))
        _delete_old(str(self.folder), best, keep)
        _delete_attempts(str(self.work.folder), own=self.name, until=step)
        if self.mirror:
            try:
                self._copy_away(newest, best)
                _delete_old(self.mirror, best, keep)
                _delete_attempts(self.work.mirror, own=self.name, until=step)
                return f"{self.mirror}/{newest}"
            except SkdError as error:
                log.warning("%s is in %s only: %s", newest, self.folder, error)
        return str(self.folder / newest)

    def _copy_here(self, offer: str, place: str) -> bool:
        """Copy a checkpoint, and the best one that it refers to; return False if its owner deleted it meanwhile."""
        attempt, _, name = offer.partition("/")
        source = f"{place}/{attempt}"
        log.info("taking over the checkpoint %s/%s", source, name)
        try:
            for each in sorted({str(_manifest(source, name)["best"]), name}, key=_step):
                if storage.is_remote(place):
                    storage.download(f"{source}/{each}", self.folder / each)
                else:
                    _link(Path(source) / each, self.folder / each)
        except (storage.Missing, FileNotFoundError):
            return False
        return True

    def _copy_away(self, newest: str, best: str) -> None:
        there = _inspect(self.mirror)
        for name in sorted({best, newest}, key=_step):
            if there.get(name) != "":
                storage.delete(f"{self.mirror}/{name}")  # what is left of a copy that failed
                storage.upload(self.folder / name, f"{self.mirror}/{name}", last=MARKER)


def _offers(place: str) -> list[str]:
    """Return the usable checkpoints of all attempts in a folder, `ATTEMPT/NAME`; warn of the others."""
    sizes: dict[str, dict[str, int]] = {}
    for path, size in storage.file_sizes(place).items():
        attempt, _, file = path.partition("/")
        sizes.setdefault(attempt, {})[file] = size
    usable = []
    for attempt, files in sizes.items():
        for name, problem in _problems(f"{place}/{attempt}", files).items():
            if problem:
                log.warning("the checkpoint %s/%s/%s is left out: %s", place, attempt, name, problem)
            else:
                usable.append(f"{attempt}/{name}")
    return usable


def _order(offer: str) -> tuple[int, str]:
    attempt, _, name = offer.partition("/")
    return _step(name), attempt


def _inspect(place: str) -> dict[str, str]:
    """Map an attempt's checkpoints, oldest first, to the problem of each; empty if it is usable."""
    return _problems(place, storage.file_sizes(place))


def _problems(place: str, files: Mapping[str, int]) -> dict[str, str]:
    sizes: dict[str, dict[str, int]] = {}
    for path, size in files.items():
        name, _, file = path.partition("/")
        if file and _NAME.fullmatch(name):
            sizes.setdefault(name, {})[file] = size
    problems: dict[str, str] = {}
    for name in sorted(sizes, key=_step):
        problems[name] = _problem(place, name, sizes[name], problems)
    return problems


def _problem(place: str, name: str, sizes: Mapping[str, int], older: Mapping[str, str]) -> str:
    if MARKER not in sizes:
        return "it was not written to its end"
    try:
        manifest = _manifest(place, name)
        best, files = str(manifest["best"]), dict(manifest["files"])
    except storage.Missing:
        return "it was deleted a moment ago"
    except (ValueError, KeyError, TypeError):
        return f"its file {MARKER} is damaged"
    for file, size in files.items():
        if sizes.get(file) != size:
            return f"its file {file} is missing or was cut off"
    if best != name and older.get(best) != "":
        return f"{best}, the best checkpoint by then, is missing or damaged"
    return ""


def _manifest(place: str, name: str) -> Any:
    return json.loads(storage.read_bytes(f"{place}/{name}/{MARKER}"))


def _link(source: Path, to: Path) -> None:
    """Copy a local checkpoint, by hard links where the file system has them."""
    with storage.atomic_directory(to) as folder:
        for file in [*_manifest(str(source.parent), source.name)["files"], MARKER]:
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source / file, target)
            except FileNotFoundError:
                raise
            except OSError:  # no hard links there
                shutil.copyfile(source / file, target)


def _delete_old(place: str, best: str, keep: int) -> None:
    """Delete an attempt's own checkpoints except for the best and the `keep` newest."""
    found = _inspect(place)
    kept = {best, *[name for name, problem in found.items() if not problem][-keep:]}
    for name in found.keys() - kept:
        # Without its marker first, so that a kill in between leaves nothing that looks complete.
        storage.delete(f"{place}/{name}/{MARKER}")
        storage.delete(f"{place}/{name}")


def _delete_attempts(place: str, *, own: str = "", until: float = math.inf) -> set[str]:
    """Delete the attempts in a folder that have ended, except for `own`, and return the names of the running ones.

    Attempts with a later step than `until` are kept: a retry goes on from there.
    """
    steps: dict[str, int] = {}
    for path in storage.file_sizes(place):
        attempt, name, *_ = [*path.split("/"), ""]
        steps[attempt] = max(steps.get(attempt, 0), _step(name) if _NAME.fullmatch(name) else 0)
    steps.pop(own, None)
    running = living(place, steps, own=own)
    for attempt in sorted(steps.keys() - running):
        if steps[attempt] <= until:
            _delete_attempt(place, attempt)
    return running


def _delete_attempt(place: str, attempt: str) -> None:
    if storage.is_remote(place):
        storage.delete(f"{place}/{attempt}")
    else:
        shutil.rmtree(Path(place) / attempt, ignore_errors=True)  # another attempt may be deleting it as well


def _name(step: int) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _step(name: str) -> int:
    return int(name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of an optimiser step's checkpoint in an attempt's folder."""
    return folder / _name(step)
