"""The recorded training sequences against the models that made them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from skd_lib.config import InterleavedConfig, SamplingParams
from skd_lib.sampling.samples import STUDENT, TEACHER
from skd_lib.training.traces import MOMENTS, SEQUENCES, recorded_steps
from tests.training.tiny_task import EOS, run

WARM = SamplingParams(temperature=1.0, top_p=0.9)
TOP_K = 3
VOCABULARY = 64
"""Of the student; the teacher's head is padded further."""


@pytest.fixture
def student(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(seed=1, vocab_size=VOCABULARY)


@pytest.fixture
def teacher(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(seed=2, vocab_size=72, hidden=48)


def test_replacements_are_what_the_teacher_says_of_them(
    student: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    sampling = InterleavedConfig(top_k=TOP_K, student=WARM, teacher=WARM)
    traces = run(student, teacher, tmp_path, max_steps=5, eval_steps=2, distill={"sampling": sampling}).traces
    assert [(trace.step, trace.row) for trace in traces] == [
        (step, row) for step in (1, 2, 4, 5) for row in range(SEQUENCES)
    ]
    assert sum(len(trace.replacements) for trace in traces) > 10
    for trace in traces:
        assert len(trace.writers) == len(trace.token_ids) <= 8
        assert trace.token_ids[-1] == EOS or len(trace.token_ids) == 8
        assert trace.prompt_ids[0] == 1
        by_teacher = [position for position, writer in enumerate(trace.writers) if writer == TEACHER]
        assert [replacement.position for replacement in trace.replacements] == by_teacher
        with torch.no_grad():
            logits_LV = teacher(torch.tensor([trace.prompt_ids + trace.token_ids])).logits[0, :, :VOCABULARY]
        for replacement in trace.replacements:
            logits_V = logits_LV[len(trace.prompt_ids) + replacement.position - 1]
            order = logits_V.argsort(descending=True).tolist()
            probabilities = logits_V.softmax(-1)
            own = trace.token_ids[replacement.position]
            assert replacement.rank == order.index(replacement.proposal) >= TOP_K
            assert replacement.own_rank == order.index(own)
            assert replacement.probability == pytest.approx(probabilities[replacement.proposal].item(), rel=1e-3)
            assert replacement.own_probability == pytest.approx(probabilities[own].item(), rel=1e-3)


@pytest.mark.parametrize(("method", "count"), [("sft", 0), ("supervised_kd", 0), ("on_policy", SEQUENCES)])
def test_other_methods(
    method: str, count: int, student: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    traces = run(student, teacher, tmp_path, method=method, max_steps=1, eval_steps=1).traces
    assert len(traces) == count
    for trace in traces:
        assert set(trace.writers) == {STUDENT}
        assert trace.replacements == []


def test_the_same_is_recorded_however_a_step_is_divided(
    teacher: PreTrainedModel, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    whole, divided = (
        run(
            tiny_model(seed=1, vocab_size=VOCABULARY), teacher, tmp_path / str(rows), micro_batch_size=rows, max_steps=1
        )
        for rows in (4, 1)
    )
    assert [(trace.row, trace.token_ids) for trace in whole.traces] == [
        (trace.row, trace.token_ids) for trace in divided.traces
    ]


@given(st.integers(1, 5000), st.integers(1, 500))
def test_recorded_steps_are_few_and_have_both_ends(steps: int, eval_steps: int) -> None:
    recorded = recorded_steps(steps, min(eval_steps, steps))
    assert {1, steps} <= recorded
    assert len(recorded) <= MOMENTS
    assert all(step in (1, steps) or step % eval_steps == 0 for step in recorded)


def test_recorded_steps_are_those_before_validations() -> None:
    assert recorded_steps(100, 25) == {1, 25, 50, 75, 100}
    assert recorded_steps(60, 25) == {1, 25, 50, 60}
