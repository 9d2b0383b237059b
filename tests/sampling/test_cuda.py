"""Rounds as real CUDA graphs. `test_graphs.py` has what can be tested without a GPU."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from skd_lib.config import SamplingParams
from skd_lib.models.heads import decoder
from skd_lib.models.loading import avoid_cudnn_attention
from skd_lib.sampling.acceptance import AcceptanceRule, lossless, student_only, teacher_only, top_k
from skd_lib.sampling.drafting import AdaptiveGamma
from skd_lib.sampling.engine import Sampler, Samples
from skd_lib.sampling.timing import bare, recorded
from tests.conftest import TinyModel
from tests.sampling.test_architectures import with_lora
from tests.sampling.test_engine import (
    ARCHITECTURES,
    GREEDY,
    PROMPTS,
    STUDENT_SAMPLES,
    assert_states_are_fresh,
    pair,
    rows,
    sampler,
)
from tests.sampling.test_graphs import MANY, RULES, SEEDS
from tests.sampling.test_memory import assert_same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LONG = [[1, *range(3, 40)] * 2, *MANY[1:]]  # longer than a bucket


@pytest.fixture(autouse=True)
def _as_loaded() -> None:
    avoid_cudnn_attention()


def on_gpu(models: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {name: None if model is None else model.to("cuda", dtype) for name, model in models.items()}


def captured(s: Sampler) -> int:
    """Graphs that there are; none, if capturing had failed."""
    assert s.graphed_rounds is not None
    return s.graphed_rounds.captured


@contextmanager
def no_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, logger="skd_lib"):
        yield
    assert [record.message for record in caplog.records if record.name.startswith("skd_lib")] == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_samples_are_those_without_graphs(
    tiny_model: TinyModel, arch: str, rule: AcceptanceRule, caplog: pytest.LogCaptureFixture
) -> None:
    s = sampler(
        on_gpu(pair(tiny_model, arch)),
        rule,
        gamma=3,
        max_new_tokens=20,
        batch_size=3,
        keep_teacher_states=rule.asks_teacher,
    )
    plain = replace(s, graphs=False)
    with no_warnings(caplog):
        for prompts in (MANY, MANY[3:], LONG, MANY):
            assert_same(s.sample(prompts, SEEDS[: len(prompts)]), plain.sample(prompts, SEEDS[: len(prompts)]))
    assert captured(s) > 0


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("params", [GREEDY, STUDENT_SAMPLES], ids=["greedy", "sampled"])
def test_the_samples_are_those_of_the_cpu(tiny_model: TinyModel, rule: AcceptanceRule, params: SamplingParams) -> None:
    """In double precision, so that the two differ in nothing that could tip a sample."""
    models = {name: model.double() for name, model in pair(tiny_model).items()}  # type: ignore[attr-defined]
    options: dict[str, Any] = {"gamma": 3, "max_new_tokens": 20, "student_params": params, "teacher_params": params}
    expected = sampler(models, rule, **options).sample(LONG, SEEDS)
    s = sampler(on_gpu(models, torch.float64), rule, **options)
    assert rows(s.sample(LONG, SEEDS)) == rows(expected)
    assert captured(s) > 0


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("rule", [top_k(6), lossless(), teacher_only()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_teacher_states_equal_a_fresh_forward(
    tiny_model: TinyModel, arch: str, rule: AcceptanceRule, dtype: torch.dtype
) -> None:
    models = on_gpu(pair(tiny_model, arch), dtype)
    s = sampler(models, rule, keep_teacher_states=True, batch_size=2)
    samples = s.sample(PROMPTS, range(4))
    assert samples.teacher_states_BTH is not None
    assert samples.teacher_states_BTH.dtype == dtype
    assert captured(s) > 0
    assert_states_are_fresh(models, PROMPTS, samples, tolerance=1e-3 if dtype == torch.float32 else 0.1)


@torch.no_grad()
def assert_likeliest(model: Any, prompts: list[list[int]], samples: Samples, tolerance: float) -> None:
    """Every token is the model's likeliest in a fresh forward pass, but for rounding."""
    for prompt, row in zip(prompts, rows(samples), strict=True):
        logits_TV = model(torch.tensor([prompt + row], device="cuda")).logits[0, len(prompt) - 1 : -1].float()
        chosen_T = logits_TV.gather(1, torch.tensor(row, device="cuda").unsqueeze(1)).squeeze(1)
        assert (logits_TV.max(-1).values - chosen_T).max() <= tolerance * logits_TV.abs().max()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bfloat16_decodes_greedily(tiny_model: TinyModel, arch: str) -> None:
    models = on_gpu(pair(tiny_model, arch), torch.bfloat16)
    for rule, model in ((student_only(), models["student"]), (teacher_only(), models["teacher"])):
        s = sampler(models, rule, student_params=GREEDY, teacher_params=GREEDY, max_new_tokens=20)
        assert_likeliest(model, LONG, s.sample(LONG, SEEDS), tolerance=0.03)
        assert captured(s) > 0


