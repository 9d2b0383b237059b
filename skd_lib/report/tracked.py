"""A run's figures as MLflow's pages show them: the description of the run, and its models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from skd_lib.models.records import read_record
from skd_lib.report.render import result_tables
from skd_lib.report.sources import PAGE
from skd_lib.report.worth import worth_lines, worth_table
from skd_lib.tracking.models import ModelRecord

if TYPE_CHECKING:
    from skd_lib.report.folders import Evaluated
    from skd_lib.report.summary import Summary
    from skd_lib.results import Role

_PARAMS = (
    *("reference", "teacher", "base_student", "student_init", "method", "divergence", "precision"),
    *("num_parameters", "weights_sha256", "data_fingerprint", "pipeline_run_id"),
)
"""Fields of a model's lineage that its page in MLflow shows."""


def description(summary: Summary, page: str) -> str:
    """Return the description of the pipeline's run, in Markdown; `page` is the run's address on its server."""
    worth = worth_table(summary)
    lines = [*worth.to_markdown(), *(f"- {line}" for line in worth_lines(summary)), ""] if worth.rows else []
    for table in result_tables(summary):
        lines += table.to_markdown()
    links = [f"[Report of this run]({page}/artifacts/{PAGE})"] if page else []
    return "\n".join([*links, "", *lines]).strip() + "\n"


def model_records(evaluated: Mapping[Role, Evaluated], summary: Summary) -> list[ModelRecord]:
    """Return the models that were measured, with the figures of those that drafted."""
    drafts = {f"student_{moment}": found.figures() for moment, found in summary.specdec.items()}
    records = []
    for role, each in evaluated.items():
        lineage = read_record(each.folder).lineage
        params = {name: str(lineage[name]) for name in _PARAMS if lineage.get(name) not in (None, "")}
        figures = {**summary.models.get(role, {}), **drafts.get(role, {})}
        records.append(ModelRecord(role=role, uri=each.scores.model_uri, params=params, figures=figures))
    return records
