"""Sources of examples: files, a dataset of the hub, or the catalogs in Python packages."""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, assert_never

from skd_lib import storage
from skd_lib._core.format import first_line
from skd_lib.config import (
    Columns,
    DataConfig,
    DataSource,
    FilesSource,
    GettextSource,
    GettextWheel,
    HeldOutConfig,
    HeldOutFiles,
    HeldOutHub,
    HubDataset,
    HubSource,
)
from skd_lib.data.cleaning import clean_examples
from skd_lib.data.examples import Example
from skd_lib.data.files import data_files, stored_files
from skd_lib.data.gettext_catalogs import read_wheel
from skd_lib.data.json_rows import RawRow
from skd_lib.data.readers import class_labels, first_names, guarded, read_file
from skd_lib.data.rows import QUICK_CHARACTERS, Problems, check_columns, check_rows, usual_columns
from skd_lib.errors import SkdError, SkdErrors

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class SourceSplits:
    """The examples of a source, None for a split that it does not have; `left_out` counts entries by reason."""

    train: list[Example]
    validation: list[Example] | None
    test: list[Example] | None
    left_out: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return sum(len(rows or ()) for rows in (self.train, self.validation, self.test))


def find_columns(source: FilesSource | HubSource | HeldOutFiles | HeldOutHub) -> Columns:
    """Return the columns to read: those given, else the usual ones that the first rows have.

    Where there are none, the default: reading the data then reports the columns that there are.
    """
    given = source.columns
    if given != Columns(answers=given.answers):
        return _as_asked(given, given)
    names: Iterable[str] = ()
    try:
        if isinstance(source, HubDataset):
            split = source.train_split if isinstance(source, HubSource) else source.split
            with _hub_errors(source.dataset):
                names = next(iter(_stream(source, split, 1)), {})
        else:
            uris = source.train if isinstance(source, FilesSource) else source.files
            file = data_files(uris[0])[0]
            with storage.open_binary(file) as stream:
                names = first_names(stream, file)
    except SkdError:
        return source.columns
    run = isinstance(source, FilesSource | HubSource)
    where = "data.source.columns" if run else "data.held_out, source.columns"
    return _as_asked(usual_columns(names, where) or given, given)


def _as_asked(found: Columns, given: Columns) -> Columns:
    """Return columns that were found, without the answers' where these are ignored."""
    if given.answers == "read":
        return found
    return found.model_copy(update={"answers": "ignore", **({} if found.messages else {"target": None})})


def load_data(data: DataConfig, *, max_rows: int | None = None) -> SourceSplits:
    """Read a run's data: what `load` reads, without what `data.redact` and `data.filter` take out."""
    found = load(data.source, max_rows=max_rows)
    splits = {
        name: None if rows is None else clean_examples(rows, data)
        for name, rows in (("train", found.train), ("validation", found.validation), ("test", found.test))
    }
    cleaned = SourceSplits(splits["train"] or [], splits["validation"], splits["test"], found.left_out)
    dropped = len(found) - len(cleaned)
    cleaned.left_out.update({"dropped by redact or filter": dropped} if dropped else {})
    return _checked(data.source, cleaned)


def load(source: DataSource, *, max_rows: int | None = None) -> SourceSplits:
    """Read and check all examples of a source.

    For a quick check, `max_rows` of each file or split; remote files are then streamed instead of copied here first
    (where their checksum is verified).
    """
    problems = Problems()
    match source:
        case FilesSource():
            columns = find_columns(source)
            parts = [
                _read_files(uris, columns, problems, max_rows) if uris else None
                for uris in (source.train, source.validation, source.test)
            ]
        case HubSource():
            columns = find_columns(source)
            parts = [
                _read_hub(source, split, columns, problems, max_rows) if split else None
                for split in (source.train_split, source.validation_split, source.test_split)
            ]
        case GettextSource():
            return _checked(source, _load_gettext(source))
        case _:
            assert_never(source)
    problems.raise_any()
    return _checked(source, SourceSplits(parts[0] or [], parts[1], parts[2]))


