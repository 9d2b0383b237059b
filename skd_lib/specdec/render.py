"""The benchmark's figures as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from skd_lib._core.format import TextTable
from skd_lib.results import DraftLength, Latency, Percentiles, Setting, Specdec

_SPEED_COLUMNS = ("drafted", "accepted", "tokens/call", "tokens/s", "speed-up", "theory", "paper's")
_SPEED_CAPTION = (
    "theory: from acceptance by position and the forwards' times; paper's: one rate, a block as slow as a token. "
    "What was not timed is predicted."
)


def render(results: Mapping[str, Specdec]) -> RenderableType:
    """Make tables for each draft model, by its name: speed in every setting, latency, acceptance by position."""
    parts: list[RenderableType] = []
    for name, result in results.items():
        parts += [_speed(name, setting).to_rich() for setting in result.settings]
        parts += [_latencies(name, result).to_rich(), _conclusion(name, result)]
        if result.vllm is not None:
            parts += [Text(f"vLLM: {reason}", style="yellow") for reason in result.vllm.reasons]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def _speed(name: str, setting: Setting) -> TextTable:
    teacher, draft = setting.teacher_alone, setting.draft_alone
    rows = [["none", "", "1.00", f"{teacher.tokens_per_second:.1f}", "1.00x", "", ""]]
    rows += map(_speed_cells, setting.lengths)
    if draft is not None:
        ratio = draft.tokens_per_second / teacher.tokens_per_second
        rows.append(["draft alone", "", "", f"{draft.tokens_per_second:.1f}", f"{ratio:.2f}x", "", ""])
    title = f"{name}: {_how(setting)}, {setting.prompts} prompts"
    return TextTable(title, _SPEED_COLUMNS, rows, note=_SPEED_CAPTION, highlighted=[str(setting.best_gamma)])


def _speed_cells(length: DraftLength) -> list[str]:
    theory = [f"{length.theoretical_speedup:.2f}x", f"{length.theoretical_speedup_iid:.2f}x"]
    timed = length.timed
    if timed is None:
        return [str(length.gamma), "", f"{length.expected_tokens_per_teacher_call:.2f}", "", "", *theory]
    return [
        str(length.gamma),
        f"{timed.acceptance_rate:.1%}",
        f"{timed.tokens_per_teacher_call:.2f}",
        f"{timed.tokens_per_second:.1f}",
        f"{timed.speedup:.2f}x",
        *theory,
    ]


def _latencies(name: str, result: Specdec) -> TextTable:
    rows = []
    for setting in result.settings:
        rows.append([_how(setting), "none", *_latency_cells(setting.teacher_alone.latency)])
        rows.append(["", str(setting.best_gamma), *_latency_cells(setting.timed(setting.best_gamma).latency)])
    columns = ("setting", "drafted", "first token", "per token")
    return TextTable(f"{name}: latency in ms", columns, rows, note="50 / 90 / 99 % of tokens take no longer")


def _latency_cells(latency: Latency) -> list[str]:
    return [_milliseconds(latency.first_token), _milliseconds(latency.per_token)]


def _milliseconds(percentiles: Percentiles | None) -> str:
    if percentiles is None:
        return ""
    return " / ".join(f"{1000 * value:.{0 if value >= 0.1 else 1}f}" for _, value in percentiles)


def _conclusion(name: str, result: Specdec) -> Text:
    headline = result.settings[0]
    rates = ", ".join(f"{rate:.1%}" for rate in result.acceptance_by_position)
    text = (
        f"{name}: positions of a block of {result.gamma} are accepted, once reached, in {rates}. Fastest at batch size "
        f"{headline.batch_size}: {headline.best_gamma} drafted tokens, {headline.best_speedup:.2f}x the teacher alone."
    )
    if headline.best_speedup <= 1 and result.break_even is not None:
        most = f"if it cost less than {result.break_even:.0%} of this one" if result.break_even > 0 else "at no cost"
        text += f" By the forwards' times a draft accepted as often would pay {most}."
    if any(setting.temperature == 0 for setting in result.settings):
        ties = f", bar {result.ties} ties within rounding" if result.ties else ""
        text += f" Its greedy output is the teacher's own, token by token{ties}."
    return Text(text)


def _how(setting: Setting) -> str:
    how = "greedy" if setting.temperature == 0 else f"temperature {setting.temperature:g}"
    return f"{how}, batch size {setting.batch_size}"
