"""`skd specdec --engine vllm` with a real server: its counts against a simulation of its rounds, and the output."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from skd_kfp.pipelines.cli import app
from skd_lib.config import TaskConfig
from skd_lib.data.tokenize import encode_prompt
from skd_lib.models.files import load_tokenizer
from skd_lib.models.loading import load_model
from skd_lib.results import ServedMeasurement, Specdec
from tests.vllm.conftest import EOS, GAMMA, NEW, Pair

pytestmark = pytest.mark.vllm

LINES = [
    "Open the file.",
    "Close the table",
    "Le fichier a",
    "12 and 30",
    "e",
    "The user account is",
    "system",
    "Print",
]
REPEATS = 2


@dataclass
class Found:
    """What the command wrote and showed, and the models and prompts it measured."""

    result: Specdec
    shown: str
    draft: Path
    models: tuple[PreTrainedModel, PreTrainedModel]
    prompts: list[list[int]]

    @property
    def served(self) -> ServedMeasurement:
        assert self.result.served is not None
        return self.result.served


@pytest.fixture(scope="module")
def found(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A draft that is the teacher with some noise, under a name that vLLM misreads."""
    root = tmp_path_factory.mktemp("specdec")
    draft = root / "eagle-x"
    noisy = load_model(pair.folders["teacher"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in noisy.parameters():
            weight += 0.15 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    tokenizer = load_tokenizer(pair.folders["teacher"])
    for saved in (noisy, tokenizer):
        saved.save_pretrained(draft)
    (root / "prompts.txt").write_text("\n".join(LINES), encoding="utf-8")
    command = ["specdec", str(pair.folders["teacher"]), str(draft), "--prompts", str(root / "prompts.txt")]
    command += ["--engine", "vllm", "--vllm-arguments", "--dtype float32", "--gamma", str(GAMMA)]
    command += ["--max-new-tokens", str(NEW), "--batch-sizes", "1,4", "--repeats", str(REPEATS)]
    answer = CliRunner().invoke(app, [*command, "--out", str(root / "out.json")], env={"COLUMNS": "200"})
    assert answer.exit_code == 0, f"{answer.output}\n{answer.exception!r}"
    result = Specdec.model_validate(json.loads((root / "out.json").read_text(encoding="utf-8"))["draft"])
    task = TaskConfig(max_new_tokens=NEW)
    prompts = [encode_prompt(tokenizer, task, line) for line in LINES]
    return Found(result, answer.output, draft, (pair.teacher, noisy), prompts)


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: list[int], tokens: int) -> list[int]:
    """Continue token by token, without a cache and without an end."""
    written: list[int] = []
    for _ in range(tokens):
        written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


def rounds(found: Found, prompt: list[int]) -> list[int]:
    """Return how many drafts stand in each of vLLM's rounds for one prompt.

    The first token comes from reading the prompt. A round drafts GAMMA tokens, also beyond the response's end, and adds
    one of the teacher.
    """
    teacher, draft = found.models
    wanted = greedy(teacher, prompt, NEW + GAMMA + 1)
    end = wanted.index(EOS) + 1 if EOS in wanted[:NEW] else NEW
    accepted, known = [], 1
    while known < end:
        drafted = greedy(draft, prompt + wanted[:known], GAMMA)
        matches = [token == wanted[known + at] for at, token in enumerate(drafted)]
        stands = matches.index(False) if False in matches else GAMMA
        accepted.append(stands)
        known += stands + 1
    return accepted


def test_vllms_counts_are_those_of_its_rounds(found: Found) -> None:
    expected = [stands for prompt in found.prompts for stands in rounds(found, prompt)]
    by_position = [sum(stands > at for stands in expected) for at in range(GAMMA)]
    assert 0.1 * len(expected) < by_position[0] < 0.95 * len(expected)
    for passes in found.served.drafts["draft"].passes:
        counts = passes.counts
        assert counts is not None
        assert counts.drafts == REPEATS * len(expected)
        assert passes.by_prompt == [
            (REPEATS * sum(stands + 1 for stands in row), REPEATS * len(row))
            for row in map(rounds, [found] * 8, found.prompts)
        ]
        assert counts.accepted_by_position == [REPEATS * accepted for accepted in by_position]
    assert found.result.tokens_per_teacher_call == pytest.approx(1 + sum(by_position) / len(expected), rel=1e-5)


def test_the_output_is_the_teachers(found: Found) -> None:
    served = found.served
    assert (served.alone.equal, served.drafts["draft"].equal, served.equal_to_transformers) == (8, 8, 8)
    assert "8 of 8 greedy responses are those of vLLM without a draft" in found.shown


def test_a_cpu_measures_temperature_0_only(found: Found) -> None:
    assert [(each.temperature, each.concurrency) for each in found.served.alone.passes] == [(0, 1), (0, 4)]
    assert "Only temperature 0 was measured" in found.shown


def test_the_line_that_was_started_is_printed(found: Found) -> None:
    line = next(line for line in found.shown.splitlines() if line.startswith("vllm serve"))
    words = shlex.split(line)
    assert json.loads(words[words.index("--speculative-config") + 1])["model"] == str(found.draft)
    assert words[-2:] == ["--dtype", "float32"]
    assert found.result.vllm is not None
    assert (found.result.vllm.command, found.result.vllm.started) == (line, True)
