"""The command line of a step inside its container."""

from collections.abc import Mapping

from kfp import dsl


def run_step(step: str, image: str, arguments: Mapping[str, object]) -> dsl.ContainerSpec:
    """The container that runs one step: `python3 -m skd_lib.steps.<step> --name value ...`.

    The command starts with the literal `python3`, by which a local runner puts its own interpreter in place, and ends
    with KFP's executor input, through which the step writes its outputs.

    Args:
        step: Module name under `skd_lib.steps`.
        image: Image reference.
        arguments: Option names (underscores become dashes) and KFP placeholders.
    """
    options = [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", value)]
    return dsl.ContainerSpec(
        image=image,
        command=["python3", "-m", f"skd_lib.steps.{step}"],
        args=[*options, "--executor-input", "{{$}}"],
    )
