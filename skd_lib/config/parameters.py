"""A run's configuration as the parameters of the pipeline, and back.

Kubeflow's page shows a form to start a run: data, models, task. All else is in the field `config`: settings that differ
from the defaults as JSON, or the URI of a run's YAML file. `to_parameters` and `from_parameters` are inverse to each
other. Sections travel on from step to step in the same short form (`short`, `parse_section`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel

from skd_lib import storage
from skd_lib._core.ascii_json import REMEDY, ascii_json, changed_fields, is_plain, may_be_changed
from skd_lib._core.documents import decoded, parse_yaml
from skd_lib.config import HeldOutConfig, RunConfig, TaskConfig, parse_json, parse_section
from skd_lib.config.models import CUTTING
from skd_lib.config.names import run_name_from
from skd_lib.config.tasks import known_tasks
from skd_lib.errors import SkdError, SkdErrors

Parameters = dict[str, Any]
SPLITS = ("train", "validation", "test")
PLACES: Mapping[str, tuple[str, ...]] = {
    **{f"data_{split}": ("data", "source", split) for split in SPLITS},
    "model_teacher": ("teacher",),
    "model_student": ("student",),
    "task": ("task", "name"),
    "training_method": ("distill", "method"),
    "training_steps": ("distill", "training", "max_steps"),
}
"""Field of the form -> its place in the configuration."""


@dataclass(frozen=True)
class Form:
    """The fields that a person fills in to start a run. Empty, or 0: as `config` says, else the default."""

    config: str = "{}"
    data_train: str = ""
    data_validation: str = ""
    data_test: str = ""
    model_teacher: str = ""
    model_student: str = ""
    task: str = ""
    training_method: str = ""
    training_steps: int = 0

    def filled(self) -> Parameters:
        """Return the fields that are filled in, without `config`."""
        values = {name: value.strip() if isinstance(value, str) else value for name, value in asdict(self).items()}
        return {name: value for name, value in values.items() if value and name != "config"}


# --- sections -----------------------------------------------------------------------------------------------------


def to_struct(section: BaseModel) -> dict[str, Any]:
    """Return all fields of a section as plain JSON values without null, which KFP's parameters cannot hold.

    Unset fields are left out; an optional text that was unset against its default becomes "".
    """
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value is not None:
            values[name] = _plain(value, to_struct)
        elif field.default is not None:
            values[name] = ""
    return values


def short(section: BaseModel) -> dict[str, Any]:
    """Return the fields of a section that differ from those that `parse_section` would fill in; see `to_struct`."""
    start = _start(section)
    values: dict[str, Any] = {}
    for name, value in section:
        if isinstance(section, HeldOutConfig) and name == "task":  # what it leaves out is the run's, if there is one
            if value.model_fields_set:
                values[name] = to_struct(value)
        elif name not in start or value != start[name]:
            values[name] = "" if value is None else _plain(value, short)
    return values


def _start(section: BaseModel) -> dict[str, Any]:
    """Return the values of fields that a mapping leaves out, without those that it must not leave out."""
    if isinstance(section, TaskConfig) and section.name:
        # A task from a file has only its title left: all is spelled out, so that the file is not looked for.
        named = dict(TaskConfig(name=section.name)) if section.name in known_tasks() else {}
        return {name: value for name, value in named.items() if name != "name"}
    return {
        name: field.get_default(call_default_factory=True)
        for name, field in type(section).model_fields.items()
        if not field.is_required() and name != "type"  # which tells one kind of section from another
    }


def _plain(value: Any, of_section: Any) -> Any:
    if isinstance(value, BaseModel):
        return of_section(value)
    if isinstance(value, list):
        return [_plain(item, of_section) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, of_section) for key, item in value.items()}
    return value


# --- the form -----------------------------------------------------------------------------------------------------


def to_parameters(config: RunConfig, *, without: Collection[str] = ()) -> Parameters:
    """Return the form's fields for a configuration, but for the fields of `without`.

    Texts that would not arrive unchanged (see `skd_lib._core.ascii_json`), and lists with commas in their paths, are in
    `config`.
    """
    values = short(config)
    form: Parameters = {}
    for name, (*sections, field) in PLACES.items():
        if name in without:
            continue
        holder = values
        for section in sections:
            holder = holder.get(section, {})
        said = _sayable(name, holder.get(field), values)
        value = holder.pop(field) if said else 0 if name == "training_steps" else ""
        form[name] = ",".join(value) if isinstance(value, list) else value
    if form["data_train"]:
        del values["data"]["source"]["type"]
    for place in PLACES.values():
        _prune(values, place[:-1])
    if "training_method" in form:  # said in any case: people compare runs by it
        form["training_method"] = config.distill.method
    return {**form, "config": ascii_json(values, compact=False)}


def _prune(values: dict[str, Any], sections: Sequence[str]) -> None:
    """Remove an empty section, and empty ones around it."""
    if sections and sections[0] in values:
        _prune(values[sections[0]], sections[1:])
        if not values[sections[0]]:
            del values[sections[0]]


def _sayable(name: str, value: Any, values: Mapping[str, Any]) -> bool:
    """Return whether a value of the configuration can stand in a field of the form."""
    if name.startswith("data_"):
        whole = values["data"]["source"]["type"] == "files" and value
        return bool(whole) and all(_is_form_text(each) and "," not in each for each in value)
    if name == "task":
        return value in known_tasks()
    return bool(value) and (not isinstance(value, str) or _is_form_text(value))


def _is_form_text(text: str) -> bool:
    return is_plain(text) and text == text.strip() != ""


def from_parameters(config: str = "{}", *, run_name: str = "", **fields: Any) -> RunConfig:
    """Return the configuration of a form with these `fields`; see `read_values` and `fill`."""
    form = Form(config=config, **fields)
    where, values = read_values(form.config, "config")
    return fill(values, form, run_name=run_name, where=where)


def read_values(text: str, field: str) -> tuple[str, dict[str, Any]]:
    """Read a field of the form: JSON, or the URI of a YAML file; return its name in messages, and its values."""
    text = text.strip()
    if text[:1] in ("{", "[", '"') or not text:
        try:
            where, values = field, parse_json(text or "{}", where=field)
        except SkdError as error:
            hint = f"pass one JSON value; Kubeflow changes `$` and what is between {{{{ and }}}}: {REMEDY}"
            raise SkdError(error.what, where=error.where, hint=hint) from error
    else:
        where = text
        try:
            values = parse_yaml(decoded(storage.read_bytes(text), where=text), where=text) or {}
        except SkdError as error:
            hint = error.hint or "correct the file"
            hint += f"; `{field}` is JSON in curly braces, or the path or URI of a YAML file"
            raise SkdError(error.what, where=f"{field}: {error.where or text}", hint=hint) from error
    if not isinstance(values, dict):
        raise SkdError("must be a mapping of fields", where=where, hint='e.g. {"distill": {"divergence": "jsd"}}')
    if field == "config" and "base" in values:
        hint = "give it as `comparison` to the pipeline compare_methods"
        raise SkdError("this is a comparison, not a run", where=where, hint=hint)
    if field == "comparison" and "teacher" in values and "base" not in values:
        raise SkdError("this is a run, not a comparison", where=where, hint="give it as `config`")
    return where, values


def fill(values: Mapping[str, Any], form: Form, *, run_name: str = "", where: str = "config") -> RunConfig:
    """Validate a configuration's plain values with a form's fields put into them; `form.config` is not looked at.

    `run_name` is any text, from which the run's name is made if the values have none; `where` names the values in
    messages. Raises SkdError with all errors, by the form's field or the configuration's.
    """
    filled = form.filled()
    whole: dict[str, Any] = copy.deepcopy(dict(values))
    try:
        if "name" not in whole:
            whole["name"] = run_name_from(run_name)
        for name, value in filled.items():
            _put(whole, name, value)
    except _NoSection:  # validation says so in the user's terms
        return parse_section(RunConfig, whole, where=where)
    missing = _missing(whole)
    for name in missing:  # so that all else that is wrong is found too
        _put(whole, name, "-")
    try:
        config = parse_section(RunConfig, whole, where=where)
    except SkdErrors as error:
        raise SkdErrors([*missing.values(), *(_named(each, filled, where) for each in error.errors)]) from error
    if missing:
        raise SkdErrors(list(missing.values()))
    return config


class _NoSection(Exception):
    """A value stands in the place of a section."""


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.setdefault(name, {})
    if not isinstance(section, dict):
        raise _NoSection
    return section


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    """Put a field of the form at its place."""
    *sections, field = PLACES[name]
    if name.startswith("data_"):
        source = _section(_section(values, "data"), "source")
        if source.setdefault("type", "files") != "files":  # the form's files instead, with the same columns
            columns = {"columns": source["columns"]} if "columns" in source else {}
            values["data"]["source"] = {"type": "files", **columns}
        value = [part.strip() for part in value.split(",") if part.strip()]
    elif name == "task" and _section(values, "task").get("name", value) != value:
        values["task"] = {}  # of another task's fields none is meant
    holder = values
    for section in sections:
        holder = _section(holder, section)
    holder[field] = value


def _missing(values: dict[str, Any]) -> dict[str, SkdError]:
    """Return errors for required values that are missing, by the form's field."""
    source = values.get("data") or {}
    source = source.get("source") or {} if isinstance(source, dict) else source
    initial = values.get("student_init")
    mode = initial.get("mode") if isinstance(initial, dict) else None
    found = {}
    if not values.get("teacher"):
        found["model_teacher"] = ("no teacher is named", "a hub id (org/name), a folder or a URI")
    if not values.get("student") and mode not in CUTTING:
        found["model_student"] = (
            "no student is named",
            "a hub id, a folder or a URI; or have it cut from the teacher, in `config`: "
            '{"student_init": {"mode": "prune", "keep_first": 8, "keep_last": 8}}',
        )
    if isinstance(source, dict) and source.get("type", "files") == "files" and not source.get("train"):
        found["data_train"] = ("there are no training data", "paths, globs or URIs of files, separated by commas")
    return {
        name: SkdError(what, where=name, hint=f"fill in `{name}`, or `{'.'.join(PLACES[name])}` in `config`: {how}")
        for name, (what, how) in found.items()
    }


