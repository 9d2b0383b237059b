"""Every field of a configuration, as a flat list for people."""

from __future__ import annotations

import inspect
import json
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

REQUIRED = " (required)"


@dataclass(frozen=True)
class ConfigField:
    """One line of the listing; `path` is dotted, `default` reads on from the type: ` = 5`, ` (required)`."""

    path: str
    type: str
    default: str
    description: str


def list_fields(model: type[BaseModel], prefix: str = "") -> list[ConfigField]:
    """The model's fields in order of definition, each section followed by its own fields."""
    return [line for name, field in model.model_fields.items() for line in _lines(f"{prefix}{name}", field)]


def _lines(path: str, field: FieldInfo) -> list[ConfigField]:
    annotation = field.annotation
    models = [part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
    if not models or any(part in (int, float) for part in _parts(annotation)):
        return [ConfigField(path, type_name(annotation), _default(field), field.description or "")]
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
    """The first paragraph of a model's docstring."""
    return " ".join(inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0].split())


def _parts(annotation: Any) -> list[Any]:
    """The annotation, or what a union, list or `Annotated` is made of."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType, list):
        return [part for argument in get_args(annotation) for part in _parts(argument)]
    return [annotation]


def _tag(model: type[BaseModel]) -> str:
    return f"type: {get_args(model.model_fields['type'].annotation)[0]}"


def type_name(annotation: Any) -> str:
    """A type for people: `a | b` for literals, `list of str`, `int or unset`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin is Annotated:
        return type_name(arguments[0])
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
