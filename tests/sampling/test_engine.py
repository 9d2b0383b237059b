"""The engine against the token-by-token reference, and the invariances that the method promises."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skd_lib.config import SamplingParams
from skd_lib.errors import SkdError
from skd_lib.models.heads import decoder
from skd_lib.sampling.acceptance import AcceptanceRule, lossless, min_prob, mixture, student_only, teacher_only, top_k
from skd_lib.sampling.distributions import row_uniforms
from skd_lib.sampling.drafting import AdaptiveGamma
from skd_lib.sampling.engine import STUDENT, TEACHER, Sampler, Samples
from skd_lib.sampling.reference import interleave, pick, probabilities
from tests.conftest import SLIDING_WINDOW, TinyModel

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "smollm3"]
GREEDY = SamplingParams(temperature=0)
STUDENT_SAMPLES = SamplingParams(temperature=0.7, top_p=0.8)
TEACHER_SAMPLES = SamplingParams(temperature=1.3)
VOCABULARY = 48
EOS = (2, 7)
PROMPTS = [[1, 5, 9, 11, 30, 31, 8], [1], [1, 40, 41], [1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 25]]


def pair(tiny_model: TinyModel, arch: str = "llama") -> dict[str, object]:
    return {
        "student": tiny_model(arch, seed=1, vocab_size=VOCABULARY),
        "teacher": tiny_model(arch, seed=2, layers=3, hidden=48, vocab_size=VOCABULARY),
    }


def sampler(models: dict[str, object], rule: AcceptanceRule, **options: object) -> Sampler:
    defaults = {
        "eos_ids": EOS,
        "pad_id": 0,
        "max_new_tokens": 12,
        "student_params": STUDENT_SAMPLES,
        "teacher_params": TEACHER_SAMPLES,
    }
    return Sampler(**models, rule=rule, **(defaults | options))  # type: ignore[arg-type]


def rows(samples: Samples) -> list[list[int]]:
    return [t[m].tolist() for t, m in zip(samples.tokens_BT, samples.mask_BT, strict=True)]


def reference_rows(
    models: dict[str, object], rule: str, parameter: float, s: Sampler, prompts: list, seeds: list
) -> tuple:
    pairs = [
        interleave(
            **models,  # type: ignore[arg-type]
            rule=rule,
            parameter=parameter,
            prompt=prompt,
            seed=seed,
            max_new_tokens=s.max_new_tokens,
            eos_ids=s.eos_ids,
            student_params=s.student_params,
            teacher_params=s.teacher_params,
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return [tokens for tokens, _ in pairs], [sources for _, sources in pairs]


def sources(samples: Samples) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(samples.source_BT, samples.mask_BT, strict=True)]


RULES = {
    "top_k": (top_k(4), 4),
    "min_prob": (min_prob(0.05), 0.05),
    "mixture": (mixture(0.4), 0.4),
    "lossless": (lossless(), 0),
    "student_only": (student_only(), 0),
    "teacher_only": (teacher_only(), 0),
}


# All rules where a cache grows and where its windows slide; what the others' caches do is the same for every rule.
PAIRS = [(arch, name) for arch in ARCHITECTURES for name in RULES if arch in ("llama", "gemma3") or name == "top_k"]
# Without samples of `lossless`: a bonus token is another sample of the same distribution, see test_distributions.py.
SAMPLED = [pair for pair in PAIRS if pair[1] != "lossless"]


@pytest.mark.parametrize(("arch", "name"), PAIRS)
def test_equals_the_reference_token_by_token_greedily(tiny_model: TinyModel, arch: str, name: str) -> None:
    gammas = range(1, 9) if RULES[name][0].accept is not None else [3]
    assert_equals_the_reference(pair(tiny_model, arch), name, (GREEDY, GREEDY), gammas)


@pytest.mark.parametrize(("arch", "name"), SAMPLED)
def test_equals_the_reference_token_by_token(tiny_model: TinyModel, arch: str, name: str) -> None:
    assert_equals_the_reference(pair(tiny_model, arch), name, (STUDENT_SAMPLES, TEACHER_SAMPLES), [3])


def assert_equals_the_reference(
    models: dict[str, object], name: str, params: tuple[SamplingParams, SamplingParams], gammas: Iterable[int]
) -> None:
    (rule, parameter), seeds = RULES[name], [11, 12, 13, 14]
    prompts = [*PROMPTS[:3], [1, *[3] * SLIDING_WINDOW, 25]]  # so that windows are seen to slide
    s = sampler(models, rule, student_params=params[0], teacher_params=params[1], eos_ids=(2,), max_new_tokens=6)
    tokens, by = reference_rows(models, name, parameter, s, prompts, seeds)
    for gamma in gammas:
        samples = replace(s, gamma=gamma).sample(prompts, seeds)
        assert rows(samples) == tokens, f"gamma {gamma}"
        if not rule.bonus:  # the teacher's bonus may be the token that the student would have drafted
            assert sources(samples) == by, f"gamma {gamma}"


def test_teacher_and_student_of_different_families(tiny_model: TinyModel) -> None:
    models = {
        "student": tiny_model("gemma3", seed=1, vocab_size=VOCABULARY),
        "teacher": tiny_model("qwen3", seed=2, layers=3, hidden=48, vocab_size=VOCABULARY),
    }
    s, seeds = sampler(models, top_k(4), max_new_tokens=24), [11, 12, 13, 14]
    samples = s.sample(PROMPTS, seeds)
    assert rows(samples) == reference_rows(models, "top_k", 4, s, PROMPTS, seeds)[0]
    assert 0 < samples.statistics.acceptance_rate < 1


def test_rejected_proposals_are_kept(tiny_model: TinyModel) -> None:
    """Where the teacher wrote, the student had drafted the proposal: with everything accepted it would stand there."""
    models, seeds = pair(tiny_model), [11, 12, 13, 14]
    samples = sampler(models, top_k(4)).sample(PROMPTS, seeds)
    replaced = samples.source_BT.eq(TEACHER)
    assert replaced.any()
    assert torch.equal(samples.proposals_BT >= 0, replaced)
    for row, prompt in enumerate(PROMPTS):
        for position in samples.proposals_BT[row].ge(0).nonzero().squeeze(1).tolist():
            known = prompt + samples.tokens_BT[row, :position].tolist()
            q = probabilities(models["student"](torch.tensor([known])).logits[0, -1].detach(), STUDENT_SAMPLES)  # type: ignore[operator]
            proposal = pick(q, float(row_uniforms(seeds[row], position + 1, 3)[position, 0]))
            assert samples.proposals_BT[row, position] == proposal


@pytest.mark.parametrize("gamma", range(1, 9))
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_samples_do_not_depend_on_gamma_batch_or_refilling(tiny_model: TinyModel, gamma: int, batch_size: int) -> None:
    models = pair(tiny_model)
    seeds = [3, 1, 4, 1]
    expected = sampler(models, top_k(6), gamma=5).sample(PROMPTS, seeds)
    samples = sampler(models, top_k(6), gamma=gamma, batch_size=batch_size).sample(PROMPTS, seeds)
    assert rows(samples) == rows(expected)
    assert torch.equal(samples.source_BT, expected.source_BT)
    assert torch.equal(samples.truncated_B, expected.truncated_B)


def test_k_equal_to_the_vocabulary_is_student_sampling(tiny_model: TinyModel) -> None:
    models, seeds = pair(tiny_model), list(range(4))
    on_policy = sampler(models, student_only()).sample(PROMPTS, seeds)
    samples = sampler(models, top_k(VOCABULARY)).sample(PROMPTS, seeds)
    assert rows(samples) == rows(on_policy)
    assert samples.statistics.replaced == 0
    assert samples.statistics.rejection_rate == 0


def test_k_zero_is_teacher_sampling(tiny_model: TinyModel) -> None:
    models, seeds = pair(tiny_model), list(range(4))
    by_teacher = sampler(models, teacher_only()).sample(PROMPTS, seeds)
    samples = sampler(models, top_k(0)).sample(PROMPTS, seeds)
    assert rows(samples) == rows(by_teacher)
    assert samples.statistics.acceptance_rate == 0
    assert samples.source_BT[samples.mask_BT].eq(TEACHER).all()


def test_the_rank_is_taken_on_raw_logits(tiny_model: TinyModel) -> None:
    """After the teacher's top-p only one token would be left, and ties at probability 0 would pass for top-K."""
    models = pair(tiny_model)
    cold = SamplingParams(temperature=0.01, top_p=0.01)
    s = sampler(models, top_k(10), teacher_params=cold, max_new_tokens=10, eos_ids=())
    seeds = list(range(4))
    samples = s.sample(PROMPTS, seeds)
    assert 0 < samples.statistics.acceptance_rate < 1
    assert rows(samples) == reference_rows(models, "top_k", 10, s, PROMPTS, seeds)[0]


