"""The rules on blocks made by hand, at their bounds."""

from __future__ import annotations

import pytest
import torch

from skd_lib.config import SamplingParams
from skd_lib.sampling.acceptance import AcceptanceRule, Block, lossless, min_prob, mixture, top_k

P = [0.5, 0.25, 0.125, 0.125]
Q = [0.125, 0.125, 0.25, 0.5]


def accepted(rule: AcceptanceRule, uniform: float) -> list[bool]:
    """Which of four tokens the rule accepts as drafts; all probabilities are exact."""
    block = Block(
        drafts_BG=torch.arange(4).unsqueeze(1),
        teacher_logits_BGV=torch.tensor(P).log().expand(4, 1, 4),
        student_probs_BGV=torch.tensor(Q).expand(4, 1, 4),
        uniforms_BG=torch.full((4, 1), uniform),
        teacher_params=SamplingParams(),
    )
    assert rule.accept is not None
    verdicts: list[bool] = rule.accept(block).squeeze(1).tolist()
    return verdicts


@pytest.mark.parametrize(("k", "count"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 4)])
def test_top_k_counts_higher_logits_alone(k: int, count: int) -> None:
    """The third and the fourth token are as likely as each other: both have two above them."""
    assert accepted(top_k(k), 0.5) == [True] * count + [False] * (4 - count)


@pytest.mark.parametrize(("a", "count"), [(0.125, 4), (0.13, 2), (0.25, 2), (0.26, 1), (0.5, 1), (0.51, 0)])
def test_min_prob_accepts_its_bound(a: float, count: int) -> None:
    assert accepted(min_prob(a), 0.5) == [True] * count + [False] * (4 - count)


def test_lossless_accepts_by_the_ratio_of_probabilities() -> None:
    ratios = [p / q for p, q in zip(P, Q, strict=True)]
    for uniform in (0.2, 0.24, 0.26, 0.49, 0.51, 0.99):
        assert accepted(lossless(), uniform) == [uniform < ratio for ratio in ratios]


def test_mixture_accepts_by_its_share() -> None:
    ratios = [0.75 + 0.25 * p / q for p, q in zip(P, Q, strict=True)]
    for uniform in (0.8, 0.82, 0.87, 0.88, 0.99):
        assert accepted(mixture(0.25), uniform) == [uniform < ratio for ratio in ratios]


def test_what_the_student_lacks_replaces_its_draft() -> None:
    p_BV, q_BV = torch.tensor([P]), torch.tensor([Q])
    for rule in (lossless(), mixture(0.25)):
        assert rule.correct is not None
        assert rule.correct(p_BV, q_BV).tolist() == [[0.375, 0.125, 0, 0]]
        assert rule.correct(p_BV, p_BV).tolist() == [P]  # nothing is lacking: a rejection was rounding
    correct = min_prob(0.2).correct
    assert correct is not None
    assert correct(p_BV, None).tolist() == [[1, 0, 0, 0]]
