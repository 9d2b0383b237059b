"""Read YAML and JSON as sections, with overrides (`--set`, the runs of a comparison) and errors that name the field.

pydantic's errors become sentences that name the file and the field, and say how to correct it.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from skd_lib._core.documents import parse_json, parse_yaml, read_text
from skd_lib._core.registry import NameIn
from skd_lib.config._base import NUMBER, SCHEDULE, ConfigSection, Section, kinds
from skd_lib.errors import SkdError, SkdErrors

SectionT = TypeVar("SectionT", bound=Section)
Overrides = dict[str, Any]
"""Values by dotted field, e.g. `distill.sampling.top_k`. A value replaces the whole field; mappings are not merged."""
MAX_SHOWN = 4_000
"""Characters of a wrong value, or of a field's name."""
MAX_IN_HINT = 200
MAX_GUESSES = 4
A_SECTION, A_LIST = "a section (fields with values)", "a list"
_COLLECTIONS = {
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), A_SECTION),
    **dict.fromkeys(("list_type", "tuple_type"), A_LIST),
}
"""Pydantic's error -> the words for the value that is wanted."""
_PLAIN = re.compile(r"[\w./:@=-]+")
"""Text without quotes inside a list or mapping on one line."""


def parse_section(model: type[SectionT], values: Any, *, where: str) -> SectionT:
    """Validate `values`, a mapping or its JSON text, as `model`; raises SkdErrors that name `where` and field."""
    if isinstance(values, str):
        values = parse_json(values, where=where, plain=issubclass(model, ConfigSection))
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise SkdErrors([_field_error(model, detail, where) for detail in error.errors()]) from error


def check_unset(model: type[Section], overrides: Mapping[str, Any], *, where: str) -> None:
    """Raise SkdErrors for fields that overrides unset and that do not exist: validation sees nothing of these."""
    hint = "`skd config` lists all of them"
    known = set(_paths(model))
    free = tuple(path.removesuffix("*") for path in known if path.endswith("*"))
    unset = [path for path, value in overrides.items() if value is None]
    unknown = [path for path in unset if path not in known and not path.startswith(free)]
    if unknown:
        raise SkdErrors([SkdError("unknown field", where=f"{where}, field `{path}`", hint=hint) for path in unknown])


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict or any(map(_is_mapping, get_args(annotation)))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the fields of a YAML file; see `skd_lib._core.documents`."""
    values = parse_yaml(read_text(path), where=str(path))
    if not isinstance(values, dict):
        raise SkdError("the config must be a mapping of fields", where=str(path))
    return values


def parse_overrides(texts: Iterable[str]) -> Overrides:
    """Read options `--set FIELD=VALUE`, with values in YAML; the last of a field counts."""
    overrides: Overrides = {}
    for text in texts:
        path, equals, value = text.partition("=")
        where = f"--set {text}"
        if not equals or not path.strip():
            raise SkdError("not FIELD=VALUE", where=where, hint="e.g. --set distill.sampling.top_k=5")
        overrides[path.strip()] = parse_yaml(value, where=where)
    return overrides


def apply(values: dict[str, Any], overrides: Overrides, *, where: str) -> dict[str, Any]:
    """Return a configuration's plain values with overrides; null removes a field."""
    changed = dict(values)
    for path, value in overrides.items():
        *sections, field = path.split(".")
        holder = changed
        for depth, section in enumerate(sections, 1):
            if value is None and holder.get(section) is None:
                break  # an empty section is not the same as none: `lora: {}` trains adapters
            inner = holder.get(section, {})
            if not isinstance(inner, dict):
                raise SkdError(
                    f"`{'.'.join(sections[:depth])}` has no fields",
                    where=f"{where}, field `{path}`",
                    hint="dotted names lead through sections; `skd config` lists all of them",
                )
            holder[section] = dict(inner)
            holder = holder[section]
        else:
            if value is None:
                holder.pop(field, None)
            else:
                holder[field] = value
    return changed


def _field_error(model: type[BaseModel], detail: Any, where: str) -> SkdError:
    path, section_type = _locate(model, detail["loc"])
    section = {name: info.description or "" for name, info in section_type.model_fields.items()}
    field = _cut(".".join(path))
    message = detail["msg"].removeprefix("Value error, ")
    hint = ""
    if detail["type"] == "extra_forbidden":
        message = "unknown field"
        similar = difflib.get_close_matches(path[-1], section, n=1) or _elsewhere(model, path, detail["input"])
        guess = f"did you mean {', '.join(f'`{name}`' for name in similar)}? " if similar else ""
        hint = f"{guess}fields here: {', '.join(section)}"
    elif detail["type"] == "missing":
        message = "this field is required"
        description = section.get(path[-1])
        hint = f"add it: {description}" if description else "add it"
    elif detail["type"] in _COLLECTIONS and path:
        kind = _COLLECTIONS[detail["type"]]
        message = f"{kind} is wanted, got {reprlib.repr(detail['input'])}"
        info = section_type.model_fields.get(path[-1])
        element = section_type if detail["type"].startswith("model") else Any  # of a list or a mapping
        annotation = info.annotation if info else element
        form = _in_flow(annotation, kind, detail["input"])
        hint = f"write `{form if path[-1].isdigit() else f'{path[-1]}: {form}'}`"
        if "FIELD" in form:
            hint = f"{hint}; fields there: {', '.join(_sections(annotation)[0].model_fields)}"
        elif description := section.get(path[-1]):
            hint = f"{hint}: {description}"
    elif detail["type"] in {"union_tag_not_found", "union_tag_invalid"}:
        annotation = section_type.model_fields[path[-1]].annotation
        kinds = ", ".join(f"`{tag}`" for variant in _sections(annotation) for tag in _tags(variant))
        field = f"{field}.type"
        message = f"unknown type {detail['ctx']['tag']!r}" if "tag" in detail["ctx"] else "this field is required"
        hint = f"one of {kinds}"
    elif detail["type"] != "value_error":
        message = _plain_words(detail) or message
        message = f"{message}, got {reprlib.repr(detail['input'])}"
        hint = section.get(path[-1], "") if path else ""
    return SkdError(_cut(message), where=f"{where}, field `{field}`" if field else where, hint=hint)


