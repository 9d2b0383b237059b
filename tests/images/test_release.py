"""A release: its checks, and its way from images in a registry to a wheel whose commands name them by digest."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from docker import DockerClient
from typer.testing import CliRunner

from release import PLACES, app, versions, wheel_problems
from skd_kfp.components.images import read_images
from skd_kfp.pipelines.compiling import PIPELINES
from skd_lib import __version__
from skd_lib.errors import SkdError, SkdErrors
from tests.images.conftest import ROOT, Build
from tests.images.test_pinning import push

CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A thing.\n\n## [0.1.0] - 2026-01-02\n\n- The first.\n"
IN_TREE = ("images", "skd_lib", "components", "pipelines", "constraints", *("pyproject.toml", "setup.py", "LICENSE"))


def release(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    failed = isinstance(result.exception, SkdError | SkdErrors)
    return result.exit_code, str(result.exception) if failed else result.output


def test_every_file_holds_the_packages_version():
    assert versions(ROOT) == {key: {__version__} for key in PLACES}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that hold the version, and a changelog."""
    for place in PLACES:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / place, tmp_path / place)
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    return tmp_path


def test_a_prepared_tree_is_ready_for_its_tag_and_no_other(tree: Path):
    code, said = release("prepare", "0.2.0", "--date", "2027-03-04", "--root", tree)
    assert code == 0, said
    assert versions(tree) == {key: {"0.2.0"} for key in PLACES}
    changed = [line for line in (tree / "pyproject.toml").read_text().splitlines() if "0.2.0" in line]
    assert changed == ['version = "0.2.0"']
    changelog = (tree / "CHANGELOG.md").read_text()
    assert changelog == CHANGELOG.replace("## [Unreleased]\n", "## [Unreleased]\n\n## [0.2.0] - 2027-03-04\n")

    notes = tree / "notes.md"
    assert release("check", "v0.2.0", "--notes", notes, "--root", tree) == (0, "version=0.2.0\nprerelease=false\n")
    assert notes.read_text() == "### Added\n\n- A thing.\n"
    said = release("check", "v0.2.1", "--root", tree)[1]
    for place in (*PLACES, "CHANGELOG.md"):
        assert f"- {place}: " in said
    assert "does not begin with v" in release("check", "0.2.0", "--root", tree)[1]


def test_prereleases_are_marked(tree: Path):
    release("prepare", "0.2.0rc1", "--root", tree)
    assert "prerelease=true" in release("check", "v0.2.0rc1", "--root", tree)[1]


@pytest.mark.parametrize(
    ("changelog", "says"),
    [
        ("## [Unreleased]\n\n- A thing.\n", "there is no chapter for"),
        (f"## [{__version__}]\n\n- A thing.\n", "has no date"),
        (f"## [{__version__}] - soon\n\n- A thing.\n", "has no date"),
        (f"## [{__version__}] - 2027-03-04\n\n## [0.0.1] - 2025-01-01\n\n- A thing.\n", "is empty"),
    ],
)
def test_a_release_without_its_dated_chapter_is_refused(tree: Path, changelog: str, says: str):
    (tree / "CHANGELOG.md").write_text(changelog)
    code, said = release("check", f"v{__version__}", "--root", tree)
    assert code != 0
    assert says in said


@pytest.mark.parametrize("version", ["0.2", "v0.2.0", "0.2.0-rc.1", "0.2.0+mine", "next"])
def test_versions_of_another_form_are_refused_before_anything_is_written(tree: Path, version: str):
    code, said = release("prepare", version, "--root", tree)
    assert code != 0
    assert "0.2.0" in said
    assert versions(tree) == {key: {__version__} for key in PLACES}