def _checked(source: DataSource, splits: SourceSplits) -> SourceSplits:
    for name, examples in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if examples is not None and not examples:
            files = f": {', '.join(getattr(source, name))}" if isinstance(source, FilesSource) else ""
            hint = "; without this split it would be cut from train" if name != "train" else ""
            raise SkdError(f"the split `{name}` is empty{files}", where="data.source", hint=f"check the source{hint}")
    return splits


def identify(source: DataSource) -> list[dict[str, Any]]:
    """Return what identifies the source's present content, cheaply: checksums, generations, revisions.

    Locations are no part of it where there is a checksum: the same content elsewhere is the same data.
    """
    match source:
        case FilesSource():
            files = {"train": source.train, "validation": source.validation, "test": source.test}
            return [{"split": split, **stored} for split, uris in files.items() for stored in _identify_files(uris)]
        case HubSource():
            return [{"dataset": source.dataset, "revision": _hub_revision(source)}]
        case GettextSource():
            wheels = {"train": source.train, "validation": source.validation, "test": source.test}
            return [
                {"split": split, "wheel": wheel.requirement, "checksum": f"sha256:{wheel.sha256}"}
                for split, listed in wheels.items()
                for wheel in listed
            ]
        case _:
            assert_never(source)


def load_held_out(held_out: HeldOutConfig, data: DataConfig, *, max_rows: int | None = None) -> list[Example]:
    """Read and check all examples of one held-out test set of a run's data; see `load_data`."""
    source, problems = held_out.source, Problems()
    columns = find_columns(source)
    if isinstance(source, HeldOutFiles):
        examples = _read_files(source.files, columns, problems, max_rows)
    else:
        examples = _read_hub(source, source.split, columns, problems, max_rows)
    problems.raise_any()
    examples = clean_examples(examples, data)
    if not examples:
        raise SkdError("the set is empty", where=f"data.held_out, `{held_out.name}`", hint="check the source")
    return examples


def identify_held_out(held_out: HeldOutConfig) -> list[dict[str, Any]]:
    """Identify one held-out set, see `identify`; one that cannot be read is identified by its absence."""
    source = held_out.source
    try:
        if isinstance(source, HeldOutFiles):
            return _identify_files(source.files)
        return [{"dataset": source.dataset, "revision": _hub_revision(source)}]
    except SkdError:  # reported when it is read: the run goes on without this set
        return [{"missing": True}]


# --- files --------------------------------------------------------------------------------------------------------


def _identify_files(uris: list[str]) -> list[dict[str, Any]]:
    return [
        {"size": stored.size, "generation": stored.generation, "checksum": stored.checksum}
        for uri in uris
        for stored in stored_files(uri)
    ]


def _read_files(uris: list[str], columns: Columns, problems: Problems, max_rows: int | None) -> list[Example]:
    examples = []
    for uri in uris:
        try:
            for file in data_files(uri):
                with _opened(file, whole=max_rows is None) as stream:
                    examples += read_file(stream, file, columns, problems, max_rows)
        except SkdErrors:
            raise  # too many problems
        except SkdError as error:
            problems.add(error)
    return examples


@contextmanager
def _opened(uri: str, *, whole: bool) -> Iterator[IO[bytes]]:
    """Open a file; a remote one that is read as a whole is copied here first, so that its checksum is verified."""
    if whole and storage.is_remote(uri):
        with tempfile.TemporaryDirectory(prefix="skd-") as folder:
            copy = storage.download(uri, Path(folder) / "data")
            with copy.open("rb") as stream:
                yield stream
    else:
        with storage.open_binary(uri) as stream:
            yield stream


# --- the hub ------------------------------------------------------------------------------------------------------


def _read_hub(
    source: HubDataset, split: str, columns: Columns, problems: Problems, max_rows: int | None
) -> list[Example]:
    where = f"{source.dataset}, split `{split}`"
    with _hub_errors(where):
        dataset = _dataset(source, split) if max_rows is None else _stream(source, split, max_rows)
        names = dataset.column_names
        try:
            if names is not None:
                check_columns(names, where, columns)
                # Pictures and sound in other columns need no decoding then.
                dataset = dataset.select_columns(columns.among(names))
        except SkdErrors as missing:
            for error in missing.errors:
                problems.add(error)
            return []
        labels = class_labels(dataset.features)
    numbered = enumerate(dataset, start=1)
    rows = (RawRow(f"{where}, row {number}", partial(dict, row)) for number, row in islice(numbered, max_rows))
    characters = None if max_rows is None else QUICK_CHARACTERS
    return check_rows(guarded(rows, "data", where, problems), columns, problems, labels, characters)


