"""Make a KFP component, and its README, from the command line of a pipeline's step.

The options of the step are the parameters of the component, with their types and their help. `INPUTS` says which kind
of artifact each folder holds; `components/<step>/component.py` says what the step puts out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from skd_kfp.components.images import TRAIN
from skd_lib.config.step import DEPENDS
from skd_lib.errors import SkdError
from skd_lib.steps.kfp_call import EXECUTOR_INPUT_OPTION, PARAMETERS_OPTION
from skd_lib.steps.runtime import Switch
from skd_lib.storage import write_text_atomic

FOLDER = Path(__file__).parent
OUTPUT = "_out"
"""End of an option's name that says where an output artifact goes."""
Main = Callable[..., None]
INPUTS: Mapping[str, Any] = {
    "data": dsl.Dataset,
    **dict.fromkeys(("teacher", "student", "model", "before", "after", "draft_before", "draft_after"), dsl.Model),
    **dict.fromkeys(("evaluations", "teacher_evaluations", "student_evaluations"), dsl.Artifact),
    **dict.fromkeys(("drafts", "champion", "artifact"), dsl.Artifact),
    "status": dsl.PipelineTaskFinalStatus,
}
"""Types of the options that no parameter sets, by name."""


class Option(NamedTuple):
    """One option of a step's command line; `variable` is the environment variable with its default, if any."""

    type: Any
    help: str
    variable: str

    @property
    def parameter(self) -> type:
        """Type of the KFP parameter that sets it."""
        return {Switch: bool, int: int, float: float}.get(self.type, str)


def options_of(main: Main) -> dict[str, Option]:
    """Return the options of a step's command line, by name, in order."""
    hints = get_type_hints(main, include_extras=True)
    described = {name: get_args(hints[name]) for name in inspect.signature(main).parameters}
    return {name: Option(type_, info.help, info.envvar or "") for name, (type_, info) in described.items()}


def component(
    main: Main,
    outputs: Mapping[str, Any] | None = None,
    *,
    results: Mapping[str, tuple[type, str]] | None = None,
    by_hand: tuple[str, ...] = (),
    image: str = TRAIN,
) -> BaseComponent:
    """Make the component that runs a step.

    Options with an environment variable say where things are kept. They are left out: as arguments they would be part
    of Kubeflow's cache key. `outputs` are types of artifacts, in the order of the options `--*-out` that say where they
    go; `results` are types and descriptions of output parameters; `by_hand` names options that only a person sets.
    """
    step, outputs, results = main.__module__.rpartition(".")[2], outputs or {}, results or {}
    options = {name: option for name, option in options_of(main).items() if not option.variable}
    places = [name for name in options if name.endswith(OUTPUT)]
    inputs = {name: _annotation(step, name, options[name]) for name in options if name not in (*places, *by_hand)}
    if len(outputs) != len(places):
        what = f"options --*-out: {', '.join(places) or 'none'}; outputs: {', '.join(outputs) or 'none'}"
        raise SkdError(what, where=f"component {step}", hint="give as many outputs as there are options")
    places_of = dict(zip(outputs, places, strict=True))
    annotations = {
        **inputs,
        **{name: dsl.Output[type_] for name, type_ in outputs.items()},
        **{name: dsl.OutputPath(type_) for name, (type_, _) in results.items()},
    }

    def container(*placeholders: Any) -> dsl.ContainerSpec:
        given = dict(zip(annotations, placeholders, strict=True))
        lists = [name for name in inputs if isinstance(given[name], dsl.placeholders.InputListOfArtifactsPlaceholder)]
        arguments = {name: getattr(given[name], "path", given[name]) for name in inputs if name not in lists}
        arguments |= {place: given[name].path for name, place in places_of.items()}
        put_out = {name: given[name] for name in (*outputs, *results)}
        return step_container(step, image, arguments, put_out, lists=bool(lists))

    container.__name__ = step
    container.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY, annotation=type_)
            for name, type_ in annotations.items()
        ]
    )
    made: BaseComponent = dsl.container_component(container)
    spec = made.component_spec
    spec.description = inspect.getdoc(main)
    for name in inputs:
        spec.inputs[name].description = options[name].help
    for name in (*outputs, *results):
        spec.outputs[name].description = results[name][1] if name in results else options[places_of[name]].help
    return made


