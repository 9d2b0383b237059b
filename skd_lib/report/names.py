"""Names of models and metrics as people write them."""

from __future__ import annotations

from skd_lib.results import ROLES

ROLE_NAMES = {role: role.replace("_", " ") for role in ROLES}
_METRICS = {"chrf": "chrF", "bleu": "BLEU", "comet": "COMET"}
_METRICS |= {f"rouge{kind}": f"ROUGE-{kind}" for kind in ("1", "2", "L")}


def metric_name(name: str) -> str:
    """Return a metric's name as people write it."""
    return _METRICS.get(name, name)
