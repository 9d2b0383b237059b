"""What a plan cannot know of a run and a machine: assumed, counted in the data, measured or given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from skd_lib.config import RunConfig, parse_section
from skd_lib.config._base import ConfigSection
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.planning.machines import Machine
from skd_lib.planning.work import Rates
from skd_lib.storage import write_text_atomic

GIVEN, MEASURED, COUNTED, ASSUMED = "given", "measured", "data", "assumed"
"""Where a value comes from."""
MOST_OF_A_PEAK = 1000
"""The largest share: peaks of CPUs are guesses."""
_WHERE = "--assume"


class Assumptions(ConfigSection):
    """What a plan cannot know. Shares are of the machine's peak."""

    teacher_rows: int = Field(10_000, ge=1, description="Training examples of the teacher.")
    train_rows: int = Field(10_000, ge=1, description="Training examples of the student.")
    validation_rows: int = Field(200, ge=0, description="Validation examples.")
    test_rows: int = Field(500, ge=0, description="Test examples.")
    prompt_tokens: float = Field(256, gt=0, description="Mean prompt.")
    response_tokens: float = Field(128, gt=0, description="Mean response.")
    longest_tokens: float = Field(256, gt=0, description="Longest response of a batch, on average.")
    padding: float = Field(1.2, ge=1, description="Positions in training for each token: rows are padded.")
    acceptance: float = Field(0.8, ge=0, le=1, description="Drafted tokens that the teacher keeps in `skd`.")
    draft_acceptance: float = Field(0.6, ge=0, le=1, description="The same in speculative decoding.")
    inference_share: float = Field(0.5, gt=0, le=MOST_OF_A_PEAK, description="Arithmetic achieved in forward passes.")
    training_share: float = Field(0.4, gt=0, le=MOST_OF_A_PEAK, description="Arithmetic achieved in training.")
    bandwidth_share: float = Field(0.6, gt=0, le=MOST_OF_A_PEAK, description="Memory bandwidth achieved.")
    update_share: float = Field(0.6, gt=0, le=MOST_OF_A_PEAK, description="The same by the optimiser.")
    link_share: float = Field(0.7, gt=0, le=1, description="Bandwidth achieved between devices.")
    layer_seconds: float = Field(1e-5, ge=0, description="A layer's time beside that: launches.")
    draw_seconds: float = Field(0, ge=0, description="A sampled token's time beside forward passes.")
    servers: int = Field(0, ge=0, description="vLLM servers; 0: as many as the run names.")
    send_gbytes: float = Field(1.0, gt=0, description="GB/s between a machine in training and vLLM servers.")
    start_seconds: float = Field(90, ge=0, description="A step's start: pod, imports, loading, saving.")

    @model_validator(mode="after")
    def _longest_is_no_mean(self) -> Assumptions:
        if self.longest_tokens < self.response_tokens:
            raise ValueError(
                f"longest_tokens {self.longest_tokens:g} is less than response_tokens {self.response_tokens:g}: the "
                "longest response of a batch is no shorter than the mean"
            )
        return self

    def rates(self, machine: Machine) -> Rates:
        """Return what a device achieves."""
        return Rates(
            inference=self.inference_share * machine.flops,
            training=self.training_share * machine.flops,
            bandwidth=self.bandwidth_share * machine.bandwidth,
            update=self.update_share * machine.bandwidth,
            layer=self.layer_seconds,
            link=self.link_share * machine.link,
            network=self.link_share * machine.network,
            element=machine.element,
        )


def assume(
    config: RunConfig,
    machine: Machine,
    *,
    given: Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
    counted: Mapping[str, Any] | None = None,
) -> tuple[Assumptions, dict[str, str]]:
    """Return the assumptions of a run's plan, and where each comes from; lengths are at most the run's limits.

    Raises:
        SkdError: values are impossible, or beyond the run's limits; each is named.
    """
    task, given = config.task, given or {}
    origins = dict.fromkeys(Assumptions.model_fields, ASSUMED)
    values: dict[str, Any] = {}
    for found, origin in ((measured, MEASURED), (counted, COUNTED), (given, GIVEN)):
        values |= found or {}
        origins |= dict.fromkeys(found or {}, origin)
    limits = {"prompt_tokens": "max_prompt_tokens", "response_tokens": "max_new_tokens"}
    limits["longest_tokens"] = limits["response_tokens"]
    for name, limit in limits.items():
        most = getattr(task, limit)
        usual = most if name == "longest_tokens" else most / 2
        if name not in given:
            values[name] = min(values.get(name, usual), most)
    if config.distill.training.micro_batch_size == 1:
        values.setdefault("padding", 1.0)
    if machine.kind == "cpu":
        values.setdefault("start_seconds", 20)  # the models are small, and no pod or image is waited for
    assumptions = parse_section(Assumptions, values, where=_WHERE)
    problems = [
        SkdError(
            f"{name} {value:g} is more than the run's task.{limit}, {getattr(task, limit)}",
            where=_WHERE,
            hint=f"give less, or raise the limit with --set task.{limit}",
        )
        for name, limit in limits.items()
        if (value := getattr(assumptions, name)) > getattr(task, limit)
    ]
    problems += [
        SkdError(f"{name} {value:g} is more than the {machine.kind}'s peak", where=_WHERE, hint="give at most 1")
        for name in given
        if machine.kind != "cpu" and name.endswith("_share") and (value := getattr(assumptions, name)) > 1
    ]
    if problems:
        raise SkdErrors(problems)
    return assumptions, origins


def calibration_file(machine: Machine) -> Path:
    """Return the file that `skd plan --measure` writes unless another is named."""
    return Path("runs") / f"plan-{machine.kind}.json"


def write_calibration(path: Path, machine: Machine, config: RunConfig, figures: dict[str, Any]) -> None:
    """Write measured assumptions for later plans."""
    content = {"profile": machine.kind, "run": config.name, "assumptions": figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, json.dumps(content, indent=2) + "\n")


def read_calibration(path: Path, machine: Machine, config: RunConfig) -> dict[str, Any]:
    """Return measured assumptions: for the run that was measured all of them, for others those of the machine.

    Raises:
        SkdError: the file is none, or of machines of another kind.
    """
    hint = "measure here with --measure, or name another file with --calibration"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind, run, figures = content["profile"], content["run"], dict(content["assumptions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SkdError("no file that `skd plan --measure` wrote", where=str(path), hint=hint) from error
    if kind != machine.kind:
        raise SkdError(f"measured on {kind}, and the plan is for {machine.kind}", where=str(path), hint=hint)
    of_machine = {name for name in Assumptions.model_fields if name.endswith(("_share", "_seconds"))}
    return {name: value for name, value in figures.items() if run == config.name or name in of_machine}
