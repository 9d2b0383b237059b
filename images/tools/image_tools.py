"""Maintain the images' digests and locked dependencies: `components/digests.yaml` and the files `images/<name>.txt`.

    python images/tools/image_tools.py --help

Needs the extra `pipelines` and, for `pin`, python-dxf.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from locks import LOCKS, locked_versions, write_lock
from skd_kfp.components.images import DIGESTS, read_images
from skd_lib._core.terminal import run_command
from skd_lib.errors import SkdError, SkdErrors

app = typer.Typer(
    help="The pipelines' images: digests, locks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Names = Annotated[list[str] | None, typer.Argument(help="Images, e.g. train.", show_default="all")]
File = Annotated[Path, typer.Option(help="The file.", show_default="components/digests.yaml of the source tree")]


@app.command()
def show(
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Only the references of pinned images, a line each.")
    ] = False,
    file: File = DIGESTS,
) -> None:
    """Print which image each pod would pull. The registry is not asked."""
    for name, image in read_images(file).items():
        if not pinned:
            typer.echo(f"{name:<9} {image.version:<9} {image.reference}{'' if image.digest else '  (not pinned)'}")
        elif image.digest:
            typer.echo(image.reference)


@app.command()
def pin(
    names: Names = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if a pinned digest is not the registry's.")
    ] = False,
    file: File = DIGESTS,
) -> None:
    """Ask the registries for the digests of the images' version tags, and write them to the file.

    Compiled pipelines name the images by these digests: compile them afterwards. A registry that requires a login
    gets the credentials of `docker login`.
    """
    import pins  # the registry's client is needed here alone

    known = pins.load(file)
    chosen = {name: known[name] for name in _known(names, list(known))}
    digests = pins.look_up(chosen)
    if check:
        if wrong := pins.differences(chosen, digests):
            raise SkdErrors(wrong)
        typer.echo(f"{', '.join(chosen)}: pinned to what the registry has")
        return
    changed = pins.pin(file, digests)
    for name, image in chosen.items():
        typer.echo(
            f"{name:<9} {image.image}:{image.version}  {digests[name]}{'' if name in changed else '  (as before)'}"
        )
    if changed:
        typer.echo(f"wrote {file}: run `skd compile` next, and commit both")


@app.command()
def lock(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="train, comet, pipeline, vllm-cpu, vllm-gpu; build: what builds them.", show_default="all"),
    ] = None,
) -> None:
    """Lock what the images and vLLM's environments install, with hashes, from pyproject.toml and the constraints."""
    for name in _known(names, list(LOCKS)):
        path = write_lock(LOCKS[name])
        typer.echo(f"wrote {path}: {len(locked_versions(path.read_text(encoding='utf-8')))} packages")


def _known(names: list[str] | None, known: list[str]) -> list[str]:
    for name in names or []:
        if name not in known:
            raise SkdError(f"there is no image {name!r}", where="NAMES", hint=f"one of {', '.join(known)}")
    return names or known


if __name__ == "__main__":
    run_command(app)
