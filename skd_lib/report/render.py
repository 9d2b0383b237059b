"""A run's summary for people: a table in the terminal, and Markdown for Kubeflow's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from skd_lib._core.format import TextTable, decoding, duration
from skd_lib.data.splits import WARN_ABOVE, in_words
from skd_lib.evaluation.statistics import LEAST_EXAMPLES
from skd_lib.report.names import ROLE_NAMES, metric_name
from skd_lib.report.series import groups
from skd_lib.report.summary import Summary
from skd_lib.report.worth import worth_lines, worth_table
from skd_lib.results import DRAFT_FIGURES, Course, Role, Specdec

# Below this share of replaced tokens SKD is hardly more than on-policy distillation, which the reader should know.
FEW_REPLACED = 0.01
UNSURE = "†"
"""Stands after an interval that is not to be relied on."""
WITHHELD = f"withheld (under {LEAST_EXAMPLES} examples)"
LOSS_COLUMNS = ("split", "rows", "left out", "why")
_BARS = "▁▂▃▄▅▆▇█"
_SPARKLINE_WIDTH = 24
_DRAFT_COLUMNS = ("distillation", "accepted", "tokens/teacher call", "speed-up", "teacher's own output")


def render(summary: Summary) -> RenderableType:
    """Return the summary for the end of a run, to be printed by a `rich` console: what the student is worth is last."""
    parts: list[RenderableType] = [_quality_table(summary).to_rich()]
    parts += [Text(line, style="dim") for line in _signature_lines(summary)]
    parts += [Text(line, style="yellow") for line in (*caution_lines(summary), *_missing_lines(summary))]
    parts += [*_course_texts(summary.course), *_loss_texts(summary)]
    if summary.seconds:
        parts += [Text(), _seconds_table(summary.seconds).to_rich()]
    if (table := worth_table(summary)).rows:
        parts += [Text(), table.to_rich(), *map(Text, worth_lines(summary))]
        parts += [Text(line, style="dim") for line in _draft_lines(summary)]
    return Group(*(Padding(part, (0, 2)) if isinstance(part, Text) else part for part in parts))


def to_markdown(summary: Summary) -> str:
    """Return the summary as Markdown."""
    lines = [f"# {summary.run_name or 'Results'}", ""]
    if (table := worth_table(summary)).rows:
        lines += [*table.to_markdown(), *(f"- {line}" for line in worth_lines(summary)), ""]
    lines += _quality_table(summary).to_markdown()
    notes = (_signature_lines, caution_lines, _missing_lines)
    lines += [*(f"- {line}" for part in notes for line in part(summary)), ""]
    if summary.specdec:
        lines += _specdec_table(summary).to_markdown()
    if course := _course_texts(summary.course):
        lines += ["## Course of the distillation", "", *(f"- {text.plain}" for text in course), ""]
    if summary.losses:
        lines += TextTable("Rows left out of the data", LOSS_COLUMNS, loss_rows(summary)).to_markdown()
    if summary.seconds:
        lines += _seconds_table(summary.seconds).to_markdown()
    return "\n".join(lines).rstrip("\n") + "\n"


def result_tables(summary: Summary) -> list[TextTable]:
    """Return the tables of what was measured: the models' quality, and the student as a draft."""
    return [_quality_table(summary), *([_specdec_table(summary)] if summary.specdec else [])]


def sparkline(values: Sequence[float], width: int = _SPARKLINE_WIDTH) -> str:
    """Draw values as a line of bars, from 0 to their maximum; more than `width` of them are averaged in groups."""
    parts = groups(values, width)
    top = max((fmean(part) for part in parts), default=0.0)
    scale = (len(_BARS) - 1) / top if top > 0 else 0.0
    return "".join(_BARS[round(max(fmean(part), 0.0) * scale)] for part in parts)


def _quality_table(summary: Summary) -> TextTable:
    metrics = _metrics(summary)
    header = ["model", *map(metric_name, metrics), "examples"]
    rows = [
        [ROLE_NAMES[role], *(_score(summary, role, name) for name in metrics), str(summary.examples.get(role, ""))]
        for role in summary.models
    ]
    return TextTable("Quality on the test set (95 % interval)", header, rows, highlighted=["student after"])


def _specdec_table(summary: Summary) -> TextTable:
    rows = [
        [moment, *draft_cells(draft.figures(), unsure=draft.is_unsure), same_output(draft)]
        for moment, draft in summary.specdec.items()
    ]
    title = "The student as draft of the teacher (speculative decoding)"
    return TextTable(title, _DRAFT_COLUMNS, rows, note=_draft_setting(summary), highlighted=["after"])


def _seconds_table(seconds: dict[str, float]) -> TextTable:
    steps = {step: value for step, value in seconds.items() if step != "total"}
    longest = max(steps.values(), default=0.0)
    rows = [
        [step, duration(value), "█" * round(30 * value / longest) if longest else ""] for step, value in steps.items()
    ]
    rows.append(["total", duration(seconds.get("total", sum(steps.values()))), ""])
    return TextTable("Time", ["step", "time", ""], rows, highlighted=["total"], numbers=False)


def _metrics(summary: Summary) -> list[str]:
    """Return the task's metric, then the others as they were measured."""
    names = dict.fromkeys(name for scores in summary.models.values() for name in scores)
    return sorted(names, key=lambda name: name != summary.task_metric)