def test_an_optimiser_step_is_seen_under_autocast(tiny_model: TinyModel) -> None:
    """Weights in fp32, rounds in bf16: graphs cast the weights themselves, or they would read an old cast."""
    student = on_gpu(pair(tiny_model))["student"]
    s = sampler({"student": student, "teacher": None}, student_only(), student_params=GREEDY, max_new_tokens=20)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.05)
    seen = []
    with torch.autocast("cuda", torch.bfloat16):
        for _ in range(3):
            samples = s.sample(MANY, SEEDS)
            seen.append(rows(samples))
            graphs = captured(s)
            assert_likeliest(student, MANY, samples, tolerance=0.03)
            student(torch.tensor([[1, 5, 9, 11]], device="cuda")).logits.float().logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert seen[0] != seen[1] != seen[2]
    assert captured(s) == graphs > 0


def test_adapters_are_captured_and_switched_off(tiny_model: TinyModel) -> None:
    student: Any = with_lora(tiny_model(seed=1, vocab_size=48), target_modules=["q_proj"]).to("cuda")
    s = sampler({"student": student, "teacher": None}, student_only(), max_new_tokens=20, eos_ids=())
    plain = replace(s, graphs=False)
    adapted = rows(s.sample(MANY, SEEDS))
    assert adapted == rows(plain.sample(MANY, SEEDS))
    assert captured(s) > 0
    with student.disable_adapter():
        assert rows(s.sample(MANY, SEEDS)) == rows(plain.sample(MANY, SEEDS)) != adapted


def test_adaptive_draft_lengths_and_a_second_call(tiny_model: TinyModel) -> None:
    s = sampler(on_gpu(pair(tiny_model)), top_k(20), gamma=AdaptiveGamma(4), max_new_tokens=30, eos_ids=())
    plain = replace(s, graphs=False)
    assert_same(s.sample(MANY, SEEDS), plain.sample(MANY, SEEDS))
    graphs = captured(s)
    assert_same(s.sample(MANY, SEEDS), plain.sample(MANY, SEEDS))
    assert captured(s) == graphs > 0


def test_models_with_other_positions_run_without_graphs(tiny_model: TinyModel) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    models = on_gpu({"student": tiny_model(seed=1, vocab_size=48, rope_parameters=rope), "teacher": None})
    s = sampler(models, student_only(), max_new_tokens=20)
    assert s.graphed_rounds is None
    assert len(rows(s.sample(MANY, SEEDS))) == len(MANY)


def test_memory_is_given_back(tiny_model: TinyModel) -> None:
    models = on_gpu(pair(tiny_model))
    s = sampler(models, top_k(6), max_new_tokens=20)
    left = []
    for _ in range(5):
        s.sample(MANY, SEEDS)
        assert captured(s) > 0
        assert s.graphed_rounds is not None
        s.graphed_rounds.clear()
        gc.collect()
        torch.cuda.synchronize()
        left.append(torch.cuda.memory_allocated())
    assert left[-1] - left[0] < 2**20  # the first time cuBLAS makes its workspaces


def test_rows_that_do_not_fit_into_the_gpu_are_halved(tiny_model: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    """A real shortage: most of the GPU is out of bounds for this process."""
    models = {
        "student": tiny_model(seed=1, vocab_size=48, max_position_embeddings=4096),
        "teacher": tiny_model(seed=2, layers=3, hidden=48, vocab_size=48, max_position_embeddings=4096),
    }
    s = sampler(on_gpu(models), top_k(6), gamma=3, max_new_tokens=20)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 48, (16, 3000), generator=generator).tolist()
    expected = replace(s, graphs=False, batch_size=1).sample(prompts, range(16))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 500 * 2**20) / total)
    try:
        with caplog.at_level(logging.WARNING, logger="skd_lib"):
            assert rows(s.sample(prompts, range(16))) == rows(expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert s.batch_limit.slots is not None
    assert any("out of memory while sampling 16 rows" in record.message for record in caplog.records)


def test_the_benchmarks_floor_is_captured(tiny_model: TinyModel) -> None:
    models = on_gpu(pair(tiny_model))
    s = replace(sampler(models, top_k(6), eos_ids=()), graphs=False)
    with recorded(*models.values()) as forwards:
        s.sample(PROMPTS, range(4))
    assert len(forwards) > 32  # more than one graph
    floor = bare(forwards)
    by_python: list[torch.nn.Module] = []
    for model in models.values():
        decoder(model).register_forward_hook(lambda module, *_: by_python.append(module))
    floor()
    torch.cuda.synchronize()
    assert by_python == []
