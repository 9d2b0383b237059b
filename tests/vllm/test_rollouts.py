"""vLLM's samples, states and signals against this project's own engine, in fp32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests
import torch
from scipy.stats import chisquare

from skd_lib.config import SamplingParams
from skd_lib.distillation.batch import collate, teacher_signals
from skd_lib.distillation.teacher_signal import SparseSignal
from skd_lib.errors import SkdError
from skd_lib.models.heads import lm_logits
from skd_lib.sampling.acceptance import AcceptanceRule, min_prob, mixture, student_only, teacher_only, top_k
from skd_lib.sampling.samples import Samples
from skd_lib.vllm.client import Engine
from skd_lib.vllm.serve import serving
from tests.vllm.conftest import EOS, GAMMA, NEW, Pair, served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

GREEDY = (SamplingParams(temperature=0), SamplingParams(temperature=0))
SAMPLED = (SamplingParams(temperature=1.0, top_p=0.9), SamplingParams(temperature=0.7, top_p=0.95))
SEEDS = list(range(1000, 1016))


CRAMPED = ("--max-num-batched-tokens", "40", "--block-size", "32", "--num-gpu-blocks-override", "14")
"""Prompts are read in pieces of 40 tokens, and there is memory for the keys and values of 416."""


@pytest.fixture(scope="module")
def cramped(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A server with room for few rows, and too little memory for these."""
    with serving(served(pair, 6, *CRAMPED), tmp_path_factory.mktemp("cramped")) as engine:
        yield engine


@pytest.fixture
def rows() -> int:
    return len(SEEDS)