def test_the_student_draws_with_its_own_settings(tiny_model: TinyModel) -> None:
    models = pair(tiny_model)
    for model in models.values():
        model.generation_config.temperature = 0.01  # type: ignore[attr-defined]
        model.generation_config.top_k = 1  # type: ignore[attr-defined]
        model.generation_config.repetition_penalty = 9.0  # type: ignore[attr-defined]
    s = sampler(models, top_k(VOCABULARY), student_params=SamplingParams(temperature=3.0), teacher_params=GREEDY)
    seeds = list(range(4))
    assert rows(s.sample(PROMPTS, seeds)) == reference_rows(models, "student_only", 0, s, PROMPTS, seeds)[0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_equals_transformers_generate(tiny_model: TinyModel, arch: str) -> None:
    model = tiny_model(arch, seed=1, vocab_size=VOCABULARY)
    prompts = [*PROMPTS, [1, *[3] * SLIDING_WINDOW, 25]]
    s = sampler({"student": model, "teacher": None}, student_only(), student_params=GREEDY, batch_size=3)
    for prompt, row in zip(prompts, rows(s.sample(prompts, [0] * 5)), strict=True):
        generated = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=list(EOS), pad_token_id=0
        )
        assert row == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_greedy_lossless_equals_the_teacher(tiny_model: TinyModel, gamma: int) -> None:
    models = pair(tiny_model)
    alone = sampler(models, teacher_only(), teacher_params=GREEDY).sample(PROMPTS, [0] * 4)
    s = sampler(models, lossless(), student_params=GREEDY, teacher_params=GREEDY, gamma=gamma, batch_size=3)
    samples = s.sample(PROMPTS, [0] * 4)
    assert rows(samples) == rows(alone)
    assert samples.statistics.tokens_per_teacher_call >= 1


