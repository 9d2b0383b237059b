"""COMET checkpoints: references, and the files that the worker loads without any network.

| reference | meaning |
|---|---|
| `path/to/folder` | a folder in COMET's layout |
| `org/name`, `org/name@revision` | a repository of the Hugging Face hub; a local folder of that name comes first |
| `gs://bucket/prefix` | a folder in Google Cloud Storage |

COMET's layout is `hparams.yaml` beside `checkpoints/NAME.ckpt`. The checkpoint has the encoder's weights but not its
configuration and tokenizer: they come from the subfolder `encoder`, if there is one, else from what `hparams.yaml`
names as `pretrained_model`, a folder or a repository of the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from skd_lib import storage
from skd_lib._core.documents import parse_yaml
from skd_lib.errors import SkdError
from skd_lib.models.references import SMALL_FILES, HubModel, LocalFolder, StoredFolder, hub_snapshot, parse_reference
from skd_lib.models.references import stored_folder as fetch_stored_folder

HPARAMS = "hparams.yaml"
ENCODER = "encoder"
_HINT = (
    "name a local folder with hparams.yaml and checkpoints/NAME.ckpt, a hub id (org/name or org/name@revision), "
    "or gs://bucket/prefix"
)


@dataclass(frozen=True)
class Checkpoint:
    """A COMET model on this machine: its .ckpt file, its settings, and the folder of its encoder's configuration."""

    reference: str
    weights: Path
    hparams: dict[str, Any]
    encoder: Path

    def stage(self, folder: Path) -> Path:
        """Lay it out in the empty `folder` as COMET loads it offline, and return the staged checkpoint."""
        staged = folder / "checkpoints" / self.weights.name
        staged.parent.mkdir()
        staged.symlink_to(self.weights.resolve())
        settings = {**self.hparams, "pretrained_model": str(self.encoder.resolve())}
        storage.write_text_atomic(folder / HPARAMS, yaml.safe_dump(settings))
        return staged


def open_checkpoint(reference: str) -> Checkpoint:
    """Find or fetch a COMET model."""
    place = _place(reference, [HPARAMS, "checkpoints/*.ckpt", f"{ENCODER}/*"])
    folder = fetch_stored_folder(place) if storage.is_remote(place) else Path(place)
    hparams = _hparams(str(folder), reference)
    weights = sorted(folder.glob("checkpoints/*.ckpt"))
    if len(weights) != 1:
        found = ", ".join(path.name for path in weights) or "none"
        raise SkdError(f"a COMET model has one checkpoints/NAME.ckpt; found {found}", where=reference, hint=_HINT)
    return Checkpoint(reference, weights[0], hparams, _encoder(folder, hparams, reference))


def check_reference(reference: str) -> None:
    """Look whether there is a COMET model, without fetching its weights."""
    _hparams(_place(reference, [HPARAMS]), reference)


def _place(reference: str, wanted: Sequence[str]) -> str:
    """Return the folder or URI of a COMET model; of one on the hub the files `wanted` are fetched."""
    match parse_reference(reference):
        case LocalFolder(path):
            return str(path)
        case HubModel(repository, revision):
            return str(hub_snapshot(repository, revision, wanted=wanted))
        case StoredFolder(uri):
            return uri
    raise SkdError("not a reference to a COMET model", where=reference, hint=_HINT)


def _hparams(place: str, reference: str) -> dict[str, Any]:
    text = storage.read_bytes(f"{place.rstrip('/')}/{HPARAMS}").decode("utf-8", "replace")
    where = f"{reference}, {HPARAMS}"
    try:
        hparams = parse_yaml(text, where=where)
    except SkdError as error:
        raise SkdError(f"not a YAML file of plain values: {error.what}", where=error.where, hint=_HINT) from error
    if not isinstance(hparams, dict) or not {"class_identifier", "pretrained_model"} <= hparams.keys():
        raise SkdError("these are not the settings of a COMET model", where=where, hint=_HINT)
    return hparams


def _encoder(folder: Path, hparams: dict[str, Any], reference: str) -> Path:
    named = str(hparams["pretrained_model"])
    for candidate in (folder / ENCODER, folder / named):  # an absolute path stays as it is
        if candidate.is_dir():
            return candidate
    try:
        return hub_snapshot(named, None, wanted=SMALL_FILES, unwanted=["*/*"])
    except SkdError as error:
        raise SkdError(
            f"the model's encoder {named} is needed: {error.what}",
            where=reference,
            hint=f"put config.json and the tokenizer of {named} into the subfolder `{ENCODER}` of the COMET model",
        ) from error
