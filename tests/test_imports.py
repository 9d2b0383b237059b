"""Imports go one way, and the packages' names collide with nobody's.

`pipelines` (command line, runners, DAGs) -> `components` -> `skd_lib.steps` -> the library, whose packages are layers.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = sorted(path for folder in ("skd_lib", "components", "pipelines") for path in (ROOT / folder).rglob("*.py"))

LAYERS = (
    ("errors", "_core"),
    ("storage",),
    ("config",),
    ("results",),
    ("models",),
    ("data",),
    ("sampling",),
    ("distillation",),
    ("vllm", "served"),
    ("training", "evaluation", "bench"),
    ("specdec",),
    ("tracking", "multinode"),
    ("report",),
    ("comparison",),
    ("planning",),
    ("preflight",),
    ("steps",),
    ("interface",),
)
"""Packages of skd_lib; each imports from those above it in this list, and never from the others of its line."""
RANK = {package: rank for rank, layer in enumerate(LAYERS) for package in layer}
COMMAND_LINES = ("skd_lib/steps/", "skd_lib/multinode/node.py")
"""Processes of their own: these may import typer and stand above the layers."""
CORE = ("skd_lib/sampling/", "skd_lib/distillation/")
"""The algorithm: for people who want nothing else."""
CORE_NEEDS = {"torch", "transformers", "numpy", "typing_extensions", "skd_lib"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Names of the modules that a module imports, within functions too, but not for annotations only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unused = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    place = name_of(path)
    names = list(imported(path))
    above = {"pipelines", "components"}  # no module is installed under these names
    if place.startswith("components/"):
        above |= {"skd_kfp.pipelines"}
    elif place.startswith("skd_lib/"):
        above |= {"skd_kfp", "kfp"} if place.startswith(COMMAND_LINES) else {"skd_kfp", "kfp", "typer"}
    assert [name for name in names if any(f"{name}.".startswith(f"{one}.") for one in above)] == []


@pytest.mark.parametrize("path", [path for path in PRODUCT if "skd_lib" in path.parts], ids=name_of)
def test_a_package_imports_from_lower_layers_only(path: Path) -> None:
    place = name_of(path)
    package = path.relative_to(ROOT / "skd_lib").parts[0].removesuffix(".py")
    if package == "__init__" or place.startswith(COMMAND_LINES):
        return
    used = {name.split(".")[1] for name in imported(path) if re.match(r"skd_lib\.[a-z_]+", name)} - {"__version__"}
    assert {other for other in used if other != package and RANK[other] >= RANK[package]} - {"errors"} == set()


def test_every_package_has_its_layer() -> None:
    found = {
        path.stem for path in (ROOT / "skd_lib").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} == RANK.keys()


@pytest.mark.parametrize("path", [path for path in PRODUCT if name_of(path).startswith(CORE)], ids=name_of)
def test_the_algorithm_needs_torch_and_transformers_only(path: Path) -> None:
    outside = {name.partition(".")[0] for name in imported(path)} - sys.stdlib_module_names - CORE_NEEDS
    assert outside == set()


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
PLACES = {"skd_lib/": "skd_lib/", "components/": "skd_kfp/components/", "pipelines/": "skd_kfp/pipelines/"}
"""Folders of the source tree, and of the wheel."""


def tracked() -> list[str]:
    return subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()


def build(tree: Path, folder: Path) -> None:
    command = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(tree)]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, of the files that git knows."""
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        if name.startswith(tuple(PLACES)) or name in {"pyproject.toml", "setup.py", "README.md", "LICENSE"}:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    build(tree, folder)
    return next(folder.iterdir())


@pytest.mark.slow
def test_the_wheel_holds_every_file(wheel: Path) -> None:
    wanted = {new + name.removeprefix(old) for name in tracked() for old, new in PLACES.items() if name.startswith(old)}
    assert wanted - set(zipfile.ZipFile(wheel).namelist()) == set()


@pytest.mark.slow
def test_the_wheel_stands_beside_others_that_ship_a_folder_pipelines(wheel: Path, tmp_path: Path) -> None:
    """Both ways round, and in a folder with a `pipelines/`, as everybody has who writes pipelines."""
    other = tmp_path / "other"
    for folder in ("pipelines", "components"):
        (other / folder).mkdir(parents=True)
        (other / folder / "__init__.py").write_text("OTHER = True\n")
    (other / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "other"\nversion = "1"\n[tool.setuptools]\npackages = ["pipelines", "components"]\n'
    )
    build(other, tmp_path)
    venv.create(tmp_path / "env", symlinks=True)
    python = str(tmp_path / "env/bin/python")
    site = next((tmp_path / "env/lib").glob("python*/site-packages"))
    # Its dependencies are this environment's, without the editable install.
    libraries = next(Path(part) for part in sys.path if part.endswith("site-packages"))
    (site / "libraries.pth").write_text(f"{libraries}\n")
    wheels = [str(wheel), *map(str, tmp_path.glob("*.whl"))]
    subprocess.run([*PIP, "--python", python, "install", "--quiet", "--no-deps", "--no-index", *wheels], check=True)

    def said(*command: str) -> str:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(command, cwd=other, env=env, check=True, capture_output=True, text=True).stdout

    assert said(python, "-m", "skd_kfp.pipelines.cli", "--version").startswith("skd ")
    assert said(python, "-c", "import pipelines, components; print(pipelines.OTHER, components.OTHER)") == "True True\n"
    subprocess.run([*PIP, "--python", python, "uninstall", "--quiet", "--yes", "other"], check=True)
    assert said(str(tmp_path / "env/bin/skd"), "--version").startswith("skd ")
    assert str(site) in said(python, "-c", "import skd_kfp.pipelines as package; print(package.__file__)")
