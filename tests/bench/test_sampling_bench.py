"""The benchmark on tiny models: every row is there, and what is timed is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import baselines
from benchmark import app
from sampling import bench_sampling, render, seconds_to_read_weights
from skd_lib.bench.setup import Settings
from skd_lib.config import SamplingParams
from skd_lib.errors import SkdError
from skd_lib.models.heads import decoder
from skd_lib.sampling.acceptance import lossless, teacher_only, top_k
from skd_lib.sampling.drafting import weights_read
from skd_lib.sampling.timing import bare, recorded
from tests.conftest import SaveTinyModel, TinyModel
from tests.sampling.test_engine import GREEDY, PROMPTS, VOCABULARY, pair, rows, sampler

WAYS = {
    "generate": 3,
    "everything": 3,
    "token-by-token": 3,
    "published shape": 1,
    "top_k": 3,
    "top_k adaptive": 3,
    "lossless": 3,
    "lossless adaptive": 3,
    "assisted": 1,
    "lossless, 1 row": 1,
    "lossless adaptive, 1 row": 1,
}
ENGINE = [way for way in WAYS if way.startswith(("everything", "top_k", "lossless"))]


@pytest.mark.slow
def test_the_command_prints_and_writes_every_row(save_tiny_model: SaveTinyModel, tmp_path: Path) -> None:
    teacher, student = save_tiny_model(tmp_path / "teacher", layers=3), save_tiny_model(tmp_path / "student", seed=1)
    options = ["--teacher", teacher, "--student", student, "--batch-size", 3, "--prompt-tokens", 8, "--new-tokens", 6]
    options += ["--gamma", 2, "--repeats", 2, "--dtype", "float32", "--device", "cpu"]
    options += ["--output", tmp_path / "new/bench.json"]
    done = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["sampling", *map(str, options)])
    assert done.exit_code == 0, done.output
    values = json.loads((tmp_path / "new/bench.json").read_text())
    assert {row["name"]: row["batch_size"] for row in values["rows"]} == WAYS
    assert values["top_k"] == 25
    for row in values["rows"]:
        assert row["name"] in done.output
        assert row["tokens"] == 6 * row["batch_size"]
        assert len(row["seconds"]) == 2
        assert row["tokens_per_second"] > 0
        assert (row["share_of_floor"] is not None) == (row["name"] in ENGINE)
    assert set(values["speedups"]) >= {"everything / generate", "lossless, 1 row / assisted"}


@pytest.mark.slow
def test_only_some_rows(save_tiny_model: SaveTinyModel, tmp_path: Path) -> None:
    teacher, student = (str(save_tiny_model(tmp_path / str(n), seed=n)) for n in (1, 2))
    settings = Settings(teacher, student, prompt_tokens=8, new_tokens=6, repeats=1, dtype="float32")
    result = bench_sampling(settings, only=["everything", "generate", "top_k"])
    assert {row.name for row in result.rows} == {"generate", "everything", "top_k"}
    assert set(result.speedups()) == {"everything / generate"}
    assert len(render(bench_sampling(settings, only=["top_k"]))) == 1


@pytest.mark.slow
def test_k_as_a_share_of_the_vocabulary_sets_the_acceptance_of_random_weights(
    save_tiny_model: SaveTinyModel, tmp_path: Path
) -> None:
    random = {"initializer_range": 0.02, "tie_word_embeddings": False}
    teacher, student = (str(save_tiny_model(tmp_path / str(n), seed=n, **random)) for n in (1, 2))
    settings = Settings(teacher, student, prompt_tokens=8, new_tokens=30, repeats=1, acceptance=0.75, dtype="float32")
    result = bench_sampling(settings)
    assert result.top_k == 240
    assert next(row.acceptance for row in result.rows if row.name == "top_k") == pytest.approx(0.75, abs=0.1)


def test_mistakes_are_named() -> None:
    with pytest.raises(SkdError, match="no shape `gpt-5`"):
        bench_sampling(Settings(teacher="random:gpt-5"))
    with pytest.raises(SkdError, match="no shape `smollm2-135m-0-layers`"):
        bench_sampling(Settings(teacher="random:smollm2-135m-0-layers"))
    with pytest.raises(SkdError, match="--dtype: no floating-point dtype `bf16`"):
        bench_sampling(Settings(dtype="bf16"))
    with pytest.raises(SkdError, match="--only: no way to sample is called `top-k`\n  hint: known: generate; "):
        bench_sampling(Settings(), only=["top-k"])


class Spy:
    """The tokens that a greedy baseline samples, read off the models' inputs."""

    def __init__(self, model: Any) -> None:
        self.calls: list[torch.Tensor] = []
        decoder(model).register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls.append(kwargs["input_ids"])


