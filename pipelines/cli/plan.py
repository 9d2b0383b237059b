"""`skd plan`: memory, time and cost of a run before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skd_kfp.pipelines.cli.options import AsJson, Set, say_json
from skd_lib._core.terminal import say
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from skd_lib._core.format import TextTable
    from skd_lib.config import RunConfig
    from skd_lib.planning.plan import Plan

GIVEN, MEASURED, DATA, GUESSED = "given", "measured", "data", "assumed"


def plan(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    profile: Annotated[
        str, typer.Option(help="Devices: l4, a100, h100, h200 or cpu, with their number, e.g. h100x64.")
    ] = "cpu",
    changes: Set = None,
    teacher: Annotated[
        str, typer.Option(help="In place of the run's: a folder, a config.json, a known shape, or weights, e.g. 70B.")
    ] = "",
    student: Annotated[str, typer.Option(help="Like --teacher.")] = "",
    assume: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Another value of a listed assumption. Repeatable."),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Dollars for a device and hour.", show_default="an example")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the assumptions on this machine first, in minutes.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="File of what was measured.", show_default="runs/plan-PROFILE.json, if it is there"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory, the time and the cost of each step of a run; nothing is trained.

    A model is known by its config.json, no weights are read, except with --measure. The data are read where they can
    be, for their number and lengths.

    Examples: `skd plan run.yaml --profile h100x8`, `skd plan run.yaml --measure`.
    """
    from skd_lib._core.terminal import Console
    from skd_lib.config import load_config, parse_overrides, parse_section
    from skd_lib.planning.estimator import Assumptions
    from skd_lib.planning.machines import load_machine
    from skd_lib.planning.measure import measure as measured
    from skd_lib.planning.measure import read_calibration, write_calibration
    from skd_lib.planning.plan import make_plan
    from skd_lib.planning.sizes import run_sizes

    settings = load_config(config, parse_overrides(changes or ()))
    machine = load_machine(profile, price=price)
    console = Console(stderr=True)
    file = calibration or Path("runs") / f"plan-{machine.kind}.json"
    if measure:
        with console.status("measuring") as status:
            figures = measured(settings, machine, lambda what: status.update(f"measuring: {what}"))
        write_calibration(file, machine, settings, figures)
    found: dict[str, tuple[Any, str]] = {}
    if calibration or file.is_file():
        known = read_calibration(file, machine, settings)
        found |= {name: (value, MEASURED) for name, value in known.items()}
    given = {name: (value, GIVEN) for name, value in _given(assume or ()).items()}
    if not {"train_rows", "prompt_tokens", "response_tokens"} <= {**found, **given}.keys():
        found |= {name: (value, DATA) for name, value in _of_data(settings, console).items()}
    found |= given
    longest = {"prompt_tokens": settings.task.max_prompt_tokens, "response_tokens": settings.task.max_new_tokens}
    for name, most in longest.items():
        found.setdefault(name, (most / 2, GUESSED))
    found.setdefault("longest_tokens", (settings.task.max_new_tokens, GUESSED))
    values = {name: value for name, (value, _) in found.items()}
    assumptions = parse_section(Assumptions, values, where="--assume")
    result = make_plan(settings, machine, assumptions, *run_sizes(settings, teacher, student))
    origins = {name: origin for name, (_, origin) in found.items()}
    if as_json:
        say_json(result.to_dict() | {"origins": origins})
        return
    for table in _tables(result, settings.name, origins):
        Console().print(table.to_rich())
    if tight := [step.name for step in result.steps if not result.fits(step)]:
        say(f"does not fit: {', '.join(tight)} (docs/guides/sizing.md says what needs less memory)", err=True)


def _of_data(config: RunConfig, console: Any) -> dict[str, Any]:
    """Return the figures of the run's data; none where they cannot be read."""
    from skd_lib.models.files import load_tokenizer
    from skd_lib.models.references import resolve_model
    from skd_lib.planning.measure import data_figures, read_splits

    try:
        tokenizer = load_tokenizer(resolve_model(config.teacher, weights=False))
    except SkdError:
        tokenizer = None
    try:
        return data_figures(config, read_splits(config), tokenizer)
    except SkdError as error:
        console.print(f"the data are not counted: {error.brief}", markup=False, highlight=False, soft_wrap=True)
        return {}


def _given(words: Sequence[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise SkdError(f"`{wrong[0]}` is no NAME=VALUE", where="--assume", hint="e.g. --assume acceptance=0.7")
    return {name: value for name, _, value in pairs}


def _tables(plan: Plan, name: str, origins: dict[str, str]) -> list[TextTable]:
    from skd_lib._core.format import TextTable, duration
    from skd_lib.planning.memory import GIB

    machine = plan.machine
    steps = [
        [
            step.name,
            str(step.devices),
            "" if step.memory is None else f"{step.memory / GIB:.1f}" + ("" if plan.fits(step) else " (too much)"),
            duration(step.seconds) if step.seconds else "",
            f"{plan.cost(step):.2f}" if step.seconds else "",
        ]
        for step in plan.steps
    ]
    steps.append(["all", "", "", duration(plan.seconds), f"{plan.total_cost:.2f}"])
    whole = sum(part.seconds for part in plan.parts)
    parts = [[part.name, f"{part.seconds:.3g}", f"{part.seconds / whole:.0%}", part.bound] for part in plan.parts]
    fields = type(plan.assumptions).model_fields
    assumed = [
        [field, f"{getattr(plan.assumptions, field):.4g}", origins.get(field, GUESSED), info.description or ""]
        for field, info in fields.items()
    ]
    memory = f", {machine.memory / GIB:.0f} GiB each" if machine.memory else ""
    return [
        TextTable(
            f"{name} on {machine.name}{memory}",
            ["step", "devices", "GiB of each", "time", "$"],
            steps,
            note=f"${machine.price:g} a device and hour, an example (--price); figures: {machine.source}",
            highlighted=("all",),
        ),
        TextTable("An optimiser step of distill", ["part", "seconds", "share", "most of it"], parts),
        TextTable("Assumptions", ["name", "value", "from", "meaning"], assumed, numbers=False),
    ]
