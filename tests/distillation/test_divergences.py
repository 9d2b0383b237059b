"""The divergences against brute force in float64, against TRL, and what must hold of each."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor

from skd_lib.distillation.divergences import DIVERGENCES, divergence
from skd_lib.errors import SkdError
from tests.distillation.cases import Case, adaptive_kl, forward_kl, jsd, reverse_kl, skew_kl, skew_reverse_kl, tvd
from tests.support.trl_jsd import TABLE
from tests.support.trl_jsd import logits as trl_logits

ALL = [
    forward_kl,
    reverse_kl,
    *(jsd(beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
    *(skew_kl(alpha) for alpha in (0.0, 0.1, 0.9)),
    *(skew_reverse_kl(alpha) for alpha in (0.0, 0.1, 0.9)),
    tvd,
    adaptive_kl,
]
IDS = [d.name for d in ALL]


def softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def kl(a: list[float], b: list[float]) -> float:
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x]
    return sum(x * (math.log(x) - math.log(y)) if y else math.inf for x, y in pairs)


def between(weight: float, a: list[float], b: list[float]) -> list[float]:
    return [weight * x + (1 - weight) * y for x, y in zip(a, b, strict=True)]


def adaptive_by_hand(p: list[float], q: list[float]) -> float:
    head: list[int] = []
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        if sum(p[kept] for kept in head) < 0.5:
            head.append(token)
    gaps = [abs(x - y) for x, y in zip(p, q, strict=True)]
    in_head, total = sum(gaps[token] for token in head), sum(gaps)
    return (in_head * kl(p, q) + (total - in_head) * kl(q, p)) / total


def brute_force(name: str, teacher: list[float], student: list[float], temperature: float) -> float:
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    kind, _, rest = name.partition("(")
    weight = float(rest[:-1]) if rest else 0.0
    if kind == "jsd" and weight in (0, 1):
        kind = "reverse_kl" if weight else "forward_kl"
    m = between(weight, p, q)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: weight * kl(p, m) + (1 - weight) * kl(q, m),
        "skew_kl": lambda: kl(p, m),
        "skew_reverse_kl": lambda: kl(q, between(weight, q, p)),
        "tvd": lambda: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
        "adaptive_kl": lambda: adaptive_by_hand(p, q),
    }[kind]()


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("loss", ALL, ids=IDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_equals_brute_force(loss: Case, temperature: float) -> None:
    teacher, student = logits(4, 7), logits(4, 7, seed=1)
    expected = [
        brute_force(loss.name, t, s, temperature) for t, s in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    actual = loss(teacher, student, temperature)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


GONE = {"both": ([1, 4], [1, 4]), "teacher": ([1, 4], []), "student": ([], [2]), "each": ([1, 4], [2, 4])}
"""Tokens whose logits are -inf: the teacher's, the student's."""


def without(logits: Tensor, tokens: list[int], value: float = -math.inf) -> Tensor:
    return logits.index_fill(-1, torch.tensor(tokens, dtype=torch.long), value)


@pytest.mark.parametrize("loss", ALL, ids=IDS)
@pytest.mark.parametrize("gone", GONE)
def test_logits_of_minus_infinity(loss: Case, gone: str) -> None:
    teacher, student = without(logits(4, 7), GONE[gone][0]), without(logits(4, 7, seed=1), GONE[gone][1])
    expected = [brute_force(loss.name, t, s, 0.7) for t, s in zip(teacher.tolist(), student.tolist(), strict=True)]
    student.requires_grad_()
    actual = loss(teacher, student, 0.7)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    if not actual.isfinite().all():  # one has tokens that the other lacks: the divergence is infinite
        assert loss.name not in ("tvd", "jsd(0.5)", "skew_kl(0.1)", "skew_reverse_kl(0.1)")
        assert gone != "both"
        return
    (gradient,) = torch.autograd.grad(actual.sum(), student)
    # The limit of ever smaller logits.
    near = without(student.detach(), GONE[gone][1], -500.0).requires_grad_()
    (limit,) = torch.autograd.grad(loss(without(teacher, GONE[gone][0], -500.0), near, 0.7).sum(), near)
    torch.testing.assert_close(gradient, limit, rtol=1e-9, atol=1e-12)


def test_jsd_is_forward_kl_at_0_and_reverse_kl_at_1_and_symmetric_in_the_middle() -> None:
    teacher, student = logits(5, 9), logits(5, 9, seed=1)
    assert torch.equal(jsd(0)(teacher, student), forward_kl(teacher, student))
    assert torch.equal(jsd(1)(teacher, student), reverse_kl(teacher, student))
    torch.testing.assert_close(jsd(0.5)(teacher, student), jsd(0.5)(student, teacher))
    torch.testing.assert_close(jsd(0.3)(teacher, student), jsd(0.7)(student, teacher))
    # The end points are the limits of jsd / beta and jsd / (1 - beta): arguments are not swapped.
    teacher, student = logits(5, 9, scale=1), logits(5, 9, seed=1, scale=1)
    torch.testing.assert_close(jsd(1e-7)(teacher, student) / 1e-7, forward_kl(teacher, student), rtol=1e-4, atol=0)
    torch.testing.assert_close(jsd(1 - 1e-7)(teacher, student) / 1e-7, reverse_kl(teacher, student), rtol=1e-4, atol=0)


def test_jsd_equals_trl() -> None:
    """The numbers are TRL's own, see `trl_jsd.py`; its beta is the teacher's weight too."""
    teacher, student, labels = trl_logits()
    table: dict[str, Any] = json.loads(TABLE.read_text())
    assert {row["beta"] for row in table["rows"]} >= {0.0, 0.5, 1.0}
    for row in table["rows"]:
        inputs = student.clone().requires_grad_()
        loss = jsd(row["beta"])(teacher, inputs, row["temperature"])[labels != -100].mean()
        loss.backward()
        assert loss.item() == pytest.approx(row["loss"], rel=1e-12)
        assert inputs.grad is not None
        assert inputs.grad[1, 2].tolist() == pytest.approx(row["gradient"], rel=1e-9, abs=1e-14)


def test_skew_divergences_start_at_the_kls_and_are_bounded() -> None:
    teacher, student = logits(5, 9), logits(5, 9, seed=1)
    for skewed, plain in ((skew_kl, forward_kl), (skew_reverse_kl, reverse_kl)):
        assert torch.equal(skewed(0)(teacher, student), plain(teacher, student))
        torch.testing.assert_close(skewed(1e-9)(teacher, student), plain(teacher, student), rtol=1e-4, atol=0)
        for far in (skewed(0.1)(30 * teacher, 30 * student), skewed(0.1)(30 * student, 30 * teacher)):
            assert (far <= -math.log(0.1) + 1e-12).all()
        with pytest.raises(SkdError, match=r"at least 0 and less than 1, got 1(.|\n)*the divergence is 0"):
            skewed(1)(teacher, student)
    # Both mix the other model into the reference, so each is the other with the models swapped.
    assert torch.equal(skew_kl(0.1)(teacher, student), skew_reverse_kl(0.1)(student, teacher))


def test_adaptive_kl_goes_from_forward_to_reverse_with_where_the_gap_is() -> None:
    teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    # The head is the first two tokens: the first alone has less than half of the mass.
    for student, share in (([0.3, 0.4, 0.2, 0.1], 1.0), ([0.4, 0.3, 0.1, 0.2], 0.0), ([0.4, 0.2, 0.3, 0.1], 0.5)):
        inputs = torch.tensor([student], dtype=torch.float64).log().requires_grad_()
        value = adaptive_kl(teacher, inputs)
        forward, reverse = forward_kl(teacher, inputs), reverse_kl(teacher, inputs)
        torch.testing.assert_close(value, share * forward + (1 - share) * reverse)
        # The shares are weights, not something to lower: no gradient flows through them.
        (expected,) = torch.autograd.grad((share * forward + (1 - share) * reverse).sum(), inputs)
        (actual,) = torch.autograd.grad(value.sum(), inputs)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("loss", ALL, ids=IDS)
def test_is_0_with_0_gradient_where_the_models_agree(loss: Case) -> None:
    teacher = logits(3, 8)
    # A shift of all logits changes no probability; but for rounding, which the edge of |p - q| at 0 would show.
    student = (teacher + (0 if loss is tvd else 5)).requires_grad_()
    value = loss(teacher, student)
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(3, dtype=torch.float64))
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros_like(student))


# The gradient of `adaptive_kl` leaves its weights out on purpose, see above.
@pytest.mark.parametrize("loss", [loss for loss in ALL if loss is not adaptive_kl], ids=str)
def test_gradient(loss: Case) -> None:
    teacher, student = logits(3, 6), logits(3, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(teacher, s, 0.7), (student,))


@pytest.mark.parametrize("loss", ALL, ids=IDS)
def test_padded_vocabularies_are_compared_on_their_common_rows(loss: Case) -> None:
    teacher, student = logits(4, 10), logits(4, 7, seed=1)
    expected = loss(teacher[:, :7], student)
    torch.testing.assert_close(loss(teacher, student), expected)
    torch.testing.assert_close(loss(teacher[:, :7], torch.cat([student, logits(4, 5)], dim=1)), expected)


@pytest.mark.parametrize("loss", ALL, ids=IDS)
def test_works_in_fp32_whatever_the_models_dtype(loss: Case) -> None:
    teacher, student = logits(4, 50).bfloat16(), logits(4, 50, seed=1).bfloat16()
    actual = loss(teacher, student)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), loss(teacher.double(), student.double()), rtol=1e-4, atol=1e-5)


finite = npst.arrays("float64", (2, 3, 12), elements=st.floats(-40, 40))


@settings(max_examples=30, deadline=None)
@given(finite, st.floats(0, 1), st.floats(0.2, 5))
def test_properties(values: object, beta: float, temperature: float) -> None:
    teacher, student = torch.tensor(values)
    skewed = (skew_kl(min(beta, 0.99)), skew_reverse_kl(min(beta, 0.99)))
    for loss in (forward_kl, reverse_kl, jsd(beta), *skewed, tvd, adaptive_kl):
        value = loss(teacher, student, temperature)
        assert torch.isfinite(value).all()
        assert (value > -1e-12).all()
        apart = tvd(teacher, student, temperature)
        assert (value[apart == 0] < 1e-12).all()
        # 0 only where the two agree by more than rounding; jsd vanishes at its ends.
        if 1e-3 < beta < 0.99:
            assert (value[apart > 1e-4] > 1e-12).all(), loss.name
        if loss is adaptive_kl:  # rounding may move a token over the head's edge
            continue
        torch.testing.assert_close(value, loss(teacher - 7, student + 3, temperature), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(value, loss(teacher.flip(-1), student.flip(-1), temperature), rtol=1e-9, atol=1e-9)
    if 0 < beta < 1:
        entropy_of_beta = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
        assert (jsd(beta)(teacher, student) <= entropy_of_beta + 1e-9).all()


def test_divergences_by_name() -> None:
    assert {loss.name.partition("(")[0] for loss in ALL} == DIVERGENCES.keys()
    teacher, student = logits(5, 9), logits(5, 9, seed=1)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    assert torch.equal(divergence("jsd", beta=0.3, alpha=0.7)(log_p, log_q), jsd(0.3)(teacher, student))
    assert torch.equal(divergence("jsd")(log_p, log_q), jsd(0.5)(teacher, student))
    assert torch.equal(divergence("skew_kl")(log_p, log_q), skew_kl(0.1)(teacher, student))
    assert torch.equal(divergence("skew_reverse_kl", alpha=0.2)(log_p, log_q), skew_reverse_kl(0.2)(teacher, student))
    with pytest.raises(SkdError, match="between 0 and 1"):
        jsd(1.5)(teacher, student)
    with pytest.raises(SkdError, match=r"unknown divergence 'forward-kl'(.|\n)*did you mean `forward_kl`"):
        divergence("forward-kl")
