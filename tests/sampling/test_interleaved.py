"""The sampler in the shape of transformers' `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, set_seed

from skd_lib.errors import SkdError
from skd_lib.sampling.acceptance import lossless, student_only, top_k
from skd_lib.sampling.interleaved import InterleavedSampler
from tests.conftest import TinyModel

PROMPTS = ["The quick", "Le fichier a été enregistré.", "Add 12 and"]


def test_lossless_and_greedy_is_the_teachers_own_generate(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    inputs = tiny_tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    theirs = teacher.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=12, do_sample=False
    )
    out = InterleavedSampler(student, teacher, lossless(), gamma=3).generate(
        inputs.input_ids, inputs.attention_mask, GenerationConfig(max_new_tokens=12)
    )
    width = theirs.shape[1]
    assert torch.equal(out.sequences[:, :width].where(out.sequences[:, :width] != 2, 0), theirs.where(theirs != 2, 0))
    assert out.statistics.tokens == int(out.response_mask.sum())


def test_greedy_student_alone_is_its_own_generate_whatever_the_side_of_padding(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    student = tiny_model(seed=1)
    sampler = InterleavedSampler(student, tiny_model(seed=2), student_only())
    responses = []
    for side in ("left", "right"):
        inputs = tiny_tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side)
        out = sampler.generate(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=8)
        responses.append(out.sequences[:, inputs["input_ids"].shape[1] :])
        assert not out.by_teacher.any()
    assert torch.equal(*responses)


def test_a_seed_repeats_and_torchs_seed_does_too(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    sampler = InterleavedSampler(tiny_model(seed=1), tiny_model(seed=2), top_k(5))
    inputs = tiny_tokenizer(PROMPTS, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 10, "do_sample": True}

    def sampled(**more: int) -> torch.Tensor:
        return sampler.generate(inputs["input_ids"], inputs["attention_mask"], **options, **more).sequences

    assert torch.equal(sampled(seed=7), sampled(seed=7))
    assert not torch.equal(sampled(seed=7), sampled(seed=8))
    set_seed(3)
    first = sampled()
    set_seed(3)
    assert torch.equal(first, sampled())
    assert not torch.equal(first, sampled())


def test_who_wrote_a_token_and_what_it_replaced(tiny_model: TinyModel) -> None:
    sampler = InterleavedSampler(tiny_model(seed=1), tiny_model(seed=2), top_k(1))
    out = sampler.generate(torch.tensor([[1, 50, 60]]), max_new_tokens=20, do_sample=True, seed=1)
    assert out.by_teacher.any()
    assert torch.equal(out.proposals >= 0, out.by_teacher)
    assert not ((out.proposals == out.sequences[:, 3:]) & out.by_teacher).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 4, "num_beams": 4}, "num_beams"),
        ({"max_new_tokens": 4, "top_k": 50}, "top_k"),
        ({"max_new_tokens": 4, "repetition_penalty": 1.2}, "repetition_penalty"),
        ({}, "no length limit"),
    ],
)
def test_settings_that_it_does_not_have_are_refused(tiny_model: TinyModel, options: dict, message: str) -> None:
    sampler = InterleavedSampler(tiny_model(seed=1), tiny_model(seed=2))
    with pytest.raises(SkdError, match=message):
        sampler.generate(torch.tensor([[1, 50]]), **options)


def test_settings_that_are_switched_off_are_not(tiny_model: TinyModel) -> None:
    sampler = InterleavedSampler(tiny_model(seed=1), tiny_model(seed=2))
    config = GenerationConfig(max_length=6, num_beams=1, top_k=0, repetition_penalty=1.0, use_cache=True)
    assert sampler.generate(torch.tensor([[1, 50]]), generation_config=config).sequences.shape[1] <= 6


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_stream_is_what_generate_returns(tiny_model: TinyModel, *, do_sample: bool) -> None:
    sampler = InterleavedSampler(tiny_model(seed=1), tiny_model(seed=2), top_k(3), gamma=4)
    prompt, options = torch.tensor([[1, 50, 60]]), {"max_new_tokens": 20, "do_sample": do_sample, "seed": 1}
    out = sampler.generate(prompt, **options)
    rounds = list(sampler.stream(prompt, **options))
    assert len(rounds) == out.statistics.teacher_calls
    tokens, by_teacher, proposals = zip(*(token for tokens in rounds for token in tokens), strict=True)
    assert list(tokens) == out.sequences[0, 3:].tolist()
    assert list(by_teacher) == out.by_teacher[0].tolist()
    assert list(proposals) == out.proposals[0].tolist()


def test_a_stream_that_is_left_gives_the_models_back(tiny_model: TinyModel) -> None:
    student = tiny_model(seed=1).train()
    stream = InterleavedSampler(student, tiny_model(seed=2)).stream(torch.tensor([[1, 50]]), max_new_tokens=20)
    next(stream)
    stream.close()
    assert student.training
    assert torch.is_grad_enabled()


def test_what_transformers_hands_over_is_taken(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    teacher.save_pretrained(tmp_path)
    sampler = InterleavedSampler(student, teacher, "lossless")
    inputs = tiny_tokenizer(["The quick"], return_tensors="pt", return_token_type_ids=True)
    config = GenerationConfig.from_pretrained(tmp_path)
    out = sampler.generate(**inputs, generation_config=config, max_new_tokens=4)
    tokens = [token.token for tokens in sampler.stream(**inputs, max_new_tokens=4) for token in tokens]
    assert out.sequences[0, inputs["input_ids"].shape[1] :].tolist() == tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_token": 4}, "did you mean max_new_tokens"),
        ({"max_length": 2}, "the longest prompt has 2 tokens"),
        ({"max_new_tokens": 4, "do_sample": True, "temperature": -1}, "field `temperature`"),
        ({"max_new_tokens": 4, "streamer": object()}, "InterleavedSampler.stream"),
    ],
)
def test_mistakes_are_named(tiny_model: TinyModel, options: dict, message: str) -> None:
    with pytest.raises(SkdError, match=message):
        InterleavedSampler(tiny_model(seed=1), tiny_model(seed=2)).generate(torch.tensor([[1, 50]]), **options)
    with pytest.raises(SkdError, match="no such rule"):
        InterleavedSampler(tiny_model(seed=1), tiny_model(seed=2), "topk")
