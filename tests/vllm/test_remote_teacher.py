"""A teacher that `vllm serve` serves, as anybody starts it, against transformers, and a whole run with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from skd_lib.config import SamplingParams, TaskConfig
from skd_lib.config.models import ServedTeacher
from skd_lib.data.tokenize import TokenizedExample
from skd_lib.distillation.batch import collate, response_states
from skd_lib.distillation.teacher_signal import SparseSignal
from skd_lib.errors import SkdError
from skd_lib.models.files import load_tokenizer
from skd_lib.models.heads import lm_logits
from skd_lib.sampling.acceptance import student_only
from skd_lib.served.teacher import RemoteTeacher
from skd_lib.vllm.serve import environment, free_port, launch, running
from tests.conftest import Skd
from tests.vllm.conftest import EOS, NEW, Pair

pytestmark = pytest.mark.vllm

MOST = 64
GREEDY, WARM = SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def served(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedTeacher]:
    port, python = free_port(), environment()
    words = ["serve", str(pair.folders["teacher"]), "--served-model-name", "org/teacher", "--dtype", "float32"]
    words += ["--max-model-len", "256", "--max-logprobs", str(MOST), "--enforce-eager"]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    folder = tmp_path_factory.mktemp("plain")
    with running(lambda log: launch(python, words, {"VLLM_CPU_KVCACHE_SPACE": "1"}, log), port, folder) as engine:
        yield ServedTeacher(url=f"{engine.url}/v1", model="org/teacher")


@pytest.fixture
def teacher(served: ServedTeacher, pair: Pair) -> RemoteTeacher:
    return RemoteTeacher(served, load_tokenizer(pair.folders["teacher"]), TaskConfig(chat_template=False), (EOS,))


def examples(pair: Pair, rows: int = 12) -> list[TokenizedExample]:
    sampler = pair.own(student_only(), (WARM, WARM))
    prompts = pair.prompts(rows)
    responses = sampler.sample(prompts, list(range(rows))).responses()
    return [TokenizedExample(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def test_greedy_responses_are_those_of_transformers(pair: Pair, teacher: RemoteTeacher) -> None:
    assert teacher.takes_ids
    assert teacher.context == 256
    found = teacher.responses(pair.prompts(16), [0] * 16, GREEDY, max_new_tokens=NEW)
    with torch.no_grad():
        for prompt, ids in zip(pair.prompts(16), found, strict=True):
            row = torch.tensor([prompt])
            expected = pair.teacher.generate(
                row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=NEW, eos_token_id=EOS
            )
            assert ids == expected[0, len(prompt) :].tolist()


def test_a_sampled_response_depends_on_its_seed_alone(pair: Pair, teacher: RemoteTeacher) -> None:
    prompts = [pair.prompts(1)[0]] * 8
    first = teacher.responses(prompts, list(range(8)), WARM, max_new_tokens=NEW)
    again = teacher.responses(prompts[:3], [5, 2, 5], WARM, max_new_tokens=NEW)
    assert again == [first[5], first[2], first[5]]
    assert len(set(map(tuple, first))) > 4


def test_log_probabilities_are_those_of_transformers(pair: Pair, teacher: RemoteTeacher) -> None:
    signals = teacher.signals(examples(pair), k=MOST, vocabulary=320)
    found = {tuple(example.prompt_ids): signal for example, signal in signals}
    assert len(found) == 12
    for example in examples(pair):
        rollout = collate([example.prompt_ids], [example.response_ids], pad_id=0, source="ground_truth")
        with torch.no_grad():
            logits_NV = lm_logits(pair.teacher, response_states(pair.teacher, rollout))
        own = SparseSignal.of_logits(logits_NV, MOST, temperature=1.0, vocabulary=320)
        signal = found[tuple(example.prompt_ids)]
        # The logits are of size 10: fp32 knows them to about 1e-5 of that.
        torch.testing.assert_close(signal.log_p_NE[:, :-1], own.log_p_NE[:, :-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(signal.log_p_NE.exp(), own.log_p_NE.exp(), atol=1e-5, rtol=0)
        assert (signal.ids_NK == own.ids_NK).float().mean() > 0.99  # all but what is equal to rounding


def test_more_tokens_than_it_was_started_for(teacher: RemoteTeacher) -> None:
    with pytest.raises(SkdError, match=rf"max allowed: {MOST}.*\n  hint: .*--max-logprobs {MOST + 1}"):
        teacher.read([1], [40], MOST + 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_whole_run(skd: Skd, served: ServedTeacher, pair: Pair, tmp_path: Path) -> None:
    rows = [{"source": f"le fichier {i} et {i * i}", "target": f"the file {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "name": "served",
        "teacher": served.model_dump(),
        "student": str(pair.folders["student"]),
        "data": {"source": {"type": "files", "train": [str(tmp_path / "rows.jsonl")]}},
        "task": {
            "prompt": "{source}\n",
            "max_prompt_tokens": 64,
            "max_new_tokens": 24,
            "metrics": ["chrf", "perplexity"],
        },
        "teacher_sft": {"enabled": False},
        "distill": {
            "method": "supervised_kd",
            "teacher_signal": {"mode": "stored", "top_k": 32},
            "training": {"max_steps": 2, "batch_size": 4},
        },
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    done = skd("run", tmp_path / "run.yaml", "--runs-dir", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/served/summary.json").read_text())
    for role in ("teacher", "student_before", "student_after"):
        assert set(summary["models"][role]) >= {"chrf", "perplexity"}
    assert "registered as skd-student version 1" in done.stdout + done.stderr
