"""A comparison's YAML file: a run's configuration, and the settings that differ from run to run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from skd_lib.config import (
    ConfigSection,
    Count,
    MethodName,
    Overrides,
    RunConfig,
    StudentInitConfig,
    apply,
    load_config,
    parse_section,
    read_yaml,
)
from skd_lib.config._base import Distinct
from skd_lib.config._reading import check_unset
from skd_lib.errors import SkdError

SHARED = "the runs of a comparison share data, task, teacher and evaluation"
OWN_SECTIONS = ("distill", "student_init", "student")
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"


class StudentInit(StudentInitConfig):
    """A start of students: section `student_init` of a run, and the student it is about."""

    student: str | None = Field(None, description="Model to start from; unset: the run's.")


class CompareConfig(ConfigSection):
    """Methods x student inits x settings, each with every seed, on one prepared data set and one teacher."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="Name of the comparison: lower case, digits and dashes."
    )
    base: str = Field(description="The run's YAML file that everything starts from, as seen from this file.")
    overrides: Overrides = Field(
        {}, description="Fields of `base` to replace in all runs, by dotted name; null unsets one."
    )
    methods: Annotated[list[MethodName], Distinct] = Field(
        [], description="Methods compared; empty: the one of `base`."
    )
    student_inits: dict[str, StudentInit] = Field({}, description="By name; empty: the one of `base`.")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {},
        description="Values to try by dotted field, e.g. `distill.sampling.top_k: [1, 5, 25]`. A method that does not "
        "read a field is run once. At most 5,000 combinations, and 500 runs in all.",
    )
    variants: dict[str, Overrides] = Field(
        {},
        description="Variants in addition to methods x grid, by name: fields by dotted name. `{}` is `base` itself.",
    )
    seeds: Annotated[list[Count], Distinct] = Field(
        [0], min_length=1, description="Each variant is run once with each of them."
    )
    drafts: bool = Field(
        False, description="Measure every student as a draft of the teacher too, as section `specdec` of `base` says."
    )
    reference: str = Field(
        "", description="Variant that the others are tested against; empty: the first whose method is `skd`."
    )

    skip: dict[str, str] = Field(
        {}, description="Trials that are left out, `VARIANT-seed-SEED`, each with the reason that the table gives."
    )


def is_comparison(path: Path) -> bool:
    """Return True for a comparison's YAML file, False for a run's."""
    return "base" in read_yaml(path)


def load_compare(path: Path, overrides: Overrides | None = None) -> tuple[CompareConfig, RunConfig]:
    """Read a comparison's YAML file and the run's that it names.

    The second is what its runs start from; `overrides` are further fields of `base`, with precedence over the file's.
    """
    fields = read_yaml(path)
    if "base" not in fields and "teacher" in fields:
        hint = "`skd run` runs it on this machine, `skd submit` in Kubeflow"
        raise SkdError("this is the file of a run, not of a comparison", where=str(path), hint=hint)
    compare = parse_section(CompareConfig, fields, where=str(path))
    if overrides:
        compare = compare.model_copy(update={"overrides": {**compare.overrides, **overrides}})
    file = path.parent / compare.base
    load_config(file)  # whose own errors name it
    where = f"{path}, field `overrides`{' with --set' if overrides else ''}"
    check_unset(RunConfig, compare.overrides, where=where)
    values = apply({**read_yaml(file), "name": compare.name}, compare.overrides, where=where)
    return compare, parse_section(RunConfig, values, where=where)
