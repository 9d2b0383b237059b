"""A terminal for tables and progress bars whose cells cannot steer it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import rich.console
from rich.segment import Segment
from rich.text import Text
from typing_extensions import override

from skd_lib.report.untrusted import visible

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType


class Console(rich.console.Console):
    """Rich's console, with control characters in texts shown instead of obeyed."""

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)  # before its width is measured

    @override
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)