def _dataset(source: HubDataset, split: str | None, *, streaming: bool = False) -> Any:
    import datasets

    return datasets.load_dataset(
        source.dataset, source.subset, split=split, revision=source.revision, streaming=streaming
    )


def _stream(source: HubDataset, split: str, max_rows: int) -> Any:
    """Return a split as a stream; of slices (`train[:10%]`, `a+b`), which cannot be streamed, their rows.

    Where a split's number of rows is unknown, percentages and positions from its end are of its first `max_rows`.
    """
    import datasets

    splits = _dataset(source, None, streaming=True)
    if split in splits:
        return splits[split]
    instruction = datasets.ReadInstruction.from_spec(split)
    relative = "%" in split or "-" in split
    lengths = _Lengths(splits, max_rows if relative else None)
    parts = [
        splits[part.splitname].skip(part.from_).take(part.to - part.from_) for part in instruction.to_absolute(lengths)
    ]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


class _Lengths(dict[str, int]):
    """The number of rows of each split, found on demand."""

    def __init__(self, splits: Mapping[str, Any], count_to: int | None) -> None:
        super().__init__(dict.fromkeys(splits, 0))
        self._splits, self._count_to = splits, count_to

    def __getitem__(self, name: str) -> int:
        known = (self._splits[name].info.splits or {}).get(name)
        if known is not None and known.num_examples:
            return int(known.num_examples)
        return sys.maxsize if self._count_to is None else sum(1 for _ in islice(self._splits[name], self._count_to))


def _hub_revision(source: HubDataset) -> str:
    """Return the commit of the source's revision; for a local folder, its files' checksums."""
    if Path(source.dataset).is_dir():
        return ",".join(stored.checksum for stored in storage.list_objects(source.dataset))
    if source.revision and _COMMIT.fullmatch(source.revision):
        return source.revision
    from huggingface_hub import HfApi

    with _hub_errors(source.dataset):
        return str(HfApi().dataset_info(source.dataset, revision=source.revision, timeout=10).sha)


@contextmanager
def _hub_errors(where: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub import errors
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # The base error of the hub's HTTP library, as in `skd_lib.models.references`.
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except OfflineModeIsEnabled as error:
        hint = "unset HF_HUB_OFFLINE, or give the data as files (`data.source.type: files`)"
        raise SkdError("the hub is switched off by HF_HUB_OFFLINE", where=where, hint=hint) from error
    except SkdError:
        raise
    except Exception as error:  # whatever the library's readers raise
        what = f"cannot load the dataset: {first_line(error)}"
        hint = (
            "check `data.source.dataset`, `subset`, `revision` and the names of the splits; a gated one needs HF_TOKEN"
        )
        if isinstance(error, OSError | http_error) and not isinstance(error, DatasetsError | HfHubHTTPError):
            what = f"cannot reach the dataset on the hub: {first_line(error)}"
            hint = "check the network (HTTPS_PROXY is honoured), or give the data as files (`data.source.type: files`)"
        raise SkdError(what, where=where, hint=hint) from error


# --- gettext catalogs ---------------------------------------------------------------------------------------------


def _load_gettext(source: GettextSource) -> SourceSplits:
    from skd_lib.models.wheels import fetch_wheel

    left_out: Counter[str] = Counter()

    def read(wheels: list[GettextWheel]) -> list[Example]:
        examples = []
        for wheel in wheels:
            path = fetch_wheel(wheel.requirement, wheel.sha256)
            pairs = read_wheel(path, wheel.requirement, source.language, source.min_words, source.max_words)
            examples += pairs.examples
            left_out.update(pairs.left_out)
        return examples

    return SourceSplits(read(source.train), read(source.validation), read(source.test), left_out)
