"""The model card that is saved with every model: its origin, settings and scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from skd_lib import __version__


@dataclass(frozen=True)
class Lineage:
    """The origin of a model.

    Attributes:
        base: The model its weights started from.
        method: The training, e.g. `sft`, `skd`, `prune`.
        teacher: The model it learnt from; empty if none.
        data_fingerprint: Fingerprint of the training data; empty if none.
        code_version: Version of this library.
        settings: Settings worth knowing (steps, learning rate, K, gamma).
    """

    base: str
    method: str
    teacher: str = ""
    data_fingerprint: str = ""
    code_version: str = __version__
    settings: Mapping[str, object] = field(default_factory=dict)


def model_card(name: str, lineage: Lineage, metrics: Mapping[str, float] | None = None) -> str:
    """Return the text of the model card, with the metadata block of the Hugging Face hub and scores by name."""
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "speculative-decoding", lineage.method],
    }
    facts = {
        "Made by": f"skd-lib {lineage.code_version}",
        "Method": lineage.method,
        "Started from": lineage.base,
        "Teacher": lineage.teacher,
        "Data fingerprint": lineage.data_fingerprint,
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        _table("Lineage", facts),
        _table("Settings", lineage.settings),
        _table("Scores", {key: f"{value:.4g}" for key, value in (metrics or {}).items()}),
        "Its licence follows from the models and data it was made from.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(title: str, rows: Mapping[str, object]) -> str:
    lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items() if value != ""]
    return "\n".join([f"| {title} | |", "|---|---|", *lines]) if lines else ""


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
