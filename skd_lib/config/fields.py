"""A flat list of all fields of a configuration, for people."""

from __future__ import annotations

import inspect
import json
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from skd_lib._core.registry import NameIn
from skd_lib.config._base import kinds

REQUIRED = " (required)"


@dataclass(frozen=True)
class ConfigField:
    """One line of the listing; `path` is dotted, `default` reads on from the type: ` = 5`, ` (required)`."""

    path: str
    type: str
    default: str
    description: str


def list_fields(model: type[BaseModel], prefix: str = "") -> list[ConfigField]:
    """Return the model's fields in order of definition, each section followed by its own fields."""
    return [line for name, field in model.model_fields.items() for line in _lines(f"{prefix}{name}", field)]


def _lines(path: str, field: FieldInfo) -> list[ConfigField]:
    names = next((each for each in field.metadata if isinstance(each, NameIn)), None)
    annotation = field.annotation if names is None else Annotated[field.annotation, names]
    models = [part for part in kinds(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
    if not models or any(part in (int, float) for part in kinds(annotation)):
        description = names.description if names else field.description or ""
        return [ConfigField(path, type_name(annotation), _default(field), description)]
    if get_origin(annotation) is list:
        path += "[]"
    lines = []
    for model in models:
        choice = f" ({_tag(model)})" if len(models) > 1 else ""
        title = field.description or _summary(model)
        lines.append(ConfigField(path + choice, "section", REQUIRED if field.is_required() else "", title))
        lines += list_fields(model, f"{path}.")
    return lines


def _summary(model: type[BaseModel]) -> str:
    """Return the first paragraph of a model's docstring."""
    return " ".join(inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0].split())


def _tag(model: type[BaseModel]) -> str:
    return f"type: {get_args(model.model_fields['type'].annotation)[0]}"


def type_name(annotation: Any) -> str:
    """Write a type for people: `a | b` for literals, `list of str`, `int or unset`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin is Annotated:
        names = [name for each in arguments[1:] if isinstance(each, NameIn) for name in each.registry]
        return " | ".join(names) or type_name(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if annotation is type(None):
        return "unset"
    return getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    return f" = {json.dumps(value.model_dump() if isinstance(value, BaseModel) else value)}"
