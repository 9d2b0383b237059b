from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from skd_lib.errors import SkdError
from skd_lib.sampling.engine import Sampler, Samples
from skd_lib.specdec.benchmark import SpecdecResult, benchmark
from skd_lib.specdec.verification import rounding, verify_greedy
from tests.conftest import TinyModel

VOCABULARY = 320
EOS = tuple(range(2, 26))
"""So many that random models end some responses, at different lengths."""
NO_EOS = (VOCABULARY + 1,)
"""An id that no model writes: every response runs to the length limit."""


def prompts(count: int = 5, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (3 + 4 * row,), generator=generator).tolist() for row in range(count)]


def run(teacher: PreTrainedModel, draft: PreTrainedModel, **changes: Any) -> SpecdecResult:
    settings: dict[str, Any] = {
        "eos_ids": EOS,
        "pad_id": 0,
        "max_new_tokens": 16,
        "gamma": 3,
        "batch_size": 2,
        "temperature": 0.0,
        "repeats": 1,
        "seed": 7,
    }
    return benchmark(teacher, draft, prompts(), **(settings | changes))


def greedy(model: PreTrainedModel, prompt: list[int], length: int, eos_ids: Sequence[int] = EOS) -> list[int]:
    """The slowest decoder there is: a whole forward for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in eos_ids:
                break
    return ids[len(prompt) :]


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sampler, Samples]]:
    """Every call of the sampler from here on: who sampled, and what."""
    seen: list[tuple[Sampler, Samples]] = []
    sample = Sampler.sample

    def watched(self: Sampler, *args: Any) -> Samples:
        seen.append((self, sample(self, *args)))
        return seen[-1][1]

    monkeypatch.setattr(Sampler, "sample", watched)
    return seen


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("gamma", [1, 3])
def test_a_teacher_drafting_for_itself_is_always_right(tiny_model: TinyModel, gamma: int, temperature: float) -> None:
    teacher = tiny_model()
    result = run(teacher, teacher, gamma=gamma, temperature=temperature, eos_ids=NO_EOS)
    assert result.acceptance_rate == 1
    assert result.tokens_per_teacher_call == gamma + 1  # 16 is a multiple of both block lengths


def test_blocks_cut_short_by_the_end_count_as_teacher_calls(tiny_model: TinyModel) -> None:
    teacher = tiny_model()
    result = run(teacher, teacher, gamma=3, max_new_tokens=10, eos_ids=NO_EOS)  # blocks of 4, 4 and 2
    assert result.tokens_per_teacher_call == pytest.approx(10 / 3)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "gemma3"])
def test_any_draft_leaves_the_greedy_output_alone(tiny_model: TinyModel, arch: str) -> None:
    # The benchmark itself compares every token: a result is the proof, mismatch is an error.
    result = run(tiny_model(arch), tiny_model(arch, seed=1, layers=1))
    assert result.mismatches == 0
    assert result.ties == 0
    assert 0 <= result.acceptance_rate < 1
    assert 1 <= result.tokens_per_teacher_call < 4


def test_the_reference_is_greedy_decoding(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    teacher = tiny_model()
    run(teacher, tiny_model(seed=1), max_new_tokens=12)
    wanted = [greedy(teacher, prompt, 12) for prompt in prompts()]
    for _, samples in seen[2:]:  # the first two are the warm-up
        lengths = samples.mask_BT.sum(-1).tolist()
        assert [row[:length] for row, length in zip(samples.tokens_BT.tolist(), lengths, strict=True)] == wanted


@pytest.mark.parametrize("row", [0, 4])
def test_a_wrong_token_is_caught_and_named(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    sample = Sampler.sample

    def corrupted(self: Sampler, *args: Any) -> Samples:
        samples = sample(self, *args)
        if self.rule.name == "lossless" and len(samples.tokens_BT) == len(prompts()):
            tokens_BT = samples.tokens_BT.clone()
            tokens_BT[row, 3] = (tokens_BT[row, 3] + 1) % VOCABULARY
            return dataclasses.replace(samples, tokens_BT=tokens_BT)
        return samples

    monkeypatch.setattr(Sampler, "sample", corrupted)
    with pytest.raises(SkdError, match=rf"prompt {row}, response position 3: token \d+ is not the teacher's choice"):
        run(tiny_model(), tiny_model(seed=1), eos_ids=NO_EOS)


def verify(teacher: PreTrainedModel, outputs: list[list[int]], references: list[list[int]], **changes: Any) -> int:
    settings: dict[str, Any] = {"eos_ids": EOS, "max_new_tokens": 8, "vocabulary": VOCABULARY}
    return verify_greedy(teacher, prompts(len(outputs)), outputs, references, **(settings | changes))


def test_a_response_that_ends_early_or_late_is_caught(tiny_model: TinyModel) -> None:
    teacher = tiny_model()
    reference = greedy(teacher, prompts(1)[0], 8)
    with pytest.raises(
        SkdError, match=r"prompt 0, response position 5: .* ended after 5 tokens, the teacher .* after 8"
    ):
        verify(teacher, [reference[:5]], [reference])
    with pytest.raises(SkdError, match="ended after 8 tokens, the teacher alone after 5"):
        verify(teacher, [reference], [reference[:5]])


class TwinTokens:
    """A teacher with two output rows alike: whenever one of the two is the best token, the other one ties with it."""

    def __init__(self, model: PreTrainedModel, prompt: list[int]) -> None:
        self.model, self.prompt = model, prompt
        reference = greedy(model, prompt, 8)
        self.first = reference[4]
        self.twin = next(token for token in range(self.first + 1, VOCABULARY) if token not in reference + prompt)
        head = model.get_output_embeddings().weight
        with torch.no_grad():
            head[self.twin] = head[self.first]
        self.start = reference[: reference.index(self.first)]

    def response(self, token: int, length: int = 8) -> list[int]:
        """Greedy with `token` forced at the tie; what follows is the model's own."""
        start = [*self.start, token]
        return [*start, *greedy(self.model, self.prompt + start, length - len(start))]


