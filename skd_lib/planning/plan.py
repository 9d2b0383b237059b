"""The plan of a run: memory, time and cost by step, from the models' sizes, lengths and the machine's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from skd_lib._core.format import TextTable, duration
from skd_lib.config import RunConfig
from skd_lib.config.models import served_teacher
from skd_lib.planning.assumptions import Assumptions
from skd_lib.planning.estimator import Estimator, Part
from skd_lib.planning.machines import Machine
from skd_lib.planning.memory import GIB, ModelSize

_SMALL_STEPS = 6
"""Steps that load no model for long: preflight, prepare_data, report, gate, register_model, finish."""
_CHEAPER: dict[str, Sequence[tuple[str, dict[str, Any]]]] = {
    "specdec_benchmark": (
        ("specdec", {"sweep": "none"}),
        ("specdec", {"sweep": "none", "repeats": 1}),
    ),
    "evaluate": (("evaluation", {"batch_size": 64}),),
}
"""By step, settings that make it cheaper, and still measure what the gate compares; the least change first."""
_DRIVES = 0.4
"""A step of at least this share of the cost is named."""


@dataclass(frozen=True)
class PlannedStep:
    """A step of the pipeline: devices, seconds, and bytes on each device; None where nothing is estimated."""

    name: str
    devices: int
    seconds: float
    memory: float | None = None


@dataclass(frozen=True)
class Plan:
    """The plan of a run on a machine; `parts` are those of an optimiser step of `distill`."""

    machine: Machine
    assumptions: Assumptions
    steps: list[PlannedStep]
    parts: list[Part] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Return the time of all steps, one after the other."""
        return sum(step.seconds for step in self.steps)

    def cost(self, step: PlannedStep) -> float:
        """Return what a step costs: whole machines are paid for."""
        return step.seconds / 3600 * self.machine.paid(step.devices) * self.machine.price

    @property
    def total_cost(self) -> float:
        """Return what the run costs."""
        return sum(map(self.cost, self.steps))

    def fits(self, step: PlannedStep) -> bool:
        """Return whether a device has the memory; CUDA's own and fragmentation take a twentieth."""
        return step.memory is None or step.memory <= 0.95 * self.machine.memory

    def __str__(self) -> str:
        tight = [step.name for step in self.steps if not self.fits(step)]
        lacking = f" (too little memory for {', '.join(tight)})" if tight else ""
        return f"{self.machine.name}: {duration(self.seconds)}, ${self.total_cost:.2f}{lacking}"

    def table(self, name: str) -> TextTable:
        """Return the steps as a table."""
        machine = self.machine
        rows = [
            [
                step.name,
                str(step.devices),
                "" if step.memory is None else f"{step.memory / GIB:.1f}" + ("" if self.fits(step) else " (too much)"),
                duration(step.seconds) if step.seconds else "",
                f"{self.cost(step):.2f}" if step.seconds else "",
            ]
            for step in self.steps
        ]
        memory = f", {machine.memory / GIB:.0f} GiB each" if machine.memory else ""
        return TextTable(
            f"{name} on {machine.name}{memory}",
            ["step", "devices", "GiB of each", "time", "$"],
            [*rows, ["all", "", "", duration(self.seconds), f"{self.total_cost:.2f}"]],
            note=f"${machine.price:g} a device and hour, idle or not, an example (--price); figures: {machine.source}",
            highlighted=("all",),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "profile": self.machine.name,
            "price": self.machine.price,
            "assumptions": self.assumptions.model_dump(),
            "steps": [
                {
                    "name": step.name,
                    "devices": step.devices,
                    "seconds": step.seconds,
                    "memory_bytes": step.memory,
                    "fits": self.fits(step),
                    "cost": self.cost(step),
                }
                for step in self.steps
            ],
            "distill_step": [{"name": part.name, "seconds": part.seconds, "terms": part.terms} for part in self.parts],
            "seconds": self.seconds,
            "cost": self.total_cost,
        }


