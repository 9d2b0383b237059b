"""The plots of docs/evidence.md, as SVG that is the same whenever it is made from the same runs."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import EQUAL, FR_EN, FR_EN_EQUAL, METHODS, RULES, Variant, variants_of
from records import SCORE, Curve, Run
from skd_lib.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_K = re.compile(r"skd-top_k-(\d+)")
_FORMAT: Any = {"svg.hashsalt": "evidence", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
_SIZE = (6.4, 3.6)


def draw(runs: Sequence[Run], curves: Sequence[Curve], folder: Path, shown: Container[str]) -> list[Path]:
    """Draw what the runs suffice for.

    Args:
        runs: Of all comparisons.
        curves: Of the same.
        folder: Where the plots go.
        shown: Files of a comparison's scores, NAME-scores.svg, that are drawn.

    Returns:
        What was written.
    """
    written: list[Path] = []
    for name in dict.fromkeys(run.comparison for run in runs):
        if (file := f"{name}-scores.svg") not in shown:
            continue
        variants = variants_of(runs, name)
        with plot(folder / file, written, height=0.3 * len(variants) + 1.2) as axes:
            _scores(axes, variants, next(run for run in runs if run.comparison == name))
    metrics = {run.comparison: run.metric for run in runs}
    for file, accounts in (("compute.svg", (METHODS, EQUAL)), ("compute-fr-en.svg", (FR_EN, FR_EN_EQUAL))):
        found = {name: variants_of(runs, name) for name in accounts if name in metrics}
        if found:
            with plot(folder / file, written) as axes:
                _compute(axes, found, metrics[next(iter(found))])
    by_k = {int(match[1]): each for each in variants_of(runs, RULES) if (match := _K.fullmatch(each.name))}
    if by_k:
        with plot(folder / "k.svg", written) as axes:
            _k_curve(axes, by_k)
    for name, figure, label in (
        (METHODS, "validation_loss", "validation loss (nats a token)"),
        (RULES, "rejection_rate", "share of tested tokens that the teacher replaced"),
    ):
        ours = [curve for curve in curves if curve.comparison == name and curve.figure == figure]
        if ours:
            with plot(folder / f"{figure.replace('_', '-')}.svg", written) as axes:
                _courses(axes, ours, label)
    return written


@contextmanager
def plot(file: Path, written: list[Path], height: float = _SIZE[1], columns: int = 1) -> Iterator[Any]:
    """Yield the axes of a new plot, or those of its columns, and write it to a file."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_FORMAT):
        figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure.subplots(ncols=columns, sharey=True)
        with atomic_file(file) as new:
            figure.savefig(new, format="svg", metadata={"Date": None})
    written.append(file)


def _scores(axes: Axes, variants: Sequence[Variant], one: Run) -> None:
    """Every run as a dot, means and intervals over them; `one` run says what the scores are of, and the teacher's."""
    ordered = sorted(variants, key=lambda variant: _mean(variant))
    for row, variant in enumerate(ordered):
        score = variant.mean(SCORE)
        if score is None:
            continue
        axes.plot([run.figures[SCORE] for run in variant.runs.values()], [row] * len(variant.runs), ".", color="0.65")
        spread = None if math.isnan(score.low) else [[score.mean - score.low], [score.high - score.mean]]
        axes.errorbar(score.mean, row, xerr=spread, fmt="o", color="C0", capsize=3)
    axes.set_yticks(range(len(ordered)), [variant.name for variant in ordered])
    axes.set_ylim(-0.5, len(ordered) - 0.5)
    if (teacher := one.figures.get("teacher")) is not None:
        axes.axvline(teacher, color="C3", linestyle="--", linewidth=1)
        axes.text(teacher, len(ordered) - 0.55, "teacher ", color="C3", ha="right", va="top")
    axes.set_xlabel(f"{one.metric} (mean and 95 % interval over seeds; a grey dot a run)")


def _k_curve(axes: Axes, by_k: dict[int, Variant]) -> None:
    """Score over K, and how much was rejected."""
    ks = sorted(by_k)
    scores = [by_k[k].mean(SCORE) for k in ks]
    means = [score.mean if score else math.nan for score in scores]
    spread = [[score.mean - score.low, score.high - score.mean] if score else [math.nan] * 2 for score in scores]
    axes.errorbar(ks, means, yerr=np.nan_to_num(np.array(spread).T), fmt="o-", color="C0", capsize=3)
    axes.set_xscale("log")
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_xlabel("K (the largest is the whole vocabulary)")
    axes.set_ylabel("accuracy, %", color="C0")
    other = axes.twinx()
    rates = [by_k[k].mean("rejection_rate") for k in ks]
    other.plot(ks, [100 * rate.mean if rate else math.nan for rate in rates], "s--", color="C1", markersize=4)
    other.set_ylabel("rejected while training, %", color="C1")
    other.set_ylim(bottom=0)
    other.spines["right"].set_visible(True)


def _compute(axes: Axes, comparisons: dict[str, list[Variant]], metric: str) -> None:
    """Score over what the training computed, of equal steps and of equal compute."""
    for marker, color, (name, variants) in zip("os", ("C0", "C1"), comparisons.items(), strict=False):
        axes.plot([], [], marker, color=color, label=name)
        for variant in variants:
            score, compute = variant.mean(SCORE), variant.compute()
            if score is None or compute is None:
                continue
            axes.plot(compute / 1e3, score.mean, marker, color=color)
            axes.annotate(variant.name, (compute / 1e3, score.mean), (4, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel("positions in forward passes while training, thousands; the teacher's by its cost")
    axes.set_ylabel("accuracy, %" if metric == "accuracy" else metric)
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


def _courses(axes: Axes, curves: Sequence[Curve], label: str) -> None:
    """Each variant's mean over its seeds."""
    for number, name in enumerate(dict.fromkeys(curve.variant for curve in curves)):
        ours = [curve for curve in curves if curve.variant == name]
        length = min(len(curve.values) for curve in ours)
        mean = np.mean([curve.values[:length] for curve in ours], axis=0)
        axes.plot(
            ours[0].steps[:length], mean, label=name, color=f"C{number % 10}", linestyle=("-", "--")[number // 10]
        )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, ncols=2, frameon=False)


def _mean(variant: Variant) -> float:
    score = variant.mean(SCORE)
    return -math.inf if score is None else score.mean
