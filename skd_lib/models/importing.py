"""Import of a model into a run: fetched from its reference, checked, and copied into a folder with its record."""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path
from typing import Any

from skd_lib.models.files import describe, reading, weight_files, weights_digest
from skd_lib.models.fingerprint import MODEL_FILES
from skd_lib.models.records import write_record
from skd_lib.models.references import LocalFolder, check_unchanged, model_fingerprint, parse_reference, resolve_model
from skd_lib.models.skeleton import check_finite, check_weights, skeleton
from skd_lib.models.vocabulary import GENERATION, stored_generation_config, without_sampling_defaults
from skd_lib.storage import atomic_directory


def fetch_model(reference: str, fingerprint: str = "", *, code: bool = False) -> tuple[Path, str]:
    """Return a model's folder (`resolve_model`), with its `*.py` if `code`, and the given or present fingerprint."""
    known = fingerprint or model_fingerprint(reference)
    return resolve_model(reference, fingerprint=known, trust_remote_code=code), known


def import_model(
    reference: str, source: Path, target: Path, *, fingerprint: str, code: bool = False, borrow: bool = False
) -> dict[str, Any]:
    """Import the model that `fetch_model` found (`import_folder`), and write its record; return its `origin_of`."""
    # A user's own folder may be written to again; caches never change what they hold.
    own_folder = isinstance(parse_reference(reference), LocalFolder)
    import_folder(source, target, link=not own_folder, code=code, borrow=borrow)
    check_unchanged(reference, fingerprint)  # nor while it was copied
    origin = origin_of(reference, target, fingerprint)
    write_record(target, lineage=origin)
    return origin


def origin_of(reference: str, folder: Path, fingerprint: str) -> dict[str, Any]:
    """Return the names, digests and sizes by which a model's record says where it came from."""
    named = {"weights_sha256": weights_digest(folder), "reference": reference, "fingerprint": fingerprint}
    return {**named, **describe(folder)}


def check_whole(folder: Path) -> None:
    """Check that a folder's weights are those that its config wants, and finite."""
    model = skeleton(folder)
    check_weights(folder, model)
    check_finite(folder, model._keys_to_ignore_on_load_unexpected or ())


def import_folder(source: Path, target: Path, *, link: bool, code: bool = False, borrow: bool = False) -> None:
    """Copy what a model needs: config, tokenizer, safetensors weights, card and licence.

    The generation config keeps its special ids only: sampling defaults of a hub model have no effect in this pipeline.
    With `link`, weights share their bytes with the source by hard links where the file system can. With `borrow` they
    are symbolic links: for a folder that is only read while the source is there, where a copy would take memory since
    temporary files are kept in memory. `code` copies `*.py` too.
    """
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*", *(["*.py"] if code else [])]
    with atomic_directory(target) as folder:
        for pattern in patterns:
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        for file in weight_files(source):
            if borrow:
                (folder / file.name).symlink_to(file.resolve())
            else:
                _copy_weights(file, folder / file.name, link)
        if (stored := stored_generation_config(folder)) is not None:
            without_sampling_defaults(stored).save_pretrained(folder)
        check_whole(folder)


def _copy_weights(file: Path, to: Path, link: bool) -> None:
    if link:
        try:
            return os.link(file.resolve(), to)
        except OSError:  # another file system, or one without hard links
            pass
    shutil.copyfile(file, to)
    return None


def same_model(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same model: greedy answers of one are those of the other.

    Their weights, configs, tokenizers and templates are compared byte for byte, up to the first that differs; of the
    generation configs, the special ids. Code (`*.py`) is not compared: it is not run when models are measured.
    """
    names = _measured_files(one)
    if names != _measured_files(other) or _special_ids(one) != _special_ids(other):
        return False
    with reading(one):
        return all(filecmp.cmp(one / name, other / name, shallow=False) for name in sorted(names))


def _measured_files(folder: Path) -> set[str]:
    patterns = [pattern for pattern in MODEL_FILES if pattern not in ("*.safetensors", "*.py")]
    settings = {file for pattern in patterns for file in folder.glob(pattern) if file.name != GENERATION}
    return {file.relative_to(folder).as_posix() for file in settings.union(weight_files(folder))}


def _special_ids(folder: Path) -> dict[str, Any]:
    ids: dict[str, Any] = without_sampling_defaults(stored_generation_config(folder)).to_diff_dict()
    return ids
