"""A model that is brought into a run: fetched, whatever names it, and kept with its record."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from skd_lib.models.files import describe, weight_files, weights_digest
from skd_lib.models.finite import check_finite
from skd_lib.models.references import LocalFolder, check_unchanged, parse_reference
from skd_lib.models.skeleton import check_weights, skeleton
from skd_lib.models.special_ids import stored_generation_config, without_sampling_defaults
from skd_lib.records import write_record
from skd_lib.storage import atomic_directory


def import_model(reference: str, source: Path, target: Path, *, fingerprint: str, code: bool = False) -> None:
    """Take over what a model needs, as `import_folder` does.

    Its record (`skd_lib.records`) holds the reference, the fingerprint, the digest of its weights and its size.

    Args:
        reference: What names it.
        source: The folder that `resolve_model` made available.
        target: The new folder; replaced if it is there.
        fingerprint: What `model_fingerprint` said.
        code: Take `*.py` along.

    Raises:
        SkdError: the weights are not those that the config wants, or not finite; or the model has changed.
    """
    # A user's own folder may be written to again; caches never change what they hold.
    own_folder = isinstance(parse_reference(reference), LocalFolder)
    import_folder(source, target, link=not own_folder, code=code)
    check_unchanged(reference, fingerprint)  # nor while it was copied
    write_record(target, lineage=origin_of(reference, target, fingerprint))


def origin_of(reference: str, folder: Path, fingerprint: str) -> dict[str, Any]:
    """Return what the record of a model says of where it came from: names, digests and its size."""
    named = {"weights_sha256": weights_digest(folder), "reference": reference, "fingerprint": fingerprint}
    return {**named, **describe(folder)}


def check_whole(folder: Path) -> None:
    """See that a model can be used.

    Raises:
        SkdError: its weights are not those that its config wants, or not finite.
    """
    model = skeleton(folder)
    check_weights(folder, model)
    check_finite(folder, model._keys_to_ignore_on_load_unexpected or ())


def import_folder(source: Path, target: Path, *, link: bool, code: bool = False) -> None:
    """Take over what a model needs: config, tokenizer, safetensors weights, card and licence.

    The generation config keeps its special ids only: sampling defaults of a hub model have no say in this pipeline.

    Args:
        source: A model in the Hugging Face layout.
        target: The new folder; replaced if it is there.
        link: Share the weights' bytes with `source` by hard links where the file system can.
        code: Take `*.py` along.

    Raises:
        SkdError: the weights are not those that the config wants, or not finite.
    """
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*", *(["*.py"] if code else [])]
    with atomic_directory(target) as folder:
        for pattern in patterns:
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        for file in weight_files(source):
            _take(file, folder / file.name, link)
        if (stored := stored_generation_config(folder)) is not None:
            without_sampling_defaults(stored).save_pretrained(folder)
        check_whole(folder)


def _take(file: Path, to: Path, link: bool) -> None:
    if link:
        try:
            os.link(file.resolve(), to)
        except OSError:  # another file system, or one without hard links
            link = False
    if not link:
        shutil.copyfile(file, to)