def _named(error: SkdError, filled: Mapping[str, Any], where: str) -> SkdError:
    """Name the form's field in an error, if the value came from there."""
    for name in filled:
        place = f"{where}, field `{'.'.join(PLACES[name])}"
        of_task = name == "task" and error.where == f"{where}, field `task`"
        of_student = name == "model_student" and error.where == where and error.what.startswith("student:")
        if error.where == f"{place}`" or error.where.startswith(f"{place}.") or of_task or of_student:
            return SkdError(error.what, where=name, hint=error.hint)
    return error


def changed_on_the_way(fields: Mapping[str, Any], documents: Sequence[str] = ("config",)) -> list[SkdError]:
    """Return errors for texts in a form's fields that Kubeflow may have changed on the way to the cluster.

    `documents` are the fields that hold JSON, or a URI.
    """
    found = []
    for name, value in fields.items():
        if not isinstance(value, str) or not may_be_changed(value):
            continue
        places = [name]
        if name in documents and value.lstrip().startswith("{"):
            try:
                places = [f"{name}, field `{path}`" for path in changed_fields(value)]
            except ValueError:
                continue  # an error where it is read
        how = REMEDY if name in documents else "give it in `config`, where JSON can write it: " + REMEDY
        what = "a text with `$`, `{{` or `}}`, which Kubeflow may have changed on the way"
        found += [SkdError(what, where=place, hint=how) for place in places]
    return found


def check_reference(reference: str, where: str) -> None:
    """Raise SkdError for a model's reference that Kubeflow would change on its way from step to step."""
    if may_be_changed(reference):
        hint = "rename it, without $, {{ and }}"
        raise SkdError(
            "Kubeflow would change this name on its way to the steps", where=f"{where} {reference}", hint=hint
        )
