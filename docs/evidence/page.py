"""The tables of the evidence pages, written between the marks that stand in it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from analysis import EQUAL, FR_EN, FR_EN_EQUAL, METHODS, Mean, Variant, at_equal_compute, p_text, variants_of
from records import SCORE, OverExamples, Run
from skd_lib._core.format import markdown_table
from skd_lib.errors import SkdError
from study_plan import ALL_ARMS

_TABLE = re.compile(r"<!-- table (?P<name>[a-z0-9-]+) -->\n.*?<!-- end -->", re.DOTALL)
SIGNIFICANT = 0.05
MILLION = 1e6
BACKWARD = 2.0
"""Cost of a backward pass in forward ones: the gradients of activations and of weights."""
P_COLUMNS = ("p", "p (Holm)")
STUDY = frozenset(arm.name for arm in ALL_ARMS)
"""Comparisons that are judged by the tables of the study's claims, with a correction for those."""


def tables(runs: Sequence[Run]) -> dict[str, str]:
    """Return the table of each comparison by its name, and those of equal compute with corrected scores.

    These are by forward passes alone, and with backward passes.
    """
    names = dict.fromkeys(run.comparison for run in runs)
    found = {
        name: markdown(variants_of(runs, name), *metric_and_reference(runs, name), judged=name not in STUDY)
        for name in names
    }
    for steps, compute in ((METHODS, EQUAL), (FR_EN, FR_EN_EQUAL)):
        if {steps, compute} <= set(names):
            variants = at_equal_compute(runs, steps, compute)
            found[f"{compute}-corrected"] = markdown(variants, *metric_and_reference(runs, compute))
            variants = at_equal_compute(runs, steps, compute, backward=BACKWARD)
            found[f"{compute}-backward"] = markdown(variants, *metric_and_reference(runs, compute))
    return found


def tables_over_examples(rows: Sequence[OverExamples]) -> dict[str, str]:
    """Return a table of what can be said of comparisons of one seed, over the test set's examples, as NAME-examples."""
    return {f"{name}-examples": _over_examples(rows, name) for name in dict.fromkeys(row.comparison for row in rows)}


def _over_examples(rows: Sequence[OverExamples], comparison: str) -> str:
    ours = sorted((row for row in rows if row.comparison == comparison), key=lambda row: -row.figures[SCORE])
    header = ["variant", ours[0].metric, f"minus `{ours[0].reference}`", *P_COLUMNS]
    cells = []
    for row in ours:
        known = row.figures
        score = Mean(known[SCORE], known["low"], known["high"])
        tested = "difference" in known
        difference = Mean(known["difference"], known["difference_low"], known["difference_high"]) if tested else None
        p_values = [p_text(known[name]) if name in known else "" for name in ("p_value", "p_holm")]
        cells.append([f"`{row.variant}`", _interval(score), _interval(difference, signed=True), *p_values])
    return "\n".join(markdown_table(header, cells, numbers=False)) + "\n"


def with_tables(page: str, found: Mapping[str, str]) -> str:
    """Return a page with each table between its marks, `<!-- table NAME -->` and `<!-- end -->`.

    Raises:
        SkdError: there is a mark for a table that is not there.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in found:
            where = f"mark `table {name}`"
            raise SkdError("there are no runs of it", where=where, hint=f"known: {', '.join(sorted(found))}")
        return f"<!-- table {name} -->\n\n{found[name]}\n<!-- end -->"

    return _TABLE.sub(table, page)


def metric_and_reference(runs: Sequence[Run], comparison: str) -> tuple[str, str]:
    """Return the metric of a comparison's scores, and the variant that its tests refer to."""
    return next((run.metric, run.reference) for run in runs if run.comparison == comparison)


def markdown(variants: Sequence[Variant], metric: str, reference: str, *, judged: bool = True) -> str:
    """One comparison as a Markdown table, the best variant first, without columns that are empty, or p where it is not
    judged here."""
    ordered = sorted(variants, key=lambda variant: -_or_low(variant.mean(SCORE)))
    rows = [{"variant": f"`{variant.name}`", **_cells(variant, metric, reference)} for variant in ordered]
    header = [name for name in rows[0] if any(row[name] for row in rows) and (judged or name not in P_COLUMNS)]
    cells = [[row[name] for name in header] for row in rows]
    return "\n".join(markdown_table(header, cells, numbers=False)) + "\n"


def _cells(variant: Variant, metric: str, reference: str) -> dict[str, str]:
    test, compute = variant.test, variant.compute()
    return {
        "seeds": str(len(variant.runs)),
        metric: _interval(variant.mean(SCORE)),
        f"minus `{reference}`": _interval(test.difference, signed=True) if test else "",
        P_COLUMNS[0]: p_text(test.p_value) if test else "",
        P_COLUMNS[1]: f"{p_text(test.p_holm)}{' *' * (test.p_holm < SIGNIFICANT)}" if test else "",
        "rejected": _percent(variant.mean("rejection_rate"), scale=100),
        "rejected at the end": _percent(variant.mean("rejection_rate_last_tenth"), scale=100),
        "accepted as draft": _percent(variant.mean("draft_acceptance_rate"), scale=100),
        "tokens/teacher call": _number(variant.mean("draft_tokens_per_teacher_call")),
        "compute": f"{compute / MILLION:#.2g}" if compute is not None else "",
        "seconds": f"{seconds:.0f}" if (seconds := variant.seconds()) is not None else "",
    }


def _interval(value: Mean | None, *, signed: bool = False) -> str:
    if value is None:
        return ""
    form = "+.1f" if signed else ".1f"
    inner = "" if math.isnan(value.low) else f" [{value.low:{form}}, {value.high:{form}}]"
    return f"{value.mean:{form}}{inner}"


def _percent(value: Mean | None, *, scale: float) -> str:
    return "" if value is None else f"{value.mean * scale:.2f} %"


def _number(value: Mean | None) -> str:
    return "" if value is None else f"{value.mean:.2f}"


def _or_low(value: Mean | None) -> float:
    return -math.inf if value is None else value.mean
