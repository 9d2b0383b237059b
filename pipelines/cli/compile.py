"""`skd compile`: compile the pipelines to YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skd_kfp.pipelines.cli.options import CometImage, Image, refuse, short
from skd_lib._core.terminal import say
from skd_lib.errors import SkdError


def compile_(
    context: typer.Context,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if the committed file differs from its definition.")
    ] = False,
    image: Image = None,
    comet_image: CometImage = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File of one pipeline.",
            show_default="PIPELINE.yaml; in a source tree pipelines/compiled/PIPELINE.yaml",
        ),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="distillation, distillation_comet or compare_methods.", show_default="all; with --output distillation"
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="What the steps ask of the cluster: cpu, l4, a100, h100x8, or a YAML file like those in "
            "pipelines/resources.",
            show_default="l4",
        ),
    ] = None,
    release: Annotated[
        bool, typer.Option("--release", help="Insist on images that are named by their digest, as a release must.")
    ] = False,
) -> None:
    """Compile the pipelines to the YAML that Kubeflow runs, and check them for mistakes KFP does not see.

    In a source tree write the READMEs of the components, too. With --check every profile is compiled and checked.

    Example: `skd compile --image registry.example.com/skd:1 --profile a100 --output mine.yaml`.
    """
    from skd_kfp.components.build import check_readmes, write_readmes
    from skd_kfp.pipelines.compiling import (
        IN_SOURCE_TREE,
        PIPELINES,
        check_compiled,
        compile_pipeline,
        compiled_path,
        images_of,
        write_compiled,
    )
    from skd_kfp.pipelines.kubeflow.sizes import of_compiled
    from skd_kfp.pipelines.profiles import DEFAULT, profile_names

    if pipeline not in (None, *PIPELINES):
        raise SkdError(f"there is no pipeline {pipeline!r}", where="--pipeline", hint=f"one of {', '.join(PIPELINES)}")
    names = [pipeline] if pipeline else ["distillation"] if output else list(PIPELINES)
    paths = {name: output or compiled_path(name) for name in names}
    chosen = profile or DEFAULT
    if not check and "distillation_comet" not in names:
        why = f"the pipeline {names[0]} has no step for COMET"
        refuse(context, "comet_image", why=why, hint="give --pipeline distillation_comet, or leave it out")
    if check:
        refuse(context, "image", "comet_image", why="the committed pipelines name the images of the release")
        for name, path in paths.items():
            check_compiled(path, name=name, profile=chosen, release=release)
            say(f"{short(path)} is up to date")
            for other in () if profile else profile_names():
                compile_pipeline(name=name, profile=other)
                say(f"{name} for profile {other} keeps the rules")
        if IN_SOURCE_TREE and output is None:
            check_readmes()
            say("the components' READMEs are up to date")
        return
    if not IN_SOURCE_TREE and output is None:  # the package's own files stay as they were installed
        paths = {name: Path(f"{name}.yaml") for name in names}
    elif (image or comet_image or profile) and output is None:
        raise SkdError(
            "images and profiles of your own do not belong in the committed pipeline",
            where="skd compile",
            hint="name another file with --output",
        )
    for name, path in paths.items():
        documents = write_compiled(path, image, comet_image, name=name, profile=chosen, release=release)
        trials = 4 if name == "compare_methods" else 1
        say(f"wrote {short(path)}{'; with 4 trials' if trials > 1 else ';'} {of_compiled(documents, trials)}")
        say(f"its images: {', '.join(images_of(documents))}")
    if IN_SOURCE_TREE and output is None:
        write_readmes()
