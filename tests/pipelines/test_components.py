"""Components against the steps they run: the same options, the same words."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.specifiers import SpecifierSet

from skd_kfp.pipelines.kubeflow.versions import NEWEST, OLDEST, text
from skd_lib.steps.kfp_call import take_call

ROOT = Path(__file__).parents[2] / "components"
NAMES = sorted(folder.name for folder in ROOT.iterdir() if (folder / "component.py").is_file())


def component(name: str) -> Any:
    return getattr(importlib.import_module(f"skd_kfp.components.{name}.component"), name)


def options_of(step: str) -> dict[str, bool]:
    """Option names of a step's command line, and whether each is required."""
    app = typer.Typer()
    app.command()(importlib.import_module(f"skd_lib.steps.{step}").main)
    return {option.opts[0]: option.required for option in typer.main.get_command(app).params}


def test_every_step_has_a_component():
    modules = (ROOT.parent / "skd_lib/steps").glob("*.py")
    steps = {path.stem for path in modules if "run_step(main)" in path.read_text()}
    assert set(NAMES) == steps


@pytest.mark.parametrize("name", NAMES)
def test_component_gives_its_step_the_options_it_takes(name: str):
    container = component(name).component_spec.implementation.container
    assert container.command == ["python3", "-m", f"skd_lib.steps.{name}"]
    words, call = take_call([str(arg).replace("{{$}}", "{}") for arg in container.args])
    given, known = words[::2], options_of(name)
    assert set(given) <= known.keys()
    assert {option for option, required in known.items() if required} <= set(given)
    outputs = component(name).component_spec.outputs or {}
    assert call.parameters.keys() == {name for name, output in outputs.items() if not output.type.startswith("system.")}
    assert (call.artifacts, call.inputs) == ({}, {})  # paths tell of them


@pytest.mark.parametrize("name", NAMES)
def test_placeholders_are_those_that_kfps_launcher_fills_in(name: str):
    """`getPlaceholders` of backend/src/v2/component/launcher_v2.go, KFP 2.15 to 2.17."""
    known = re.compile(
        r"\{\{\$\}\}"
        r"|\{\{\$\.(inputs|outputs)\.artifacts\['\w+'\]\.(uri|path)\}\}"
        r"|\{\{\$\.inputs\.parameters\['\w+'\]\}\}"
        r"|\{\{\$\.outputs\.parameters\['\w+'\]\.output_file\}\}"
    )
    args = [str(arg) for arg in component(name).component_spec.implementation.container.args]
    assert ("{{$}}" in args) == (name == "compare_table")  # the only one that reads lists of artifacts
    assert [arg for arg in args if "{{" in known.sub("", arg)] == []


@pytest.mark.parametrize("name", NAMES)
def test_component_is_documented(name: str):
    spec = component(name).component_spec
    readme = (ROOT / name / "README.md").read_text()
    metadata = yaml.safe_load((ROOT / name / "metadata.yaml").read_text())
    assert metadata["name"] == name
    assert spec.description.startswith(metadata["description"])
    (pipelines,) = (each for each in metadata["dependencies"]["kubeflow"] if each["name"] == "Pipelines")
    taken = SpecifierSet(pipelines["version"])
    major, minor, _ = OLDEST
    assert text(OLDEST) in taken
    assert text(NEWEST) in taken
    assert f"{major}.{minor - 1}.99" not in taken  # which `skd submit` refuses
    for described in [*(spec.inputs or {}).items(), *(spec.outputs or {}).items()]:
        assert described[1].description, described[0]
        assert f"| `{described[0]}` |" in readme
        assert " ".join(described[1].description.split()) in readme
