"""Sampled outputs against exact enumeration of their joint distribution."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import chisquare
from transformers import PreTrainedModel

from skd_lib.config import SamplingParams
from skd_lib.sampling.acceptance import AcceptanceRule, lossless, min_prob, mixture, student_only, teacher_only, top_k
from skd_lib.sampling.distributions import by_bisection, draw, warp
from skd_lib.sampling.drafting import AdaptiveGamma
from skd_lib.sampling.engine import Sampler
from skd_lib.sampling.reference import probabilities
from tests.conftest import TinyModel

VOCABULARY, LENGTH, SAMPLES = 5, 3, 4000
STUDENT = SamplingParams(temperature=1.2, top_p=0.9)
TEACHER = SamplingParams(temperature=0.8, top_p=0.95)
PROMPT = [1, 3]

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Raw student and teacher logits (V) -> the distribution of the next token."""


def student_alone(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return probabilities(student, STUDENT)


def teacher_alone(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return probabilities(teacher, TEACHER)


def interleaved(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """SKD's exact mixture: the student's mass on the teacher's top-K, the rest spread as the teacher samples."""
    in_top_k = torch.zeros(VOCABULARY, dtype=torch.double)
    in_top_k[teacher.topk(2).indices] = 1
    accepted = probabilities(student, STUDENT) * in_top_k
    return accepted + (1 - accepted.sum()) * probabilities(teacher, TEACHER)


def mixed(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return 0.7 * probabilities(student, STUDENT) + 0.3 * probabilities(teacher, TEACHER)


def kept_where_likely(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    accepted = probabilities(student, STUDENT) * (torch.softmax(teacher.double(), -1) >= 0.01)
    accepted[teacher.argmax()] += 1 - accepted.sum()
    return accepted


@torch.no_grad()
def enumerate_joint(student: PreTrainedModel, teacher: PreTrainedModel, step: Step) -> dict[tuple[int, ...], float]:
    joint = {}
    for tokens in itertools.product(range(VOCABULARY), repeat=LENGTH):
        ids = torch.tensor([PROMPT + list(tokens)])
        q, p = student(ids).logits[0], teacher(ids).logits[0]
        probability = 1.0
        for i, token in enumerate(tokens):
            at = len(PROMPT) - 1 + i
            probability *= float(step(q[at], p[at])[token])
        joint[tokens] = probability
    return joint


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        (student_only(), student_alone),
        (teacher_only(), teacher_alone),
        (lossless(), teacher_alone),
        (top_k(2), interleaved),
        (min_prob(0.01), kept_where_likely),
        (mixture(0.3), mixed),
    ],
    ids=["student_only", "teacher_only", "lossless", "top_k", "min_prob", "mixture"],
)
@pytest.mark.parametrize("gamma", [1, 2, AdaptiveGamma(3)], ids=["1", "2", "adaptive"])
def test_joint_distribution(
    tiny_model: TinyModel, rule: AcceptanceRule, step: Step, gamma: int | AdaptiveGamma
) -> None:
    student = tiny_model(seed=1, vocab_size=VOCABULARY)
    teacher = tiny_model(seed=2, vocab_size=VOCABULARY)
    joint = enumerate_joint(student, teacher, step)
    assert sum(joint.values()) == pytest.approx(1)

    sampler = Sampler(
        student, teacher, rule, eos_ids=(), pad_id=0, max_new_tokens=LENGTH, gamma=gamma,
        student_params=STUDENT, teacher_params=TEACHER, batch_size=SAMPLES // 4,
    )  # fmt: skip
    samples = sampler.sample([PROMPT] * SAMPLES, range(SAMPLES))
    counts = Counter(map(tuple, samples.tokens_BT.tolist()))
    assert all(joint[tokens] > 0 for tokens in counts), "a sequence of probability 0 was sampled"

    common = [tokens for tokens, probability in joint.items() if probability * SAMPLES >= 5]
    assert len(common) > 3, "a distribution this narrow tests nothing"
    expected = [joint[tokens] * SAMPLES for tokens in common]
    observed = [counts[tokens] for tokens in common]
    rest = SAMPLES - sum(expected)
    if rest >= 5:
        expected, observed = [*expected, rest], [*observed, SAMPLES - sum(observed)]
    else:
        expected = [e * sum(observed) / sum(expected) for e in expected]
    assert chisquare(observed, expected).pvalue > 1e-4


def test_the_statistical_test_can_fail(tiny_model: TinyModel) -> None:
    """The teacher's distribution and the interleaved one are far enough apart for the sample size."""
    student, teacher = tiny_model(seed=1, vocab_size=VOCABULARY), tiny_model(seed=2, vocab_size=VOCABULARY)
    mine, other = (enumerate_joint(student, teacher, step) for step in (interleaved, teacher_alone))
    expected = torch.tensor([mine[t] for t in mine]) * SAMPLES
    statistic = ((torch.tensor([other[t] for t in mine]) * SAMPLES - expected) ** 2 / expected.clamp_min(1)).sum()
    assert statistic > 300


LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12).map(torch.tensor)


@settings(deadline=None)
@given(LOGITS, st.floats(0.1, 3), st.floats(0.01, 1))
def test_warp_keeps_the_smallest_set_that_reaches_top_p(logits: torch.Tensor, temperature: float, top_p: float) -> None:
    probs = warp(logits, SamplingParams(temperature=temperature, top_p=top_p))
    full = torch.softmax(logits.double() / temperature, -1)
    kept = probs > 0
    assert float(probs.sum()) == pytest.approx(1, abs=1e-5)
    assert float(full[kept].sum()) >= top_p - 1e-5
    # Those as likely as the last one stay too, so the mass of the likelier ones alone must not reach it.
    assert float(full[full > full[kept].min() + 1e-6].sum()) < top_p + 1e-5
    if (~kept).any():
        assert full[~kept].max() <= full[kept].min() + 1e-6
    torch.testing.assert_close(probs.double()[kept], full[kept] / full[kept].sum(), rtol=1e-3, atol=1e-6)


def test_a_nucleus_wider_than_the_first_guess() -> None:
    flat = -1e-6 * torch.arange(5000.0).expand(2, -1).clone()
    flat[0, 17] = 20.0
    probs = warp(flat, SamplingParams(top_p=0.5))
    assert (probs > 0).sum(-1).tolist() == [1, 2497]


def test_tokens_as_likely_as_the_last_in_the_nucleus_stay() -> None:
    probs = warp(torch.tensor([[1.0, 0.0, 1.0, 1.0]]), SamplingParams(top_p=0.5))
    assert (probs > 0).tolist() == [[True, False, True, True]]


@settings(deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 700)), elements=st.floats(-20, 20, width=32)))
def test_the_nucleus_without_sorting_is_the_same(logits: np.ndarray) -> None:
    """What a GPU does, where asking whether the guess was wide enough would cost more than 31 halvings."""
    probs = torch.softmax(torch.from_numpy(logits), -1)
    for top_p in (0.1, 0.5, 0.9):
        least = by_bisection(probs, top_p)
        reaches, above = (torch.where(keep, probs, 0).sum(-1) for keep in (probs >= least, probs > least))
        assert (reaches >= top_p - 1e-6).all()
        assert (above < top_p + 1e-6).all()


def test_temperature_zero_is_the_argmax() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.9], [5.0, 5.0, 1.0]])
    assert warp(logits, SamplingParams(temperature=0)).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("vocabulary", [48, 256, 320])
def test_draw_stays_in_the_vocabulary_whatever_the_weights(vocabulary: int) -> None:
    """An id beyond it would end the process on a GPU, where a model that diverged gives NaN."""
    tokens = draw(torch.full((3, vocabulary), torch.nan), torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64))
    assert tokens.max() < vocabulary


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 1e-7, 0.3, 1.0]), min_size=1, max_size=9), st.floats(0, 1, exclude_max=True)
)
def test_draw_never_gives_a_token_of_probability_zero(weights: list[float], uniform: float) -> None:
    if not any(weights):
        weights = [*weights, 1.0]
    probs = torch.tensor([weights])
    token = int(draw(probs, torch.tensor([uniform], dtype=torch.float64)))
    assert probs[0, token] > 0
