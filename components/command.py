"""The command line of a step inside its container."""

from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl

from skd_lib.steps.kfp_call import EXECUTOR_INPUT_OPTION, PARAMETERS_OPTION


def run_step(
    step: str, image: str, arguments: Mapping[str, object], outputs: Mapping[str, Any], *, lists: bool = False
) -> dsl.ContainerSpec:
    """Make the container that runs one step: `python3 -m skd_lib.steps.<step> --name value ...`.

    The command starts with the literal `python3`, by which a local runner puts its own interpreter in place. Behind
    the step's own options stands where its output parameters go, see `skd_lib.steps.kfp_call`.

    Args:
        step: Module name under `skd_lib.steps`.
        image: Image reference.
        arguments: Option names (underscores become dashes) and KFP placeholders.
        outputs: All outputs of the component, by name, as its function gets them.
        lists: Whether the step reads lists of artifacts, which only KFP's whole executor input tells.
    """
    options = [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", value)]
    command = ["python3", "-m", f"skd_lib.steps.{step}"]
    parameters = {
        name: output
        for name, output in outputs.items()
        if isinstance(output, dsl.placeholders.OutputParameterPlaceholder)
    }
    if parameters:
        options += [PARAMETERS_OPTION, f"{','.join(parameters)}={next(iter(parameters.values()))}"]
    if lists:
        options += [EXECUTOR_INPUT_OPTION, "{{$}}"]
    return dsl.ContainerSpec(image=image, command=command, args=options)


def on_several_gpus(command: Sequence[str], processes: int) -> list[str]:
    """A step's command for `processes` processes on the GPUs of one pod.

    Args:
        command: As `run_step` made it.
        processes: At least two.
    """
    python, dash_m, module = command
    options = {
        "num_processes": str(processes),
        "num_machines": "1",
        "main_process_port": "0",  # any that is free
        "mixed_precision": "no",  # the trainer's own affair
        "dynamo_backend": "no",
    }
    launch = [part for name, value in options.items() for part in (f"--{name}", value)]
    return [python, dash_m, "accelerate.commands.launch", "--multi_gpu", *launch, "--module", module]
