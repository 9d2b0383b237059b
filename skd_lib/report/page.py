"""The run's page: one HTML file that needs no network, no server and no JavaScript but for browsing.

What models wrote is on it, so it trusts nothing: every value is escaped, harmful characters are shown instead of
obeyed, and a Content-Security-Policy admits this very style sheet and script and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from skd_lib._core.terminal import visible
from skd_lib.data.splits import WARN_ABOVE
from skd_lib.models.records import SampledSequence
from skd_lib.report import figures, viewer, views
from skd_lib.report.render import FEW_REPLACED, loss_rows, same_output
from skd_lib.report.summary import Summary
from skd_lib.storage import write_text_atomic

_TEMPLATES = Path(__file__).parent / "templates"


def render_page(summary: Summary, samples: Sequence[SampledSequence] = ()) -> str:
    """Return the page as HTML, with the training sequences in order; what was not measured is left out."""
    style, script = _asset("page.css"), _asset("page.js")
    rates = summary.course.rejection_rate
    return (
        _environment()
        .get_template("page.html")
        .render(
            summary=summary,
            views=views,
            figures=figures,
            same_output=same_output,
            loss_rows=loss_rows,
            much_lost=WARN_ABOVE,
            steps=viewer.step_views(samples),
            shares_chart=viewer.shares_chart,
            few_replaced=0 < sum(rates) < FEW_REPLACED * len(rates),
            style=style,
            script=script,
            policy=_policy(style, script),
        )
    )


def write_page(path: Path, summary: Summary, samples: Sequence[SampledSequence] = ()) -> None:
    """Write the page, atomically."""
    write_text_atomic(path, render_page(summary, samples))


def _policy(style: Markup, script: Markup) -> str:
    """Allow the browser nothing but the style sheet and the script of the page."""
    return (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _asset(name: str) -> Markup:
    """Read a file of ours that goes into the page unescaped."""
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))  # noqa: S704 - written here, not by a model


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("skd_lib.report"),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalize(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
