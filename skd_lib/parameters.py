"""A run's configuration as the parameters of the pipeline, and back.

People who start a run in Kubeflow's page see about a dozen parameters they are likely to change; the rest of the
configuration travels in one structured parameter, `config`. Both functions are pure and inverse to each other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from skd_lib.config import RunConfig, parse_json, parse_section

Parameters = dict[str, Any]

# Pipeline parameter -> its place in the configuration.
PLACES: Mapping[str, tuple[str, ...]] = {
    "run_name": ("name",),
    "teacher": ("teacher",),
    "student": ("student",),
    "method": ("distill", "method"),
    "divergence": ("distill", "divergence"),
    "top_k": ("distill", "sampling", "top_k"),
    "gamma": ("distill", "sampling", "gamma"),
    "max_steps": ("distill", "training", "max_steps"),
    "learning_rate": ("distill", "training", "learning_rate"),
    "seed": ("seed",),
}
# KFP has no null: these values stand for an unset field.
UNSET: Mapping[str, Any] = {"student": "", "max_steps": 0}
# These stand for a schedule over the training, which is no number: it is in `config`, at the field's place.
SCHEDULED: Mapping[str, int] = {"top_k": -1, "gamma": -1}


def to_struct(section: BaseModel) -> dict[str, Any]:
    """A section as plain JSON values without null, which KFP's structured parameters cannot hold.

    Unset fields are left out; an optional text that was unset against its default becomes "".
    """
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value is not None:
            values[name] = _plain(value)
        elif field.default is not None:
            values[name] = ""
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return to_struct(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def to_parameters(config: RunConfig) -> Parameters:
    """The pipeline's parameters for this configuration: the scalars of `PLACES`, and `config` with all the rest."""
    rest = to_struct(config)
    parameters: Parameters = {}
    for name, (*sections, field) in PLACES.items():
        holder = rest
        for section in sections:
            holder = holder[section]
        if name in SCHEDULED and isinstance(holder[field], dict):
            parameters[name] = SCHEDULED[name]
        else:
            parameters[name] = holder.pop(field, UNSET.get(name))
    return {**parameters, "config": rest}


def from_parameters(config: Mapping[str, Any] | str, *, where: str = "config", **scalars: Any) -> RunConfig:
    """The configuration that `to_parameters` took apart.

    Args:
        config: The structured parameter, or its JSON text. A whole configuration does too: then no scalars are needed.
        where: Named in error messages.
        scalars: Values of the parameters in `PLACES`; None and those in `SCHEDULED` leave what `config` says.

    Raises:
        SkdError: a wrong, missing or unknown field.
    """
    values = parse_json(config, where=where) if isinstance(config, str) else copy.deepcopy(dict(config))
    if not isinstance(values, dict):
        return parse_section(RunConfig, values, where=where)
    for name, value in scalars.items():
        if value is None or (name in SCHEDULED and value == SCHEDULED[name]):
            continue
        *sections, field = PLACES[name]
        holder = values
        for section in sections:
            holder = holder.setdefault(section, {})
            if not isinstance(holder, dict):  # not a section at all: validation says so in the user's terms
                return parse_section(RunConfig, values, where=where)
        if name in UNSET and value == UNSET[name]:
            holder.pop(field, None)
        else:
            holder[field] = value
    return parse_section(RunConfig, values, where=where)
