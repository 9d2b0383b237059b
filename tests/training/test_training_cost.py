"""What is counted is what forward hooks on both decoders see, where nothing is padded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from skd_lib.config import DistillConfig, parse_section
from skd_lib.data.tokenize import TokenizedExample
from skd_lib.distillation.batch import collate
from skd_lib.distillation.loss import objective_for
from skd_lib.distillation.rollouts import RowKey, rollout_for
from skd_lib.models.heads import decoder
from skd_lib.sampling.acceptance import AcceptanceRule, lossless, min_prob, mixture, student_only, teacher_only, top_k
from skd_lib.sampling.drafting import AdaptiveGamma, Costs
from skd_lib.sampling.engine import Sampler
from skd_lib.training.figures import ratio_error, ratio_sums, tokens_processed
from tests.conftest import TinyModel

RULES = [top_k(3), top_k(0), min_prob(0.1), mixture(0.5), lossless(), student_only(), teacher_only()]
DRAFT_LENGTHS = [*range(1, 9), AdaptiveGamma(8, costs=Costs(student=0.1, token=0.02))]
PROMPTS = [[5, 6, 7, 8], [5], [9, 10], [11, 12, 13]]
EOS = tuple(range(40, 60))


@contextmanager
def positions_seen(**models: PreTrainedModel) -> Iterator[Counter[str]]:
    """Positions in each model's decoder, by its name."""
    seen: Counter[str] = Counter()

    def watch(name: str, model: PreTrainedModel) -> Any:
        def hook(_: torch.nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], ___: object) -> None:
            seen[name] += kwargs["input_ids"].numel()

        return decoder(model).register_forward_hook(hook, with_kwargs=True)

    handles = [watch(name, model) for name, model in models.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def sampler(models: dict[str, PreTrainedModel], rule: AcceptanceRule, **options: Any) -> Sampler:
    settings: dict[str, Any] = {"eos_ids": EOS, "pad_id": 0, "max_new_tokens": 12, **options}
    return Sampler(rule=rule, **models, **settings)


@pytest.fixture(scope="module")
def pair(tiny_model: TinyModel) -> dict[str, PreTrainedModel]:
    return {"student": tiny_model(layers=1), "teacher": tiny_model(seed=1, layers=1)}


@pytest.mark.parametrize("gamma", DRAFT_LENGTHS, ids=lambda gamma: gamma if isinstance(gamma, int) else "adaptive")
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_sampling_counts_the_positions_that_both_decoders_take(
    pair: dict[str, PreTrainedModel], rule: AcceptanceRule, gamma: int | AdaptiveGamma
) -> None:
    with positions_seen(**pair) as seen:
        counts = sampler(pair, rule, gamma=gamma, batch_size=1).sample(PROMPTS[:2], [3, 1]).statistics
    assert (counts.student_positions, counts.teacher_positions) == (seen["student"], seen["teacher"])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_padded_prompts_cost_no_more(pair: dict[str, PreTrainedModel], rule: AcceptanceRule) -> None:
    together, alone = (
        sampler(pair, rule, gamma=3, batch_size=rows).sample(PROMPTS, [3, 1, 4, 1]).statistics for rows in (4, 1)
    )
    assert together == alone


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_decoder_without_a_cache_reads_the_whole_sequence_each_time(rule: AcceptanceRule) -> None:
    size = {"vocab_size": 320, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    config = GPT2Config(**size, bos_token_id=1, eos_token_id=2)
    models: dict[str, PreTrainedModel] = {name: GPT2LMHeadModel(config) for name in ("student", "teacher")}
    with positions_seen(**models) as seen:
        counts = sampler(models, rule, gamma=3, batch_size=1).sample(PROMPTS, [3, 1, 4, 1]).statistics
    assert (counts.student_positions, counts.teacher_positions) == (seen["student"], seen["teacher"])


METHODS: list[dict[str, Any]] = [
    {"method": "sft"},
    {"method": "seqkd"},
    {"method": "supervised_kd"},
    {"method": "on_policy"},
    {"method": "imitkd"},
    {"method": "skd_mixed"},
    *({"method": "skd", "sampling": {"rule": rule}} for rule in ("top_k", "min_prob", "mixture", "lossless")),
]


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_training_step_costs_what_both_decoders_take(
    pair: dict[str, PreTrainedModel], settings: dict[str, Any]
) -> None:
    distill = parse_section(DistillConfig, settings, where="distill")
    examples = [TokenizedExample(row, [8, 9, 2]) for row in PROMPTS]
    limits: dict[str, Any] = {"eos_ids": EOS, "pad_id": 0, "max_new_tokens": 12}
    strategy = rollout_for(distill.method, **pair, distill=distill, steps=1, seed=0, **limits)
    objective = objective_for(distill.method, pair["teacher"], distill)
    for row, example in enumerate(examples):  # one at a time: nothing is padded
        with positions_seen(**pair) as seen:
            rollout = strategy([example], [RowKey(0, row)])
            objective(pair["student"], rollout)
        cost = tokens_processed(rollout, divergence=distill.method not in ("sft", "seqkd"))
        assert (cost.student, cost.teacher) == (seen["student"], seen["teacher"])


def test_padding_costs_nothing() -> None:
    rollout = collate([[5, 6, 7], [5]], [[8, 9], [8, 9, 10]], pad_id=0, source="ground_truth")
    sft, supervised_kd = (tokens_processed(rollout, divergence=divergence) for divergence in (False, True))
    assert (sft.student, sft.teacher) == (9, 0)
    assert (supervised_kd.student, supervised_kd.teacher) == (9, 9)


def test_the_error_of_a_mean_over_tokens_is_that_of_resampled_rows() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 30, size=60)
    losses = tokens * generator.normal(2.0, 0.5, size=60)
    halves = [ratio_sums(torch.tensor(losses[part]), torch.tensor(tokens[part])) for part in np.split(np.arange(60), 2)]
    error = ratio_error((halves[0] + halves[1]).tolist())
    drawn = generator.integers(60, size=(4000, 60))
    resampled = losses[drawn].sum(1) / tokens[drawn].sum(1)
    assert error == pytest.approx(resampled.std(), rel=0.1)
    assert ratio_error(ratio_sums(torch.tensor([3.0]), torch.tensor([2])).tolist()) is None
    equal = ratio_sums(torch.tensor([1.0, 2.0]), torch.tensor([1, 2])).tolist()
    assert ratio_error(equal) == 0
