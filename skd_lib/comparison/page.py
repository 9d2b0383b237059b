"""A comparison's page: one HTML file with the tables and the charts (`skd_lib.report.document`)."""

from __future__ import annotations

from markupsafe import Markup

from skd_lib.comparison.figures import figures, quality
from skd_lib.comparison.render import notes, tables
from skd_lib.comparison.table import Comparison
from skd_lib.report.charts import interval
from skd_lib.report.document import render_document
from skd_lib.report.names import metric_name
from skd_lib.report.views import Headline

PAGE = "comparison.html"


def render_page(comparison: Comparison) -> str:
    """Return the page as HTML."""
    first, *others = tables(comparison)
    return render_document(
        "comparison.html",
        comparison=comparison,
        headlines=_headlines(comparison),
        first=first,
        pictures=_pictures(comparison),
        others=others,
        figures=figures(comparison),
        notes=list(notes(comparison)),
    )


def _headlines(comparison: Comparison) -> list[Headline]:
    """Return the best variant by the task's metric, its distance from the reference, and the runs."""
    found = []
    metric = comparison.metrics[0] if comparison.metrics else ""
    scored = [each for each in comparison.variants if metric in each.scores]
    if scored:
        best = max(scored, key=lambda each: quality(each, metric))
        score = best.scores[metric]
        label = f"{metric_name(metric)} of {best.variant}, the best mean"
        found.append(Headline(label, f"{score.mean:.1f}", [f"95%: {score.low:.1f} to {score.high:.1f}"]))
        if teacher := comparison.teacher.get(metric):
            found.append(Headline(f"{metric_name(metric)} of the teacher", f"{teacher.score:.1f}", []))
    runs, failed = sum(each.runs for each in comparison.variants), sum(each.failed for each in comparison.variants)
    found.append(
        Headline(
            "variants" if len(comparison.variants) > 1 else "variant",
            f"{len(comparison.variants)}",
            [f"against {comparison.reference}"],
        )
    )
    found.append(Headline("runs", f"{runs}", [f"{failed} more failed"] if failed else []))
    return found


def _pictures(comparison: Comparison) -> dict[str, Markup]:
    """Return each variant's interval of the first table's metric as a picture, all on one scale."""
    metric = next((metric for metric in comparison.metrics if any(metric in v.scores for v in comparison.variants)), "")
    scores = {each.variant: each.scores[metric] for each in comparison.variants if metric in each.scores}
    ends = [end for score in scores.values() for end in (score.low, score.high)]
    teacher = comparison.teacher.get(metric)
    ends += [teacher.low, teacher.high] if teacher else []
    scale = min(ends, default=0.0), max(ends, default=1.0)
    found = {name: interval(score.mean, score.low, score.high, scale, "s0") for name, score in scores.items()}
    if teacher:
        found["(teacher)"] = interval(teacher.score, teacher.low, teacher.high, scale, "teacher")
    return found
