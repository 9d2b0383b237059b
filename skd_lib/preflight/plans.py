"""The plans in preflight's report: memory, time and cost by step, here or on machines that a cluster may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skd_lib.config import RunConfig
from skd_lib.planning.assumptions import ASSUMED, assume, calibration_file, read_calibration
from skd_lib.planning.machines import Machine, load_machine, this_machine
from skd_lib.planning.memory import ModelSize
from skd_lib.planning.plan import Plan, cost_driver, make_plan
from skd_lib.preflight.checks import Checks

OF_CLUSTERS = ("l4", "a100", "h100x8")
"""Machines that a cluster's nodes may be: the one of preflight says nothing of them."""


def check_plans(
    checks: Checks,
    config: RunConfig,
    sizes: tuple[ModelSize, ModelSize],
    counted: Mapping[str, Any],
    *,
    elsewhere: bool,
) -> list[Plan]:
    """Plan a run, and report what it takes and what was assumed.

    Args:
        checks: Takes the findings.
        config: The run.
        sizes: Of the teacher and the student.
        counted: Assumptions that the data replace.
        elsewhere: The steps get other nodes than this machine.
    """
    machine = None if elsewhere else this_machine()
    machines = [machine] if machine else [load_machine(name) for name in OF_CLUSTERS]
    plans, assumed = [], ""
    for each in machines:
        plan, assumed = _plan(config, each, sizes, counted)
        plans.append(plan)
    usable = next((plan for plan in plans if all(map(plan.fits, plan.steps))), plans[-1])
    hint = cost_driver(config, usable, *sizes)
    checks.add("plan", "ok", f"{'; '.join(map(str, plans))}; assumed: {assumed}", hint=hint)
    return plans


def _plan(
    config: RunConfig, machine: Machine, sizes: tuple[ModelSize, ModelSize], counted: Mapping[str, Any]
) -> tuple[Plan, str]:
    """Return the plan for a machine, and the assumptions that nothing replaces."""
    file = calibration_file(machine)
    measured = read_calibration(file, machine, config) if file.is_file() else {}
    assumptions, origins = assume(config, machine, measured=measured, counted=counted)
    named = (f"{name} {value:g}" for name, value in assumptions.model_dump().items() if origins[name] == ASSUMED)
    return make_plan(config, machine, assumptions, *sizes), ", ".join(named)
