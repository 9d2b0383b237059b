"""Components: what the generator makes of the command lines of the steps."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml
from kfp import dsl
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from skd_kfp.components import build
from skd_kfp.components.build import component, component_names, load_component, readme
from skd_kfp.pipelines.kubeflow.checks import NEWEST, OLDEST, text
from skd_lib.errors import SkdError
from skd_lib.steps.kfp_call import take_call
from skd_lib.steps.runtime import Switch

ROOT = Path(__file__).parents[2] / "components"
NAMES = component_names()


def options_of(step: str) -> dict[str, bool]:
    """Option names of a step's command line, and whether each is required."""
    app = typer.Typer()
    app.command()(importlib.import_module(f"skd_lib.steps.{step}").main)
    return {option.opts[0]: option.required for option in typer.main.get_command(app).params}


def test_every_step_has_a_component():
    modules = (ROOT.parent / "skd_lib/steps").glob("*.py")
    steps = {path.stem for path in modules if "run_step(main)" in path.read_text()}
    assert set(NAMES) == steps


def test_components_need_no_package_of_the_steps():
    """Pipelines are compiled where only the extra `pipelines` is installed: in the image `pipeline`, in a workflow."""
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(sys.argv[1:])\n"  # importing them fails
        "from skd_kfp.components.build import component_names, load_component\n"
        "print(*(load_component(name).name for name in component_names()))"
    )
    extras = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = [Requirement(line).name for extra in ("training", "tracking", "s3") for line in extras[extra]]
    # Imported by kfp itself.
    blocked = [
        name.replace("-", "_") for name in packages if name not in ("requests", "kubernetes", "google-cloud-storage")
    ]
    done = subprocess.run([sys.executable, "-c", code, *blocked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_component_gives_its_step_the_options_it_takes(name: str):
    spec = load_component(name).component_spec
    container = spec.implementation.container
    assert container.command == ["python3", "-m", f"skd_lib.steps.{name}"]
    words, call = take_call([str(arg).replace("{{$}}", "{}") for arg in container.args])
    given, known = words[::2], options_of(name)
    assert set(given) <= known.keys()
    assert {option for option, required in known.items() if required} <= set(given)
    outputs = spec.outputs or {}
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
    args = [str(arg) for arg in load_component(name).component_spec.implementation.container.args]
    assert ("{{$}}" in args) == (name == "compare_table")  # the only one that reads lists of artifacts
    assert [arg for arg in args if "{{" in known.sub("", arg)] == []


@pytest.mark.parametrize("name", NAMES)
def test_component_is_documented(name: str):
    spec = load_component(name).component_spec
    metadata = yaml.safe_load((ROOT / name / "metadata.yaml").read_text())
    assert metadata["name"] == name
    (pipelines,) = (each for each in metadata["dependencies"]["kubeflow"] if each["name"] == "Pipelines")
    taken = SpecifierSet(pipelines["version"])
    major, minor, _ = OLDEST
    assert text(OLDEST) in taken
    assert text(NEWEST) in taken
    assert f"{major}.{minor - 1}.99" not in taken  # which `skd submit` refuses
    assert spec.description
    for described in [*(spec.inputs or {}).values(), *(spec.outputs or {}).values()]:
        assert described.description


# --- the generator, with a step of its own ------------------------------------------------------------------------


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    page_out: Annotated[Path, typer.Option(help="File for the page.")],
    draft_length: Annotated[int, typer.Option(help="Tokens of a draft.")] = 4,
    warm: Annotated[Switch, typer.Option(help="Warm up first.")] = Switch.true,
    verbose: Annotated[bool, typer.Option(help="Say more.")] = False,
    root: Annotated[str, typer.Option(envvar="ROOT", help="Folder of checkpoints.")] = "",
) -> None:
    """Draw a page.

    With colours.
    """


def test_options_become_a_component():
    spec = component(
        main, {"report": dsl.HTML}, results={"count": (int, "Pages.")}, by_hand=("verbose",), image="r/i:1"
    ).component_spec
    assert spec.description.startswith("Draw a page.")
    inputs = {name: (each.type, each.description) for name, each in spec.inputs.items()}
    assert inputs == {
        "model": ("system.Model@0.0.1", "Folder of the model."),
        "draft_length": ("Integer", "Tokens of a draft."),
        "warm": ("Boolean", "Warm up first."),
    }
    outputs = {name: (each.type, each.description) for name, each in spec.outputs.items()}
    assert outputs == {"report": ("system.HTML@0.0.1", "File for the page."), "count": ("Integer", "Pages.")}
    container = spec.implementation.container
    assert container.image == "r/i:1"
    assert [str(arg) for arg in container.args] == [
        *("--model", "{{$.inputs.artifacts['model'].path}}"),
        *("--draft-length", "{{$.inputs.parameters['draft_length']}}"),
        *("--warm", "{{$.inputs.parameters['warm']}}"),
        *("--page-out", "{{$.outputs.artifacts['report'].path}}"),
        *("--kfp-parameters", "count={{$.outputs.parameters['count'].output_file}}"),
    ]


def test_every_folder_has_a_type():
    def step(book: Annotated[Path, typer.Option(help="Folder of the book.")]) -> None:
        """Read."""

    with pytest.raises(SkdError, match="option `book`: which kind of artifact is it"):
        component(step)
    with pytest.raises(SkdError, match=r"options --\*-out: page_out; outputs: none"):
        component(main)


@pytest.mark.parametrize("name", NAMES)
def test_committed_readme_is_current(name: str):
    assert (ROOT / name / "README.md").read_text() == readme(name)


def test_a_readme_says_what_comes_from_the_environment():
    assert "`SKD_CHECKPOINT_ROOT`, `SKD_TRACKING_URI`, `SKD_EXPERIMENT`" in readme("distill")
    assert "| `evaluations` | list of Artifact |" in readme("compare_table")
    assert "environment" not in readme("show")


def test_drift_of_a_readme_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    (tmp_path / "show").mkdir()
    (tmp_path / "show/component.py").touch()
    with pytest.raises(SkdError, match=r"show/README.md: differs from the options of its step\n  hint: run `skd comp"):
        build.check_readmes()
    build.write_readmes()
    build.check_readmes()
    (tmp_path / "show/README.md").write_text("old")
    with pytest.raises(SkdError, match="differs"):
        build.check_readmes()
