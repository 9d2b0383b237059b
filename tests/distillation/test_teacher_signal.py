"""A part of what the teacher says: a coarser distribution, so a smaller divergence, and the same one in the end."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skd_lib.config.distill import SelectiveConfig
from skd_lib.distillation.loss import selective_weights
from skd_lib.distillation.teacher_signal import SparseSignal
from skd_lib.errors import SkdError
from tests.distillation.cases import Case, adaptive_kl, forward_kl, jsd, reverse_kl, skew_kl, skew_reverse_kl, tvd

F_DIVERGENCES = [forward_kl, reverse_kl, jsd(0.3), skew_kl(0.1), skew_reverse_kl(0.1), tvd]
ALL = [*F_DIVERGENCES, adaptive_kl]
VOCABULARY = 12


def logits(rows: int, columns: int = VOCABULARY, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sparse(loss: Case, teacher: Tensor, student: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    signal = SparseSignal.of_logits(teacher, k, temperature=temperature, vocabulary=VOCABULARY)
    compared = signal.compare(student, temperature)
    return loss.f(compared.log_p_NE, compared.log_q_NE)


@pytest.mark.parametrize("loss", ALL, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_with_all_tokens_it_is_the_dense_divergence(loss: Case, temperature: float) -> None:
    teacher, student = logits(6), logits(6, seed=1).requires_grad_()
    expected, actual = loss(teacher, student, temperature), sparse(loss, teacher, student, VOCABULARY, temperature)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (expected, actual)]
    torch.testing.assert_close(gradients[1], gradients[0])
    assert torch.equal(sparse(loss, teacher, student, 10 * VOCABULARY, temperature), actual)


@pytest.mark.parametrize("loss", ALL, ids=str)
@pytest.mark.parametrize("k", [3, 9, VOCABULARY])
def test_logits_of_minus_infinity(loss: Case, k: int) -> None:
    # Both lack 8 of 12 tokens: of the 9 most likely 5 are impossible, and so are all others together.
    gone = torch.arange(4, VOCABULARY)
    teacher = logits(6).index_fill(1, gone, -torch.inf)
    student = logits(6, seed=1).index_fill(1, gone, -torch.inf).requires_grad_()
    actual = sparse(loss, teacher, student, k)
    (gradient,) = torch.autograd.grad(actual.sum(), student)
    near = student.detach().index_fill(1, gone, -500.0).requires_grad_()
    limit = sparse(loss, teacher.index_fill(1, gone, -500.0), near, k)
    torch.testing.assert_close(actual, limit)
    torch.testing.assert_close(gradient, torch.autograd.grad(limit.sum(), near)[0])
    if k == VOCABULARY:
        torch.testing.assert_close(actual, loss(teacher, student))


def test_a_bucket_that_only_the_teacher_lacks_makes_the_reverse_kl_infinite_and_others_finite() -> None:
    teacher, student = logits(6).index_fill(1, torch.arange(4, VOCABULARY), -torch.inf), logits(6, seed=1)
    assert sparse(reverse_kl, teacher, student, 4).isposinf().all()
    for loss in (forward_kl, jsd(0.3), skew_kl(0.1), skew_reverse_kl(0.1), tvd):
        student.requires_grad_()
        torch.testing.assert_close(sparse(loss, teacher, student, 4), loss(teacher, student))
        assert torch.autograd.grad(sparse(loss, teacher, student, 4).sum(), student)[0].isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 3))
def test_the_more_tokens_the_closer_from_below(seed: int, temperature: float) -> None:
    """Data processing inequality: what is told apart less cannot differ more."""
    teacher, student = logits(4, seed=seed), logits(4, seed=seed + 1)
    for loss in F_DIVERGENCES:
        values = [sparse(loss, teacher, student, k, temperature) for k in range(1, VOCABULARY + 1)]
        for fewer, more in pairwise(values):
            assert (fewer <= more + 1e-12).all(), loss.name
        assert (values[0] >= -1e-12).all()


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_it_is_0_where_the_models_agree_and_has_the_right_gradient(loss: Case) -> None:
    teacher, student = logits(3), logits(3, seed=1).requires_grad_()
    zeros = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(sparse(loss, teacher, teacher + 4, 3), zeros)
    if loss is not adaptive_kl:
        assert torch.autograd.gradcheck(lambda inputs: sparse(loss, teacher, inputs, 3), (student,))


def test_the_bucket_keeps_its_mass_where_fp32_cannot_see_it() -> None:
    """1 - sum of the stored probabilities would be 0 or negative here."""
    teacher = torch.tensor([[60.0, 0.0, -1.0, -2.0]])
    signal = SparseSignal.of_logits(teacher, 1, temperature=1.0, vocabulary=4)
    expected = torch.tensor([[0.0, -1.0, -2.0]]).logsumexp(-1) - 60.0
    torch.testing.assert_close(signal.log_p_NE[:, 1], expected)
    student = torch.tensor([[0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    compared = signal.compare(student, 1.0)
    torch.testing.assert_close(compared.log_q_NE.exp(), torch.tensor([[0.25, 0.75]]))
    (gradient,) = torch.autograd.grad(reverse_kl.f(compared.log_p_NE, compared.log_q_NE).sum(), student)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("teachers", "students"), [(15, VOCABULARY), (VOCABULARY, 15)])
def test_ids_that_one_model_lacks_do_not_count(teachers: int, students: int) -> None:
    teacher, student = logits(4, teachers), logits(4, students, seed=1)
    actual = sparse(forward_kl, teacher, student, VOCABULARY)
    torch.testing.assert_close(actual, forward_kl(teacher, student))
    assert sparse(forward_kl, teacher, student, 4).shape == (4,)


def test_what_was_stored_for_something_else_is_refused() -> None:
    signal = SparseSignal.of_logits(logits(2), 3, temperature=1.0, vocabulary=VOCABULARY)
    with pytest.raises(SkdError, match="of temperature 1, the loss wants 2"):
        signal.compare(logits(2, seed=1), 2.0)
    with pytest.raises(SkdError, match=f"of {VOCABULARY} tokens, the student's head has 10"):
        signal.compare(logits(2, 10), 1.0)


def test_selective_weights_are_those_of_the_dense_signal() -> None:
    teacher, student = logits(40), logits(40, 15, seed=1)
    weights = [
        selective_weights(
            SelectiveConfig(top=3),
            SparseSignal.of_logits(teacher, k, temperature=1.0, vocabulary=VOCABULARY).compare(student, 1.0),
            student,
        )
        for k in (3, VOCABULARY)
    ]
    assert torch.equal(*weights)
    assert 0 < (weights[0] == 1).sum() < 40


def test_parts_and_their_whole() -> None:
    signal = SparseSignal.of_logits(logits(7), 3, temperature=1.0, vocabulary=VOCABULARY)
    for sizes in (3, [1, 0, 6]):
        parts = signal.split(sizes)
        assert sum(map(len, parts)) == len(signal) == 7
        whole = SparseSignal.concatenate(parts)
        assert torch.equal(whole.log_p_NE, signal.log_p_NE)
        assert torch.equal(whole.ids_NK, signal.ids_NK)
