"""The run's page: one HTML file (`skd_lib.report.document`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skd_lib.data.splits import WARN_ABOVE
from skd_lib.models.records import SampledSequence
from skd_lib.report import figures, viewer, views
from skd_lib.report.document import render_document
from skd_lib.report.render import FEW_REPLACED, loss_rows, same_output
from skd_lib.report.summary import Summary
from skd_lib.report.worth import worth_lines
from skd_lib.storage import write_text_atomic


def render_page(summary: Summary, samples: Sequence[SampledSequence] = ()) -> str:
    """Return the page as HTML, with the training sequences in order; what was not measured is left out."""
    rates = summary.course.rejection_rate
    return render_document(
        "page.html",
        summary=summary,
        views=views,
        figures=figures,
        worth_lines=worth_lines,
        same_output=same_output,
        loss_rows=loss_rows,
        much_lost=WARN_ABOVE,
        steps=viewer.step_views(samples),
        shares_chart=viewer.shares_chart,
        few_replaced=0 < sum(rates) < FEW_REPLACED * len(rates),
    )


def write_page(path: Path, summary: Summary, samples: Sequence[SampledSequence] = ()) -> None:
    """Write the page, atomically."""
    write_text_atomic(path, render_page(summary, samples))
