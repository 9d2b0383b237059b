"""Prepared data: the folder that `prepare_data` writes and later steps read, its manifest, and its fingerprints."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skd_lib import storage
from skd_lib._core.terminal import visible
from skd_lib.config import Columns, DataConfig, FilesSource
from skd_lib.data import sources
from skd_lib.data.cleaning import filter_version
from skd_lib.data.examples import Example, read_jsonl, write_jsonl
from skd_lib.data.splits import Splits, complaints, make_splits
from skd_lib.errors import SkdError

SPLITS = ("train_teacher", "train_student", "validation", "test")
HELD_OUT = "held_out"
MANIFEST = "manifest.json"
FORMAT = 1
_HINT = "make it again: run the step prepare_data"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """The splits of a run (see `splits.Splits`), its further test sets, and the manifest that describes them.

    `missing` are the held-out sets that could not be read, and why.
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
        """Return a digest that changes when the source, its preparation, the seed or any row changes."""
        return str(self.manifest["fingerprint"])

    @property
    def private(self) -> bool:
        """Return whether its texts stay here (`data.private`)."""
        return bool(self.manifest["config"].get("private", False))

    @classmethod
    def load(cls, folder: Path) -> PreparedData:
        """Read a prepared folder, and check each file against the manifest.

        A held-out set whose file is missing, changed or broken is one of the `missing`.
        """
        path = folder / MANIFEST
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


def prepare(config: DataConfig, folder: Path, *, seed: int) -> PreparedData:
    """Read a source, make the splits and write them with their manifest; `folder` appears when it is complete.

    It has `train_teacher.jsonl`, `train_student.jsonl`, `validation.jsonl`, `test.jsonl`, `manifest.json` and
    `held_out/NAME.jsonl`. A held-out set that cannot be read is left out with a warning; the manifest says why.
    """
    held_out, missing = _load_held_out(config)
    whole = make_splits(sources.load_data(config), config, seed, held_out)
    splits = whole.by_turn() if config.assistant_turns == "all" else whole
    files = {**splits.named(), **{f"{HELD_OUT}/{name}": rows for name, rows in splits.held_out.items()}}
    rows = {name: len(examples) for name, examples in files.items()}
    wanted = (config.teacher_examples, config.student_examples, config.validation_examples, config.test_examples)
    limits = dict(zip(SPLITS, wanted, strict=True)) | {f"{HELD_OUT}/{s.name}": s.examples for s in config.held_out}
    found = {**whole.named(), **{f"{HELD_OUT}/{name}": examples for name, examples in whole.held_out.items()}}
    for name, examples in found.items():
        limit = limits[name]
        if limit is not None and len(examples) < limit:
            log.warning("%s: %d examples were asked for, the source has %d", name, limit, len(examples))
    for _, _, complaint in complaints(splits.losses):
        log.warning("%s", complaint)
    with storage.atomic_directory(folder) as temporary:
        checksums = {}
        for name, examples in files.items():
            file = temporary / f"{name}.jsonl"
            file.parent.mkdir(exist_ok=True)
            write_jsonl(file, examples)
            checksums[f"{name}.jsonl"] = storage.sha256(file)
        description = _manifest(config, seed, rows, checksums, splits, missing)
        storage.write_text_atomic(temporary / MANIFEST, json.dumps(description, indent=2, ensure_ascii=False))
    return PreparedData(**splits.named(), manifest=description, held_out=splits.held_out, missing=missing)


def _load_held_out(config: DataConfig) -> tuple[dict[str, list[Example]], dict[str, str]]:
    """Return the held-out sets that can be read, and why the others cannot."""
    found, missing = {}, {}
    for each in config.held_out:
        try:
            found[each.name] = sources.load_held_out(each, config)
        except SkdError as error:
            missing[each.name] = visible(error.brief)
            log.warning("held-out set %s is left out, everything else goes on: %s", each.name, error)
    return found, missing


def data_fingerprint(config: DataConfig) -> str:
    """Return the hex sha256 of the source's present content and of its preparation, without preparing it.

    Reads local files, but asks only for the checksums of remote ones: cheap enough to be a cache key that is computed
    before every run.
    """
    return digest({**_content(config), "preparation": preparation(config)})


def _manifest(
    config: DataConfig, seed: int, rows: dict[str, int], sha256: dict[str, str], splits: Splits, missing: dict[str, str]
) -> dict[str, Any]:
    """Return the manifest; its `fingerprint` covers the source, the preparation, the seed and the rows themselves."""
    content = {**_content(config), "preparation": preparation(config), "seed": seed, "sha256": sha256}
    return {
        "format": FORMAT,
        "fingerprint": digest(content),
        "rows": rows,
        "dropped": {reason: count for reason, count in splits.dropped.items() if count},
        "losses": {name: loss.to_dict() for name, loss in splits.losses.items()},
        "missing": missing,
        **content,
        "config": _described(config),
    }


def preparation(config: DataConfig) -> dict[str, Any]:
    """Return the part of the configuration that decides which rows come out of given content; locations do not."""
    values = _values(config)
    if isinstance(config.source, FilesSource):
        # `sources.identify` says which file belongs to which split, with the file's checksum.
        for split in ("train", "validation", "test"):
            del values["source"][split]
    # Likewise; and a set's task changes no row of it.
    for held_out in values["held_out"]:
        del held_out["task"]
        held_out["source"].pop("files", None)
    if not values["held_out"]:
        del values["held_out"]
    values.pop("private", None)
    if config.filter:
        values["filter"] = [config.filter, filter_version(config.filter)]
    return values


def _values(config: DataConfig) -> dict[str, Any]:
    """Return the configuration, without later settings at their defaults.

    So data keep the fingerprints they had before there were conversations, and filters.
    """
    values: dict[str, Any] = config.model_dump(mode="json")
    columns = [each.get("columns") for each in (values["source"], *(each["source"] for each in values["held_out"]))]
    of_data, of_columns = DataConfig.model_fields, Columns.model_fields
    defaults = [(each, of_columns, name) for each in columns if each for name in ("messages", "tools", "answers")]
    defaults += [(values, of_data, name) for name in ("assistant_turns", "redact", "filter", "private")]
    for section, fields, name in defaults:
        if section[name] == fields[name].default:
            del section[name]
    return values


def _described(config: DataConfig) -> dict[str, Any]:
    """Return the configuration for later steps; of a held-out set's task only the fields that it overrides."""
    values = _values(config)
    for held_out, described in zip(config.held_out, values["held_out"], strict=True):
        # Without its name, which may be that of a file that is not there.
        described["task"] = held_out.task.model_dump(mode="json", exclude_unset=True, exclude={"name"})
    return values


def _content(config: DataConfig) -> dict[str, Any]:
    """Return what identifies the sources' present content."""
    held_out = {each.name: sources.identify_held_out(each) for each in config.held_out}
    return {"source": sources.identify(config.source), **({"held_out": held_out} if held_out else {})}


def digest(value: Any) -> str:
    """Return the hex sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
