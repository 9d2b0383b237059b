"""Keep the digests of the published images in `components/digests.yaml` equal to those of the registry."""

from __future__ import annotations

import re
from pathlib import Path

from registry import registry_digest
from skd_kfp.components.images import DIGESTS, Image, parse_images
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.storage import write_text_atomic


def load(path: Path = DIGESTS) -> dict[str, Image]:
    """Load the images of a source tree.

    Raises:
        SkdError: the file does not exist.
    """
    if not path.is_file():
        raise SkdError("the file does not exist", where=str(path), hint="name components/digests.yaml of a source tree")
    return parse_images(path.read_text(encoding="utf-8"))


def look_up(images: dict[str, Image]) -> dict[str, str]:
    """Ask the registries for the digests of the images' versions.

    Raises:
        SkdErrors: some are not available; each is named.
    """
    digests, problems = {}, []
    for name, image in images.items():
        try:
            digests[name] = registry_digest(image)
        except SkdError as error:
            problems.append(error)
    if problems:
        raise SkdErrors(problems)
    return digests


def pin(path: Path, digests: dict[str, str]) -> list[str]:
    """Write digests into the file, whose comments and order stay.

    Returns:
        The images whose digest has changed.

    Raises:
        SkdError: the file is not laid out one field a line, so that a digest cannot be put in its place.
    """
    text = path.read_text(encoding="utf-8")
    images = parse_images(text)
    changed = [name for name, digest in digests.items() if images[name].digest != digest]
    for name in changed:
        field = rf"(^{re.escape(name)}:[^\n]*\n(?:[ \t#][^\n]*\n|\n)*?[ \t]+digest:)[^\n#]*?([ \t]*#[^\n]*)?$"
        text = re.sub(field, rf'\g<1> "{digests[name]}"\g<2>', text, count=1, flags=re.MULTILINE)
    wanted = {
        name: image.model_copy(update={"digest": digests.get(name, image.digest)}) for name, image in images.items()
    }
    if parse_images(text) != wanted:
        raise SkdError("a digest has no line of its own", where=str(path), hint='write `digest: ""` under each image')
    if changed:
        write_text_atomic(path, text)
    return changed


def differences(images: dict[str, Image], digests: dict[str, str]) -> list[SkdError]:
    """Return an error for each pin that differs from the registry."""
    return [
        SkdError(
            f"pinned is {image.digest or 'nothing'}, the registry has {digests[name]}",
            where=f"{image.image}:{image.version}",
            hint="run `python images/tools/image_tools.py pin`, then `skd compile`",
        )
        for name, image in images.items()
        if name in digests and image.digest != digests[name]
    ]
