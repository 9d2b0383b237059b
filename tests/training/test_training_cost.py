from __future__ import annotations

from dataclasses import replace

import torch

from skd_lib.batches import collate, merge
from skd_lib.sampling.samples import SamplingStatistics
from skd_lib.teacher_signals import DenseSignal
from skd_lib.training.cost import tokens_processed
from tests.conftest import TinyModel

PROMPTS, RESPONSES = [[5, 6, 7], [5]], [[8, 9], [8, 9, 10, 2]]
# Two sequences of 5 tokens each, 4 of all 10 in the prompts.


def test_ground_truth_goes_through_the_student_and_with_a_divergence_through_the_teacher():
    rollout = collate(PROMPTS, RESPONSES, pad_id=0, source="ground_truth")
    sft, supervised_kd = (tokens_processed(rollout, divergence=divergence) for divergence in (False, True))
    assert (sft.student, sft.teacher) == (10, 0)
    assert (supervised_kd.student, supervised_kd.teacher) == (10, 10)


def test_students_samples_are_drafted_by_it_and_read_by_the_teacher_afterwards():
    rollout = replace(
        collate(PROMPTS, RESPONSES, pad_id=0, source="student"),
        statistics=SamplingStatistics(sequences=2, tokens=6, drafted=6, accepted=6, student_calls=6),
    )
    on_policy = tokens_processed(rollout, divergence=True)
    assert (on_policy.student, on_policy.teacher) == (10 + 4 + 6, 10)


def test_interleaved_samples_are_read_by_the_teacher_once(tiny_model: TinyModel):
    statistics = SamplingStatistics(sequences=2, tokens=6, drafted=8, tested=7, teacher_calls=3, student_calls=8)
    rollout = collate(PROMPTS, RESPONSES, pad_id=0, source="interleaved")
    signals = DenseSignal(torch.zeros(6, 32), tiny_model()).split(rollout.lengths)
    skd = tokens_processed(replace(rollout, statistics=statistics, signals=tuple(signals)), divergence=True)
    assert (skd.student, skd.teacher) == (10 + 4 + 8, 4 + 8 + 3)


def test_teachers_samples_for_cross_entropy():
    statistics = SamplingStatistics(sequences=2, tokens=6, replaced=6, teacher_calls=6)
    rollout = replace(collate(PROMPTS, RESPONSES, pad_id=0, source="teacher"), statistics=statistics)
    seqkd = tokens_processed(rollout, divergence=False)
    assert (seqkd.student, seqkd.teacher) == (10, 4 + 6)


def test_rows_of_both_kinds_add_up():
    statistics = SamplingStatistics(sequences=1, tokens=4, drafted=4, student_calls=4)
    truth = collate(PROMPTS[:1], RESPONSES[:1], pad_id=0, source="ground_truth")
    sampled = replace(collate(PROMPTS[1:], RESPONSES[1:], pad_id=0, source="student"), statistics=statistics)
    imitkd = tokens_processed(merge([truth, sampled], [0, 1], pad_id=0), divergence=True)
    assert (imitkd.student, imitkd.teacher) == (10 + 1 + 4, 10)
