"""The gate's decisions."""

from __future__ import annotations

import pytest

from skd_lib.errors import SkdError
from skd_lib.tracking.gate import Candidate, decide


def _decide(
    challenger: float, champion: float, *, higher_is_better: bool = True, min_improvement: float = 0.0
) -> tuple[bool, str]:
    decision = decide(
        Candidate({"chrf": challenger, "speedup": 1.1}, pipeline_run_id="new"),
        Candidate({"chrf": champion, "speedup": 1.4}, version="3", pipeline_run_id="old"),
        "chrf",
        higher_is_better=higher_is_better,
        min_improvement=min_improvement,
    )
    assert not set(decision.reason) & set("'\"")  # quotes break KFP's conditions
    return decision.promote, decision.reason


def test_the_first_version_is_promoted() -> None:
    decision = decide(Candidate({"chrf": 12.0}), None, "chrf", min_improvement=5.0)
    assert decision.promote
    assert decision.reason == "first champion of this name, with chrf 12.00"


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


def test_a_champion_without_the_figure_stays() -> None:
    decision = decide(Candidate({"chrf": 30.0}), Candidate({"bleu": 3.0}, version="2"), "chrf")
    assert not decision.promote
    assert "version 2) has no chrf" in decision.reason


@pytest.mark.parametrize("figures", [{}, {"bleu": 3.0}, {"chrf": float("nan")}])
def test_a_challenger_without_the_figure_is_an_error(figures: dict[str, float]) -> None:
    with pytest.raises(SkdError, match="no score `chrf`"):
        decide(Candidate(figures), None, "chrf")


def test_a_resumed_run_decides_the_same_again() -> None:
    champion = Candidate({"chrf": 30.0}, version="4", pipeline_run_id="run-1")
    decision = decide(Candidate({"chrf": 30.0}, pipeline_run_id="run-1"), champion, "chrf")
    assert decision.promote
    assert not decide(Candidate({"chrf": 30.0}), champion, "chrf").promote


def test_other_data_is_told() -> None:
    champion = Candidate({"chrf": 30.0}, version="4", data_fingerprint="aaa")
    assert "different data" in decide(Candidate({"chrf": 31.0}, data_fingerprint="bbb"), champion, "chrf").reason
    assert "different data" not in decide(Candidate({"chrf": 31.0}, data_fingerprint="aaa"), champion, "chrf").reason
