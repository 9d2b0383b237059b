"""The list of a comparison's runs, made of its grid, and the configuration of each."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from skd_lib.comparison.config import NAME, OWN_SECTIONS, SHARED, CompareConfig
from skd_lib.config import ConfigSection, Overrides, RunConfig, apply, parse_section
from skd_lib.config.models import CUTTING
from skd_lib.config.parameters import short, to_struct
from skd_lib.distillation.methods import reads_setting
from skd_lib.errors import SkdError, SkdErrors

MAX_RUNS = 500
"""Runs of one comparison. Their list travels as one argument of a command, which the kernel limits to 128 KiB."""
MAX_COMBINATIONS = 5_000
"""Of methods and values in a grid, before those are left out that differ in nothing a method reads."""


class Trial(ConfigSection):
    """One run of a comparison, as it travels to the cluster: what differs from the base configuration."""

    variant: str = Field(pattern=NAME, description="What is compared; its runs differ in their seeds.")
    seed: int = Field(ge=0, lt=2**31)
    init: str = Field("", description="Name of the student's init; empty where all have the base's.")
    overrides: Overrides = Field({}, description="What differs from the base, by dotted field.")

    @property
    def label(self) -> str:
        """Unique in the comparison."""
        return f"{self.variant}-seed-{self.seed}"

    def config(self, base: RunConfig) -> RunConfig:
        """Return the whole configuration of this run."""
        where = f"variant {self.variant}"
        if unset := [path for path, value in self.overrides.items() if value is None]:
            hint = "give a value, or unset it for all runs, under `overrides`"
            raise SkdErrors(
                [SkdError("an override must not be null", where=f"{where}, field `{p}`", hint=hint) for p in unset]
            )
        if shared := [path for path in self.overrides if path.split(".")[0] not in OWN_SECTIONS]:
            raise SkdErrors([_shared(path, where) for path in shared])
        values = apply({**to_struct(base), "seed": self.seed}, self.overrides, where=where)
        if values["student_init"].get("mode") in CUTTING and "student" not in self.overrides:
            values.pop("student", None)
        return parse_section(RunConfig, values, where=where)


def expand(compare: CompareConfig, base: RunConfig, *, where: str) -> list[Trial]:
    """List the runs of a comparison, variant by variant, each with every seed."""
    variants = [
        (f"{name}-{init}" if init else name, init, {**_init_overrides(compare, init), **overrides})
        for name, overrides in _variants(compare, base, where)
        for init in compare.student_inits or [""]
    ]
    count = len(variants) * len(compare.seeds)
    if count > MAX_RUNS:
        what = f"{count:,} runs ({len(variants):,} variants x {len(compare.seeds):,} seeds); the limit is {MAX_RUNS:,}"
        raise SkdError(what, where=where, hint="leave out variants or seeds, or make several comparisons")
    trials, errors, seen = [], [], dict[str, str]()
    for name, init, overrides in variants:
        if name in seen:
            hint = "name them yourself, under `variants`"
            errors.append(SkdError(f"two variants are called `{name}`", where=where, hint=hint))
            continue
        seen[name] = init
        try:
            these = [_trial(name, seed, init, overrides, where) for seed in compare.seeds]
            these[0].config(base)
        except SkdError as error:
            errors += _placed(error, where)
        else:
            trials += these
    if errors:
        raise SkdErrors(errors)
    return trials


def reference_of(compare: CompareConfig, trials: Sequence[Trial], base: RunConfig, *, where: str) -> str:
    """Return the variant that the others are tested against."""
    names = list(dict.fromkeys(trial.variant for trial in trials))
    if compare.reference:
        if compare.reference not in names:
            raise SkdError(
                f"there is no variant `{compare.reference}`",
                where=f"{where}, field `reference`",
                hint=f"one of {', '.join(names)}",
            )
        return compare.reference
    skd = (trial.variant for trial in trials if trial.config(base).distill.method == "skd")
    return next(skd, names[0])


def _check_combinations(compare: CompareConfig, methods: Sequence[str], where: str) -> None:
    """Count the grid before anything is made of it."""
    factors = {"methods": len(methods), **{f"values of {path}": len(values) for path, values in compare.grid.items()}}
    count = math.prod(factors.values())
    if count > MAX_COMBINATIONS:
        product = " x ".join(f"{number:,} {name}" for name, number in factors.items() if number > 1)
        raise SkdError(
            f"{count:,} combinations ({product}); the limit is {MAX_COMBINATIONS:,}, and {MAX_RUNS:,} runs",
            where=f"{where}, field `grid`",
            hint="leave out values, or make several comparisons",
        )


def _variants(compare: CompareConfig, base: RunConfig, where: str) -> Iterator[tuple[str, Overrides]]:
    """Yield name and overrides of methods x grid, then of the further variants; without student inits."""
    methods = compare.methods or ([] if compare.variants and not compare.grid else [base.distill.method])
    _check_combinations(compare, methods, where)
    for method in methods:
        combinations: dict[str, Overrides] = {}
        for values in itertools.product(*compare.grid.values()):
            overrides = {"distill.method": method, **dict(zip(compare.grid, values, strict=True))}
            read = _read(overrides, base, where)
            combinations.setdefault("-".join([method, *_slugs(read)]), read)
        yield from combinations.items()
    yield from compare.variants.items()


def _read(overrides: Overrides, base: RunConfig, where: str) -> Overrides:
    """Leave out the settings of the distillation that the method does not read."""
    own = {path: value for path, value in overrides.items() if path.startswith("distill.")}
    values = apply(to_struct(base), own, where=where)
    distill = parse_section(RunConfig, values, where=f"{where}, field `grid`").distill
    return {
        path: value
        for path, value in overrides.items()
        if not path.startswith("distill.") or reads_setting(distill, path.removeprefix("distill."))
    }


def _slugs(overrides: Mapping[str, Any]) -> Iterator[str]:
    """Yield `top_k-5` for each setting but the method."""
    for path, value in overrides.items():
        if path != "distill.method":
            text = "-".join(str(part) for part in value.values()) if isinstance(value, dict) else str(value)
            yield f"{path.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9_.]+', '-', text).strip('-')}"


def _init_overrides(compare: CompareConfig, init: str) -> Overrides:
    if not init:
        return {}
    chosen = compare.student_inits[init]
    values = short(chosen)
    student = values.pop("student", None)
    return {"student_init": values} | ({"student": student} if student else {})


def _trial(name: str, seed: int, init: str, overrides: Overrides, where: str) -> Trial:
    values = {"variant": name, "seed": seed, "init": init, "overrides": overrides}
    return parse_section(Trial, values, where=f"{where}, variant {name}")


def _shared(path: str, where: str) -> SkdError:
    hint = (
        "list seeds under `seeds`"
        if path == "seed"
        else f"set it for all runs, under `overrides`, or make another comparison; of each run's own are fields of "
        f"{', '.join(OWN_SECTIONS)}"
    )
    return SkdError(SHARED, where=f"{where}, field `{path}`", hint=hint)


def _placed(error: SkdError, where: str) -> list[SkdError]:
    each = error.errors if isinstance(error, SkdErrors) else [error]
    return [
        one if one.where.startswith(where) else SkdError(one.what, where=f"{where}, {one.where}", hint=one.hint)
        for one in each
    ]