def test_a_model_that_drafts_for_itself_is_always_accepted(tiny_model: TinyModel) -> None:
    teacher = tiny_model(seed=2, vocab_size=VOCABULARY)
    s = sampler(
        {"student": teacher, "teacher": teacher}, lossless(), student_params=TEACHER_SAMPLES, gamma=3, eos_ids=()
    )
    statistics = s.sample(PROMPTS, list(range(4))).statistics
    assert statistics.acceptance_rate == 1
    assert statistics.replaced == 0
    assert statistics.bonus == 4 * 12 // 4
    assert statistics.tokens_per_teacher_call == 4


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("rule", [top_k(6), lossless(), teacher_only()], ids=["top_k", "lossless", "teacher_only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_teacher_states_equal_a_fresh_forward(
    tiny_model: TinyModel, arch: str, rule: AcceptanceRule, dtype: torch.dtype
) -> None:
    models: dict[str, object] = {name: model.to(dtype) for name, model in pair(tiny_model, arch).items()}  # type: ignore[attr-defined]
    samples = sampler(models, rule, keep_teacher_states=True, batch_size=2).sample(PROMPTS, list(range(4)))
    assert samples.teacher_states_BTH is not None
    assert samples.teacher_states_BTH.dtype == dtype
    assert_states_are_fresh(models, PROMPTS, samples, tolerance=1e-4 if dtype == torch.float32 else 0.1)


@torch.no_grad()
def assert_states_are_fresh(
    models: dict[str, object], prompts: list[list[int]], samples: Samples, tolerance: float = 1e-4
) -> None:
    assert samples.teacher_states_BTH is not None
    device = samples.tokens_BT.device
    for prompt, row, states in zip(prompts, rows(samples), samples.teacher_states_BTH, strict=True):
        known = torch.tensor([prompt + row], device=device)
        fresh = decoder(models["teacher"])(known).last_hidden_state[0]  # type: ignore[arg-type]
        # The state at position i predicts token i + 1.
        torch.testing.assert_close(states[: len(row)], fresh[len(prompt) - 1 : -1], rtol=tolerance, atol=tolerance)
        assert states[len(row) :].eq(0).all()


def test_rows_end_at_any_eos_and_truncated_rows_get_none(tiny_model: TinyModel) -> None:
    models = pair(tiny_model)
    samples = sampler(models, top_k(20), max_new_tokens=20).sample(PROMPTS * 8, list(range(32)))
    ended = 0
    for row, truncated in zip(rows(samples), samples.truncated_B.tolist(), strict=True):
        assert not set(row[:-1]) & set(EOS)
        assert truncated == (row[-1] not in EOS)
        assert len(row) == 20 or not truncated
        ended += not truncated
    assert 0 < ended < 32
    assert samples.statistics.truncated == 32 - ended


def test_pad_equal_to_eos_keeps_the_real_eos(tiny_model: TinyModel) -> None:
    models, seeds = pair(tiny_model), list(range(16))
    apart = sampler(models, top_k(20), eos_ids=(2,)).sample(PROMPTS * 4, seeds)
    equal = sampler(models, top_k(20), eos_ids=(2,), pad_id=2).sample(PROMPTS * 4, seeds)
    assert torch.equal(apart.mask_BT, equal.mask_BT)
    assert rows(apart) == rows(equal)
    assert any(row[-1] == 2 for row in rows(equal))


def test_padded_vocabularies_of_different_size(tiny_model: TinyModel) -> None:
    models = {
        "student": tiny_model(seed=1, vocab_size=VOCABULARY),
        "teacher": tiny_model(seed=2, vocab_size=VOCABULARY + 16),
    }
    samples = sampler(models, top_k(2), teacher_params=SamplingParams(temperature=5.0)).sample(PROMPTS, list(range(4)))
    assert samples.statistics.replaced > 0
    assert samples.tokens_BT.max() < VOCABULARY


def test_dropout_is_off_while_sampling_and_back_on_after(tiny_model: TinyModel) -> None:
    models = pair(tiny_model)
    expected = rows(sampler(models, student_only()).sample(PROMPTS, [0] * 4))
    student = tiny_model(seed=1, vocab_size=VOCABULARY, attention_dropout=0.9)
    student.train()
    student.lm_head.eval()  # type: ignore[union-attr]
    assert rows(sampler({"student": student, "teacher": None}, student_only()).sample(PROMPTS, [0] * 4)) == expected
    assert student.training
    assert not student.lm_head.training  # type: ignore[union-attr]


def test_a_stop_condition_ends_a_row(tiny_model: TinyModel) -> None:
    models = pair(tiny_model)
    s = sampler(models, student_only(), eos_ids=(), stop=lambda tokens: len(tokens) >= 5)
    samples = s.sample(PROMPTS, [0] * 4)
    assert [len(row) for row in rows(samples)] == [5] * 4
    assert not samples.truncated_B.any()


def test_progress_reaches_the_number_of_prompts(tiny_model: TinyModel) -> None:
    seen: list[int] = []
    sampler(pair(tiny_model), top_k(6), batch_size=2).sample(PROMPTS, [0] * 4, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 4


def test_errors_name_the_prompt_and_the_way_out(tiny_model: TinyModel) -> None:
    models = pair(tiny_model)
    with pytest.raises(SkdError, match="prompt 1: the prompt has no tokens"):
        sampler(models, top_k(3)).sample([[1], []], [0, 0])
    with pytest.raises(SkdError, match="need 601 positions, the model has 512"):
        sampler(models, top_k(3), max_new_tokens=600).sample([[1]], [0])
    with pytest.raises(SkdError, match="needs a student"):
        sampler({"student": None, "teacher": models["teacher"]}, top_k(3))
    with pytest.raises(SkdError, match="never asks the teacher"):
        sampler(models, student_only(), keep_teacher_states=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "sampling: `max_new_tokens` is 0"),
        ({"gamma": 0}, "sampling: `gamma` is 0"),
        ({"gamma": AdaptiveGamma(0)}, "sampling: `gamma` is 0"),
        ({"student_params": SamplingParams.model_construct(temperature=1e-38)}, "student: `temperature` is 1e-38"),
        ({"teacher_params": SamplingParams.model_construct(temperature=1e-7)}, "teacher: `temperature` is 1e-07"),
        ({"teacher_params": SamplingParams.model_construct(temperature=float("nan"))}, "`temperature` is nan"),
        ({"teacher_params": SamplingParams.model_construct(top_p=0.0)}, "teacher: `top_p` is 0"),
    ],
)
def test_settings_of_which_there_are_no_samples(tiny_model: TinyModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SkdError, match=re.escape(message)):
        sampler(pair(tiny_model), top_k(3), **options)