def _score(summary: Summary, role: Role, metric: str) -> str:
    score = summary.models[role].get(metric)
    if score is None:
        return ""
    interval = summary.intervals.get(role, {}).get(metric)
    mark = UNSURE if metric in summary.cautions.get(role, {}) else ""
    return f"{score:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]{mark}" if interval else "")


def draft_cells(figures: Mapping[str, float], *, unsure: bool = False) -> list[str]:
    """Return the cells of a draft's three headline figures; a question mark where the speed-up may be chance."""
    rate, tokens, speedup = (figures[name] for name in DRAFT_FIGURES)
    return [f"{rate:.1%}", f"{tokens:.2f}", f"{speedup:.2f}x{'?' if unsure else ''}"]


def _draft_setting(summary: Summary) -> str:
    """Describe how the drafts were measured, before and after alike."""
    draft = next(iter(summary.specdec.values()))
    setting = [] if draft.gamma is None else [f"{draft.gamma} tokens drafted a time"]
    if draft.temperature is not None:
        setting.append(decoding(draft.temperature))
    if draft.served:
        setting.append(
            f"{draft.batch_size} requests in flight, speed-up over vLLM {draft.served.version} without a draft"
        )
    else:
        setting.append("speed-up over the teacher alone in the same process")
    return ", ".join(setting)


def _draft_lines(summary: Summary) -> list[str]:
    if "after" not in summary.specdec:
        return []
    same = same_output(summary.specdec["after"])
    cells = {moment: draft_cells(one.figures(), unsure=one.is_unsure) for moment, one in summary.specdec.items()}
    speedups = ", ".join(f"{speedup} with the student {moment}" for moment, (_, _, speedup) in cells.items())
    return [
        f"Speed-up by drafts: {speedups}. Measured with {_draft_setting(summary)}. Output with drafts is the teacher's "
        f"own: {same}."
    ]


def same_output(draft: Specdec) -> str:
    """Say whether speculative decoding wrote what the teacher writes alone."""
    if draft.served and (counted := [each.equal for each in draft.served.drafts.values() if each.equal is not None]):
        rounding = "" if counted[0] == draft.prompts else "; in half precision others may differ by rounding alone"
        return f"{counted[0]} of {draft.prompts} answers{rounding}"
    if draft.temperature:
        return "in distribution"
    return f"yes, bar {draft.ties} rounding tie{'s' if draft.ties > 1 else ''}" if draft.ties else "yes"


def caution_lines(summary: Summary) -> list[str]:
    """Explain why intervals are marked, and why tests are withheld."""
    found = dict.fromkeys(reason for cautions in summary.cautions.values() for reason in cautions.values())
    lines = [f"{UNSURE} {reason}." for reason in found]
    if any(comparison.p_value is None for comparison in summary.comparisons):
        lines.append(f"Paired tests are {WITHHELD}: there chance alone makes small p-values far too often.")
    return lines


def _signature_lines(summary: Summary) -> list[str]:
    return [f"{metric_name(name)}: {signature}" for name, signature in summary.signatures.items()]


def _missing_lines(summary: Summary) -> list[str]:
    return [f"{metric_name(name)} is missing: {' '.join(reason.split())}" for name, reason in summary.missing.items()]


def _course_texts(course: Course) -> list[Text]:
    texts = []
    rates = course.rejection_rate
    if rates:
        parts = groups(rates, 8)
        over = f" over {course.steps[-1]} steps" if course.steps else ""
        figures = f" {fmean(parts[0]):.3f} -> {fmean(parts[-1]):.3f}{over} (share of drafts the teacher replaced)"
        texts.append(Text.assemble("Rejection rate  ", (sparkline(rates), "cyan"), figures))
        # Exactly 0 throughout is on-policy distillation, asked for as such.
        if 0 < fmean(rates) < FEW_REPLACED:
            warning = (
                f"The teacher replaced only {fmean(rates):.2%} of the drafts: this is close to on-policy distillation. "
                "A smaller top_k lets it correct more."
            )
            texts.append(Text(warning, style="yellow"))
    losses = course.validation_loss
    if losses:
        best = min(range(len(losses)), key=losses.__getitem__)
        at = f" at step {course.validation_steps[best]}" if best < len(course.validation_steps) else ""
        figures = f" {losses[0]:.3f} -> {losses[-1]:.3f} (best {losses[best]:.3f}{at})"
        texts.append(Text.assemble("Validation loss ", (sparkline(losses), "cyan"), figures))
    return texts


def loss_rows(summary: Summary) -> list[list[str]]:
    """Return the rows that each split of the data lost: its name, its rows, the number left out, and why."""
    return [
        [
            name,
            f"{loss.rows:,}",
            f"{loss.total:,} ({loss.share:.0%})" if loss.total else "none",
            in_words(loss.lost),
        ]
        for name, loss in summary.losses.items()
    ]


def _loss_texts(summary: Summary) -> list[Text]:
    """Describe the splits that lost rows; yellow where it is much."""
    return [
        Text(f"Left out of {name}: {left_out} of {rows} rows: {why}", style="yellow" if loss.share > WARN_ABOVE else "")
        for (name, rows, left_out, why), loss in zip(loss_rows(summary), summary.losses.values(), strict=True)
        if loss.total
    ]
