"""What `specdec_benchmark` finds about a student as a draft model, as a folder: `before.json` and `after.json`.

Each holds the label of the trial, and the figures where they were measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skd_lib.config import parse_json, parse_section
from skd_lib.errors import SkdError
from skd_lib.report.summary import MOMENTS, Moment, Specdec
from skd_lib.storage import write_text_atomic

LABEL = "label"


def write_drafts(folder: Path, label: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the folder.

    Args:
        folder: Created where it is missing.
        label: Which trial of a comparison the student is from; empty where there is one run only.
        results: Figures by moment; none where nothing was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for moment in MOMENTS:
        text = json.dumps({LABEL: label, **results.get(moment, {})}, indent=2)
        write_text_atomic(folder / f"{moment}.json", text + "\n")


def read_drafts(folder: Path) -> tuple[str, dict[Moment, Specdec]]:
    """Read the label, and the figures by moment where they were measured.

    Raises:
        SkdError: the folder is not one that `specdec_benchmark` wrote.
    """
    label, found = "", dict[Moment, Specdec]()
    for moment in MOMENTS:
        file = folder / f"{moment}.json"
        try:
            values = parse_json(file.read_text(encoding="utf-8"), where=str(file), plain=False)
        except OSError as error:
            hint = "name a folder that step `specdec_benchmark` wrote"
            raise SkdError(f"cannot be read: {error.strerror}", where=str(file), hint=hint) from error
        label = str(values.pop(LABEL, ""))
        if values:
            found[moment] = parse_section(Specdec, values, where=str(file))
    return label, found
