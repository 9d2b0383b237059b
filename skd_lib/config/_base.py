"""What all sections of a configuration are."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from skd_lib._core.documents import MAX_DIGITS


class Section(BaseModel):
    """A part of a file that is read: of a configuration, or of results. Unknown fields are errors."""

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
        for name, value in values.items():
            if any(isinstance(text, str) and "\0" in text for text in _each(value)):
                raise ValueError(f"{name}: text with the character U+0000, which no file can hold")
            if _is_whole(cls, name) and any(
                isinstance(each, float) and 10**MAX_DIGITS <= abs(each) < math.inf for each in _each(value)
            ):
                raise ValueError(f"{name}: a whole number of more than {MAX_DIGITS} digits, which JSON cannot hold")
        # As a text it is refused for its field by pydantic, which takes a bare `true` for 1.
        return {name: _no_boolean(value) if _is_number(cls, name) else value for name, value in values.items()}


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _no_boolean(value: Any) -> Any:
    if isinstance(value, list):
        return [_no_boolean(each) for each in value]
    return str(value).lower() if isinstance(value, bool) else value


@cache
def _is_whole(section: type[Section], name: str) -> bool:
    field = section.model_fields.get(name)
    kinds = set(_kinds(field.annotation)) if field else set()
    return int in kinds and float not in kinds


@cache
def _is_number(section: type[Section], name: str) -> bool:
    field = section.model_fields.get(name)
    kinds = set(_kinds(field.annotation)) if field else set()
    return bool(kinds & {int, float}) and bool not in kinds


def _kinds(annotation: Any) -> list[Any]:
    """The annotation, or what a union, a list or `Annotated` is made of."""
    arguments = get_args(annotation)
    return [kind for part in arguments for kind in _kinds(part)] if arguments else [annotation]
