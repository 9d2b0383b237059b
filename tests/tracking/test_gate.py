"""The gate's decisions."""

from __future__ import annotations

from typing import Any

import pytest

from skd_lib.errors import SkdError
from skd_lib.tracking.gate import Decision, Rival, decide, decide_drafts


def _decide(
    challenger: float, champion: float, *, drafts: tuple[float, float] | None = None, **options: Any
) -> tuple[bool, str]:
    speedups = dict(zip(("challenger_speedup", "speedup"), drafts or (), strict=False))
    rival = Rival(version="3", figures={"chrf": champion}, **speedups)
    decision = decide({"chrf": challenger, "bleu": 1.0}, rival, "chrf", **options)
    return decision.promote, decision.reason


def test_the_first_version_is_promoted() -> None:
    decision = decide({"chrf": 12.0}, Rival(), "chrf", min_improvement=5.0)
    assert decision == Decision(True, "first champion of this name, with chrf 12.00")


def test_the_first_version_is_not_promoted_where_distillation_made_it_worse() -> None:
    decision = decide({"chrf": 12.0}, Rival(), "chrf", before=30.0)
    assert decision == Decision(False, "distillation made the student worse: chrf 30.00 before, 12.00 after")
    rival = Rival(version="3", figures={"chrf": 10.0})
    assert decide({"chrf": 12.0}, rival, "chrf", before=30.0).promote


def test_better_is_promoted_and_equal_or_worse_is_not() -> None:
    assert _decide(30.5, 30.0) == (True, "chrf 30.50 against 30.00 of the champion (version 3): better")
    assert _decide(30.0, 30.0) == (False, "chrf 30.00 against 30.00 of the champion (version 3): not better")
    assert not _decide(29.0, 30.0)[0]


def test_the_margin_must_be_exceeded() -> None:
    assert not _decide(31.0, 30.0, min_improvement=1.0)[0]
    promote, reason = _decide(31.5, 30.0, min_improvement=1.0)
    assert promote
    assert reason.endswith("more than 1 better")


def test_lower_may_be_better() -> None:
    assert _decide(0.4, 0.5, higher_is_better=False)[0]
    assert not _decide(0.6, 0.5, higher_is_better=False)[0]


def test_a_better_student_that_drafts_more_slowly_is_not_promoted() -> None:
    promote, reason = _decide(31.0, 30.0, drafts=(1.2, 1.4), max_slowdown=0.05)
    assert not promote
    assert reason == (
        "chrf 31.00 against 30.00 of the champion (version 3): better; "
        "as draft 1.20x against 1.40x: more than 5 % slower"
    )


def test_a_slowdown_within_the_allowance_is_none() -> None:
    promote, reason = _decide(31.0, 30.0, drafts=(1.36, 1.4), max_slowdown=0.05)
    assert promote
    assert reason.endswith("as draft 1.36x against 1.40x: not more than 5 % slower")
    assert not _decide(31.0, 30.0, drafts=(1.36, 1.4))[0]
    assert _decide(31.0, 30.0, drafts=(0.1, 1.4), max_slowdown=1.0)[0]


def test_a_faster_draft_does_not_make_up_for_a_worse_score() -> None:
    assert not _decide(29.0, 30.0, drafts=(2.0, 1.0), max_slowdown=0.05)[0]


def test_a_champion_that_could_not_be_measured_stays() -> None:
    rival = Rival(version="2", missing="'/gone': no such folder")
    decision = decide({"chrf": 30.0}, rival, "chrf")
    assert not decision.promote
    assert decision.reason == (
        "the champion (version 2) could not be measured; set the alias champion by hand to replace it: "
        "'/gone': no such folder"
    )
    other_metric = decide({"chrf": 30.0}, Rival(version="2", figures={"bleu": 3.0}), "chrf")
    assert not other_metric.promote
    assert "it has no chrf on this data" in other_metric.reason


