"""What the steps of our pipelines do, as far as the backend sees it: preflight and compare_variant with their own code,
the others as stubs. Models and data are named by their content's fingerprints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from skd_lib.comparison.trials import Trial
from skd_lib.config import parse_section
from skd_lib.config.parameters import Form
from skd_lib.config.step import StepConfig, step_config
from skd_lib.data.prepared import preparation
from skd_lib.preflight.reuse import keep, reuse_from
from skd_lib.steps.compare_variant import outputs_of
from skd_lib.steps.preflight import NO_COMPARISON, read, settings_of
from tests.kubeflow.backend.run import Call, Made

_FORM = set(Form.__dataclass_fields__)
_FILL = {"STRUCT": {}, "LIST": [], "BOOLEAN": False, "NUMBER_INTEGER": 1, "NUMBER_DOUBLE": 0.5}


@dataclass
class Steps:
    """The steps of a run.

    Attributes:
        run_id: KFP's id of the run.
        content: Fingerprint of data and models by name, where it is not the name's own.
        checkpoint_root: Where steps keep what later runs need to know.
        instead: What a task does instead: returns its outputs, or raises.
        calls: What steps have got, in order.
    """

    run_id: str = "run-1"
    content: dict[str, str] = field(default_factory=dict)
    checkpoint_root: str = ""
    instead: dict[str, Callable[[Call], Made]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def __call__(self, call: Call) -> Made:
        """Run a step."""
        self.calls.append(call)
        if call.task in self.instead:
            return self.instead[call.task](call)
        declared = call.outputs.get("parameters", {})
        filled = {name: _FILL.get(spec["parameterType"], "a-text") for name, spec in declared.items()}
        known = {
            "comp-preflight": self.preflight,
            "comp-prepare-data": self.prepare_data,
            "comp-compare-variant": compare_variant,
        }.get(call.component)
        return Made({**filled, **(known(call.parameters) if known else {})})

    def preflight(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Do what step preflight does, without looking at data and models."""
        form = Form(**{name: value for name, value in given.items() if name in _FORM})
        config, plan = read(
            form, "" if given["comparison"] == NO_COMPARISON else given["comparison"] or "{}", given["run_name"]
        )
        models = [config.teacher, config.student or ""]
        models += [trial.config(config).student or "" for trial in plan.trials] if plan else []
        prints = {name: self.content.get(name, f"of {name}") for name in models}
        data = self.content.get("data", json.dumps(preparation(config.data), sort_keys=True))
        prepared = step_config("prepare_data", config, fingerprint=data)
        fresh, _ = reuse_from(
            self.checkpoint_root,
            prepared,
            "" if given["reuse"] else self.run_id,
            kind="comparison" if plan else "run",
        )
        found = settings_of(
            config,
            plan,
            data=data,
            models=prints,
            fresh=fresh,
        )
        return {**found, "problems": ""}

    def prepare_data(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Do what step prepare_data does when it has made its data."""
        keep(self.checkpoint_root, parse_section(StepConfig, given["config"], where="config").fresh)
        return {}


def compare_variant(given: Mapping[str, Any]) -> dict[str, Any]:
    """Do what step compare_variant does."""
    base = parse_section(StepConfig, given["config"], where="config")
    return outputs_of(Trial.model_validate_json(given["trial"]), base, json.loads(given["model_fingerprints"]))
