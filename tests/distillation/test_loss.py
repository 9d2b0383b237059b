"""Losses on the head's side: chunks, weights and options against what full logits give."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib.config.distill import SelectiveConfig
from skd_lib.distillation.loss import DistillationLoss, LossSums, cross_entropy_sum
from skd_lib.distillation.teacher_signal import DenseSignal
from skd_lib.errors import SkdError
from skd_lib.models.heads import decoder, lm_logits
from tests.distillation.cases import Case, adaptive_kl, forward_kl, jsd, reverse_kl, skew_kl, tvd

TOKENS = torch.randint(4, 300, (1, 11), generator=torch.Generator().manual_seed(3))
TARGETS = torch.arange(11) + 20
BY_TEACHER = torch.tensor([True, False, False, True, False, True, False, False, False, False, True])


@pytest.fixture(params=["llama", "gemma2"])
def student(request: pytest.FixtureRequest, tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    # Gemma 2 caps its logits: the head must do so here too.
    return tiny_model(request.param, seed=1)


@pytest.fixture
def teacher(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model("llama", seed=2, hidden=48, layers=3, vocab_size=384)


def states(model: PreTrainedModel) -> Tensor:
    return decoder(model)(input_ids=TOKENS).last_hidden_state[0]


def logits(model: PreTrainedModel) -> Tensor:
    all_logits: Tensor = model(TOKENS).logits[0]
    return all_logits


def distilled(
    loss: DistillationLoss, student: PreTrainedModel, teacher: PreTrainedModel, chunk: int | None = None
) -> LossSums:
    return loss(student, states(student), DenseSignal(states(teacher), teacher), TARGETS, BY_TEACHER, chunk)


def gradients(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl, jsd(0.3), skew_kl(0.1), tvd, adaptive_kl], ids=str)
def test_equals_the_divergence_of_full_logits(student: PreTrainedModel, teacher: PreTrainedModel, loss: Case) -> None:
    expected = loss(logits(teacher), logits(student), 2.0).sum()
    actual = distilled(DistillationLoss(loss.f, temperature=2.0), student, teacher).loss
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        distilled(DistillationLoss(loss.f, temperature=2.0, squared=True), student, teacher).loss,
        4 * expected,
    )


def test_cross_entropy_is_added_at_the_tokens_that_the_teacher_wrote(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    plain, with_replaced = (
        distilled(DistillationLoss(reverse_kl.f, temperature=2.0, replaced_weight=weight), student, teacher).loss
        for weight in (0.0, 0.3)
    )
    # At temperature 1, whatever the divergence's.
    expected = torch.nn.functional.cross_entropy(logits(student)[BY_TEACHER], TARGETS[BY_TEACHER], reduction="sum")
    torch.testing.assert_close(with_replaced - plain, 0.3 * expected)
    loss, nothing = DistillationLoss(reverse_kl.f, replaced_weight=0.3), torch.zeros_like(BY_TEACHER)
    signal = DenseSignal(states(teacher), teacher)
    without = loss(student, states(student), signal, TARGETS, nothing).loss
    torch.testing.assert_close(without, reverse_kl(logits(teacher), logits(student)).sum())


@pytest.mark.parametrize("top", [40, 120])
def test_selective_weights(student: PreTrainedModel, teacher: PreTrainedModel, top: int) -> None:
    each = forward_kl(logits(teacher), logits(student))
    choices = logits(student).argmax(-1)
    common = logits(teacher)[:, :320]
    ranks = (common > common.gather(1, choices[:, None])).sum(-1)
    weights = torch.where(ranks < top, 1.0, 0.01)
    assert len(set(weights.tolist())) == 2
    loss = DistillationLoss(forward_kl.f, selective=SelectiveConfig(top=top))
    torch.testing.assert_close(distilled(loss, student, teacher).loss, (each * weights).sum())


@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_chunks_change_neither_value_nor_gradient(
    student: PreTrainedModel, teacher: PreTrainedModel, chunk: int
) -> None:
    targets = torch.arange(11) + 20
    loss = DistillationLoss(jsd(0.3).f, temperature=2.0, squared=True, selective=SelectiveConfig(), replaced_weight=0.7)
    rows: list[int] = []
    student.get_output_embeddings().register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    for whole, parts in (
        (
            distilled(loss, student, teacher),
            distilled(loss, student, teacher, chunk=chunk),
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
    # A chunk at a time, and each once: the backward pass has its gradient already.
    assert max(size for size in rows if size != 11) <= chunk
    assert sum(size for size in rows if size != 11) == 2 * 11


def test_no_response_tokens_give_0_with_a_graph(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    loss = DistillationLoss(adaptive_kl.f, selective=SelectiveConfig(), replaced_weight=0.5)
    signal = DenseSignal(states(teacher)[:0], teacher)
    for sums in (
        loss(student, states(student)[:0], signal, TARGETS[:0], BY_TEACHER[:0]),
        cross_entropy_sum(student, states(student)[:0], torch.empty(0, dtype=torch.long)),
    ):
        assert sums.loss.item() == 0
        for gradient in gradients(student, sums.loss):  # every parameter takes part, as data parallelism needs
            assert not gradient.any()


def test_the_teacher_gets_no_gradient(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    distilled(DistillationLoss(forward_kl.f), student, teacher).loss.backward()
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


def test_chunks_change_nothing_under_autocast(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Autocast keeps the head's bf16 copy, and its graph, from one chunk to the next."""
    loss = DistillationLoss(jsd(0.3).f)
    with torch.autocast("cpu", torch.bfloat16):
        whole, parts = (gradients(student, distilled(loss, student, teacher, chunk).loss) for chunk in (11, 1))
    for part, expected in zip(parts, whole, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, expected, rtol=0.05, atol=0.01 * expected.abs().max().item())


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl, jsd(0.3), skew_kl(0.1), tvd, adaptive_kl], ids=str)
def test_heads_that_rule_tokens_out(tiny_model: Callable[..., PreTrainedModel], loss: Case) -> None:
    student, teacher = (tiny_model("llama", seed=seed, tie_word_embeddings=False) for seed in (1, 2))
    for model in (student, teacher):
        head = torch.nn.Linear(32, 320)
        head.weight = model.get_output_embeddings().weight
        head.bias = torch.nn.Parameter(torch.zeros(320).index_fill(0, torch.arange(300, 320), -torch.inf))
        model.set_output_embeddings(head)
    sums = distilled(DistillationLoss(loss.f), student, teacher)
    torch.testing.assert_close(sums.loss, loss(logits(teacher)[:, :300], logits(student)[:, :300]).sum())
    expected = torch.distributions.Categorical(logits=logits(teacher)[:, :300]).entropy().sum()
    torch.testing.assert_close(sums.entropies["teacher"], expected.detach())
    assert all(gradient.isfinite().all() for gradient in gradients(student, sums.loss))


@pytest.mark.parametrize(("reduce", "shape"), [(lambda x: x.sum(-1).mean(), "()"), (lambda x: x, "(4, 320)")])
def test_a_divergence_of_another_shape_is_refused(
    student: PreTrainedModel, teacher: PreTrainedModel, reduce: Callable[[Tensor], Tensor], shape: str
) -> None:
    def toy(log_p_NE: Tensor, log_q_NE: Tensor) -> Tensor:
        return reduce(log_p_NE - log_q_NE)

    with pytest.raises(SkdError, match=re.escape(f"of shape (4,); this one returns shape {shape}")) as error:
        distilled(DistillationLoss(partial(toy)), student, teacher, chunk=4)
    assert error.value.where == "divergence toy"
