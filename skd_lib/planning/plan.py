"""The plan of a run: memory, time and cost by step, from the models' sizes, lengths and the machine's figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skd_lib.config import RunConfig
from skd_lib.planning.estimator import Assumptions, Estimator, Part
from skd_lib.planning.machines import Machine
from skd_lib.planning.memory import ModelSize

_SMALL_STEPS = 6
"""Steps that load no model for long: preflight, prepare_data, report, gate, register_model, finish."""


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
    planner = Estimator(config, machine, assumptions, assumptions.rates(machine))
    memory = planner.memory(teacher, student)
    steps: list[PlannedStep] = []
    trainings = (
        ("teacher_sft", config.teacher_sft, teacher, config.teacher_sft.enabled, assumptions.teacher_rows),
        ("student_init", config.student_init, student, config.student_init.trains, assumptions.train_rows),
    )
    for name, section, size, wanted, rows in trainings:
        if wanted:
            devices = min(machine.devices, section.training.batch_size)
            seconds = planner.sft(section.training, size, devices, rows)
            steps.append(PlannedStep(name, devices, seconds, memory[name]))
    parts = planner.distill_step(teacher, student)
    whole, server = planner.distill(parts, teacher), planner.server(teacher, student)
    steps.append(PlannedStep("distill", planner.trainers + planner.servers, whole, memory["distill"]))
    if server:
        steps.append(PlannedStep("distill: a vLLM server", planner.split, 0.0, server))
    batch = min(config.evaluation.batch_size, max(assumptions.test_rows, 1))
    for name, size in (("teacher", teacher), ("student before", student), ("student", student)):
        seconds = assumptions.test_rows / batch * planner.generation(size, batch) + assumptions.start_seconds
        steps.append(PlannedStep(f"evaluate {name}", 1, seconds, planner.held([size], batch)))
    both = planner.held([teacher, student], max(config.specdec.batch_sizes))
    steps.append(PlannedStep("specdec_benchmark", 1, planner.specdec(teacher, student), both))
    steps.append(PlannedStep("other steps", 1, _SMALL_STEPS * assumptions.start_seconds))
    return Plan(machine, assumptions, steps, parts)
