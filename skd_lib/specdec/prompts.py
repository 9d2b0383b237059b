"""The prompts of `skd specdec`."""

from __future__ import annotations

from pathlib import Path

from skd_lib.config import Columns, FilesSource, RunConfig
from skd_lib.data import sources
from skd_lib.data.examples import Question
from skd_lib.data.readers import read_lines
from skd_lib.data.splits import make_splits
from skd_lib.errors import SkdError
from skd_lib.storage import Missing


def read_prompts(path: Path, *, column: str, limit: int) -> list[Question]:
    """Read the first inputs of a file: the lines of a .txt file, or a column of any data file.

    Args:
        path: Its ending says which format it is.
        column: Which column holds the input, but for .txt.
        limit: Read at most this many.

    Raises:
        SkdErrors: rows that are wrong, each with its number.
        SkdError: the file cannot be read, or has no inputs.
    """
    if path.suffix != ".txt":
        file = FilesSource(train=[str(path)])
        # Under its default name the column is found as in a run's data, conversations too.
        columns = sources.find_columns(file) if column == Columns().source else Columns(source=column)
        # A log has answered and unanswered requests.
        columns = columns.model_copy(update={"target": None} if columns.messages is None else {"answers": "ignore"})
        source = file.model_copy(update={"columns": columns})
        return [example.question for example in sources.load(source, max_rows=limit).train]
    try:
        prompts: list[Question] = [*read_lines(path, limit)]
    except Missing as error:
        raise SkdError(error.what, where=f"prompts {path}", hint=error.hint) from error
    if not prompts:
        raise SkdError("there are no prompts in it", where=str(path), hint="write one a line")
    return prompts


def prompts_of_run(config: RunConfig, *, limit: int) -> list[Question]:
    """Return the first inputs of a run's test set, as `prepare_data` makes it.

    Raises:
        SkdError: the data cannot be read, or a split of it is empty.
    """
    test = make_splits(sources.load_data(config.data), config.data, config.seed).test
    return [example.question for example in test[:limit]]
