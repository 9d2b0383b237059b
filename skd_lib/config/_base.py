"""The base classes of all sections of a configuration, and settings that may change in the course of training."""

from __future__ import annotations

import math
from functools import cache
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from skd_lib._core.documents import MAX_DIGITS


class Section(BaseModel):
    """A part of a file: of a configuration, or of results. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ConfigSection(Section):
    """A part of the configuration.

    Unknown fields are errors: a misspelt name must never be swallowed. So are infinity, NaN, and `true` for a number.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        plain: dict[str, Any] = {}
        for name, value in values.items():
            numbers = _numbers(cls, name)
            if any(isinstance(text, str) and "\0" in text for text in _each(value)):
                raise ValueError(f"{name}: text with the character U+0000, which no file can hold")
            whole = int in numbers and float not in numbers
            if whole and any(isinstance(n, float) and 10**MAX_DIGITS <= abs(n) < math.inf for n in _each(value)):
                raise ValueError(f"{name}: a whole number of more than {MAX_DIGITS} digits, which JSON cannot hold")
            # As a text it is refused for its field by pydantic, which takes a bare `true` for 1.
            plain[name] = _no_boolean(value) if numbers and bool not in numbers else value
        return plain


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _no_boolean(value: Any) -> Any:
    if isinstance(value, list):
        return [_no_boolean(each) for each in value]
    return str(value).lower() if isinstance(value, bool) else value


@cache
def _numbers(section: type[Section], name: str) -> set[Any]:
    """Return the kinds of numbers that a field takes, and bool if it takes that."""
    field = section.model_fields.get(name)
    return {int, float, bool}.intersection(kinds(field.annotation)) if field else set()


def kinds(annotation: Any) -> list[Any]:
    """Return the annotation, or the parts of a union, a list, a mapping or `Annotated`."""
    arguments = get_args(annotation)
    return [kind for part in arguments for kind in kinds(part)] if arguments else [annotation]


OptionalText = Annotated[str | None, BeforeValidator(lambda text: None if text == "" else text)]


def _distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError(f"values must be unique, got {', '.join(map(str, values))}")
    return values


Distinct = AfterValidator(_distinct)
NumberT = TypeVar("NumberT")
NUMBER, SCHEDULE = "<number>", "<schedule>"


class Schedule(ConfigSection, Generic[NumberT]):
    """A setting that goes from `start` at the first optimiser step to `end` at the last."""

    start: NumberT = Field(description="Value at the first optimiser step.")
    end: NumberT = Field(description="Value at the last optimiser step.")
    shape: Literal["linear", "cosine"] = Field("linear", description="`cosine`: slow at both ends, half a wave.")

    @classmethod
    def model_parametrized_name(cls, params: tuple[Any, ...]) -> str:
        """Name the class for people who read the JSON schema."""
        return f"Schedule_{getattr(params[0], '__origin__', params[0]).__name__}"

    def __str__(self) -> str:
        return f"{self.start:g} to {self.end:g}, {self.shape}"


def _number_or_schedule(value: Any) -> str:
    return SCHEDULE if isinstance(value, dict | Schedule) else NUMBER


_EITHER = Discriminator(_number_or_schedule)
"""A number, or a mapping `{start, end, shape}`."""
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
DraftLength = Annotated[int, Field(ge=1, le=256)]
Share = Annotated[float, Field(ge=0, le=1)]
ScheduledCount = Annotated[Annotated[Count, Tag(NUMBER)] | Annotated[Schedule[Count], Tag(SCHEDULE)], _EITHER]
ScheduledDraftLength = Annotated[
    Annotated[DraftLength, Tag(NUMBER)] | Annotated[Schedule[DraftLength], Tag(SCHEDULE)], _EITHER
]
ScheduledShare = Annotated[Annotated[Share, Tag(NUMBER)] | Annotated[Schedule[Share], Tag(SCHEDULE)], _EITHER]