def _annotation(step: str, name: str, option: Option) -> Any:
    """Return how KFP wants an option's type declared."""
    if name in INPUTS:
        type_ = list[INPUTS[name]] if "list" in str(option.type) else INPUTS[name]  # type: ignore[valid-type]
        return type_ if name == "status" else dsl.Input[type_]
    if "Path" in str(option.type):
        raise SkdError(f"option `{name}`: which kind of artifact is it?", where=f"component {step}", hint="see INPUTS")
    return option.parameter


def step_container(
    step: str, image: str, arguments: Mapping[str, object], outputs: Mapping[str, Any], *, lists: bool = False
) -> dsl.ContainerSpec:
    """Make the container that runs one step: `python3 -m skd_lib.steps.<step> --name value ...`.

    The command starts with the literal `python3`, which a local runner replaces by its own interpreter. The step's own
    options are followed by the place of its output parameters, see `skd_lib.steps.kfp_call`. With `lists` the step
    reads lists of artifacts, which only KFP's whole executor input contains.
    """
    options = [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", value)]
    parameters = {
        name: output
        for name, output in outputs.items()
        if isinstance(output, dsl.placeholders.OutputParameterPlaceholder)
    }
    if parameters:
        options += [PARAMETERS_OPTION, f"{','.join(parameters)}={next(iter(parameters.values()))}"]
    if lists:
        options += [EXECUTOR_INPUT_OPTION, "{{$}}"]
    return dsl.ContainerSpec(image=image, command=["python3", "-m", f"skd_lib.steps.{step}"], args=options)


# --- their READMEs -------------------------------------------------------------------------------------------------


def component_names() -> list[str]:
    """Return the names of all components."""
    return sorted(file.parent.name for file in FOLDER.glob("*/component.py"))


def load_component(name: str) -> BaseComponent:
    """Return a component by its name."""
    return getattr(import_module(f"skd_kfp.components.{name}.component"), name)


def readme(name: str) -> str:
    """Return the text of a component's README."""
    spec = load_component(name).component_spec
    main = import_module(f"skd_lib.steps.{name}").main
    variables = [option.variable for option in options_of(main).values() if option.variable]
    parts = [f"# {name}", f"<!-- Written by `skd compile` from skd_lib/steps/{name}.py. -->", spec.description]
    for title, rows in (("Inputs", spec.inputs), ("Outputs", spec.outputs)):
        if rows:
            table = [
                f"| `{row}` | {_type(each)} | {' '.join(each.description.split())} |" for row, each in rows.items()
            ]
            parts.append("\n".join([f"## {title}\n", "| name | type | |", "|---|---|---|", *table]))
    if name in DEPENDS:
        parts.append(f"Fields of `config`: {', '.join(f'`{field}`' for field in DEPENDS[name])}.")
    parts.append(f"## By hand\n\nThe step is a command line: `python3 -m skd_lib.steps.{name} --help`.")
    if variables:
        named = ", ".join(f"`{variable}`" for variable in variables)
        parts.append(f"Set by environment variables, and no part of the cache key: {named}.")
    return "\n\n".join(parts) + "\n"


def write_readmes() -> None:
    """Write the README of every component."""
    for name in component_names():
        write_text_atomic(FOLDER / name / "README.md", readme(name))


def check_readmes() -> None:
    """Check that the README of every component says what its step takes."""
    for name in component_names():
        path = FOLDER / name / "README.md"
        if not path.is_file() or path.read_text(encoding="utf-8") != readme(name):
            what = "differs from the options of its step"
            raise SkdError(what, where=str(path), hint="run `skd compile` and commit the result")


def _type(spec: Any) -> str:
    name = spec.type.removeprefix("system.").partition("@")[0]
    return f"list of {name}" if spec.is_artifact_list else name
