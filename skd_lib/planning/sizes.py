"""Sizes of models for a plan: of a folder, of a config.json alone, of a known shape, or of a number of weights."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from skd_lib.config import RunConfig
from skd_lib.errors import SkdError
from skd_lib.planning.memory import ModelSize, config_size

_UNITS = {"M": 10**6, "B": 10**9}


def run_sizes(config: RunConfig, teacher: str = "", student: str = "") -> tuple[ModelSize, ModelSize]:
    """Return the sizes of a run's teacher and student, or of others in their place.

    Raises:
        SkdError: a size cannot be found out.
    """
    large = model_size(teacher or config.teacher, where="teacher", trust_remote_code=config.trust_remote_code)
    named = student or config.student
    if named:
        return large, model_size(named, where="student", trust_remote_code=config.trust_remote_code)
    return large, large.pruned((config.student_init.keep_first or 0) + (config.student_init.keep_last or 0))


def model_size(model: str, *, where: str, trust_remote_code: bool = False) -> ModelSize:
    """Return a model's size; no weights are read or fetched.

    Args:
        model: A reference; a config.json; a name that holds a known one (`meta-llama/Llama-3.1-70B-Instruct`); or a
            number of weights (`70B`, `350M`), for which the nearest known shape is stretched.
        where: For errors.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        SkdError: a folder holds no model, or a model of the hub cannot be fetched.
    """
    from skd_lib.models.files import load_config
    from skd_lib.models.references import resolve_model
    from skd_lib.models.shapes import SHAPES

    path = Path(model)
    if path.exists() and ((path.is_file() and path.suffix == ".json") or path.is_dir()):
        return config_size(load_config(path, trust_remote_code=trust_remote_code))
    if (number := re.fullmatch(r"(\d+(?:\.\d+)?)([MB])", model)) and (given := float(number[1])):
        return _stretched(given * _UNITS[number[2]])
    if known := [name for name in SHAPES if name in model.lower()]:
        return config_size(SHAPES[max(known, key=len)]())
    try:
        folder = resolve_model(model, trust_remote_code=trust_remote_code, weights=False)
    except SkdError as error:
        hint = f"give --{where} another folder, a config.json, a number of weights (70B), or one of {', '.join(SHAPES)}"
        raise SkdError(error.what, where=f"{where} {model}", hint=hint) from error
    return config_size(load_config(folder, trust_remote_code=trust_remote_code))


def _stretched(parameters: float) -> ModelSize:
    """Return the known shape with the nearest number of weights, with that number."""
    from skd_lib.models.shapes import SHAPES

    sizes = [config_size(shape()) for shape in SHAPES.values()]
    size = min(sizes, key=lambda one: max(one.parameters / parameters, parameters / one.parameters))
    factor = parameters / size.parameters
    # Weights grow with depth and with the square of the width.
    width, depth = factor**0.375, factor**0.25
    return replace(
        size,
        parameters=round(parameters),
        inside=round(size.inside * factor),
        computing=round(size.computing * factor),
        adapted=round(size.adapted * factor),
        layers=max(1, round(size.layers * depth)),
        hidden=round(size.hidden * width),
        attended=round(size.attended * width),
    )
