"""The benchmark's figures as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from skd_lib._core.format import TextTable, decoding, plain
from skd_lib.results import DraftLength, Latency, Percentiles, ServedMeasurement, ServedPasses, Setting, Specdec
from skd_lib.specdec.benchmark import compare_drafts

_SPEED_COLUMNS = ("drafted", "accepted", "tokens a call", "tokens/s", "speed-up", "theory", "paper's")
_SERVED_COLUMNS = ("decoding", "in flight", "tokens/s without", "tokens/s with it", "speed-up", "tokens a call")
_SPEED_CAPTION = (
    "theory: from acceptance by position and the forwards' times; paper's: one rate, a block as slow as a token. "
    "What was not timed is predicted."
)


def render(results: Mapping[str, Specdec]) -> RenderableType:
    """Make tables for each draft model, by its name: speed in every setting, latency, acceptance by position."""
    parts: list[RenderableType] = []
    for name, result in results.items():
        if result.served is not None:
            parts += _served(name, result.served)
        else:
            parts += [_speed(name, setting).to_rich() for setting in result.settings]
            parts += [_latencies(name, result).to_rich(), _conclusion(name, result)]
        if result.vllm is not None:
            parts += [Text(f"vLLM: {reason}", style="yellow") for reason in result.vllm.reasons]
    if results.keys() >= {"before", "after"} and (gain := compare_drafts(results["after"], results["before"])):
        interval = f"95 % interval {gain.low:+.2f} to {gain.high:+.2f}"
        parts.append(Text(f"after against before: {gain.difference:+.2f} tokens a call, {interval} over the prompts."))
    notes = [note for result in results.values() if result.served for note in result.served.notes]
    parts += [Text(note, style="yellow") for note in dict.fromkeys(notes)]
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
    only = sum(length.timed is not None for length in headline.lengths) == 1
    text = (
        f"{name}: positions of a block of {result.gamma} are accepted, once reached, in {rates}. "
        f"{'At' if only else 'Fastest at'} batch size {headline.batch_size}: {headline.best_gamma} drafted tokens, "
        f"{headline.best_speedup:.2f}x the teacher alone{'; no other length was timed' if only else ''}."
    )
    if headline.best_speedup <= 1 and result.break_even is not None:
        most = f"if it cost less than {result.break_even:.0%} of this one" if result.break_even > 0 else "at no cost"
        text += f" By the forwards' times a draft accepted as often would pay {most}."
    if any(setting.temperature == 0 for setting in result.settings):
        ties = f", bar {result.ties} ties within rounding" if result.ties else ""
        text += f" Its greedy output is the teacher's own, token by token{ties}."
    return Text(text)


def _served(name: str, served: ServedMeasurement) -> list[RenderableType]:
    model = served.drafts[name]
    speeds = [
        [
            decoding(each.temperature),
            str(each.concurrency),
            _rate(served.alone.at(each.temperature, each.concurrency)),
            _rate(each),
            f"{served.speedup(each):.2f}x{'?' if served.is_unsure(each) else ''}",
            f"{each.counts.accepted_length:.2f}" if each.counts else "",
        ]
        for each in model.passes
    ]
    title = (
        f"{name}: vLLM {served.version} on a {served.device.upper()}, {served.prompts} prompts, {served.gamma} drafted"
    )
    note = (
        "Tokens a second: the median of the passes, slowest to fastest in brackets. Servers run one after the other. "
        "Tokens a call: 1 + accepted / drafts. A question mark: ranges overlap or there is one pass; may be chance."
    )
    parts: list[RenderableType] = [TextTable(title, _SERVED_COLUMNS, speeds, note=note).to_rich()]
    if (counts := model.passes[0].counts) is not None:
        rows = [
            [str(position), str(accepted), f"{accepted / reached:.1%}" if reached else "", f"{share:.1%}"]
            for position, (accepted, reached, share) in enumerate(
                zip(counts.accepted_by_position, counts.tested, counts.shares, strict=False), 1
            )
        ]
        title = f"{name}: acceptance by vLLM's counts, {counts.drafts} drafts"
        parts.append(TextTable(title, ("position", "accepted", "of those reached", "of all drafts"), rows).to_rich())
    parts.append(Text(" ".join(_greedy(name, served))))
    return parts


def _greedy(name: str, served: ServedMeasurement) -> list[str]:
    """Say how many greedy responses are the teacher's own."""
    equal = served.drafts[name].equal
    if equal is None:
        return []
    found = [
        f"{name}: {equal} of {served.prompts} greedy responses are those of vLLM without a draft, which itself repeats "
        f"{served.alone.equal} of {served.prompts}."
    ]
    if served.equal_to_transformers is not None:
        found.append(f"{served.equal_to_transformers} of {served.prompts} of these are those of transformers.")
    return found


def _rate(passes: ServedPasses) -> str:
    return f"{plain(passes.tokens_per_second)} ({plain(passes.slowest)}-{plain(passes.fastest)})"


def _how(setting: Setting) -> str:
    return f"{decoding(setting.temperature)}, batch size {setting.batch_size}"