def counted(server: Engine, name: str) -> float:
    """Return the sum of one of vLLM's counters."""
    lines = requests.get(f"{server.url}/metrics", timeout=10).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}_total{{"))


def rows_of(samples: Samples) -> list[tuple[list[int], list[int], list[int]]]:
    lengths = samples.lengths
    tensors = (samples.tokens_BT, samples.source_BT, samples.proposals_BT)
    return [tuple(x[row, :n].tolist() for x in tensors) for row, n in enumerate(lengths)]  # type: ignore[misc]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "rule",
    [top_k(0), top_k(1), top_k(25), top_k(320), min_prob(0.05), student_only(), teacher_only()],
    ids=lambda rule: rule.name,
)
def test_samples_are_those_of_the_own_engine(
    pair: Pair,
    server: Engine,
    tmp_path: Path,
    rows: int,
    rule: AcceptanceRule,
    params: tuple[SamplingParams, SamplingParams],
) -> None:
    prompts, seeds = pair.prompts(rows), SEEDS[:rows]
    want = pair.own(rule, params).sample(prompts, seeds)
    got = pair.engine(server, tmp_path, params).sampler(rule, 0).sample(prompts, seeds)
    assert rows_of(got) == rows_of(want)
    assert torch.equal(got.truncated_B, want.truncated_B)
    if rule.asks_teacher:
        assert got.teacher_states_BTH is not None
        assert want.teacher_states_BTH is not None
        ours, theirs = want.teacher_states_BTH[want.mask_BT], got.teacher_states_BTH[got.mask_BT]
        assert torch.allclose(ours, theirs, atol=3e-4)
    if rule.drafts and rule.asks_teacher:
        names = ("sequences", "tokens", "accepted", "replaced", "tested", "teacher_calls", "truncated")
        assert {n: getattr(got.statistics, n) for n in names} == {n: getattr(want.statistics, n) for n in names}


def test_the_teachers_most_likely_tokens_come_back(pair: Pair, server: Engine, tmp_path: Path) -> None:
    prompts = pair.prompts(6)
    want = pair.own(top_k(8), SAMPLED).sample(prompts, SEEDS[:6])
    got = pair.engine(server, tmp_path, SAMPLED, signal="top_k").sampler(top_k(8), 0).sample(prompts, SEEDS[:6])
    assert got.teacher_top is not None
    assert want.teacher_states_BTH is not None
    logits_NV = lm_logits(pair.teacher, want.teacher_states_BTH[want.mask_BT])
    own = SparseSignal.of_logits(logits_NV, 8, temperature=1.0, vocabulary=320)
    log_p_BTE, _ = got.teacher_top
    assert torch.allclose(log_p_BTE[got.mask_BT], own.log_p_NE, atol=1e-3)


def test_signals_along_given_responses(pair: Pair, server: Engine, tmp_path: Path) -> None:
    prompts = pair.prompts(5)
    responses = [prompt[: 3 + row] for row, prompt in enumerate(pair.prompts(5, shortest=10))]
    got = pair.engine(server, tmp_path, SAMPLED).signals_along(list(zip(prompts, responses, strict=True)))
    want = teacher_signals(pair.teacher, collate(prompts, responses, pad_id=0, source="ground_truth"))
    for ours, theirs in zip(want, got, strict=True):
        assert torch.allclose(ours.states_NH, theirs.states_NH, atol=3e-4)  # type: ignore[attr-defined]


def test_the_distribution_is_the_algorithms(pair: Pair, server: Engine, tmp_path: Path) -> None:
    """Frequencies of (tokens, writers) of two tokens out of 8, against the own reference's by counting."""
    engine = pair.engine(server, tmp_path, (SamplingParams(), SamplingParams()), vocabulary=8, new=2)
    rows = 3000
    prompt = [[5, 6, 7, 3]] * rows
    got = engine.sampler(top_k(3), 0).sample(prompt, range(rows))
    counts = Counter((tuple(tokens), tuple(source)) for tokens, source, _ in rows_of(got))
    expected = enumerated(pair, prompt[0])
    assert set(counts) <= set(expected)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    frequent = [key for key, p in expected.items() if p * rows >= 5]
    rest = rows - sum(counts[key] for key in frequent)
    observed = [*(counts[key] for key in frequent), rest]
    wanted = [*(expected[key] * rows for key in frequent)]
    wanted.append(rows - sum(wanted))
    assert chisquare(observed, wanted).pvalue > 1e-3


def enumerated(pair: Pair, prompt: list[int]) -> dict[tuple[tuple[int, ...], tuple[int, ...]], float]:
    """Probabilities of responses of two tokens by top-K with K = 3: by plain forwards, without any sampler."""

    def step(tokens: list[int]) -> dict[tuple[int, int], float]:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            q_V, raw_V = (model(ids).logits[0, -1, :8] for model in (pair.student, pair.teacher))
        q, p = q_V.softmax(-1), raw_V.softmax(-1)
        accepted = [int((raw_V > raw_V[t]).sum()) < 3 for t in range(8)]
        rejected = sum(float(q[t]) for t in range(8) if not accepted[t])
        student = {(t, 0): float(q[t]) for t in range(8) if accepted[t]}
        return student | {(t, 1): rejected * float(p[t]) for t in range(8)}

    found: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for (first, who), p in step(prompt).items():
        if first == 2:  # EOS
            found[(first,), (who,)] = p
            continue
        for (second, whose), share in step([*prompt, first]).items():
            found[(first, second), (who, whose)] = p * share
    return found


def test_new_weights_arrive_with_each_step(pair: Pair, server: Engine, tmp_path: Path) -> None:
    prompts = pair.prompts(8)
    engine = pair.engine(server, tmp_path, SAMPLED)
    before = {name: value.clone() for name, value in pair.student.state_dict().items()}
    seen = []
    try:
        for step in range(3):
            want = pair.own(top_k(8), SAMPLED).sample(prompts, SEEDS[:8])
            got = engine.sampler(top_k(8), step).sample(prompts, SEEDS[:8])
            assert rows_of(got) == rows_of(want)
            seen.append(rows_of(got))
            generator = torch.Generator().manual_seed(step)
            for parameter in pair.student.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    finally:
        pair.student.load_state_dict(before)
    assert seen[0] != seen[1] != seen[2]


def test_slots_chunks_prefixes_and_lost_memory_change_nothing(pair: Pair, cramped: Engine, tmp_path: Path) -> None:
    """Long prompts with a common beginning; rows whose memory vLLM takes away are sampled once more."""
    prefix = pair.prompts(1, 40, 41)[0]
    prompts = [prefix + prompt for prompt in pair.prompts(12)]
    want = pair.own(top_k(8), SAMPLED).sample(prompts, SEEDS[:12])
    assert want.teacher_states_BTH is not None
    engine = pair.engine(cramped, tmp_path, SAMPLED)
    for _ in range(5):  # which rows vLLM runs at the same time depends on when their requests arrive
        before = counted(cramped, "request_success")
        got = engine.sampler(top_k(8), 0).sample(prompts, SEEDS[:12])
        assert rows_of(got) == rows_of(want)
        assert got.teacher_states_BTH is not None
        assert torch.allclose(want.teacher_states_BTH[want.mask_BT], got.teacher_states_BTH[got.mask_BT], atol=3e-4)
        if counted(cramped, "num_preemptions") > 0:
            break
    assert counted(cramped, "num_preemptions") > 0
    assert counted(cramped, "prefix_cache_hits") > 0
    assert counted(cramped, "request_success") - before > len(prompts)  # some were sampled twice


def test_processes_that_share_the_teacher_sample_as_one(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tensor-parallel ranks, of which the first one keeps the notes."""
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")  # vLLM wants a NUMA node for each
    prompts = pair.prompts(6)
    want = pair.own(top_k(8), SAMPLED).sample(prompts, SEEDS[:6])
    with serving(replace(served(pair, 6), tensor_parallel=2), tmp_path / "server") as server:
        engine = pair.engine(server, tmp_path / "weights", SAMPLED)
        got = engine.sampler(top_k(8), 0).sample(prompts, SEEDS[:6])
        along = engine.signals_along([(prompts[0], want.tokens_BT[0, : want.lengths[0]].tolist())])
    assert rows_of(got) == rows_of(want)
    assert got.teacher_states_BTH is not None
    states_TH = got.teacher_states_BTH[0, : want.lengths[0]]
    assert torch.allclose(states_TH, along[0].states_NH, atol=3e-4)  # type: ignore[attr-defined]


def test_prompts_that_end_with_an_end_of_sequence(pair: Pair, server: Engine, tmp_path: Path) -> None:
    """vLLM would stop at the held-back token, whatever `min_tokens` says."""
    prompts = [[*prompt, EOS] for prompt in pair.prompts(8)]
    engine = pair.engine(server, tmp_path, SAMPLED)
    ours = pair.own(top_k(8), SAMPLED).sample(prompts, SEEDS[:8])
    theirs = engine.sampler(top_k(8), 0).sample(prompts, SEEDS[:8])
    assert rows_of(theirs) == rows_of(ours)
    assert theirs.truncated_B.tolist() == ours.truncated_B.tolist()
    assert 0 < sum(theirs.truncated_B.tolist()) < 8


def test_a_server_for_other_drafts_or_shorter_rows_is_refused(pair: Pair, server: Engine, tmp_path: Path) -> None:
    engine = pair.engine(server, tmp_path, SAMPLED)
    with pytest.raises(SkdError, match=rf"drafts {GAMMA} tokens at once(.|\n)*--gamma 7"):
        replace(engine, gamma=7).sampler(top_k(8), 0).sample(pair.prompts(1), SEEDS[:1])
    with pytest.raises(SkdError, match=r"takes 95 tokens(.|\n)*--max-len 96"):
        engine.sampler(top_k(8), 0).sample([[5] * (96 - NEW)], SEEDS[:1])
    with pytest.raises(SkdError, match=r"fewer than 2 tokens(.|\n)*template"):
        engine.sampler(top_k(8), 0).sample([[5]], SEEDS[:1])


def test_rules_that_read_the_students_probabilities_are_refused(pair: Pair, tmp_path: Path) -> None:
    engine = pair.engine(Engine("http://127.0.0.1:9"), tmp_path, SAMPLED)
    with pytest.raises(SkdError, match="cannot sample by the rule mixture"):
        engine.sampler(mixture(0.5), 0)


def test_all_routes_want_the_token(server: Engine) -> None:
    assert requests.get(f"{server.url}/health", timeout=10).ok
    for method, path in (("POST", "/collective_rpc"), ("POST", "/inference/v1/generate"), ("GET", "/v1/models")):
        answer = requests.request(method, f"{server.url}{path}", json={}, timeout=10)
        assert answer.status_code == 401, path
        wrong = {"Authorization": "Bearer wrong"}
        assert requests.request(method, f"{server.url}{path}", json={}, headers=wrong, timeout=10).status_code == 401


def test_lengths_fit(pair: Pair) -> None:
    assert max(map(len, pair.prompts(16))) + NEW + GAMMA + 2 <= 96 + GAMMA + 2