@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
def test_the_baselines_sample_what_the_engine_samples(tiny_model: TinyModel, k: int) -> None:
    """Greedily all ways give the same tokens: a baseline that does something else would be no comparison."""
    models: dict[str, Any] = pair(tiny_model)
    s = sampler(models, top_k(k), eos_ids=(), student_params=GREEDY, teacher_params=GREEDY)
    expected = rows(s.sample(PROMPTS, [0] * 4))
    spy = Spy(models["teacher"])

    assert baselines.token_by_token(*models.values(), k, PROMPTS, 12, GREEDY, GREEDY) == 4 * 12
    fed = torch.cat(spy.calls[1:], dim=1).tolist()
    assert fed == [row[:11] for row in expected]

    for prompt, row in zip(PROMPTS, expected, strict=True):
        for gamma in (1, 3, 5):
            assert baselines.published_shape(*models.values(), k, gamma, prompt, 12, GREEDY, GREEDY) == 12
            assert spy.calls[-1].tolist() == [prompt + row]  # the loss's forward


def test_generate_samples_as_many_tokens_as_it_should(tiny_model: TinyModel) -> None:
    models: dict[str, Any] = pair(tiny_model)
    params = SamplingParams(top_p=0.9)
    for model in models.values():
        model.generation_config.eos_token_id = list(range(40))
    assert baselines.generate(models["student"], PROMPTS, 12, params) == 4 * 12
    assert baselines.generate(models["teacher"], PROMPTS[:1], 12, params, assistant=models["student"], gamma=3) == 12


def test_the_floor_makes_the_same_forwards(tiny_model: TinyModel) -> None:
    models: dict[str, Any] = pair(tiny_model)
    s = sampler(models, lossless(), eos_ids=(), gamma=3, keep_teacher_states=True)
    with recorded(*models.values()) as forwards:
        statistics = s.sample(PROMPTS, range(4)).statistics
    heads = {name: [f.at_head for f in forwards if f.model is model and f.at_head] for name, model in models.items()}
    assert sum(heads["student"]) == statistics.student_calls
    assert sum(heads["teacher"]) == 4 * statistics.teacher_calls  # gamma positions and the bonus

    seen: list[tuple[int, int]] = []
    for model in models.values():
        decoder(model).register_forward_hook(lambda module, args, output: seen.append(output[0].shape[:2]))
    bare(forwards)()
    assert [tuple(shape) for shape in seen] == [(f.rows, f.tokens) for f in forwards]


def test_bare_forwards_attend_to_what_came_before(tiny_model: TinyModel) -> None:
    """Same tokens, same states as the model on the whole sequence: the floor leaves no work out."""
    model = tiny_model(seed=2, vocab_size=VOCABULARY)
    s = sampler({"student": None, "teacher": model}, teacher_only(), eos_ids=(), max_new_tokens=4)
    with recorded(model) as forwards:
        s.sample([[1, 5, 9]], [0])
    states: list[torch.Tensor] = []
    decoder(model).register_forward_hook(lambda module, args, output: states.append(output[0]))
    bare(forwards)()
    with torch.no_grad():
        whole = decoder(model)(torch.zeros(1, 6, dtype=torch.long)).last_hidden_state
    torch.testing.assert_close(torch.cat(states[:-1], dim=1)[:, :6], whole, rtol=1e-4, atol=1e-5)


def test_weights_are_read_once_a_forward(tiny_model: TinyModel) -> None:
    model = tiny_model(vocab_size=VOCABULARY)
    with recorded(model) as forwards:
        sampler({"student": None, "teacher": model}, teacher_only(), eos_ids=(), max_new_tokens=4).sample(
            PROMPTS, range(4)
        )
    assert len(forwards) == 1 + 4
    assert seconds_to_read_weights(forwards, 1000.0) == pytest.approx(5 * 4 * weights_read(model) / 1000)
