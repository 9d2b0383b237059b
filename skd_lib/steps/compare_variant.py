"""Step `compare_variant`: the sections of the configuration that one run of a comparison has for itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from skd_lib.ascii_json import ascii_json
from skd_lib.compare.trials import Trial
from skd_lib.config import RunConfig, parse_json, parse_section
from skd_lib.parameters import short
from skd_lib.steps.runtime import StepIO, run_step


def main(
    trial: Annotated[str, typer.Option(help="The run, as JSON: {variant, seed, init, overrides: {FIELD: VALUE}}.")],
    config: Annotated[str, typer.Option(help="The configuration that all runs start from, as JSON.")],
    model_fingerprints: Annotated[
        str, typer.Option(help="Fingerprints of the models as preflight found them, as JSON: {REFERENCE: FINGERPRINT}.")
    ] = "{}",
) -> None:
    """Hand each later step its own section, as `preflight` does for a single run.

    Output parameters: `student`, `student_fingerprint`, `seed`, `student_init_config`, `distill_config` and `label`.
    """
    one = parse_section(Trial, trial, where="--trial")
    base = parse_section(RunConfig, config, where="--config")
    io = StepIO({})
    for name, value in outputs_of(one, base, parse_json(model_fingerprints, where="--model-fingerprints")).items():
        io.parameter(name, value)
    io.write()


def outputs_of(trial: Trial, base: RunConfig, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Return what the later steps of a run read.

    Args:
        trial: The run.
        base: What all runs start from.
        fingerprints: Of the models, by reference.
    """
    settings = trial.config(base)
    return {
        "student": settings.student or "",
        "student_fingerprint": fingerprints.get(settings.student or "", ""),
        "seed": settings.seed,
        "student_init_config": ascii_json(short(settings.student_init)),
        "distill_config": ascii_json(short(settings.distill)),
        "label": trial.label,
    }


if __name__ == "__main__":
    run_step(main)