def test_nothing_is_released_twice_or_unsaid(tree: Path):
    assert "there is a chapter for 0.1.0 already" in release("prepare", "0.1.0", "--root", tree)[1]
    (tree / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [0.1.0] - 2026-01-02\n\n- The first.\n")
    assert "the chapter for 0.2.0 is empty" in release("prepare", "0.2.0", "--root", tree)[1]
    assert versions(tree) == {key: {__version__} for key in PLACES}


@dataclass(frozen=True)
class Release:
    """A source tree whose images lie in a registry, and what a release makes of it."""

    tree: Path
    registry: str

    def environment(self, name: str) -> Path:
        """Make an environment that has what the tests' own has, but for this project."""
        folder = self.tree.parent / name
        _run("uv", "venv", "--quiet", "--python", sys.executable, folder)
        for packages in folder.glob("lib/*/site-packages"):
            (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
        return folder

    def install(self, name: str, what: str | Path, *options: str) -> Path:
        """Install the project, and nothing else, into an environment of this name; its programs."""
        folder = self.environment(name)
        settings = ("--quiet", "--offline", "--no-deps", "--no-build-isolation", "--python", str(folder))
        _run("uv", "pip", "install", *settings, *options, str(what))
        return folder / "bin"

    def pin(self, programs: Path, *names: str) -> str:
        """Pin and compile as the workflow does, by its script."""
        return _run(self.tree / "images/tools/pin.sh", *names, PATH=f"{programs}:{os.environ['PATH']}")

    def wheel(self) -> Path:
        """Build the sdist, and from it the wheel."""
        _run("uv", "build", "--quiet", "--offline", "--no-build-isolation", "--python", sys.executable, self.tree)
        (path,) = self.tree.glob("dist/*.whl")
        return path

    def skd(self, programs: Path, *arguments: str) -> str:
        """Return what `skd` prints in a folder of its own."""
        folder = self.tree.parent / "elsewhere"
        folder.mkdir(exist_ok=True)
        return _run(programs / "skd", *arguments, cwd=folder)


def _run(program: str | Path, *arguments: str | Path, cwd: Path | None = None, **environment: str) -> str:
    own = Path(sys.executable).with_name("uv")
    command = [own if program == "uv" and own.exists() else program, *arguments]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def make_release(registry: str, tmp_path: Path) -> Callable[[str], Release]:
    """Copies what a release is made of; its images are those of a team in the local registry."""

    def make(team: str) -> Release:
        tree = tmp_path / "tree"
        tree.mkdir()
        for name in (*IN_TREE, "README.md"):
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__", ".mypy_cache")
            shutil.copytree(source, tree / name, ignore=ignored) if source.is_dir() else shutil.copy(source, tree)
        digests = tree / "components/digests.yaml"
        digests.write_text(digests.read_text().replace("ghcr.io/skd-kubeflow/", f"{registry}/{team}/"))
        return Release(tree, registry)

    return make


@pytest.fixture
def installed_release(make_release: Callable[[str], Release]) -> tuple[Release, Path, dict[str, str]]:
    """A release whose images have no content, its wheel, installed, and the digests that the registry gave."""
    made = make_release("quick")
    digests = {name: push(made.registry, f"quick/skd-{name}", __version__) for name in ("train", "comet", "vllm")}
    source = made.install("source", made.tree, "--editable")
    said = made.skd(source, "submit", str(made.tree / "pipelines/configs/demo.yaml"), "--dry-run", "--host", "http://h")
    assert "no digest" in said
    made.pin(source, "train", "comet", "vllm")
    digests["pipeline"] = push(made.registry, "quick/skd-pipeline", __version__, index=True)
    made.pin(source, "pipeline")
    return made, made.install("installed", made.wheel()), digests


@pytest.mark.slow
def test_an_installed_release_names_its_images_by_digest(
    installed_release: tuple[Release, Path, dict[str, str]], tmp_path: Path
):
    made, programs, digests = installed_release
    (wheel,) = made.tree.glob("dist/*.whl")
    assert wheel_problems(wheel) == []
    assert release("wheel", wheel)[0] == 0
    assert release("smoke", wheel, "--environment", programs.parent) == (0, release_commands())
    pinned = {name: image.digest for name, image in read_images(made.tree / "components/digests.yaml").items()}
    assert pinned == digests

    made.skd(programs, "compile")
    train, comet = (f"{made.registry}/quick/skd-{name}@{digests[name]}" for name in ("train", "comet"))
    for name in PIPELINES:  # not into the package, which an administrator may have installed
        text = (tmp_path / "elsewhere" / f"{name}.yaml").read_text()
        assert re.search(rf"value: {made.registry}/quick/skd-vllm@{digests['vllm']}$", text, re.MULTILINE)
        assert set(re.findall(r"image: (\S+)", text)) == {train, *([comet] if name == "distillation_comet" else [])}
    made.skd(programs, "init", "--from", "demo")
    said = made.skd(programs, "submit", "run.yaml", "--dry-run", "--host", "http://h")
    assert f"images       {train}\n" in said
    what = "from skd_lib._core.bugs import install_command; print(install_command('torch'))"
    assert _run(programs / "python", "-c", what, cwd=tmp_path) == "pip install 'skd-lib[training]'\n"


def release_commands() -> str:
    from release import SMOKE

    return "".join(f"$ {' '.join(command)}\n" for command in SMOKE)


def test_a_wheel_without_pins_is_no_releases(tmp_path: Path):
    path = tmp_path / "skd_lib-9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(ROOT / "components/digests.yaml", "skd_kfp/components/digests.yaml")
        for name in PIPELINES:
            document = {"deploymentSpec": {"executors": {"a": {"container": {"image": "r/other:1"}}}}}
            archive.writestr(f"skd_kfp/pipelines/compiled/{name}.yaml", yaml.safe_dump(document))
    said = [str(problem) for problem in wheel_problems(path)]
    assert sum("its digest is empty" in each for each in said) == len(read_images())
    assert sum("names r/other:1" in each for each in said) == len(PIPELINES)
    (tmp_path / "no.whl").write_text("text")
    with pytest.raises(SkdError, match="not a wheel of skd-lib"):
        wheel_problems(tmp_path / "no.whl")


@pytest.mark.docker
@pytest.mark.timeout(3600)
def test_images_of_a_release_are_built_pushed_pinned_and_pulled(
    engine: DockerClient, build: Build, make_release: Callable[[str], Release]
):
    made = make_release("real")

    def publish(name: str, tag: str) -> str:
        repository = f"{made.registry}/real/skd-{name}"
        engine.images.get(tag).tag(repository, __version__)
        for line in engine.images.push(repository, __version__).splitlines():
            assert "error" not in json.loads(line), line
        engine.images.remove(f"{repository}:{__version__}")
        return repository

    source = made.install("source", made.tree, "--editable")
    repository = publish("train", build("train"))
    for name in ("comet", "vllm"):
        push(made.registry, f"real/skd-{name}", __version__)
    made.pin(source, "train", "comet", "vllm")
    publish("pipeline", build("pipeline", made.tree))
    made.pin(source, "pipeline")
    programs = made.install("installed", made.wheel())

    images = read_images(made.tree / "components/digests.yaml")
    made.skd(programs, "compile", "--output", "mine.yaml")
    assert f"image: {repository}@{images['train'].digest}" in (made.tree.parent / "elsewhere/mine.yaml").read_text()
    run = {"remove": True, "network_mode": "none"}
    help_ = ["python3", "-m", "skd_lib.steps.preflight", "--help"]
    assert b"preflight" in engine.containers.run(images["train"].reference, help_, **run)
    submits = ["skd", "compile", "--check", "--release"]
    assert b"up to date" in engine.containers.run(images["pipeline"].reference, submits, **run)
