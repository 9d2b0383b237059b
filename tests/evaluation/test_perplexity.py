from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from skd_lib.config import EvaluationConfig, TaskConfig
from skd_lib.data.examples import Example, make_example
from skd_lib.data.tokenize import answer_end_id, encode
from skd_lib.errors import SkdError
from skd_lib.evaluation.evaluate import evaluate
from skd_lib.evaluation.perplexity import reference_losses
from skd_lib.evaluation.predictions import perplexity
from tests.conftest import TinyModel

EXAMPLES = [
    make_example("Le fichier", "The file"),
    make_example("x", "Please enter a valid email address for the user account, and do it again."),
    make_example("Voulez-vous continuer ? " * 3, "Do you want to continue? 你好"),
    make_example("42", "4"),
    make_example("empty", " "),
]
CONFIG = EvaluationConfig(batch_size=2, bootstrap_samples=100)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3"])
def test_losses_are_those_of_transformers(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, arch: str
) -> None:
    """Ragged rows in a batch, against transformers' own loss of each row alone."""
    model, task = tiny_model(arch, seed=3), TaskConfig(max_new_tokens=20)
    losses = reference_losses(model, tiny_tokenizer, EXAMPLES, task, batch_size=3)
    end = answer_end_id(tiny_tokenizer, task)
    for example, loss in zip(EXAMPLES, losses, strict=True):
        row = encode(tiny_tokenizer, task, example, end)
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        labels = ids.clone()
        labels[0, : len(row.prompt_ids)] = -100
        with torch.no_grad():
            expected = float(model(input_ids=ids, labels=labels).loss)
        assert loss.tokens == len(row.response_ids) <= 20
        assert loss.nll / loss.tokens == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_over_all_tokens(tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, task = tiny_model(), TaskConfig(max_new_tokens=8, metrics=["perplexity", "rougeL"])
    result = evaluate(model, tiny_tokenizer, EXAMPLES[:4], task, CONFIG)
    losses = reference_losses(model, tiny_tokenizer, EXAMPLES[:4], task, batch_size=4)
    wanted = math.exp(sum(loss.nll for loss in losses) / sum(loss.tokens for loss in losses))
    score = result.scores.metrics["perplexity"]
    assert score.score == pytest.approx(wanted, rel=1e-5)
    assert score.low <= score.score <= score.high
    first = result.predictions[0]
    assert first.scores["perplexity"] == pytest.approx(math.exp(losses[0].nll / losses[0].tokens), rel=1e-5)
    assert first.reference_tokens == losses[0].tokens


def test_a_model_that_yields_nan_loses_its_perplexity_only(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    task = TaskConfig(max_new_tokens=4, metrics=["perplexity", "chrf"])
    result = evaluate(model, tiny_tokenizer, EXAMPLES, task, CONFIG)
    assert "likelihood of 5 of 5 references is not a number" in result.scores.missing["perplexity"]
    assert result.scores.metrics["chrf"].score >= 0
    assert result.predictions[0].reference_nll is None
    with pytest.raises(SkdError, match="is not a number"):
        evaluate(model, tiny_tokenizer, EXAMPLES, TaskConfig(max_new_tokens=4, metrics=["perplexity"]), CONFIG)


def test_a_prompt_beyond_the_context_costs_its_own_answer_only(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(max_position_embeddings=64)
    examples: list[Example] = [make_example("word " * 60, "word"), make_example("x", "y")]
    task = TaskConfig(max_new_tokens=6, metrics=["chrf"])
    result = evaluate(model, tiny_tokenizer, examples, task, CONFIG)
    alone = evaluate(model, tiny_tokenizer, examples[1:], task, CONFIG)
    assert (result.predictions[0].prediction, result.predictions[0].truncated) == ("", True)
    assert result.predictions[1] == alone.predictions[0]
    assert "1 of 2 prompts and their answers do not fit" in caplog.text


def test_a_reference_beyond_the_context_is_left_out(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-2 has a table of positions: reading beyond it is an error of the device."""
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config).eval()
    examples: list[Example] = [make_example("word " * 60, "word"), make_example("x", "y"), make_example("y", "x")]
    task = TaskConfig(max_new_tokens=6, metrics=["perplexity", "chrf"], chat_template=False, prompt="{source}")
    result = evaluate(model, tiny_tokenizer, examples, task, CONFIG)
    alone = evaluate(model, tiny_tokenizer, examples[1:], task, CONFIG)
    score = result.scores.metrics["perplexity"]
    assert score.score == pytest.approx(alone.scores.metrics["perplexity"].score, rel=1e-6)
    assert score.scored == 2
    assert "perplexity" not in result.predictions[0].scores
    assert "1 of 3 references do not fit" in caplog.text
    with pytest.raises(SkdError, match="no reference fits the model's context"):
        perplexity(result.predictions[:1])


def test_without_any_answer_all_metrics_are_missing(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [make_example(example.source, "") for example in EXAMPLES[:3]]
    task = TaskConfig(max_new_tokens=4, metrics=["chrf", "perplexity"])
    result = evaluate(tiny_model(), tiny_tokenizer, prompts, task, CONFIG)
    assert result.scores.metrics == {}
    assert result.scores.missing.keys() == {"chrf", "perplexity"}
    assert "no answers to compare with" in result.scores.missing["chrf"]
    assert [row.tokens > 0 for row in result.predictions] == [True] * 3