@pytest.fixture
def twins(tiny_model: TinyModel) -> TwinTokens:
    return TwinTokens(tiny_model(tie_word_embeddings=False), prompts(1)[0])


def test_a_tie_is_counted_not_refused(twins: TwinTokens) -> None:
    first, twin = twins.response(twins.first), twins.response(twins.twin)
    assert verify(twins.model, [twin], [first]) == 1
    assert verify(twins.model, [first], [first]) == 0


def test_what_follows_a_tie_must_still_be_the_teachers(twins: TwinTokens) -> None:
    first, twin = twins.response(twins.first), twins.response(twins.twin)
    twin[6] = (twin[6] + 1) % VOCABULARY
    with pytest.raises(SkdError, match="prompt 0, response position 6"):
        verify(twins.model, [twin], [first])
    with pytest.raises(SkdError, match="ended after 7 tokens instead of 8"):
        verify(twins.model, [twins.response(twins.twin)[:7]], [first])


def test_rounding_is_finer_than_a_real_difference(twins: TwinTokens) -> None:
    first, twin = twins.response(twins.first), twins.response(twins.twin)
    with torch.no_grad():
        twins.model.get_output_embeddings().weight[twins.twin] *= 0.99
    with pytest.raises(SkdError, match=f"response position {len(twins.start)}"):
        verify(twins.model, [twin], [first])


def test_rounding_grows_with_the_type() -> None:
    assert rounding(torch.float32) < rounding(torch.float16) < rounding(torch.bfloat16) < 0.05


def test_padded_heads_of_different_size(tiny_model: TinyModel) -> None:
    result = run(tiny_model(vocab_size=384), tiny_model(seed=1, vocab_size=VOCABULARY))
    assert result.mismatches == 0


def test_figures_fit_together(tiny_model: TinyModel) -> None:
    result = run(tiny_model(), tiny_model(seed=1), repeats=3, temperature=1.0)
    figures = result.to_dict()
    assert all(isinstance(value, (int, float)) for value in figures.values())
    ratio = result.speculative_tokens_per_second / result.teacher_only_tokens_per_second
    assert result.speedup == pytest.approx(ratio)
    assert result.tokens <= 3 * 5 * 16
    assert result.seconds > result.tokens / result.speculative_tokens_per_second * 0.5


def test_passes_take_turns_after_a_warm_up(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    run(tiny_model(), tiny_model(seed=1), repeats=2, max_new_tokens=4)
    turns = [("nothing", 5), ("lossless", 5)]
    assert [(sampler.rule.name, len(samples.tokens_BT)) for sampler, samples in seen] == [
        ("nothing", 2),
        ("lossless", 2),
        *turns,
        *turns,
    ]


def test_no_prompts(tiny_model: TinyModel) -> None:
    with pytest.raises(SkdError, match="no prompts"):
        benchmark(tiny_model(), tiny_model(), [], eos_ids=EOS, pad_id=0, max_new_tokens=4)