def compared(name: str, plans: Sequence[Plan]) -> TextTable:
    """Return the steps of a run on several machines as one table: the time and the cost of each."""
    shown = [*dict.fromkeys(step.name for plan in plans for step in plan.steps if step.seconds), "all"]
    by_machine = [{step.name: step for step in plan.steps} for plan in plans]

    def cell(plan: Plan, steps: dict[str, PlannedStep], row: str) -> str:
        if row == "all":
            return f"{duration(plan.seconds)}, ${plan.total_cost:.2f}"
        if (step := steps.get(row)) is None:
            return ""
        alike = [each for each in plan.steps if each.name.partition(":")[0] == row]
        tight = "" if all(map(plan.fits, alike)) else "; too much memory"
        return f"{duration(step.seconds)}, ${plan.cost(step):.2f}{tight}"

    return TextTable(
        f"{name} on one machine of each kind",
        ["step", *(plan.machine.name for plan in plans)],
        [[row, *(cell(plan, steps, row) for plan, steps in zip(plans, by_machine, strict=True))] for row in shown],
        note="prices are examples",
        highlighted=("all",),
    )


def make_plan(
    config: RunConfig, machine: Machine, assumptions: Assumptions, teacher: ModelSize, student: ModelSize
) -> Plan:
    """Plan a run.

    Args:
        config: The run.
        machine: Its devices: training uses all of them, every other step one.
        assumptions: Of data and speed.
        teacher: Size of the teacher.
        student: Size of the student, after a cut.
    """
    planner = Estimator(config, machine, assumptions)
    memory = {step: float(each.total) for step, each in planner.memory(teacher, student).items()}
    steps: list[PlannedStep] = []
    # Only the teacher's fine-tuning and the distillation use all devices.
    trainings = (
        ("teacher_sft", config.teacher_sft, teacher, config.teacher_sft.enabled, machine.devices),
        ("student_init", config.student_init, student, config.student_init.trains, 1),
    )
    for name, section, size, wanted, most in trainings:
        if wanted:
            devices = planner.devices_of(section.training, most)
            rows = assumptions.teacher_rows if name == "teacher_sft" else assumptions.train_rows
            seconds = planner.sft(section.training, size, devices, rows)
            steps.append(PlannedStep(name, devices, seconds, memory[name]))
    parts = planner.distill_step(teacher, student)
    whole, server = planner.distill(parts, teacher), planner.server(teacher, student)
    shared = 0.0 if planner.servers else server
    devices = planner.trainers + planner.servers
    steps.append(PlannedStep("distill", devices, whole, memory["distill"] + shared))
    if planner.servers:
        steps.append(PlannedStep("distill: a vLLM server", planner.split, 0.0, server))
    elsewhere = served_teacher(config.teacher) is not None
    batch = min(config.evaluation.batch_size, max(assumptions.test_rows, 1))
    for name, size in (("teacher", teacher), ("student before", student), ("student", student)):
        seconds = assumptions.test_rows / batch * planner.generation(size, batch) + assumptions.start_seconds
        held = None if elsewhere and name == "teacher" else planner.held([size], batch)
        steps.append(PlannedStep(f"evaluate {name}", 1, seconds, held))
    if not elsewhere:
        both = planner.held([teacher, student], max(config.specdec.batch_sizes))
        steps.append(PlannedStep("specdec_benchmark", 1, planner.specdec(teacher, student), both))
    steps.append(PlannedStep("other steps", 1, _SMALL_STEPS * assumptions.start_seconds))
    return Plan(machine, assumptions, steps, parts)


def cost_driver(config: RunConfig, plan: Plan, teacher: ModelSize, student: ModelSize) -> str:
    """Return which step most of a run is paid for, and settings that make it cheaper; empty if none stands out.

    Args:
        config: The run.
        plan: Its plan.
        teacher: Size of the teacher.
        student: Size of the student.
    """
    step = max(plan.steps[:-1], key=plan.cost)  # the last are the small ones
    share = plan.cost(step) / plan.total_cost if plan.total_cost else step.seconds / plan.seconds
    if share < _DRIVES:
        return ""
    said = f"{share:.0%} of the cost is {step.name}"
    for section, changes in _CHEAPER.get(step.name.partition(" ")[0], ()):
        changed = config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})
        other = make_plan(changed, plan.machine, plan.assumptions, teacher, student)
        if other.seconds < 0.95 * plan.seconds:
            words = " ".join(f"--set {section}.{name}={value}" for name, value in changes.items())
            said += f"; `{words}`: the run takes {duration(other.seconds)}, ${other.total_cost:.2f}"
    if step.name == "distill" and plan.parts:
        part = max(plan.parts, key=lambda part: part.seconds)
        whole = sum(each.seconds for each in plan.parts)
        said += f", which is {part.seconds / whole:.0%} {part.name}, mostly {part.bound}"
        said += "; fewer steps (`--set distill.training.max_steps=N`) cost less"
    return said
