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
    from skd_lib.config import load_config, parse_overrides
    from skd_lib.planning.assumptions import assume as assumed
    from skd_lib.planning.assumptions import calibration_file, read_calibration, write_calibration
    from skd_lib.planning.machines import load_machine
    from skd_lib.planning.measure import measure as measured
    from skd_lib.planning.plan import cost_driver, make_plan
    from skd_lib.planning.sizes import run_sizes

    settings = load_config(config, parse_overrides(changes or ()))
    machine = load_machine(profile, price=price)
    console = Console(stderr=True)
    file = calibration or calibration_file(machine)
    if measure:
        with console.status("measuring") as status:
            figures = measured(settings, machine, lambda what: status.update(f"measuring: {what}"))
        write_calibration(file, machine, settings, figures)
    known = read_calibration(file, machine, settings) if calibration or file.is_file() else {}
    given, counted = _given(assume or ()), {}
    if not {"train_rows", "prompt_tokens", "response_tokens"} <= {*known, *given}:
        counted = _of_data(settings, console)
    assumptions, origins = assumed(settings, machine, given=given, measured=known, counted=counted)
    sizes = run_sizes(settings, teacher, student)
    result = make_plan(settings, machine, assumptions, *sizes)
    driver = cost_driver(settings, result, *sizes)
    if as_json:
        say_json(result.to_dict() | {"origins": origins, "driver": driver})
        return
    for table in _tables(result, settings.name, origins):
        Console().print(table.to_rich())
    if driver:
        say(driver)
    if tight := [step.name for step in result.steps if not result.fits(step)]:
        say(f"does not fit: {', '.join(tight)} (docs/guides/sizing.md says what needs less memory)", err=True)


def _of_data(config: RunConfig, console: Any) -> dict[str, Any]:
    """Return the figures of the run's data; none where they cannot be read."""
    from skd_lib.models.files import load_tokenizer
    from skd_lib.models.references import resolve_model
    from skd_lib.planning.measure import data_figures, read_splits, some_tokens

    try:
        tokenizer = load_tokenizer(resolve_model(config.teacher, weights=False))
    except SkdError:
        tokenizer = None
    try:
        splits = read_splits(config)
        return data_figures(config, splits, some_tokens(config, tokenizer, splits) if tokenizer else [])
    except SkdError as error:
        console.print(f"the data are not counted: {error.brief}", markup=False, highlight=False, soft_wrap=True)
        return {}


def _given(words: Sequence[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise SkdError(f"`{wrong[0]}` is no NAME=VALUE", where="--assume", hint="e.g. --assume acceptance=0.7")
    return {name: value for name, _, value in pairs}


def _tables(plan: Plan, name: str, origins: dict[str, str]) -> list[TextTable]:
    from skd_lib._core.format import TextTable, plain

    whole = sum(part.seconds for part in plan.parts)
    parts = [[part.name, f"{part.seconds:.3g}", f"{part.seconds / whole:.0%}", part.bound] for part in plan.parts]
    fields = type(plan.assumptions).model_fields
    assumed = [
        [field, plain(getattr(plan.assumptions, field)), origins[field], info.description or ""]
        for field, info in fields.items()
    ]
    return [
        plan.table(name),
        TextTable("An optimiser step of distill", ["part", "seconds", "share", "most of it"], parts),
        TextTable("Assumptions", ["name", "value", "from", "meaning"], assumed, numbers=False),
    ]
