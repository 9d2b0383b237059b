"""The folder of a teacher on a server: in the place of weights where it is, and the student's config and tokenizer.

Teacher and student have one tokenizer, so that the folder holds all that is needed to ask the server.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from skd_lib.config.models import ServedTeacher
from skd_lib.models.files import SERVED, weights_digest
from skd_lib.models.records import write_record
from skd_lib.models.references import SMALL_FILES, model_fingerprint, resolve_model
from skd_lib.storage import atomic_directory


def write_served(served: ServedTeacher, student: str, target: Path) -> dict[str, Any]:
    """Write the folder of a teacher on a server, with its record, whose lineage is returned.

    `student` is the reference of a model with the teacher's tokenizer.
    """
    source = resolve_model(student, fingerprint=model_fingerprint(student), weights=False)
    with atomic_directory(target) as folder:
        for file in (file for pattern in SMALL_FILES[:-2] for file in source.glob(pattern)):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
        (folder / SERVED).write_text(served.model_dump_json(), encoding="utf-8")
    lineage = {
        "weights_sha256": weights_digest(target),
        "reference": str(served),
        "fingerprint": model_fingerprint(str(served)),
    }
    write_record(target, lineage=lineage)
    return lineage
