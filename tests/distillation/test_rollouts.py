"""Where responses come from, and which positions the loss sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib.config import DistillConfig, InterleavedConfig, SamplingParams
from skd_lib.distillation.batch import Rollout, collate, response_states, teacher_signals
from skd_lib.distillation.loss import cross_entropy_sum
from skd_lib.distillation.rollouts import RowKey, interleaving_rule, rollout_for, row_seed, row_uniform, step_uniform
from skd_lib.distillation.teacher_signal import DenseSignal, TeacherSignal
from skd_lib.errors import SkdError
from skd_lib.sampling.samples import SamplingStatistics

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
KEYS = [RowKey(7, row) for row in range(len(EXAMPLES))]
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
    distill: dict[str, Any] | None = None,
    rule: dict[str, Any] | None = None,
    steps: int = 10,
    keys: list[RowKey] = KEYS,
    examples: list[Tokens] = EXAMPLES,
    adaptive_gamma: bool = True,
    **options: Any,
) -> Rollout:
    sampling = InterleavedConfig(
        **{"top_k": top_k, "gamma": 3, "adaptive_gamma": adaptive_gamma, "student": HOT, "teacher": HOT, **(rule or {})}
    )
    arguments: dict[str, Any] = {"seed": 5, "eos_ids": (EOS,), "pad_id": 0, "max_new_tokens": 9, **options}
    strategy = rollout_for(
        method,
        student=student,
        teacher=teacher,
        distill=DistillConfig(sampling=sampling, **(distill or {})),
        steps=steps,
        **arguments,
    )
    return strategy(examples, keys)  # type: ignore[arg-type]


def responses(rollout: Rollout) -> list[list[int]]:
    return [part.tolist() for part in torch.split(rollout.targets_N, rollout.lengths)]


def by_teacher(rollout: Rollout) -> list[list[bool]]:
    return [part.tolist() for part in torch.split(rollout.by_teacher_N, rollout.lengths)]


def states(signals: Iterable[TeacherSignal | None]) -> Tensor:
    """The states of dense signals, one after the other."""
    return torch.cat([signal.states_NH for signal in signals if isinstance(signal, DenseSignal)])


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
    alone = [response_states(student, make("sft", student, None, examples=[e], keys=KEYS[:1])) for e in EXAMPLES]
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
    written = [list(zip(*row, strict=True)) for row in zip(responses(rollout), by_teacher(rollout), strict=True)]
    for part in parts:
        fresh = response_states(teacher, part)
        torch.testing.assert_close(states(part.signals), fresh, rtol=1e-4, atol=1e-5)
        for row in zip(responses(part), by_teacher(part), strict=True):
            assert list(zip(*row, strict=True)) in written
        assert part.response_mask_BL[:, -2].any()  # no column of padding alone
    (whole,) = rollout.split([4])
    assert whole.input_ids_BL.shape == rollout.input_ids_BL.shape
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    ids = torch.zeros(2, 3, dtype=torch.long)
    empty = Rollout(ids, nothing, nothing, ids - 1, ("student",) * 2, (None,) * 2)
    assert [part.tokens for part in empty.split([1, 1])] == [0, 0]


def test_an_empty_prompt_is_an_error() -> None:
    with pytest.raises(SkdError, match="a prompt has no tokens"):
        collate([[]], [[5, EOS]], pad_id=0, source="ground_truth")


# --- where they come from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "supervised_kd"])
def test_ground_truth_is_taken_as_it_is(method: str, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    rollout = make(method, student, teacher)
    assert responses(rollout) == [example.response_ids for example in EXAMPLES]
    assert (set(rollout.sources), set(rollout.signals), rollout.statistics) == ({"ground_truth"}, {None}, None)
    assert not rollout.by_teacher_BL.any()


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
    assert (set(on_policy.sources), set(skd.sources)) == ({"student"}, {"interleaved"})
    assert not on_policy.by_teacher_BL.any()
    assert not skd.by_teacher_BL.any()
    assert skd.statistics is not None
    assert skd.statistics.rejection_rate == 0


def test_skd_that_accepts_none_is_the_teacher_alone(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    one = make("skd", student, teacher, top_k=0)
    other = make("skd", teacher, teacher, top_k=0)
    assert torch.equal(one.input_ids_BL, other.input_ids_BL)


def test_the_samplers_teacher_states_equal_a_fresh_forward(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    for rule in ("top_k", "lossless", "min_prob", "mixture"):
        rollout = make("skd", student, teacher, rule={"rule": rule})
        assert tuple(teacher_signals(None, rollout)) == rollout.signals
        fresh = response_states(teacher, rollout)
        assert fresh.shape == (rollout.tokens, 48)
        torch.testing.assert_close(states(rollout.signals), fresh, rtol=1e-4, atol=1e-5)


def test_without_kept_states_the_teacher_runs_once_without_gradient(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    rollout = make("on_policy", student, teacher)
    assert set(rollout.signals) == {None}
    actual = states(teacher_signals(teacher, rollout))
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
        for response in responses(make(method, student, teacher, examples=EXAMPLES[rows], keys=KEYS[rows]))
    ]
    assert whole == halves
    assert whole != responses(make(method, student, teacher, keys=[RowKey(8, row) for row in range(4)]))
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
    assert not any(signal.states_NH.requires_grad for signal in rollout.signals if isinstance(signal, DenseSignal))


def test_ids_that_one_vocabulary_lacks_are_never_sampled(
    teacher: PreTrainedModel, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    padded = tiny_model(seed=1, vocab_size=4096)
    for method in ("on_policy", "skd"):
        assert make(method, padded, teacher).targets_N.max() < VOCABULARY


def test_a_share_of_the_steps_is_on_policy(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    def source(step: int, fraction: Any) -> str:
        keys = [RowKey(step, row) for row in range(4)]
        share = {"on_policy_fraction": fraction}
        rollout = make("on_policy", student, teacher, distill=share, keys=keys, steps=40, max_new_tokens=1)
        (source,) = set(rollout.sources)
        return source

    assert {source(step, 0.0) for step in range(5)} == {"ground_truth"}
    assert {source(step, 1.0) for step in range(5)} == {"student"}
    sources = [source(step, 0.3) for step in range(40)]
    assert sources == [source(step, 0.3) for step in range(40)]
    assert sources.count("student") == sum(step_uniform(5, step) < 0.3 for step in range(40))
    assert 4 <= sources.count("student") <= 20
    rising = [source(step, {"start": 0, "end": 1}) for step in range(40)]
    assert rising == [["ground_truth", "student"][step_uniform(5, step) < step / 39] for step in range(40)]


def test_two_stages(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    for steps, truths in ((10, 5), (7, 4), (1, 1)):
        sources = [
            make("two_stage", student, teacher, keys=[RowKey(step, row) for row in range(4)], steps=steps).sources
            for step in range(steps)
        ]
        assert sources == [("ground_truth",) * 4] * truths + [("student",) * 4] * (steps - truths)


def test_seqkd_is_written_by_the_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    rollout = make("seqkd", student, teacher)
    assert set(rollout.sources) == {"teacher"}
    assert torch.equal(rollout.by_teacher_BL, rollout.response_mask_BL)
    assert set(rollout.signals) == {None}  # its loss has no use for them
    assert responses(rollout) == responses(make("skd", student, teacher, top_k=0))


@pytest.mark.parametrize(("method", "sampled"), [("imitkd", "student"), ("skd_mixed", "interleaved")])
def test_rows_are_mixed_by_their_places(
    method: str, sampled: str, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    examples, keys = EXAMPLES * 3, [RowKey(2, row) for row in range(12)]
    whole = make(method, student, teacher, examples=examples, keys=keys)
    chosen = [row_uniform(5, place) < 0.5 for place in keys]
    assert whole.sources == tuple(sampled if is_sampled else "ground_truth" for is_sampled in chosen)
    assert {True, False} == set(chosen)
    alone = make("skd" if method == "skd_mixed" else "on_policy", student, teacher, examples=examples, keys=keys)
    for row, is_sampled in enumerate(chosen):
        assert responses(whole)[row] == (responses(alone)[row] if is_sampled else examples[row].response_ids)
        assert whole.input_ids_BL[row].tolist()[: len(examples[row].prompt_ids)] == examples[row].prompt_ids
        assert by_teacher(whole)[row] == (by_teacher(alone)[row] if is_sampled else [False] * whole.lengths[row])
    # Micro-batches and processes have parts of the step: each row is the same in any of them.
    for rows in (slice(0, 5), slice(5, 12)):
        part = make(method, student, teacher, examples=examples[rows], keys=keys[rows])
        assert part.sources == whole.sources[rows]
        assert responses(part) == responses(whole)[rows]
    assert whole.statistics is not None
    assert whole.statistics.sequences == sum(chosen)
    assert whole.statistics.tokens == sum(
        length for length, is_sampled in zip(whole.lengths, chosen, strict=True) if is_sampled
    )


def test_a_mixed_batch_asks_the_teacher_about_ground_truth_only(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    examples, keys = EXAMPLES * 3, [RowKey(2, row) for row in range(12)]
    rollout = make("skd_mixed", student, teacher, examples=examples, keys=keys)
    truths = [row for row, source in enumerate(rollout.sources) if source == "ground_truth"]
    seen: list[int] = []
    teacher.get_decoder().register_forward_hook(
        lambda _module, _inputs, keywords, _output: seen.append(len(keywords["input_ids"])), with_kwargs=True
    )
    signals = teacher_signals(teacher, rollout)
    assert seen == [len(truths)]
    torch.testing.assert_close(states(signals), response_states(teacher, rollout), rtol=1e-4, atol=1e-5)
    assert [signals[row] is rollout.signals[row] for row in range(12)] == [row not in truths for row in range(12)]
    with pytest.raises(SkdError, match="needs a teacher, or its signal"):
        teacher_signals(None, rollout)


def test_all_of_one_kind_is_no_mixture(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    for fraction, source in ((0, "ground_truth"), (1, "interleaved")):
        rollout = make("skd_mixed", student, teacher, distill={"sampled_fraction": fraction})
        assert set(rollout.sources) == {source}
        assert (rollout.statistics is None) == (fraction == 0)


def test_the_rule_decides_what_stands(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    def rejected(step: int = 0, **rule: Any) -> float:
        rollout = make("skd", student, teacher, rule=rule, keys=[RowKey(step, row) for row in range(4)])
        assert rollout.statistics is not None
        assert rollout.by_teacher_BL.sum() == rollout.statistics.replaced + rollout.statistics.bonus
        return rollout.statistics.rejection_rate

    assert rejected(rule="min_prob", min_prob=0) == rejected(rule="mixture", mixture=0) == 0
    assert rejected(rule="min_prob", min_prob=1) == rejected(rule="top_k", top_k=0) == 1
    assert 0 < rejected(rule="mixture", mixture=0.5) < 1
    assert 0 < rejected(rule="lossless") < 1
    # Schedules run from the first step to the last.
    ramp = {"start": VOCABULARY, "end": 0}
    assert [rejected(step, rule="top_k", top_k=ramp) for step in (0, 9)] == [0, 1]
    assert [rejected(step, rule="min_prob", min_prob={"start": 1, "end": 0}) for step in (0, 9)] == [1, 0]


@pytest.mark.parametrize("rule", ["min_prob", "mixture"])
@pytest.mark.parametrize(
    ("start", "end", "most"),
    [(0.5, 0.25, 26), (0.004, 0.001, 31), (0.996, 0.9999, 200), (0.0, 1.0, 500), (1e-7, 2e-7, 11), (0.3, 0.0, 200)],
)
def test_a_scheduled_probability_has_few_values_and_none_is_another(
    rule: str, start: float, end: float, most: int
) -> None:
    """Each value is a sampler of its own."""
    settings = InterleavedConfig.model_validate({"rule": rule, rule: {"start": start, "end": end}})
    names = [interleaving_rule(settings, step, 1000).name for step in range(1000)]
    assert len(set(names)) <= most
    for step, name in enumerate(names):
        exact = start + (end - start) * step / 999
        value = float(name.removeprefix(f"{rule}(").removesuffix(")"))
        assert value == pytest.approx(exact, rel=0.051)
        assert 1 - value == pytest.approx(1 - exact, rel=0.051, abs=1e-12)


def test_a_probability_that_is_a_number_is_taken_as_it_is() -> None:
    assert interleaving_rule(InterleavedConfig(rule="mixture", mixture=0.123), 5, 10).name == "mixture(0.123)"


def test_the_draft_length_may_follow_a_schedule_and_changes_nothing(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    drafted = []
    for step in (0, 9):
        options: dict[str, Any] = {"keys": [RowKey(step, row) for row in range(4)], "adaptive_gamma": False}
        scheduled = make("skd", student, teacher, rule={"gamma": {"start": 1, "end": 6}}, **options)
        assert torch.equal(scheduled.input_ids_BL, make("skd", student, teacher, **options).input_ids_BL)
        statistics = scheduled.statistics or SamplingStatistics()
        drafted.append(statistics.drafted / statistics.teacher_calls)
    assert drafted == [1, 6]


def test_sampling_needs_a_teacher(student: PreTrainedModel) -> None:
    for method in ("seqkd", "on_policy", "imitkd", "two_stage", "skd", "skd_mixed"):
        with pytest.raises(SkdError, match=f"method `{method}` needs a teacher"):
            make(method, student, None)


def test_seeds_are_distinct_and_stable() -> None:
    seeds = {row_seed(seed, RowKey(step, row)) for seed in range(5) for step in range(20) for row in range(20)}
    assert len(seeds) == 5 * 20 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Checkpoints of an earlier version must go on with the same rows.
    assert row_seed(0, RowKey(0, 0)) == 1_267_123_373_154_733_616
    draws: Tensor = torch.tensor([step_uniform(0, step) for step in range(2000)])
    assert 0 <= draws.min() < 0.01
    assert 0.99 < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.03
