"""The record of a training in its model's folder, so that it goes wherever the model goes.

    MODEL/skd_record/lineage.json   where the model came from, what its data lost, and the run that trained it
    MODEL/skd_record/course.json    curves of the training, rounded, and where its time and memory went
    MODEL/skd_record/figures.json   closing figures of the training
    MODEL/skd_record/samples.jsonl  a few sequences that the student was trained on, see `skd_lib.models.samples`

Step `evaluate` copies the record into the model's evaluation, so that later steps need not fetch the model.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from skd_lib._core.documents import read_text
from skd_lib.config import parse_json, parse_section
from skd_lib.models.samples import SampledSequence, read_samples
from skd_lib.results import Course, rounded
from skd_lib.storage import write_text_atomic

RECORD = "skd_record"
_PACKAGES = ("skd-lib", "torch", "transformers")
LINEAGE, COURSE, FIGURES, SAMPLES = "lineage.json", "course.json", "figures.json", "samples.jsonl"


@dataclass(frozen=True)
class Record:
    """A model's record; what was not recorded is empty.

    Attributes:
        folder: Its files.
        lineage: Where the model came from: method, teacher, data, versions; `losses`: what each split of the data
            lost; `pipeline_run_id` and `mlflow_run_id`: Kubeflow's run that trained it, and the MLflow run of that.
        course: Curves of the training.
        figures: Closing figures of the training.
    """

    folder: Path
    lineage: Mapping[str, Any]
    course: Course
    figures: Mapping[str, float]

    @property
    def mlflow_run_id(self) -> str:
        """MLflow run of the pipeline run that trained the model; empty where that was not tracked."""
        return str(self.lineage.get("mlflow_run_id") or "")

    def samples(self) -> list[SampledSequence]:
        """Read the recorded sequences.

        Raises:
            SkdError: their file is broken.
        """
        file = self.folder / SAMPLES
        return read_samples(file) if file.is_file() else []


def write_record(
    model: Path,
    *,
    lineage: Mapping[str, Any],
    course: Mapping[str, Any] | None = None,
    figures: Mapping[str, float] | None = None,
    samples: str = "",
) -> None:
    """Write a model's record into its folder.

    Args:
        model: The folder.
        lineage: See `Record`.
        course: Fields of `Course`.
        figures: See `Record`.
        samples: Content of `samples.jsonl`.
    """
    folder = model / RECORD
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in {LINEAGE: lineage, COURSE: _rounded(course or {}), FIGURES: figures or {}}.items():
        write_text_atomic(folder / name, json.dumps(values, indent=None if name == COURSE else 2) + "\n")
    write_text_atomic(folder / SAMPLES, samples)


def read_record(folder: Path) -> Record:
    """Read the record in the folder of a model, or of its evaluation; an empty one where there is none.

    Raises:
        SkdError: a file of it is broken.
    """
    record = folder / RECORD
    course = record / COURSE
    return Record(
        folder=record,
        lineage=_values(record / LINEAGE),
        course=parse_section(Course, _values(course), where=str(course)),
        figures=_values(record / FIGURES),
    )


def copy_record(model: Path, folder: Path) -> None:
    """Copy a model's record into another folder; nothing where there is none."""
    if (model / RECORD).is_dir():
        shutil.copytree(model / RECORD, folder / RECORD, dirs_exist_ok=True)


def software() -> str:
    """Return the versions of Python and the packages that this process runs on."""
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # run from a source tree, or without the extra
            continue
    return ", ".join(found)


def _values(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    values: dict[str, Any] = parse_json(read_text(file), where=str(file), plain=False)
    return values


def _rounded(values: Any) -> Any:
    """Round numbers to five significant digits, which is enough for a curve; whole numbers stay as they are."""
    if isinstance(values, float):
        return rounded(values)
    if isinstance(values, Mapping):
        return {name: _rounded(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_rounded(value) for value in values]
    return values
