from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from skd_lib.config import SamplingParams, SpecdecConfig, parse_section
from skd_lib.errors import SkdError
from skd_lib.results import Specdec
from skd_lib.sampling.acceptance import teacher_only
from skd_lib.sampling.engine import Sampler, Samples
from skd_lib.specdec.benchmark import Plan, benchmark
from skd_lib.specdec.verify import measured_rounding, rounding, verify_greedy
from tests.conftest import TinyModel
from tests.specdec.conftest import FakeClock

VOCABULARY = 320
EOS = tuple(range(2, 26))
"""So many that random models end some responses, at different lengths."""
NO_EOS = (VOCABULARY + 1,)
"""An id that no model writes: every response runs to the length limit."""


def prompts(count: int = 5, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (3 + 4 * row,), generator=generator).tolist() for row in range(count)]


def run(teacher: PreTrainedModel, draft: PreTrainedModel, **changes: Any) -> Specdec:
    """The benchmark of one draft model; `changes` are fields of the plan or of its configuration."""
    return run_all(teacher, {"draft": draft}, **changes)["draft"]


def run_all(teacher: PreTrainedModel, drafts: dict[str, PreTrainedModel], **changes: Any) -> dict[str, Specdec]:
    config: dict[str, Any] = {"gamma": 3, "gammas": [1, 3], "sweep": "none", "batch_sizes": [2], "temperatures": [0.0]}
    config["repeats"] = 1
    config |= {name: changes.pop(name) for name in list(changes) if name in SpecdecConfig.model_fields}
    fields: dict[str, Any] = {"prompts": prompts(), "eos_ids": EOS, "pad_id": 0, "max_new_tokens": 16, "seed": 7}
    fields |= {name: changes.pop(name) for name in list(changes) if name in fields}
    return benchmark(Plan(teacher, drafts, config=SpecdecConfig.model_validate(config), **fields), **changes)


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

    def watched(self: Sampler, *args: Any, **kwargs: Any) -> Samples:
        seen.append((self, sample(self, *args, **kwargs)))
        return seen[-1][1]

    monkeypatch.setattr(Sampler, "sample", watched)
    return seen


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("gamma", [1, 3])
def test_a_teacher_drafting_for_itself_is_always_right(tiny_model: TinyModel, gamma: int, temperature: float) -> None:
    teacher = tiny_model()
    result = run(teacher, teacher, gamma=gamma, temperatures=[temperature], eos_ids=NO_EOS)
    assert result.acceptance_rate == 1
    assert result.tokens_per_teacher_call == gamma + 1  # 16 is a multiple of both block lengths


def test_blocks_cut_short_by_the_end_count_as_teacher_calls(tiny_model: TinyModel) -> None:
    teacher = tiny_model()
    result = run(teacher, teacher, gamma=3, max_new_tokens=10, eos_ids=NO_EOS)  # blocks of 4, 4 and 2
    assert result.tokens_per_teacher_call == pytest.approx(10 / 3, rel=1e-5)
    assert set(result.by_prompt) == {(10 * result.repeats, 3 * result.repeats)}  # type: ignore[operator]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "gemma3"])
def test_any_draft_leaves_the_greedy_output_alone(tiny_model: TinyModel, arch: str) -> None:
    # The benchmark itself compares every token, and ends with an error where one is not the teacher's.
    result = run(tiny_model(arch), tiny_model(arch, seed=1, layers=1))
    assert result.ties == 0
    assert 0 <= result.acceptance_rate < 1
    assert 1 <= result.tokens_per_teacher_call < 4


