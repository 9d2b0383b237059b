"""Names of metrics that the documentation explains."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tests.conftest import ROOT

PAGE = (ROOT / "docs/guides/tracking.md").read_text(encoding="utf-8")
(SECTION,) = re.findall(r"^## What a run logs\n(.*?)^## ", PAGE, flags=re.DOTALL | re.MULTILINE)
DOCUMENTED = set(re.findall(r"`([^`\n]+)`", SECTION))


def undocumented(metrics: Iterable[str]) -> set[str]:
    """Return the names that the page does not have; `final/NAME_first_tenth` is there if `train/NAME` is."""
    plain = {name: re.sub(r"^final/(\w+)_(?:first|last)_tenth$", r"train/\1", name) for name in metrics}
    return {name for name, of in plain.items() if of not in DOCUMENTED}
