"""Check and prepare a release: its version in every file, its chapter of the changelog, what its wheel holds.

    python images/tools/release.py --help

Needs the extra `pipelines`. What a release does, in order, is in docs/project/versions.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import venv
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

import typer
from packaging.version import InvalidVersion, Version

from skd_kfp.components.images import Image, parse_images
from skd_kfp.pipelines.compiling import PIPELINES, images_of
from skd_lib._core.documents import parse_yaml_documents
from skd_lib._core.terminal import run_command
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.storage import write_text_atomic

ROOT = Path(__file__).resolve().parents[2]
PLACES = {
    "pyproject.toml": r'^version = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
    "images/Dockerfile": r"^ARG VERSION=(.+)$",
    "components/digests.yaml": r"^  version: (.+)$",
}
"""Files that hold the version, and the lines that do."""
SMOKE = (
    ("skd", "--version"),
    ("python", "-c", "from skd_lib import InterleavedSampler, SKDTrainer"),
    ("skd", "init", "--from", "demo"),
    ("skd", "run", "run.yaml", "--dry-run"),
    ("skd", "compile", "--check"),
    ("skd", "compile"),
    ("skd", "submit", "run.yaml", "--dry-run", "--host", "http://localhost:8888"),
)
"""What must work where a wheel is installed, without a source tree."""
CHANGELOG = "CHANGELOG.md"
UNRELEASED = "## [Unreleased]"
WITH_COMET = "distillation_comet"

app = typer.Typer(
    help="Check and prepare a release.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Root = Annotated[Path, typer.Option(help="The source tree.", show_default="this one")]


@app.command()
def check(
    tag: Annotated[str, typer.Argument(help="The tag, e.g. v0.2.0.")],
    notes: Annotated[Path | None, typer.Option(help="File to write the release's notes to.")] = None,
    root: Root = ROOT,
) -> None:
    """Fail where the tree is not ready for this tag: another version in a file, no dated chapter of the changelog.

    Print `version=...` and `prerelease=true|false`, as a workflow's outputs take them.
    """
    version = parsed(tag.removeprefix("v"))
    problems = find_problems(tag, root)
    if problems:
        raise SkdErrors(problems)
    if notes:
        write_text_atomic(notes, chapter((root / CHANGELOG).read_text(encoding="utf-8"), str(version)))
    typer.echo(f"version={version}\nprerelease={str(version.is_prerelease).lower()}")


@app.command()
def prepare(
    version: Annotated[str, typer.Argument(help="The version to release, e.g. 0.2.0.")],
    day: Annotated[str, typer.Option("--date", help="Its date.", show_default="today")] = "",
    root: Root = ROOT,
) -> None:
    """Write the version into every file that holds it, and date what the changelog calls unreleased."""
    new = str(parsed(version))
    text = (root / CHANGELOG).read_text(encoding="utf-8")
    dated = with_chapter(text, new, date.fromisoformat(day) if day else datetime.now(UTC).date())
    for place, pattern in PLACES.items():
        path = root / place
        before = path.read_text(encoding="utf-8")
        write_text_atomic(path, re.sub(pattern, lambda found: _with_version(found, new), before, flags=re.MULTILINE))
        typer.echo(f"wrote {place}")
    write_text_atomic(root / CHANGELOG, dated)
    typer.echo(f"wrote {CHANGELOG}\nrun `make clean install compile` next, commit all, and push the tag v{new}")


@app.command()
def wheel(path: Annotated[Path, typer.Argument(help="The wheel, e.g. dist/*.whl.")]) -> None:
    """Fail where a wheel's images are not pinned, or its compiled pipelines name others."""
    if problems := wheel_problems(path):
        raise SkdErrors(problems)
    typer.echo(f"{path.name}: its pipelines name the images by the digests that it holds")


