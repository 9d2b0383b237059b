"""What is counted of the servers' work, against what the own engine counts, without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from skd_lib.distillation.batch import Rollout, collate
from skd_lib.distillation.teacher_signal import DenseSignal
from skd_lib.sampling.acceptance import AcceptanceRule, student_only, teacher_only, top_k
from skd_lib.sampling.engine import Sampler
from skd_lib.sampling.samples import SamplingStatistics
from skd_lib.training.figures import sampling_figures, tokens_processed
from skd_lib.vllm.sampler import Note, VllmEngine
from skd_lib.vllm.settings import RolloutSettings
from tests.conftest import TinyModel

PROMPTS, RESPONSES, NEW = [[5, 6, 7, 8], [9, 10]], [[8, 9, 2], [11, 2]], 6
Answers = Callable[[Sequence[Any]], list[Any]]


@pytest.fixture(scope="module")
def models(tiny_model: TinyModel) -> dict[str, PreTrainedModel]:
    return {"student": tiny_model(layers=1), "teacher": tiny_model(seed=1, layers=1)}


@pytest.fixture
def engine(models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> Callable[[Answers], VllmEngine]:
    """An engine whose servers' answers a function gives."""

    def make(answers: Answers) -> VllmEngine:
        made = VllmEngine(
            engines=[],
            student=models["student"],
            head=models["teacher"],
            teacher="",
            settings=RolloutSettings(vocabulary=320),
            eos_ids=(2,),
            pad_id=0,
            max_new_tokens=NEW,
            gamma=3,
        )
        monkeypatch.setattr(made, "spread", lambda _ask, items, *_: answers(items))
        return made

    return make


@pytest.mark.parametrize("sampled", [0, 3])
def test_ground_truth_costs_the_teacher_what_the_own_engine_reads(
    models: dict[str, PreTrainedModel], engine: Callable[[Answers], VllmEngine], sampled: int
) -> None:
    def strategy(*_: object) -> Rollout:
        rollout = collate(PROMPTS, RESPONSES, pad_id=0, source="ground_truth")
        return replace(rollout, statistics=SamplingStatistics(teacher_positions=sampled) if sampled else None)

    def answers(pairs: Sequence[Any]) -> list[Any]:
        assert pairs == list(zip(PROMPTS, RESPONSES, strict=True))
        return [DenseSignal(torch.zeros(len(response), 32), models["teacher"]) for _, response in pairs]

    own = strategy()
    got = engine(answers).attached(strategy, torch.device("cpu"))([], [])
    assert None not in got.signals
    cost = tokens_processed(got, divergence=True)
    assert cost == tokens_processed(own, divergence=True)
    assert cost.teacher == 11 + sampled
    assert sampling_figures(got.statistics or SamplingStatistics()) == {}  # nothing was sampled


def test_rows_with_a_signal_cost_the_teacher_no_more(engine: Callable[[Answers], VllmEngine]) -> None:
    rollout = collate(PROMPTS, RESPONSES, pad_id=0, source="student")
    known = replace(rollout, signals=("stored",) * 2)  # type: ignore[arg-type]
    got = engine(lambda _: pytest.fail("asked")).attached(lambda *_: known, torch.device("cpu"))([], [])
    assert tokens_processed(got, divergence=True).teacher == 0


@pytest.mark.parametrize("rule", [top_k(3), student_only(), teacher_only()], ids=lambda rule: rule.name)
def test_rates_are_told_of_rules_that_test(
    models: dict[str, PreTrainedModel], engine: Callable[[Answers], VllmEngine], rule: AcceptanceRule
) -> None:
    own = Sampler(
        models["student"] if rule.drafts else None,
        models["teacher"] if rule.asks_teacher else None,
        rule,
        gamma=3,
        eos_ids=(2,),
        pad_id=0,
        max_new_tokens=NEW,
    )
    want = own.sample(PROMPTS, [1, 2])

    def answers(rows: Sequence[Any]) -> list[Any]:
        assert len(rows) == len(PROMPTS)
        by_teacher = [row[:length].bool().tolist() for row, length in zip(want.source_BT, want.lengths, strict=True)]
        return [
            Note(tokens, wrote, [-1] * len(tokens), truncated, {})
            for tokens, wrote, truncated in zip(want.responses(), by_teacher, want.truncated_B.tolist(), strict=True)
        ]

    got = engine(answers).sampler(rule, 0).sample(PROMPTS, [1, 2])
    assert got.statistics.tested == want.statistics.tested
    assert sampling_figures(got.statistics) == sampling_figures(want.statistics)
    assert ("rejection_rate" in sampling_figures(got.statistics)) == (rule.accept is not None)
