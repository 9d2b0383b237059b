from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skd_lib.config import TaskConfig
from skd_lib.data.tokenize import decode_answer, encode_prompt
from skd_lib.errors import SkdError
from skd_lib.evaluation.generate import Answer, generate, stop_condition
from tests.conftest import CHAT_TEMPLATE, TinyModel
from tests.data.test_conversation_tokens import THINKING

SOURCES = [
    "Le fichier a été enregistré.",
    "x",
    "Please enter a valid email address for the user account, then do it again and again.",
    "42",
    "Voulez-vous continuer ? 你好",
]


def task(**changes: Any) -> TaskConfig:
    return TaskConfig(**({"max_new_tokens": 20} | changes))


def by_transformers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, settings: TaskConfig, eos: list[int]
) -> list[Answer]:
    """transformers' own greedy decoding, one padded batch."""
    prompts = [encode_prompt(tokenizer, settings, source) for source in SOURCES]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    width = batch["input_ids"].shape[1]
    output = model.generate(
        **batch, do_sample=False, max_new_tokens=settings.max_new_tokens, eos_token_id=eos, pad_token_id=0
    )
    answers = []
    for row in output[:, width:].tolist():
        ends = [at + 1 for at, token in enumerate(row) if token in eos]
        ids = row[: ends[0]] if ends else row
        answers.append(Answer(decode_answer(tokenizer, settings, ids), len(ids), not ends))
    return answers


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "gemma3"])
def test_answers_are_those_of_transformers(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, arch: str, batch_size: int
) -> None:
    eos = list(range(2, 26))  # so many that random models end some answers, at different lengths
    model = tiny_model(arch, seed=3, eos_token_id=eos)
    answers = generate(model, tiny_tokenizer, SOURCES, task(), batch_size=batch_size)
    assert answers == by_transformers(model, tiny_tokenizer, task(), eos)
    assert len({answer.tokens for answer in answers}) > 1


def test_sampling_defaults_of_the_model_do_not_leak_in(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model()
    plain = generate(model, tiny_tokenizer, SOURCES, task(), batch_size=4)
    model.generation_config.update(do_sample=True, top_k=50, temperature=3.0, repetition_penalty=5.0)
    assert generate(model, tiny_tokenizer, SOURCES, task(), batch_size=4) == plain


def test_a_stop_string_ends_the_row_and_nothing_else(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    whole = generate(model, tiny_tokenizer, SOURCES, task(), batch_size=2)
    stop = [whole[2].text[6:8]]
    stopped = generate(model, tiny_tokenizer, SOURCES, task(stop=stop), batch_size=2)
    assert stopped[2].tokens < whole[2].tokens
    assert not stopped[2].truncated
    # Ending early changes the cost, never the text.
    monkeypatch.setattr("skd_lib.evaluation.generate.stop_condition", lambda *_: None)
    unstopped = generate(model, tiny_tokenizer, SOURCES, task(stop=stop), batch_size=2)
    assert [answer.text for answer in stopped] == [answer.text for answer in unstopped]
    for before, after in zip(whole, stopped, strict=True):
        assert after.text == before.text.partition(stop[0])[0].strip()


@pytest.mark.parametrize("stop", ["\n", "Question:", "é", "你好", " a", "a\n\n"])
@pytest.mark.parametrize(
    "text", ["x\nQuestion: a", "Le fichier é", "ni 你好 hao", "一 a\n\n", "nothing here", "", " a"]
)
def test_stop_is_found_as_soon_as_it_is_written(tiny_tokenizer: PreTrainedTokenizerFast, text: str, stop: str) -> None:
    condition = stop_condition(tiny_tokenizer, [stop])
    assert condition is not None
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    found = [condition(ids[:length]) for length in range(1, len(ids) + 1)]
    written = [stop in tiny_tokenizer.decode(ids[:length]) for length in range(1, len(ids) + 1)]
    assert any(found) == any(written) == (stop in text)
    if any(written):
        assert found.index(True) == written.index(True)


def test_no_stop_strings_no_condition(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert stop_condition(tiny_tokenizer, []) is None


def test_the_token_that_training_puts_after_answers_ends_them(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The tokenizer's EOS ends an answer, also where the model's own files name another."""
    model, settings = tiny_model(), task(chat_template=False)
    prompt = torch.tensor([encode_prompt(tiny_tokenizer, settings, SOURCES[0])])
    written = model.generate(prompt, do_sample=False, max_new_tokens=20, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    taught = copy.deepcopy(tiny_tokenizer)
    taught.eos_token = tiny_tokenizer.convert_ids_to_tokens(written[4])
    [answer] = generate(model, taught, SOURCES[:1], settings, batch_size=1)
    assert answer.tokens == written.index(written[4]) + 1 < len(written)
    assert not answer.truncated


def test_a_reference_with_thinking_is_asked_for_with_the_prompt_of_its_training(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, tokenizer = tiny_model(), copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = THINKING
    references = ["<think>\nhm\n</think>\n\n42", "42"]
    thought, plain = generate(model, tokenizer, SOURCES[:1] * 2, task(), batch_size=2, references=references)
    assert [plain] == generate(model, tokenizer, SOURCES[:1], task(), batch_size=1)
    tokenizer.chat_template = CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
    assert [thought] == generate(model, tokenizer, SOURCES[:1], task(), batch_size=1)
    assert thought != plain


def test_long_prompts_are_answered_with_a_warning(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    with caplog.at_level(logging.WARNING):
        answers = generate(model, tiny_tokenizer, SOURCES, task(max_prompt_tokens=40), batch_size=4)
    assert answers == generate(model, tiny_tokenizer, SOURCES, task(), batch_size=4)
    assert "prompts are longer than max_prompt_tokens (40)" in caplog.text


def test_a_prompt_beyond_the_models_context(tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SkdError, match="the model has 64"):
        generate(tiny_model(max_position_embeddings=64), tiny_tokenizer, ["word " * 60], task(), batch_size=1)


@pytest.mark.parametrize(
    ("context", "rope"),
    [
        (64, {"rope_type": "default"}),
        (64, {"rope_type": "dynamic", "factor": 2.0}),
        (
            256,
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
    ids=["plain", "dynamic", "longrope"],
)
def test_a_prompt_that_does_not_fit_counts_as_not_answered_whatever_the_positions(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, context: int, rope: dict[str, Any]
) -> None:
    model = tiny_model(max_position_embeddings=context, rope_parameters=rope | {"rope_theta": 10000.0})
    settings = task(chat_template=False, max_new_tokens=8)
    # From two tokens below the limit to two above: at the edge, too, nothing is raised.
    sources = ["0" * length for length in range(1, 80)]
    lengths = [len(encode_prompt(tiny_tokenizer, settings, source)) + 8 for source in sources]
    chosen = [source for source, length in zip(sources, lengths, strict=True) if 62 <= length <= 66]
    answers = generate(model, tiny_tokenizer, ["a", *chosen], settings, batch_size=2)
    answered = [answer.tokens > 0 for answer in answers]
    assert answered[:2] == [True, True]
    assert not any(answered[-2:])
    assert answers[-1] == Answer("", 0, truncated=True)


def test_progress_reaches_the_end(
    tiny_model: TinyModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SKD_EVENTS", "1")
    generate(tiny_model(), tiny_tokenizer, SOURCES, task(max_new_tokens=2), batch_size=2)
    assert f'"done": {len(SOURCES)}, "total": {len(SOURCES)}' in capsys.readouterr().out


def test_the_model_is_left_as_it_was(tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generate(model, tiny_tokenizer, SOURCES[:2], task(), batch_size=2)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