def test_the_reference_is_greedy_decoding(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    teacher, draft = tiny_model(), tiny_model(seed=1)
    run(teacher, draft, max_new_tokens=12, batch_sizes=[5])
    assert len(seen) == 6
    for sampler, samples in seen[3:]:  # the first three are the warm-up
        wanted = [greedy(draft if sampler.teacher is draft else teacher, prompt, 12) for prompt in prompts()]
        lengths = samples.mask_BT.sum(-1).tolist()
        assert [row[:length] for row, length in zip(samples.tokens_BT.tolist(), lengths, strict=True)] == wanted


@pytest.mark.parametrize("row", [0, 4])
def test_a_wrong_token_is_caught_and_named(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    sample = Sampler.sample

    def corrupted(self: Sampler, *args: Any, **kwargs: Any) -> Samples:
        samples = sample(self, *args, **kwargs)
        if self.rule.name == "lossless" and len(samples.tokens_BT) == len(prompts()):
            tokens_BT = samples.tokens_BT.clone()
            tokens_BT[row, 3] = (tokens_BT[row, 3] + 1) % VOCABULARY
            return dataclasses.replace(samples, tokens_BT=tokens_BT)
        return samples

    monkeypatch.setattr(Sampler, "sample", corrupted)
    with pytest.raises(SkdError, match=rf"prompt {row}, response position 3: token \d+ is not the teacher's choice"):
        run(tiny_model(), tiny_model(seed=1), eos_ids=NO_EOS, batch_sizes=[5])


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


class HalfPrecision:
    """A teacher in bf16, its responses to some prompts, and responses with its second-best token at one position."""

    LENGTH = 20

    def __init__(self, teacher: PreTrainedModel) -> None:
        self.teacher = teacher.bfloat16()
        self.prompts = prompts(16)  # as rounding differs among CPUs, enough for every case
        self.references = self.write(self.prompts, self.LENGTH)
        self.rounding = measured_rounding(self.teacher, self.prompts, self.references, VOCABULARY)

    def write(self, starts: list[list[int]], length: int) -> list[list[int]]:
        settings: dict[str, Any] = {"rule": teacher_only(), "eos_ids": (), "pad_id": 0, "max_new_tokens": length}
        sampler = Sampler(
            student=None, teacher=self.teacher, teacher_params=SamplingParams(temperature=0.0), **settings
        )
        return sampler.sample(starts, range(len(starts))).tokens_BT.tolist()

    def planted(self, narrowest: float, widest: float) -> dict[int, list[int]]:
        """By row: the second-best token at the last position where it is so far behind, in logits."""
        found = {}
        for row, (prompt, response) in enumerate(zip(self.prompts, self.references, strict=True)):
            with torch.no_grad():
                logits = self.teacher(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            best, second = logits.float().topk(2).values.unbind(-1)
            places = ((best - second > narrowest) & (best - second < widest)).nonzero().flatten().tolist()
            if places:
                start = [*response[: places[-1]], int(logits[places[-1]].topk(2).indices[1])]
                rest = self.LENGTH - len(start)
                found[row] = start + (self.write([prompt + start], rest)[0] if rest else [])
        return found

    def verify(self, outputs: dict[int, list[int]]) -> int:
        settings: dict[str, Any] = {"eos_ids": (), "max_new_tokens": self.LENGTH, "vocabulary": VOCABULARY}
        chosen = [(self.prompts[row], output, self.references[row]) for row, output in outputs.items()]
        return verify_greedy(self.teacher, *zip(*chosen, strict=True), **settings, measure=lambda: self.rounding)


@pytest.fixture(scope="module")
def half(tiny_model: TinyModel) -> HalfPrecision:
    return HalfPrecision(tiny_model(seed=1, layers=3, hidden=64))


def test_rounding_is_measured(half: HalfPrecision, tiny_model: TinyModel) -> None:
    teacher = tiny_model(seed=1, layers=3, hidden=64)
    fine = measured_rounding(teacher, half.prompts[:1], half.references[:1], VOCABULARY)
    assert 0 < fine.typical < fine.widest < 1e-4 < half.rounding.typical < half.rounding.widest < 0.3


def test_in_half_precision_ties_are_counted(half: HalfPrecision) -> None:
    found = half.planted(0.5 * half.rounding.typical, 2 * half.rounding.typical)
    assert half.verify(found) == sum(output != half.references[row] for row, output in found.items()) > 1


def test_a_second_best_token_in_half_precision_is_no_tie(half: HalfPrecision) -> None:
    """Wider than rounding makes a tie, if not by much."""
    found = half.planted(2.1 * half.rounding.widest, 8 * half.rounding.widest)
    assert len(found) > 3
    for row, output in found.items():
        with pytest.raises(SkdError, match=r"prompt 0, response position .* is not the teacher's choice"):
            half.verify({row: output})


def test_many_wide_ties_are_no_rounding(half: HalfPrecision) -> None:
    """Each alone would pass: together they show that other tokens are preferred."""
    found = half.planted(1.4 * half.rounding.widest, 2 * half.rounding.widest)
    assert len(found) > 3
    assert all(half.verify({row: output}) == 1 for row, output in found.items())
    with pytest.raises(SkdError, match=f"{len(found)} of {len(found)} responses differ from the teacher's own"):
        half.verify(found)


def test_padded_heads_of_different_size(tiny_model: TinyModel) -> None:
    result = run(tiny_model(vocab_size=384), tiny_model(seed=1, vocab_size=VOCABULARY))
    assert result.ties == 0
    assert 0 <= result.acceptance_rate < 1


def test_figures_fit_together(tiny_model: TinyModel) -> None:
    settings: dict[str, Any] = {"repeats": 2, "temperatures": [1.0, 0.0], "batch_sizes": [1, 2]}
    result = run(tiny_model(), tiny_model(seed=1), prompts=prompts(3), max_new_tokens=8, **settings)
    assert [(each.temperature, each.batch_size) for each in result.settings] == [(1, 1), (0, 1), (1, 2), (0, 2)]
    assert [each.prompts for each in result.settings] == [3, 3, 2, 2]  # whole batches
    assert result.tokens <= 2 * 3 * 8
    assert result.seconds > result.tokens / result.speculative_tokens_per_second * 0.5
    headline = result.settings[0].timed(3)
    assert (result.temperature, result.batch_size, result.prompts) == (1, 1, 3)
    assert result.speedup == headline.speedup
    assert result.latency == headline.latency
    assert result.acceptance_rate == headline.acceptance_rate
    assert len(headline.tested_by_position) == 3
    assert list(headline.tested_by_position) == sorted(headline.tested_by_position, reverse=True)
    assert result.latency.first_token.p50 <= result.latency.first_token.p90 <= result.latency.first_token.p99
    text = json.dumps(result.to_dict())
    assert Specdec.model_validate_json(text) == result
    assert "null" not in text  # which a KFP parameter cannot hold


def test_flat_figures_are_numbers(tiny_model: TinyModel) -> None:
    result = run(tiny_model(), tiny_model(seed=1), prompts=prompts(2), batch_sizes=[1, 2], eos_ids=NO_EOS)
    figures = result.metrics()
    assert all(isinstance(value, int | float) for value in figures.values())
    assert figures["speedup"] == result.speedup
    assert figures["acceptance_position_1"] == result.acceptance_by_position[0]
    assert figures["teacher_only_per_token_p99_seconds"] == result.teacher_only_latency.per_token.p99
    assert figures["best_speedup_temperature_0_batch_2"] == result.settings[1].best_speedup


def test_the_speedup_is_over_the_teacher_in_the_same_turn(
    tiny_model: TinyModel, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine becomes three times as slow after the first turn: the ratio does not."""
    passes = itertools.count()
    sample = Sampler.sample

    def timed(self: Sampler, *args: Any, **kwargs: Any) -> Samples:
        samples = sample(self, *args, **kwargs)
        if len(samples.tokens_BT) == 5:  # not the warm-up
            clock.now += (1 if next(passes) < 3 else 3) * (2.0 if self.student is None else 1.0)
        return samples

    monkeypatch.setattr(Sampler, "sample", timed)
    models = clock.charge(tiny_model(), 0.001), clock.charge(tiny_model(seed=1), 0.001)
    result = run(*models, repeats=3, batch_sizes=[5], eos_ids=NO_EOS)
    assert result.speedup == pytest.approx(2, rel=0.05)
    assert result.teacher_only_tokens_per_second == pytest.approx(80 / 6, rel=0.05)


def test_theory_meets_what_is_measured(tiny_model: TinyModel, clock: FakeClock) -> None:
    """Where forwards are all that takes time, the two differ by the prefill alone."""
    teacher, draft = clock.charge(tiny_model(), 1.0), clock.charge(tiny_model(), 0.1)
    result = run(teacher, draft, eos_ids=NO_EOS, max_new_tokens=120, prompts=prompts(1), batch_sizes=[1])
    assert result.theoretical_speedup == pytest.approx(4 / 1.3, rel=1e-5)  # 4 tokens for 3 drafts and a block
    assert result.theoretical_speedup_iid == pytest.approx(4 / 1.3, rel=1e-5)
    assert result.speedup == pytest.approx(4 / 1.3, rel=0.03)
    assert result.latency.per_token is not None
    assert result.latency.per_token.p50 == pytest.approx(1.3 / 4, rel=1e-5)
    assert result.teacher_only_latency.first_token.p99 == pytest.approx(2)  # the prompt, and the first round


def test_passes_take_turns_after_a_warm_up(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    teacher, before, after = (tiny_model(seed=seed) for seed in range(3))
    progress: list[tuple[int, int]] = []
    run_all(
        teacher,
        {"before": before, "after": after},
        repeats=2,
        max_new_tokens=4,
        batch_sizes=[5],
        on_progress=lambda done, total: progress.append((done, total)),
    )
    turns = [(None, teacher), (before, teacher), (after, teacher), (None, before), (None, after)]
    assert [(sampler.student, sampler.teacher, len(samples.tokens_BT)) for sampler, samples in seen] == [
        (*models, rows) for rows in (1, 5, 5) for models in turns
    ]
    assert progress == [(done, 50) for done in range(5, 51, 5)]


def test_what_each_model_writes_by_itself(tiny_model: TinyModel, clock: FakeClock) -> None:
    teacher, draft = clock.charge(tiny_model(), 1.0), clock.charge(tiny_model(seed=1), 0.1)
    result = run(teacher, draft, eos_ids=NO_EOS, max_new_tokens=120, prompts=prompts(1), batch_sizes=[1])
    assert result.teacher_only_tokens_per_second == pytest.approx(1, rel=0.02)  # the prefill is the difference
    assert result.draft_only_tokens_per_second == pytest.approx(10, rel=0.02)
    assert (result.teacher_parameters, result.draft_parameters) == (teacher.num_parameters(), draft.num_parameters())


def test_all_draft_lengths_are_timed(tiny_model: TinyModel) -> None:
    result = run(tiny_model(), tiny_model(seed=1), sweep="all", gamma=2, gammas=[1, 4], eos_ids=NO_EOS)
    setting = result.settings[0]
    assert [length.gamma for length in setting.lengths] == [1, 2, 4]
    speedups = {length.gamma: length.timed.speedup for length in setting.lengths if length.timed}
    assert setting.best_speedup == speedups[setting.best_gamma] == max(speedups.values())
    assert len(speedups) == 3


def test_without_a_sweep_other_lengths_are_predicted(tiny_model: TinyModel) -> None:
    teacher = tiny_model()
    result = run(teacher, teacher, gammas=[1, 5], eos_ids=NO_EOS)
    lengths = {length.gamma: length for length in result.settings[0].lengths}
    assert [gamma for gamma, length in lengths.items() if length.timed] == [3]
    assert lengths[5].expected_tokens_per_teacher_call == 6  # every position that was tested was accepted
    assert result.best_gamma == 3


@pytest.mark.parametrize(("slow", "wanted"), [("draft", 1), ("teacher", 8)])
def test_the_sweep_finds_the_best_length_and_leaves_out_what_cannot_win(
    tiny_model: TinyModel, clock: FakeClock, slow: str, wanted: int
) -> None:
    """A draft that is always right: with a slow teacher long blocks win, with a slow draft short ones do."""
    teacher, draft = (clock.charge(tiny_model(), 1.0 if role == slow else 0.01) for role in ("teacher", "draft"))
    changes: dict[str, Any] = {"gamma": 2, "gammas": [1, 2, 4, 8], "eos_ids": NO_EOS, "max_new_tokens": 18}
    result = run(teacher, draft, sweep="best", prompts=prompts(2), **changes)
    setting = result.settings[0]
    assert setting.best_gamma == wanted
    assert [length.gamma for length in setting.lengths if length.timed] == sorted({2, wanted})


@pytest.mark.slow
@pytest.mark.parametrize("cost", [0.02, 0.6])
def test_the_sweep_finds_a_length_as_good_as_the_best_of_all(
    tiny_model: TinyModel, clock: FakeClock, cost: float
) -> None:
    """A draft that is right at times: the headline figures are the same, and the best speed-up is."""
    teacher, draft = clock.charge(tiny_model(), 1.0), clock.charge(tiny_model(seed=1), cost)
    changes: dict[str, Any] = {"gamma": 5, "gammas": [*range(1, 9)], "eos_ids": NO_EOS, "max_new_tokens": 16}
    changes["prompts"] = prompts(2)
    every, swept = (
        run(teacher, draft, sweep=sweep, temperatures=[1.0], **changes).settings[0] for sweep in ("all", "best")
    )
    assert sum(length.timed is not None for length in swept.lengths) <= 3
    timed = [next(length.timed for length in each.lengths if length.gamma == 5) for each in (every, swept)]
    assert timed[0] == timed[1] is not None
    assert swept.best_speedup >= 0.98 * every.best_speedup


def test_batches_that_the_prompts_do_not_fill_are_left_out(tiny_model: TinyModel) -> None:
    result = run(tiny_model(), tiny_model(seed=1), batch_sizes=[1, 8], max_new_tokens=4)
    assert [each.batch_size for each in result.settings] == [1]
    result = run(tiny_model(), tiny_model(seed=1), batch_sizes=[8], max_new_tokens=4)
    assert [each.batch_size for each in result.settings] == [5]


def test_no_prompts(tiny_model: TinyModel) -> None:
    with pytest.raises(SkdError, match="no prompts"):
        run(tiny_model(), tiny_model(), prompts=[])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gammas", [0, 1], "equal to 1, got 0"),
        ("batch_sizes", [1, 1], "must be unique"),
        ("batch_sizes", [], "at least 1 item"),
        ("temperatures", [-0.5], "equal to 0, got -0.5"),
        ("sweep", "some", "'all', 'best' or 'none'"),
    ],
)
def test_settings_that_make_no_sense(field: str, value: Any, message: str) -> None:
    with pytest.raises(SkdError, match=message) as caught:
        parse_section(SpecdecConfig, {field: value}, where="run.yaml")
    assert f"field `{field}" in str(caught.value)
