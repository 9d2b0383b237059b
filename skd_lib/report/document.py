"""Pages as one HTML file that needs no network, no server and no JavaScript but for browsing.

What models wrote is on them, so they trust nothing: every value is escaped, harmful characters are shown instead of
obeyed, and a Content-Security-Policy admits this very style sheet and script and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from skd_lib._core.terminal import visible

_TEMPLATES = Path(__file__).parent / "templates"


def render_document(template: str, **values: Any) -> str:
    """Render a template that extends `base.html`, with the style sheet and the script in it."""
    style, script = _asset("page.css"), _asset("page.js")
    return (
        _environment()
        .get_template(template)
        .render(**values, style=style, script=script, policy=_policy(style, script))
    )


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
