"""A terminal for tables and progress bars whose cells cannot steer it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import rich.console
from rich.segment import Segment
from rich.text import Text
from typing_extensions import override

from skd_lib._core.untrusted import visible

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

    @override
    def on_broken_pipe(self) -> None:
        """End quietly, as other programs do whose reader has gone, `head` for example."""
        # Rich's own looks at `sys.stdout`, which KFP replaces; so nothing is flushed into the pipe at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        raise SystemExit(1)
