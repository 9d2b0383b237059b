"""Step `compare_variant`: the parts of the configuration that one run of a comparison has for itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from skd_lib.comparison.trials import Trial
from skd_lib.config import RunConfig, parse_json, parse_section
from skd_lib.config.step import StepConfig, step_config
from skd_lib.steps.runtime import StepIO, run_step


def main(
    trial: Annotated[str, typer.Option(help="The run, as JSON: {variant, seed, init, overrides: {FIELD: VALUE}}.")],
    config: Annotated[str, typer.Option(help="The configuration that all runs start from, as preflight gives it.")],
    model_fingerprints: Annotated[
        str, typer.Option(help="Fingerprints of the models as preflight found them, as JSON: {REFERENCE: FINGERPRINT}.")
    ] = "{}",
) -> None:
    """Hand each later step its own `config`, as `preflight` does for a single run.

    Output parameters: `student_init`, `distill`, `evaluate` and `specdec_benchmark`.
    """
    one = parse_section(Trial, trial, where="--trial")
    base = parse_section(StepConfig, config, where="--config")
    io = StepIO({})
    for name, value in outputs_of(one, base, parse_json(model_fingerprints, where="--model-fingerprints")).items():
        io.parameter(name, value)
    io.write()


def outputs_of(trial: Trial, base: StepConfig, fingerprints: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of a run's later steps, by name: of one trial of the runs that start from `base`."""
    shared = parse_section(RunConfig, {name: getattr(base, name) for name in RunConfig.model_fields}, where="--config")
    own = trial.config(shared)
    # All runs are measured alike: with the settings and the seed that they share.
    steps = {"student_init": own, "distill": own, "evaluate": shared, "specdec_benchmark": shared}
    fingerprint = fingerprints.get(own.student or "", "")
    return {
        step: step_config(step, config, fingerprint=fingerprint, label=trial.label, drafts=base.drafts)
        for step, config in steps.items()
    }


if __name__ == "__main__":
    run_step(main)