@app.command()
def smoke(
    path: Annotated[Path, typer.Argument(help="The wheel, e.g. dist/*.whl.")],
    environment: Annotated[
        Path | None, typer.Option(help="Environment where it is installed already.", show_default="a fresh one")
    ] = None,
) -> None:
    """Install a wheel with its extras into a fresh environment, and try the commands that people begin with."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bin_folder = (environment or folder / "environment").resolve() / "bin"
        if environment is None:
            venv.create(folder / "environment", with_pip=True)
            wanted = (f"{path.resolve()}[training,pipelines]", "-c", str(ROOT / "constraints/main.txt"))
            _try(folder, bin_folder, "pip", "install", "--quiet", *wanted)
            _try(folder, bin_folder, "pip", "check")
        for command in SMOKE:
            _try(folder, bin_folder, *command)


def _try(folder: Path, bin_folder: Path, program: str, *arguments: str) -> None:
    """Run a program of an environment in a folder, as someone would who has no source tree."""
    typer.echo(f"$ {program} {' '.join(arguments)}")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([bin_folder / program, *arguments], cwd=folder, env=kept)
    if done.returncode:
        raise SkdError(f"`{program} {' '.join(arguments)}` fails with exit code {done.returncode}", where="the wheel")


def parsed(version: str) -> Version:
    """Return a version, written as packages and image tags write it.

    Raises:
        SkdError: it is none, is not of three numbers, or is written in another way.
    """
    try:
        found = Version(version)
    except InvalidVersion as error:
        raise SkdError(f"{version!r} is no version", where="version", hint="e.g. 0.2.0, or 0.2.0rc1") from error
    if str(found) != version or len(found.release) != 3 or found.local:
        raise SkdError(f"{version!r} is not of the form 0.2.0 or 0.2.0rc1", where="version", hint="name another one")
    return found


def versions(root: Path) -> dict[str, set[str]]:
    """Return the versions that each file of `PLACES` holds; in a sound tree all are one."""
    return {
        place: set(re.findall(pattern, (root / place).read_text(encoding="utf-8"), re.MULTILINE))
        for place, pattern in PLACES.items()
    }


def find_problems(tag: str, root: Path) -> list[SkdError]:
    """Return what keeps a tree from being released under a tag."""
    version = tag.removeprefix("v")
    problems = [
        SkdError(
            f"the version is {', '.join(sorted(found)) or 'missing'}, the tag {tag}",
            where=place,
            hint=f"run `python images/tools/release.py prepare {version}`",
        )
        for place, found in versions(root).items()
        if found != {version}
    ]
    if not tag.startswith("v"):
        problems.append(SkdError(f"the tag {tag!r} does not begin with v", where="tag", hint=f"tag v{version}"))
    try:
        chapter((root / CHANGELOG).read_text(encoding="utf-8"), version)
    except SkdError as error:
        problems.append(error)
    return problems


def chapter(changelog: str, version: str) -> str:
    """Return what the changelog says of a version, without its heading.

    Raises:
        SkdError: it has no such chapter, the chapter has no date, or says nothing.
    """
    heading = rf"^## \[{re.escape(version)}\]([^\n]*)\n"
    found = re.search(rf"{heading}(.*?)(?=^## \[|^\[[^\]]+\]:|\Z)", changelog, re.MULTILINE | re.DOTALL)
    hint = f"run `python images/tools/release.py prepare {version}`"
    if found is None:
        raise SkdError(f"there is no chapter for {version}", where=CHANGELOG, hint=hint)
    try:
        date.fromisoformat(found[1].removeprefix(" - ").strip())
    except ValueError as error:
        what = f"the chapter for {version} has no date"
        raise SkdError(what, where=CHANGELOG, hint=f"write `## [{version}] - YYYY-MM-DD`") from error
    if not found[2].strip():
        raise SkdError(f"the chapter for {version} is empty", where=CHANGELOG, hint="say what has changed")
    return found[2].strip() + "\n"


def with_chapter(changelog: str, version: str, day: date) -> str:
    """Return the changelog with what was unreleased under a version and its date, and nothing unreleased.

    Raises:
        SkdError: nothing is unreleased, or the version has a chapter.
    """
    if re.search(rf"^## \[{re.escape(version)}\]", changelog, re.MULTILINE):
        raise SkdError(f"there is a chapter for {version} already", where=CHANGELOG, hint="name another version")
    changed = changelog.replace(f"{UNRELEASED}\n", f"{UNRELEASED}\n\n## [{version}] - {day.isoformat()}\n", 1)
    chapter(changed, version)
    return changed


def wheel_problems(path: Path) -> list[SkdError]:
    """Return what keeps a wheel from being a release's: images without a digest, pipelines that name other images.

    Raises:
        SkdError: it is no wheel of this project.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            images = parse_images(archive.read("skd_kfp/components/digests.yaml").decode())
            named = {
                name: images_of(parse_yaml_documents(archive.read(_compiled(name)).decode(), where=_compiled(name)))
                for name in PIPELINES
            }
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise SkdError(f"not a wheel of skd-lib: {error}", where=str(path), hint="build one: `pip wheel .`") from error
    problems = [
        SkdError("its digest is empty", where=f"{path.name}, image {name}", hint="run `image_tools.py pin` before")
        for name, image in images.items()
        if not image.digest
    ]
    for name, found in named.items():
        if strange := set(found) - _expected(name, images):
            what = f"the pipeline names {', '.join(sorted(strange))}, and not the images of digests.yaml"
            problems.append(SkdError(what, where=f"{path.name}, {_compiled(name)}", hint="run `skd compile` before"))
    return problems


def _expected(pipeline: str, images: dict[str, Image]) -> set[str]:
    names = ("train", "comet") if pipeline == WITH_COMET else ("train",)
    return {images[name].reference for name in names}


def _compiled(pipeline: str) -> str:
    return f"skd_kfp/pipelines/compiled/{pipeline}.yaml"


def _with_version(found: re.Match[str], version: str) -> str:
    return found[0][: found.start(1) - found.start()] + version + found[0][found.end(1) - found.start() :]


if __name__ == "__main__":
    run_command(app)
