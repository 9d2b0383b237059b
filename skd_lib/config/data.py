"""Section `data`: the source of examples, and their splits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from skd_lib.config._base import ConfigSection, OptionalText
from skd_lib.config.names import check_not_blank
from skd_lib.config.task import TaskConfig
from skd_lib.errors import SkdError
from skd_lib.storage import check_kind

Cast = Literal["text", "label_name"]


def _check_location(uri: str) -> str:
    try:
        check_kind(check_not_blank(uri))
    except SkdError as error:
        raise ValueError(f"{error.what}, got {error.where}: {error.hint}") from error
    return uri


def _check_dataset(name: str) -> str:
    if "://" in name:
        raise ValueError("a dataset of the hub is named by its id (org/name), not by a URI; files have `type: files`")
    return name


Location = Annotated[str, AfterValidator(_check_location)]
"""Of data: a path or a URI."""
PLACE = re.compile(r"{([^{}]+)}")
"""A column's place in a template."""


class Columns(ConfigSection):
    """Which columns hold what. Without them the format is found from the usual names: `messages` (OpenAI, TRL),
    `conversations` (ShareGPT), `prompt` and `completion`, `prompt` alone, `question` and `answer`, ..."""

    source: str = Field(
        "source",
        description="The input: a column, or a template of several: `{body} {question}`. Parts may be empty, what "
        "comes out may not. A column may hold lists of messages.",
    )
    target: OptionalText = Field(
        "target",
        description="The reference answer, likewise. Empty: there are none, so only methods that sample every response "
        "can train on the data.",
    )
    messages: OptionalText = Field(
        None,
        description="In place of `source` and `target`: a column of conversations, lists of messages `{role, content}` "
        "or `{from, value}`.",
    )
    tools: str = Field("tools", description="Tools of conversations: read where the data have this column.")
    answers: Literal["read", "ignore"] = Field(
        "read",
        description="`ignore`: rows become prompts alone, as for a log of which only requests count; a conversation "
        "ends with its last message that is not the assistant's.",
    )
    cast: dict[str, Cast] = Field(
        {},
        description="Columns that hold no text, and what becomes of their values: `text` writes numbers, dates and "
        "true/false as JSON does, null as nothing; `label_name` takes the name of a ClassLabel, e.g. "
        "`{label: label_name}`.",
    )

    @property
    def names(self) -> list[str]:
        """All columns that the data must have."""
        if self.messages is not None:
            return [self.messages]
        return list(dict.fromkeys([*columns_of(self.source), *(columns_of(self.target) if self.target else ())]))

    def among(self, columns: Iterable[str]) -> list[str]:
        """Return those of the columns that are read."""
        return [name for name in columns if name in self.names or name == self.tools]

    def __str__(self) -> str:
        if self.messages is not None:
            return f"conversations in `{self.messages}`{'' if self.answers == 'read' else ', as requests alone'}"
        answers = f"answer `{self.target}`" if self.target else "no answers: prompts alone"
        source = self.source.replace("\n", "\\n")
        return f"input `{source}`, {answers}"

    @model_validator(mode="after")
    def _one_format(self) -> Columns:
        given = [name for name in ("source", "target") if getattr(self, name) != Columns.model_fields[name].default]
        if self.messages is not None and given:
            raise ValueError(f"messages takes the place of source and target: leave out {' and '.join(given)}")
        return self

    @model_validator(mode="after")
    def _casts_are_read(self) -> Columns:
        if unread := sorted(set(self.cast) - set(self.names)):
            raise ValueError(f"cast names a column that neither source nor target reads: {', '.join(unread)}")
        return self


def columns_of(column: str) -> list[str]:
    """Return the columns that a template names, or the one column that it is."""
    return PLACE.findall(column) or [column]


class FilesSource(ConfigSection):
    """JSONL, JSON, CSV, TSV (all of them also as .gz) or Parquet files; each split is a list of files, folders and
    globs (`data/*.jsonl`), local or gs:// URIs."""

    type: Literal["files"] = "files"
    train: list[Location] = Field(min_length=1)
    validation: list[Location] = Field([], description="Empty: cut from train by `data.validation_fraction`.")
    test: list[Location] = Field([], description="Empty: cut from train by `data.test_fraction`.")
    columns: Columns = Columns()


class HubDataset(ConfigSection):
    """A dataset of the Hugging Face hub."""

    type: Literal["hub"]
    dataset: Annotated[str, AfterValidator(_check_dataset)] = Field(description="Dataset id, e.g. `openai/gsm8k`.")
    subset: OptionalText = None
    revision: OptionalText = Field(None, description="Commit or tag; pin it for reproducible runs.")
    columns: Columns = Columns()