def test_the_smallest_temperature_is_nearly_greedy(tiny_model: TinyModel) -> None:
    smallest, zero = (SamplingParams(temperature=temperature) for temperature in (1e-6, 0.0))
    both = [
        rows(sampler(pair(tiny_model), top_k(3), student_params=params, teacher_params=params).sample(PROMPTS, [0] * 4))
        for params in (smallest, zero)
    ]
    assert both[0] == both[1]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=5),
    k=st.integers(0, VOCABULARY),
    gamma=st.integers(1, 7),
    eos=st.sets(st.integers(0, VOCABULARY - 1), max_size=6),
    limit=st.integers(1, 11),
    batch_size=st.integers(1, 5),
    use_lossless=st.booleans(),
)
def test_statistics_add_up_and_teacher_states_are_fresh(
    tiny_model: TinyModel, prompts: list, k: int, gamma: int, eos: set, limit: int, batch_size: int, use_lossless: bool
) -> None:
    models = pair(tiny_model)
    rule = lossless() if use_lossless else top_k(k)
    options = {"gamma": gamma, "eos_ids": tuple(eos), "max_new_tokens": limit, "batch_size": batch_size}
    samples = sampler(models, rule, keep_teacher_states=True, **options).sample(iter(prompts), range(len(prompts)))
    assert_states_are_fresh(models, prompts, samples)
    s, source = samples.statistics, samples.source_BT
    assert s.sequences == len(prompts)
    assert s.tokens == int(samples.mask_BT.sum()) == s.accepted + s.replaced + s.bonus
    assert s.tested == s.accepted + s.replaced
    assert s.accepted == int((source.eq(STUDENT) & samples.mask_BT).sum())
    assert s.replaced + s.bonus == int(source.eq(TEACHER).sum())
    assert s.tested <= s.drafted == s.student_calls == gamma * s.teacher_calls
    assert s.truncated == int(samples.truncated_B.sum())
    lengths = samples.mask_BT.sum(-1)
    assert lengths.min() >= 1
    assert lengths.max() <= limit
    for row, mask in zip(samples.tokens_BT, samples.mask_BT, strict=True):
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert row[~mask].eq(0).all()


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_every_rule_combines_with_either_greedy_side(tiny_model: TinyModel, name: str) -> None:
    """Greedy students or teachers give one-hot distributions: no NaN, no token of probability 0."""
    models, (rule, parameter) = pair(tiny_model), RULES[name]
    sampled = SamplingParams(temperature=1.3, top_p=0.7)
    for student, teacher in itertools.product([GREEDY, STUDENT_SAMPLES], [GREEDY, sampled]):
        samples = sampler(models, rule, student_params=student, teacher_params=teacher).sample(PROMPTS, range(4))
        drafted = samples.proposals_BT.ge(0).tolist()
        for prompt, tokens, by, replaced in zip(PROMPTS, rows(samples), sources(samples), drafted, strict=True):
            assert tokens
            known = torch.tensor([prompt + tokens])
            logits = {role: model(known).logits[0, len(prompt) - 1 :] for role, model in models.items()}  # type: ignore[operator]
            for at, token in enumerate(tokens):
                q, p = (
                    probabilities(logits[role][at], params)
                    for role, params in (("student", student), ("teacher", teacher))
                )
                teachers = logits["teacher"][at]
                if by[at] == STUDENT:
                    assert q[token] > 0
                    assert {
                        "top_k": int((teachers > teachers[token]).sum()) < parameter,
                        "min_prob": float(teachers.softmax(-1)[token]) >= parameter,
                        "lossless": p[token] > 0,
                        "teacher_only": False,
                    }.get(name, True)
                else:
                    assert p[token] > 0
                    if replaced[at] and name in ("lossless", "mixture"):  # drawn from what the student lacks
                        assert p[token] > q[token]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            AcceptanceRule("toy", lambda block: block.drafts_BG.any(-1)),
            r"`accept` must return the shape \(1, 3\), got \(1,\)",
        ),
        (
            AcceptanceRule("toy", lambda block: block.drafts_BG < 0, lambda p_BV, q_BV: p_BV.argmax(-1, keepdim=True)),
            r"`correct` must return the shape \(1, 48\), got \(1, 1\)",
        ),
    ],
    ids=["accept", "correct"],
)
def test_a_rule_of_another_shape_is_named(tiny_model: TinyModel, rule: AcceptanceRule, message: str) -> None:
    with pytest.raises(SkdError, match=message) as error:
        sampler(pair(tiny_model), rule, gamma=3).sample([[1, 5]], [0])
    assert error.value.where == "acceptance rule toy"