def _plain_words(detail: Any) -> str:
    """Say how many items a list or mapping may have, in plain words; empty for other errors."""
    limits = {"too_short": ("at least", "min_length"), "too_long": ("at most", "max_length")}
    if detail["type"] not in limits:
        return ""
    how, key = limits[detail["type"]]
    count = detail["ctx"][key]
    return f"{how} {count} item{'' if count == 1 else 's'} wanted"


def _elsewhere(model: type[BaseModel], path: list[str], value: Any) -> list[str]:
    """Find fields of this name below the section of the error, else anywhere; at most four.

    For a section with one field (`training: {fsdp: true}`, `--set training.fsdp=true`) it is that field.
    """
    inner = [str(next(iter(value)))] if isinstance(value, dict) and len(value) == 1 else []
    ending = "." + ".".join([path[-1], *inner])
    found = [place for place in dict.fromkeys(_paths(model)) if f".{place}".endswith(ending)]
    near = [place for place in found if place.startswith("".join(f"{name}." for name in path[:-1]))]
    return (near or found)[:MAX_GUESSES]


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield all fields by their dotted names; with `.*` those whose keys may have any name."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if _is_mapping(field.annotation):
            yield f"{prefix}{name}.*"
        elif not _is_list(field.annotation):
            for section in _sections(field.annotation):
                yield from _paths(section, f"{prefix}{name}.")


def _in_flow(annotation: Any, kind: str, value: Any) -> str:
    """Write a value as the list or section that is wanted."""
    short = isinstance(value, str) and len(value) <= MAX_IN_HINT and _PLAIN.fullmatch(value)
    shown = str(value) if short else reprlib.repr(value)
    if value is None or isinstance(value, list | dict):
        shown = "..."
    sections = _sections(annotation)
    if sections:
        shown = _in_section(sections[0], value, shown)
    if kind == A_LIST:
        return f"[{shown}]"
    if sections:
        return f"{{NAME: {shown}}}" if _is_mapping(annotation) else shown
    return f"{{NAME: {shown}}}"


def _in_section(section: type[BaseModel], value: Any, shown: str) -> str:
    """Write a section with the field that a value is most likely for: one that lists it, is required, or is text."""
    fields = {name: field for name, field in section.model_fields.items() if name != "type"}
    names = {
        name: each.registry for name, field in fields.items() for each in field.metadata if isinstance(each, NameIn)
    }
    lists = [name for name, field in fields.items() if value in (*get_args(field.annotation), *names.get(name, ()))]
    required = [name for name, field in fields.items() if field.is_required()]
    first = next(iter(fields))
    text = (
        [first]
        if first not in names and isinstance(value, str | None) and fields[first].annotation in (str, str | None)
        else []
    )
    tag = section.model_fields.get("type")
    kind = f"type: {get_args(tag.annotation)[0]}, " if tag else ""
    for name in [*lists, *required, *text]:
        annotation = fields[name].annotation
        wanted = A_LIST if _is_list(annotation) else A_SECTION if _sections(annotation) else ""
        return f"{{{kind}{name}: {_in_flow(annotation, wanted, value) if wanted else shown}}}"
    return f"{{{kind}FIELD: {shown}}}"


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(map(_is_list, get_args(annotation)))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _locate(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel]]:
    """Return the path of an error's field as the user wrote it, and the section of its last field.

    In a union pydantic puts the variant's tag into the location (`source.files.train`, `top_k.<schedule>.start`): it
    leads to the variant, and is no part of the user's path.
    """
    path: list[str] = []
    here: type[BaseModel] = model
    variants: dict[Any, type[Section]] = {}
    for index, part in enumerate(loc):
        if part in variants:
            here, variants = variants[part], {}
            continue
        if part in (NUMBER, SCHEDULE):
            continue
        path.append(str(part))
        field = here.model_fields.get(str(part))
        if field is None:
            continue
        sections = _sections(field.annotation)
        variants = {tag: section for section in sections for tag in _tags(section)} if len(sections) > 1 else {}
        if len(sections) == 1 and index < len(loc) - 1 and loc[index + 1] != NUMBER:
            here = sections[0]
    return path, here


def _sections(annotation: Any) -> list[type[Section]]:
    return [kind for kind in kinds(annotation) if isinstance(kind, type) and issubclass(kind, Section)]


def _tags(section: type[Section]) -> tuple[Any, ...]:
    tag = section.model_fields.get("type")
    return get_args(tag.annotation) if tag else ()