class HubSource(HubDataset):
    """A dataset of the Hugging Face hub, with the names of its splits."""

    train_split: str = "train"
    validation_split: OptionalText = None
    test_split: OptionalText = Field("test", description="Empty: cut from train by `data.test_fraction`.")


class GettextWheel(ConfigSection):
    """The gettext catalogs inside one wheel of a Python package index."""

    requirement: str = Field(description="Pinned requirement, e.g. `django==5.2.19`.", pattern=r"^[\w.-]+==[\w.]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class GettextSource(ConfigSection):
    """Translation pairs from the catalogs that Python packages ship: wheels are fetched with pip, never installed."""

    type: Literal["gettext"]
    language: str = Field(description="Language of the source side, e.g. `fr`; the target side is the msgid.")
    train: list[GettextWheel] = Field(min_length=1)
    validation: list[GettextWheel] = Field(min_length=1)
    test: list[GettextWheel] = Field(min_length=1)
    min_words: int = Field(3, ge=1, description="Pairs with fewer words on either side are left out.")
    max_words: int | None = Field(None, ge=1, description="Pairs with more words on either side are left out.")


DataSource = Annotated[FilesSource | HubSource | GettextSource, Field(discriminator="type")]


class HeldOutFiles(ConfigSection):
    """One test set in files."""

    type: Literal["files"] = "files"
    files: list[Location] = Field(min_length=1, description="Files, folders and globs, local or gs:// URIs.")
    columns: Columns = Columns()


class HeldOutHub(HubDataset):
    """One split of a dataset of the Hugging Face hub."""

    split: str = "test"


class HeldOutConfig(ConfigSection):
    """A test set besides the run's own: other data, another task, the same models."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$", description="Names its scores, e.g. `svamp`.")
    source: Annotated[HeldOutFiles | HeldOutHub, Field(discriminator="type")]
    task: TaskConfig = Field(
        TaskConfig(),
        description="What differs from the run's task: fields not given here or by its name are the run's.",
    )
    examples: int | None = Field(None, ge=1, description="At most this many examples; all if unset.")


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


class Redaction(ConfigSection):
    """A pattern of personal data, and what is put in its place."""

    pattern: Annotated[str, AfterValidator(_check_pattern)] = Field(
        min_length=1,
        description="Regular expression of Python's `re`, e.g. `[\\w.+-]+@[\\w-]+\\.[\\w.]+`; at most 10 s for a text.",
    )
    replacement: str = Field("[redacted]", description="Text for each match, as it is: no references to groups.")


class DataConfig(ConfigSection):
    """The source of examples, and their splits."""

    source: DataSource
    redact: list[Redaction] = Field(
        [], description="Replaced in every text of every row as it is read, before anything is stored or shown."
    )
    filter: str = Field(
        "",
        description="Filter of texts that a package of your own registers under this name, as an entry point of the "
        "group `skd.filters`; it must be installed where the steps run. Empty: none.",
    )
    private: bool = Field(
        False,
        description="Texts stay in the prepared data and in the evaluations' files: MLflow, reports and models' "
        "records get figures alone.",
    )
    assistant_turns: Literal["all", "last"] = Field(
        "all",
        description="Answers of a conversation that count in training: `all`, each with what comes before it as its "
        "prompt, or the `last`. Tests ask for the last one.",
    )
    teacher_examples: int | None = Field(
        None, ge=1, description="Training examples for the teacher's SFT; all if unset."
    )
    student_examples: int | None = Field(None, ge=1, description="Training examples for the student; all if unset.")
    validation_examples: int | None = Field(None, ge=1, description="At most this many validation examples.")
    test_examples: int | None = Field(None, ge=1, description="At most this many test examples.")
    validation_fraction: float = Field(0.1, gt=0, lt=0.5, description="Used when the source has no validation split.")
    test_fraction: float = Field(0.1, gt=0, lt=0.5, description="Used when the source has no test split.")
    near_duplicate_threshold: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Jaccard similarity of character 5-grams above which a training row that resembles a held-out row "
        "is dropped, if both have the same numbers in the same order; 1 drops exact duplicates only.",
    )
    held_out: list[HeldOutConfig] = Field(
        [], description="Further test sets: every model is scored on each, none is trained or chosen on it."
    )

    @field_validator("held_out")
    @classmethod
    def _names_are_unique(cls, held_out: list[HeldOutConfig]) -> list[HeldOutConfig]:
        names = [each.name for each in held_out]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"every set needs a name of its own; given twice: {', '.join(sorted(repeated))}")
        return held_out

    def without_tasks(self) -> DataConfig:
        """Return what the data is prepared by: how a held-out set is asked and judged changes no row of it."""
        return self.model_copy(
            update={"held_out": [each.model_copy(update={"task": TaskConfig()}) for each in self.held_out]}
        )
