"""The folder of a finished local run, made without running it: real tiny models, their records, figures."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from skd_lib.config import RunConfig, parse_section
from skd_lib.config.parameters import to_struct
from skd_lib.models.records import write_record
from skd_lib.report.summary import build_summary
from skd_lib.results import Course, Scores, Specdec
from tests.conftest import SaveTinyModel


def finished_run(runs: Path, name: str, save: SaveTinyModel, *, tuned: bool = True) -> Path:
    """Make RUNS/NAME, whose teacher is org/teacher, fine-tuned or not."""
    root = runs / name
    made = root / "artifacts/made"
    save(made / "student", seed=1)
    save(made / "teacher", seed=2)
    lineage = {
        "base_student": "org/student",
        "teacher": "org/teacher",
        "method": "skd",
        "top_k": 25,
        "gamma": 4,
        "weights_sha256": "5" * 64,
        "data_fingerprint": "d" * 64,
    }
    write_record(made / "student", lineage=lineage, samples='{"prompt": "a row of the training data"}\n')
    write_record(made / "teacher", lineage={"reference": "org/teacher", "method": "sft"})
    for model in ("student", "teacher"):
        (root / model).symlink_to(made / model)
    values = {
        "name": name,
        "teacher": "org/teacher",
        "student": "org/student",
        "data": {"source": {"type": "files", "train": ["/home/someone/train.jsonl"]}},
        "task": {"prompt": "Translate: {source}\n", "metrics": ["chrf"]},
        "teacher_sft": {"enabled": tuned},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(to_struct(parse_section(RunConfig, values, where="test"))))
    (root / "run.json").write_text(json.dumps({"run_id": "1"}))
    scores = {
        role: Scores.model_validate({"chrf": {"score": score, "low": score - 2, "high": score + 2}, "examples": 64})
        for role, score in {"teacher": 46.8, "student_before": 17.1, "student_after": 35.3}.items()
    }
    drafts = {
        moment: Specdec(acceptance_rate=rate, tokens_per_teacher_call=1 + rate, speedup=1.1)
        for moment, rate in {"before": 0.4, "after": 0.6}.items()
    }
    build_summary(
        task_metric="chrf",
        scores=scores,  # type: ignore[arg-type]
        specdec=drafts,  # type: ignore[arg-type]
        course=Course(),
        run_name=name,
    ).with_seconds({"total": 125.0}).write(root / "summary.json")
    return root
