"""What a dry run sees of a run's data and models, without a model being loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from skd_lib.errors import SkdError, SkdErrors

if TYPE_CHECKING:
    from skd_lib.config import RunConfig

_COUNTED = 5_000
"""Rows of a file that a dry run reads, at most."""
_COMPARED = 100_000
"""Characters in which it looks for near duplicates."""


def check_inputs(base: RunConfig, runs: Sequence[RunConfig] = ()) -> None:
    """Raise what is seen to be wrong with the data of a run, and with its models, or those of the runs based on it."""
    raise_any([*read_data(base)[1], *model_errors(runs or [base])])


def check_places(base: RunConfig, runs: Sequence[RunConfig] = ()) -> None:
    """Raise where files of the data or models are not where they should be on this machine; nothing is read."""
    from skd_lib.config import FilesSource
    from skd_lib.data.files import data_files
    from skd_lib.storage import is_remote

    source, errors = base.data.source, []
    files = [*source.train, *source.validation, *source.test] if isinstance(source, FilesSource) else []
    for file in files:
        try:
            if not is_remote(file):
                data_files(file)
        except SkdError as error:
            errors.append(error)
    raise_any([*errors, *model_errors(runs or [base])])


def raise_any(errors: Sequence[SkdError]) -> None:
    """Raise the errors, if there are any."""
    if errors:
        raise errors[0] if len(errors) == 1 else SkdErrors(list(errors))


def model_errors(configs: Iterable[RunConfig]) -> list[SkdError]:
    """Return errors of references to models that show without asking for the models."""
    from skd_lib.models.references import parse_reference

    errors = []
    for reference in dict.fromkeys(each for config in configs for each in (config.teacher, config.student) if each):
        try:
            parse_reference(reference)
        except SkdError as error:
            errors.append(error)
    return errors


def read_data(config: RunConfig) -> tuple[dict[str, str], list[SkdError]]:
    """Return the format of the data and the sizes of the splits, where they are files of this machine, and errors."""
    from skd_lib.config import FilesSource
    from skd_lib.data.sources import find_columns
    from skd_lib.storage import is_remote

    source = config.data.source
    if not isinstance(source, FilesSource) or any(map(is_remote, [*source.train, *source.validation, *source.test])):
        return {}, []
    found: dict[str, str] = {}
    try:
        found["data"] = f"{find_columns(source)}; {', '.join(source.train)}"
        if sizes := _splits(config):
            found["splits"] = sizes
    except SkdErrors as several:
        return found, several.errors
    except SkdError as error:
        return found, [error]
    return found, []


def _splits(config: RunConfig) -> str:
    """Return the sizes of the splits; empty for data too large to be read here."""
    from skd_lib.data.sources import load, load_data
    from skd_lib.data.splits import divide

    # Counted before `data.filter` takes rows out: of data that are read in part nothing can be said.
    rows = load(config.data.source, max_rows=_COUNTED)
    if any(len(split) >= _COUNTED for split in (rows.train, rows.validation or (), rows.test or ())):
        return ""
    made = divide(load_data(config.data), config.data, config.seed, characters=_COMPARED)
    sizes = {"train": made.train_student, "validation": made.validation, "test": made.test}
    asked = {name: getattr(config.data, f"{name}_examples", None) or 0 for name in ("validation", "test")}
    fewer = [f"{name}_examples: {count}" for name, count in asked.items() if count > len(sizes[name])]
    text = ", ".join(f"{name} {len(split)}" for name, split in sizes.items())
    return f"{text}; fewer than {', '.join(fewer)}" if fewer else text