def test_a_champion_that_cannot_draft_for_this_teacher_is_compared_by_score() -> None:
    rival = Rival(version="2", figures={"chrf": 29.0}, undrafted="the tokenizers differ: 5 is 'a'")
    decision = decide({"chrf": 30.0}, rival, "chrf", max_slowdown=0.0)
    assert decision.promote
    assert decision.reason.endswith("better; not compared as drafts: the tokenizers differ: 5 is 'a'")


@pytest.mark.parametrize("figures", [{}, {"bleu": 3.0}, {"chrf": float("nan")}])
def test_a_challenger_without_the_figure_is_an_error(figures: dict[str, float]) -> None:
    with pytest.raises(SkdError, match="no score `chrf`"):
        decide(figures, Rival(), "chrf")


def test_a_student_that_is_champion_already_stays_it() -> None:
    decision = decide({"chrf": 30.0}, Rival(version="4", is_this_student=True), "chrf", min_improvement=9.0)
    assert decision == Decision(True, "the champion (version 4) is this very student, with chrf 30.00")


@pytest.mark.parametrize(
    ("new", "speed", "options", "promote", "verdict"),
    [
        (2.6, 1.5, {}, True, "better; as draft 1.50x against 1.50x: not more than 0 % slower"),
        (2.5, 1.5, {}, False, "not better; as draft 1.50x against 1.50x: not more than 0 % slower"),
        (2.6, 1.5, {"min_improvement": 0.2}, False, "not more than 0.2 better; as draft 1.50x against"),
        (2.6, 1.4, {"max_slowdown": 0.05}, False, "better; as draft 1.40x against 1.50x: more than 5 % slower"),
    ],
)
def test_drafts_compete_by_tokens_per_call_and_speed(
    new: float, speed: float, options: dict[str, float], promote: bool, verdict: str
) -> None:
    rival = Rival(
        version="3", speedup=1.5, challenger_speedup=speed, tokens_per_call=2.5, challenger_tokens_per_call=new
    )
    decision = decide_drafts(rival, 9.0, **options)
    assert decision.promote == promote
    start = f"{new:.2f} tokens per teacher call against 2.50 of the champion (version 3), "
    assert decision.reason.startswith(f"{start}too few prompts for an interval: {verdict}")


@pytest.mark.parametrize(
    ("low", "least", "promote", "verdict"),
    [
        (0.01, 0.0, True, "95 % interval of the gain +0.01 to +0.40: better"),
        (-0.01, 0.0, False, "95 % interval of the gain -0.01 to +0.40: not better"),
        (0.01, 0.1, False, "95 % interval of the gain +0.01 to +0.40: not more than 0.1 better"),
    ],
)
def test_a_draft_that_may_be_better_by_chance_stays_challenger(
    low: float, least: float, promote: bool, verdict: str
) -> None:
    rival = Rival(version="3", tokens_per_call=2.5, challenger_tokens_per_call=2.7, gain_low=low, gain_high=0.4)
    decision = decide_drafts(rival, 9.0, min_improvement=least)
    assert decision.promote == promote
    assert verdict in decision.reason


def test_drafts_without_a_measured_champion() -> None:
    measured = "with 2.50 tokens per teacher call"
    assert decide_drafts(Rival(), 2.5) == Decision(True, f"first champion of this name, {measured}")
    none = "the teacher accepts none of its drafts, with 1.00 tokens per teacher call"
    assert decide_drafts(Rival(), 1.0) == Decision(False, none)
    same = Rival(version="4", is_this_student=True)
    assert decide_drafts(same, 2.5) == Decision(True, f"the champion (version 4) is this very student, {measured}")
    for rival in (Rival(version="4", undrafted="other tokens"), Rival(version="4", missing="other tokens")):
        decision = decide_drafts(rival, 2.5)
        assert not decision.promote
        assert decision.reason.endswith("set the alias champion by hand to replace it: other tokens")
