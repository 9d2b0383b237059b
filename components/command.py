"""The command line of a step inside its container."""

from collections.abc import Mapping, Sequence

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
