"""The trials of a comparison, and the parameters of its pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from skd_lib._core.ascii_json import ascii_json
from skd_lib._core.machine import POD_VARIABLE
from skd_lib.comparison.config import CompareConfig
from skd_lib.comparison.trials import Trial, expand, reference_of
from skd_lib.config import RunConfig, apply, parameters, parse_section
from skd_lib.config._reading import check_unset
from skd_lib.config.names import run_name_from
from skd_lib.config.parameters import Form, Parameters, fill, read_values, short
from skd_lib.errors import SkdError, SkdErrors

_IN_CONFIG = ("base", "overrides")
"""Fields of a comparison's file that parameter `config` stands for."""

MOST_TRIALS_ON_A_CLUSTER = 24
"""Argo keeps the state of a run in one object of Kubernetes, whose size is limited: `pipelines/kubeflow/sizes.py`."""


@dataclass(frozen=True)
class Plan:
    """A comparison, the configuration that its trials start from, and the trials.

    Trials are run or skipped for a reason; each variant is tested against `reference`.
    """

    compare: CompareConfig
    base: RunConfig
    trials: Sequence[Trial]
    skipped: Sequence[tuple[Trial, str]]
    reference: str

    def without(self, failed: Mapping[str, str]) -> Plan:
        """Leave out trials, by label, each with the reason that the table gives."""
        compare = self.compare.model_copy(update={"skip": {**self.compare.skip, **failed}})
        gone = [(trial, failed[trial.label]) for trial in self.trials if trial.label in failed]
        left = [trial for trial in self.trials if trial.label not in failed]
        return replace(self, compare=compare, trials=left, skipped=[*self.skipped, *gone])

    def table(self) -> dict[str, Any]:
        """Return the plain values that step `compare_table` needs."""
        return {
            "reference": self.reference,
            "trials": [short(trial) for trial in self.trials],
            "skipped": [{**short(trial), "reason": reason} for trial, reason in self.skipped],
        }


def plan(compare: CompareConfig, base: RunConfig, *, where: str) -> Plan:
    """List the trials of a comparison."""
    every = expand(compare, base, where=where)
    labels = {trial.label for trial in every}
    if unknown := sorted(compare.skip.keys() - labels):
        hint = f"one of {', '.join(sorted(labels))}"
        raise SkdError(f"there is no trial `{unknown[0]}`", where=f"{where}, field `skip`", hint=hint)
    trials = [trial for trial in every if trial.label not in compare.skip]
    if not trials:
        raise SkdError("no trial is left", where=f"{where}, field `skip`", hint="leave out fewer")
    return Plan(
        compare,
        base,
        trials,
        [(trial, compare.skip[trial.label]) for trial in every if trial.label in compare.skip],
        reference_of(compare, every, base, where=where),
    )


def check_fits_cluster(plan: Plan, *, where: str) -> None:
    """Raise an SkdError where a comparison is too large for one run in Kubeflow."""
    if len(plan.trials) > MOST_TRIALS_ON_A_CLUSTER:
        raise SkdError(
            f"{len(plan.trials)} runs; in a cluster a comparison has at most {MOST_TRIALS_ON_A_CLUSTER}",
            where=where,
            hint="make several comparisons of it, each with some of the variants, or use `skd compare` on one machine",
        )


def to_parameters(compare: CompareConfig, base: RunConfig) -> Parameters:
    """Return the form's fields for a comparison whose `overrides` are in `base` already, as `load_compare` has them."""
    values = {name: value for name, value in short(compare).items() if name not in _IN_CONFIG}
    form = parameters.to_parameters(base, without=("training_method",))  # the methods are the comparison's
    return {**form, "comparison": ascii_json(values, compact=False)}


def from_parameters(comparison: str = "{}", *, run_name: str = "", **fields: Any) -> Plan:
    """Return the comparison that a form describes.

    `comparison` is JSON of a comparison's fields without `base`, or the URI of its YAML file; `fields` are those of
    `Form`. The name is made of `run_name`, any text, where neither `comparison` nor `config` has one. An SkdError names
    all that is wrong.
    """
    form = Form(**fields)
    where, values = read_values(comparison, "comparison")
    place, base = read_values(_base_of(values, comparison.strip(), form), "config")
    name = values.get("name") or base.get("name") or run_name_from(run_name)
    errors: list[SkdError] = []
    compare = CompareConfig(name="unread", base="")
    with _noted(errors):
        compare = parse_section(CompareConfig, {"base": "", **values, "name": name}, where=where)
    with _noted(errors):
        overridden = f"{where}, field `overrides`"
        check_unset(RunConfig, compare.overrides, where=overridden)
        run = fill(apply({**base, "name": name}, compare.overrides, where=overridden), form, where=place)
    if errors:
        raise SkdErrors(errors)
    planned = plan(compare, run, where=where)
    # A notebook in the cluster is a pod too, but none of the pipeline's.
    if "KUBERNETES_SERVICE_HOST" in os.environ and POD_VARIABLE in os.environ:
        check_fits_cluster(planned, where=where)
    return planned


@contextmanager
def _noted(errors: list[SkdError]) -> Iterator[None]:
    try:
        yield
    except SkdError as error:
        errors += error.errors if isinstance(error, SkdErrors) else [error]


def _base_of(values: Mapping[str, Any], comparison: str, form: Form) -> str:
    """Field `config`; where it says nothing, the file that the comparison names, as seen from the comparison's own."""
    base = values.get("base")
    if form.config.strip() not in ("", "{}") or not isinstance(base, str) or not base:
        return form.config
    folder, slash, _ = ("" if comparison.startswith("{") else comparison).rpartition("/")
    return base if "://" in base or base.startswith("/") else f"{folder}{slash}{base}"
