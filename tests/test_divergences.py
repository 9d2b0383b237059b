"""The losses against brute force in float64, and their chunked evaluation on the head's side."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib.divergences import (
    Divergence,
    cross_entropy_sum,
    distillation_loss,
    divergence,
    forward_kl,
    jsd,
    reverse_kl,
)
from skd_lib.errors import SkdError
from skd_lib.models.heads import decoder, lm_logits

ALL = [forward_kl, reverse_kl, jsd(0.0), jsd(0.1), jsd(0.5), jsd(0.9), jsd(1.0)]
IDS = [d.name for d in ALL]


def softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True))


def brute_force(name: str, teacher: list[float], student: list[float], temperature: float) -> float:
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(name)
    beta = float(name[4:-1]) if beta is None else beta
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("loss", ALL, ids=IDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_equals_brute_force(loss: Divergence, temperature: float) -> None:
    teacher, student = logits(4, 7), logits(4, 7, seed=1)
    expected = [
        brute_force(loss.name, t, s, temperature) for t, s in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    actual = loss(teacher, student, temperature)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("loss", ALL, ids=IDS)
def test_is_0_with_0_gradient_where_the_models_agree(loss: Divergence) -> None:
    teacher = logits(3, 8)
    student = (teacher + 5).requires_grad_()  # a shift of all logits changes no probability
    value = loss(teacher, student)
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(3, dtype=torch.float64))
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("loss", ALL, ids=IDS)
def test_gradient(loss: Divergence) -> None:
    teacher, student = logits(3, 6), logits(3, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(teacher, s, 0.7), (student,))


@pytest.mark.parametrize("loss", ALL, ids=IDS)
def test_padded_vocabularies_are_compared_on_their_common_rows(loss: Divergence) -> None:
    teacher, student = logits(4, 10), logits(4, 7, seed=1)
    expected = loss(teacher[:, :7], student)
    torch.testing.assert_close(loss(teacher, student), expected)
    torch.testing.assert_close(loss(teacher[:, :7], torch.cat([student, logits(4, 5)], dim=1)), expected)


@pytest.mark.parametrize("loss", ALL, ids=IDS)
def test_works_in_fp32_whatever_the_models_dtype(loss: Divergence) -> None:
    teacher, student = logits(4, 50).bfloat16(), logits(4, 50, seed=1).bfloat16()
    actual = loss(teacher, student)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), loss(teacher.double(), student.double()), rtol=1e-4, atol=1e-5)


finite = npst.arrays("float64", (2, 3, 12), elements=st.floats(-40, 40))


@settings(max_examples=50, deadline=None)
@given(finite, st.floats(0, 1), st.floats(0.2, 5))
def test_properties(values: object, beta: float, temperature: float) -> None:
    teacher, student = torch.tensor(values)
    for loss in (forward_kl, reverse_kl, jsd(beta)):
        value = loss(teacher, student, temperature)
        assert torch.isfinite(value).all()
        assert (value > -1e-12).all()
        torch.testing.assert_close(value, loss(teacher - 7, student + 3, temperature), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(value, loss(teacher.flip(-1), student.flip(-1), temperature), rtol=1e-9, atol=1e-9)
    if 0 < beta < 1:
        entropy_of_beta = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
        assert (jsd(beta)(teacher, student) <= entropy_of_beta + 1e-9).all()


def test_registry() -> None:
    assert divergence("forward_kl") is forward_kl
    assert divergence("reverse_kl", beta=0.1) is reverse_kl
    assert divergence("jsd", 0.3).name == "jsd(0.3)"
    with pytest.raises(SkdError, match=r"unknown divergence 'kl'(.|\n)*forward_kl, jsd, reverse_kl"):
        divergence("kl")
    with pytest.raises(SkdError, match="between 0 and 1"):
        jsd(1.5)


# --- on the head's side -------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "gemma2"])
def student(request: pytest.FixtureRequest, tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    # Gemma 2 caps its logits: the head must do so here too.
    return tiny_model(request.param, seed=1)


@pytest.fixture
def teacher(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model("llama", seed=2, hidden=48, layers=3, vocab_size=384)


def states(model: PreTrainedModel, count: int = 11) -> Tensor:
    tokens = torch.randint(4, 300, (1, count), generator=torch.Generator().manual_seed(3))
    return decoder(model)(input_ids=tokens).last_hidden_state[0]


def gradients(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl, jsd(0.3)], ids=str)
def test_equals_the_divergence_of_full_logits(
    student: PreTrainedModel, teacher: PreTrainedModel, loss: Divergence
) -> None:
    tokens = torch.randint(4, 300, (1, 11), generator=torch.Generator().manual_seed(3))
    expected = loss(teacher(tokens).logits[0], student(tokens).logits[0], 2.0).sum()
    actual = distillation_loss(student, states(student), teacher, states(teacher), loss, 2.0).loss
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_chunks_change_neither_value_nor_gradient(
    student: PreTrainedModel, teacher: PreTrainedModel, chunk: int
) -> None:
    targets = torch.arange(11) + 20
    rows: list[int] = []
    student.get_output_embeddings().register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    for whole, parts in (
        (
            distillation_loss(student, states(student), teacher, states(teacher), jsd(0.3)),
            distillation_loss(student, states(student), teacher, states(teacher), jsd(0.3), chunk=chunk),
        ),
        (
            cross_entropy_sum(student, states(student), targets),
            cross_entropy_sum(student, states(student), targets, chunk=chunk),
        ),
    ):
        torch.testing.assert_close(parts.loss, whole.loss)
        torch.testing.assert_close(parts.entropies, whole.entropies)
        for part, expected in zip(gradients(student, parts.loss), gradients(student, whole.loss), strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)
    # Forward, and once more in the backward pass, a chunk at a time.
    assert max(size for size in rows if size != 11) <= chunk
    assert sum(size for size in rows if size != 11) == 2 * 2 * 11


def test_no_response_tokens_give_0_with_a_graph(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    for sums in (
        distillation_loss(student, states(student)[:0], teacher, states(teacher)[:0], forward_kl),
        cross_entropy_sum(student, states(student)[:0], torch.empty(0, dtype=torch.long)),
    ):
        assert sums.loss.item() == 0
        for gradient in gradients(student, sums.loss):  # every parameter takes part, as data parallelism needs
            assert not gradient.any()


def test_the_teacher_gets_no_gradient(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    distillation_loss(student, states(student), teacher, states(teacher), forward_kl).loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_cross_entropy_and_entropies(student: PreTrainedModel) -> None:
    hidden, targets = states(student), torch.arange(11) + 20
    sums = cross_entropy_sum(student, hidden, targets)
    all_logits = lm_logits(student, hidden)
    torch.testing.assert_close(sums.loss, torch.nn.functional.cross_entropy(all_logits, targets, reduction="sum"))
    expected = torch.distributions.Categorical(logits=all_logits).entropy().sum()
    torch.testing.assert_close(sums.entropies, {"student": expected.detach()})
    assert not sums.entropies["student"].requires_grad
