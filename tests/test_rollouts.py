"""Where responses come from, and which positions the loss sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib.config import DistillConfig, InterleavedConfig, SamplingParams
from skd_lib.divergences import cross_entropy_sum
from skd_lib.errors import SkdError
from skd_lib.rollouts import (
    Place,
    Rollout,
    collate,
    response_states,
    rollout_for,
    row_seed,
    step_uniform,
    teacher_response_states,
)

VOCABULARY = 320
EOS = 2


@dataclass
class Tokens:
    prompt_ids: list[int]
    response_ids: list[int]


EXAMPLES = [
    Tokens([1, 50, 60, 70], [80, 81, EOS]),
    Tokens([1, 51], [82, EOS]),
    Tokens([1, 52, 62, 72, 73, 74], [83, 84, 85, 86, EOS]),
    Tokens([1, 53, 63], [87, 88, 89]),  # cut at the length limit: no EOS
]
PLACES = [Place(7, row) for row in range(len(EXAMPLES))]
HOT = SamplingParams(temperature=1.0, top_p=0.9)


@pytest.fixture
def student(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(seed=1)


@pytest.fixture
def teacher(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(seed=2, layers=3, hidden=48)


def make(
    method: str,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    *,
    top_k: int = 25,
    fraction: float = 1.0,
    places: list[Place] = PLACES,
    examples: list[Tokens] = EXAMPLES,
    adaptive_gamma: bool = True,
    **options: Any,
) -> Rollout:
    sampling = InterleavedConfig(top_k=top_k, gamma=3, adaptive_gamma=adaptive_gamma, student=HOT, teacher=HOT)
    arguments: dict[str, Any] = {"seed": 5, "eos_ids": (EOS,), "pad_id": 0, "max_new_tokens": 9, **options}
    distill = DistillConfig(sampling=sampling, on_policy_fraction=fraction)
    strategy = rollout_for(method, student=student, teacher=teacher, distill=distill, **arguments)  # type: ignore[arg-type]
    return strategy(examples, places)  # type: ignore[arg-type]


def responses(rollout: Rollout) -> list[list[int]]:
    counts = rollout.response_mask_BL.sum(1).tolist()
    return [part.tolist() for part in torch.split(rollout.targets_N, counts)]


# --- which positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_id", [0, EOS])
def test_the_mask_is_true_where_the_next_token_is_of_the_response(pad_id: int) -> None:
    rollout = collate(
        [e.prompt_ids for e in EXAMPLES[:2]],
        [e.response_ids for e in EXAMPLES[:2]],
        pad_id=pad_id,
        source="ground_truth",
    )
    p = pad_id
    assert rollout.input_ids_BL.tolist() == [[1, 50, 60, 70, 80, 81, EOS], [1, 51, 82, EOS, p, p, p]]
    expected = [[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0]]
    assert rollout.response_mask_BL.long().tolist() == expected
    # First response tokens and EOS are in, prompts and padding are not, even where the padding is EOS.
    assert responses(rollout) == [[80, 81, EOS], [82, EOS]]
    assert rollout.tokens == 5


def test_an_adaptive_draft_length_wastes_less_and_changes_nothing(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    adaptive, fixed = (make("skd", student, teacher, top_k=5, adaptive_gamma=on) for on in (True, False))
    assert torch.equal(adaptive.input_ids_BL, fixed.input_ids_BL)
    assert adaptive.statistics is not None
    assert fixed.statistics is not None
    assert adaptive.statistics.drafted < fixed.statistics.drafted


def test_states_are_those_that_predict_the_targets(student: PreTrainedModel) -> None:
    """Against the shift that transformers itself makes for labels."""
    rollout = make("sft", student, None)
    labels = rollout.input_ids_BL.clone()
    for row, example in zip(labels, EXAMPLES, strict=True):
        row[: len(example.prompt_ids)] = -100
        row[len(example.prompt_ids) + len(example.response_ids) :] = -100
    expected = student(input_ids=rollout.input_ids_BL, labels=labels).loss * rollout.tokens
    actual = cross_entropy_sum(student, response_states(student, rollout), rollout.targets_N).loss
    torch.testing.assert_close(actual, expected)


def test_padding_changes_no_state(student: PreTrainedModel) -> None:
    together = response_states(student, make("sft", student, None))
    alone = [response_states(student, make("sft", student, None, examples=[e], places=PLACES[:1])) for e in EXAMPLES]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_split_puts_like_lengths_together_and_keeps_each_rows_states(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    rollout = make("skd", student, teacher)
    parts = rollout.split([1, 2, 1])
    assert [len(part.input_ids_BL) for part in parts] == [1, 2, 1]
    widths = [part.input_ids_BL.shape[1] for part in parts]
    assert widths == sorted(widths)
    assert sorted(response for part in parts for response in responses(part)) == sorted(responses(rollout))
    assert rollout.teacher_states_NH is not None
    for part in parts:
        fresh = response_states(teacher, part)
        torch.testing.assert_close(part.teacher_states_NH, fresh, rtol=1e-4, atol=1e-5)
        assert part.response_mask_BL[:, -2].any()  # no column of padding alone
    (whole,) = rollout.split([4])
    assert whole.input_ids_BL.shape == rollout.input_ids_BL.shape
    empty = Rollout(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool), "student")
    assert [part.tokens for part in empty.split([1, 1])] == [0, 0]


def test_an_empty_prompt_is_an_error() -> None:
    with pytest.raises(SkdError, match="a prompt has no tokens"):
        collate([[]], [[5, EOS]], pad_id=0, source="ground_truth")


# --- where they come from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "supervised_kd"])
def test_ground_truth_is_taken_as_it_is(method: str, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    rollout = make(method, student, teacher)
    assert responses(rollout) == [example.response_ids for example in EXAMPLES]
    assert (rollout.source, rollout.statistics, rollout.teacher_states_NH) == ("ground_truth", None, None)


def test_prompts_are_kept_and_sampled_tokens_follow_them(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    rollout = make("skd", student, teacher)
    for row, example, response in zip(rollout.input_ids_BL.tolist(), EXAMPLES, responses(rollout), strict=True):
        assert row[: len(example.prompt_ids) + len(response)] == example.prompt_ids + response
        assert 1 <= len(response) <= 9
        assert EOS not in response[:-1]
    assert rollout.statistics is not None
    assert rollout.statistics.tokens == rollout.tokens
    assert rollout.statistics.rejection_rate > 0


def test_a_truncated_response_gets_no_eos(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    for method in ("on_policy", "skd"):
        rollout = make(method, student, teacher, eos_ids=(319,), pad_id=319)
        assert rollout.statistics is not None
        truncated = [response for response in responses(rollout) if 319 not in response]
        assert len(truncated) == rollout.statistics.truncated > 0
        assert all(len(response) == 9 for response in truncated)


def test_skd_that_accepts_all_tokens_is_on_policy(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    on_policy = make("on_policy", student, teacher)
    skd = make("skd", student, teacher, top_k=VOCABULARY)
    assert torch.equal(skd.input_ids_BL, on_policy.input_ids_BL)
    assert torch.equal(skd.response_mask_BL, on_policy.response_mask_BL)
    assert (on_policy.source, skd.source) == ("student", "interleaved")
    assert skd.statistics is not None
    assert skd.statistics.rejection_rate == 0


def test_skd_that_accepts_none_is_the_teacher_alone(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    one = make("skd", student, teacher, top_k=0)
    other = make("skd", teacher, teacher, top_k=0)
    assert torch.equal(one.input_ids_BL, other.input_ids_BL)


def test_the_samplers_teacher_states_equal_a_fresh_forward(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    rollout = make("skd", student, teacher)
    assert teacher_response_states(teacher, rollout) is rollout.teacher_states_NH
    fresh = response_states(teacher, rollout)
    assert fresh.shape == (rollout.tokens, 48)
    torch.testing.assert_close(rollout.teacher_states_NH, fresh, rtol=1e-4, atol=1e-5)


def test_without_kept_states_the_teacher_runs_once_without_gradient(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    rollout = make("on_policy", student, teacher)
    assert rollout.teacher_states_NH is None
    actual = teacher_response_states(teacher, rollout)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, response_states(teacher, rollout))


@pytest.mark.parametrize("method", ["on_policy", "skd"])
def test_a_rows_response_depends_on_its_place_alone(
    method: str, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    whole = responses(make(method, student, teacher))
    halves = [
        response
        for rows in (slice(0, 2), slice(2, 4))
        for response in responses(make(method, student, teacher, examples=EXAMPLES[rows], places=PLACES[rows]))
    ]
    assert whole == halves
    assert whole != responses(make(method, student, teacher, places=[Place(8, row) for row in range(4)]))
    assert whole != responses(make(method, student, teacher, seed=6))


@pytest.mark.parametrize("method", ["on_policy", "skd"])
def test_sampling_leaves_mode_random_state_and_gradients_alone(
    method: str, tiny_model: Callable[..., PreTrainedModel], teacher: PreTrainedModel
) -> None:
    student = tiny_model(seed=1, attention_dropout=0.5)
    expected = make(method, student, teacher)
    student.train()
    before = torch.get_rng_state()
    rollout = make(method, student, teacher)
    assert torch.equal(rollout.input_ids_BL, expected.input_ids_BL)  # dropout was off
    assert student.training
    assert torch.equal(torch.get_rng_state(), before)
    assert rollout.teacher_states_NH is None or not rollout.teacher_states_NH.requires_grad


def test_ids_that_one_vocabulary_lacks_are_never_sampled(
    teacher: PreTrainedModel, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    padded = tiny_model(seed=1, vocab_size=4096)
    for method in ("on_policy", "skd"):
        assert make(method, padded, teacher).targets_N.max() < VOCABULARY


def test_a_share_of_the_steps_is_on_policy(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    def source(step: int, fraction: float) -> str:
        places = [Place(step, row) for row in range(4)]
        return make("on_policy", student, teacher, fraction=fraction, places=places, max_new_tokens=1).source

    assert {source(step, 0.0) for step in range(5)} == {"ground_truth"}
    assert {source(step, 1.0) for step in range(5)} == {"student"}
    sources = [source(step, 0.3) for step in range(40)]
    assert sources == [source(step, 0.3) for step in range(40)]
    assert sources.count("student") == sum(step_uniform(5, step) < 0.3 for step in range(40))
    assert 4 <= sources.count("student") <= 20


def test_sampling_needs_a_teacher(student: PreTrainedModel) -> None:
    for method in ("on_policy", "skd"):
        with pytest.raises(SkdError, match=f"method `{method}` needs a teacher"):
            make(method, student, None)


def test_seeds_are_distinct_and_stable() -> None:
    seeds = {row_seed(seed, Place(step, row)) for seed in range(5) for step in range(20) for row in range(20)}
    assert len(seeds) == 5 * 20 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Checkpoints of an earlier version must go on with the same rows.
    assert row_seed(0, Place(0, 0)) == 1_267_123_373_154_733_616
    draws: Tensor = torch.tensor([step_uniform(0, step) for step in range(2000)])
    assert 0 <= draws.min() < 0.01
    assert 0.99 < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.03
