"""Checkpoints that survive a kill at any moment, and that a restarted or re-submitted step finds again.

A checkpoint is complete once it holds `MARKER`, written last, and every file that the marker lists, in its size. Older
ones are deleted only after that. Where checkpoints belong in object storage, each is made in a local folder first and
then copied, the marker last. What a step trains on decides the folder its checkpoints are in, so the same work finds
them and other work does not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from skd_lib import storage
from skd_lib.errors import SkdError

MARKER = "complete"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
log = logging.getLogger(__name__)


def checkpoint_key(step: str, **inputs: Any) -> str:
    """Where a step's checkpoints are, seen from the root of all: `step/HASH`, a hash of all that the result depends on.

    Args:
        step: Name of the pipeline step.
        **inputs: JSON values: configuration sections, seed, digests of what the models read and of the models.
    """
    canonical = json.dumps({"step": step, **inputs}, sort_keys=True)
    return f"{step}/{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training run.

    Attributes:
        folder: Where they are made; of several machines without a common file system each has its own.
        mirror: URI of a folder in object storage for copies of them; empty: none.
    """

    folder: Path
    mirror: str = ""

    def latest(self) -> Path | None:
        """The newest usable checkpoint, None if there is none; all processes call this together.

        What was not written to its end is named in a warning, and removed from the local folder. If object storage has
        a newer one than the local folder, it is fetched, with the best one that it refers to.

        Raises:
            SkdError: object storage cannot be read, or the local folder cannot be written.
        """
        state = PartialState()
        if state.is_local_main_process:
            self._prepare()
        state.wait_for_everyone()
        names = [name for name, problem in _inspect(str(self.folder)).items() if not problem]
        if state.num_processes > 1:
            # Of several machines one may have a checkpoint whose copying failed: all go on from what all have.
            everywhere = set.intersection(*map(set, gather_object([names])))
            names = [name for name in names if name in everywhere]
        return self.folder / names[-1] if names else None

    def commit(self, step: int, best_step: int, keep: int) -> None:
        """Declare a checkpoint that all processes have written complete, copy it, and delete older ones.

        A failed copy does not stop hours of training: it is told, and the next checkpoint tries again.

        Args:
            step: The checkpoint's optimiser step.
            best_step: That of the checkpoint with the lowest validation loss; 0: there is none yet.
            keep: How many of the newest are kept, besides the best.
        """
        newest = _name(step)
        best = _name(best_step) if best_step else newest
        (self.folder / newest / MARKER).unlink(missing_ok=True)
        manifest = {"best": best, "files": storage.file_sizes(str(self.folder / newest))}
        storage.write_text_atomic(self.folder / newest / MARKER, json.dumps(manifest, indent=2))
        _delete_old(str(self.folder), best, keep)
        if self.mirror:
            try:
                self._copy(newest, best)
                _delete_old(self.mirror, best, keep)
            except SkdError as error:
                log.warning("%s is in %s only: %s", newest, self.folder, error)

    def remove(self) -> None:
        """Delete all; to be called once nothing depends on them: what cannot be deleted is told, and left."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.mirror:
            try:
                storage.delete(self.mirror)
            except SkdError as error:
                log.warning("the checkpoints in %s are left there: %s", self.mirror, error)

    def _prepare(self) -> None:
        here = _inspect(str(self.folder))
        for name, problem in here.items():
            if problem:
                log.warning("the checkpoint %s is left out: %s", self.folder / name, problem)
                shutil.rmtree(self.folder / name)
        if not self.mirror:
            return
        there = _inspect(self.mirror)
        for name, problem in there.items():
            if problem:
                log.warning("the checkpoint %s/%s is left out: %s", self.mirror, name, problem)
        usable_here, usable_there = ([n for n, problem in found.items() if not problem] for found in (here, there))
        if usable_there and _steps(usable_there[-1:]) > _steps(usable_here[-1:]):
            newest = usable_there[-1]
            # The best one first: the newest is of no use without it.
            for name in sorted({_manifest(self.mirror, newest)["best"], newest} - set(usable_here), key=_step):
                log.info("fetching the checkpoint %s/%s", self.mirror, name)
                storage.download(f"{self.mirror}/{name}", self.folder / name)

    def _copy(self, newest: str, best: str) -> None:
        there = _inspect(self.mirror)
        for name in sorted({best, newest}, key=_step):
            if there.get(name) != "":
                storage.delete(f"{self.mirror}/{name}")  # what is left of an attempt that was cut off
                storage.upload(self.folder / name, f"{self.mirror}/{name}", last=MARKER)


class CheckpointKeeper(TrainerCallback):
    """Commits each checkpoint that the Trainer writes.

    Args:
        checkpoints: Where they are.
        keep: How many of the newest are kept, besides the best.
    """

    def __init__(self, checkpoints: Checkpoints, keep: int) -> None:
        self._checkpoints, self._keep = checkpoints, keep

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """After a resume: the best checkpoint may have been written under another path, on another machine."""
        self._name_best(state)

    def on_save(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Called by the trainer after each checkpoint."""
        PartialState().wait_for_everyone()
        self._name_best(state)
        if state.is_world_process_zero:
            self._checkpoints.commit(state.global_step, state.best_global_step or 0, self._keep)

    def _name_best(self, state: TrainerState) -> None:
        """On every process: the Trainer names it only where it sees the folder, and all must load it together."""
        if state.best_global_step:
            state.best_model_checkpoint = str(self._checkpoints.folder / _name(state.best_global_step))


def _inspect(place: str) -> dict[str, str]:
    """The checkpoints in a folder, oldest first, and what is wrong with each; empty if nothing is."""
    sizes: dict[str, dict[str, int]] = {}
    for path, size in storage.file_sizes(place).items():
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


def _delete_old(place: str, best: str, keep: int) -> None:
    found = _inspect(place)
    kept = {best, *[name for name, problem in found.items() if not problem][-keep:]}
    for name in found.keys() - kept:
        # Without its marker first, so that a kill in between leaves nothing that looks complete.
        storage.delete(f"{place}/{name}/{MARKER}")
        storage.delete(f"{place}/{name}")


def _name(step: int) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _step(name: str) -> int:
    return int(name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def _steps(names: list[str]) -> list[int]:
    return [_step(name) for name in names]
