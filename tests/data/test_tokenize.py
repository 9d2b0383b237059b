"""Tokenising: one BOS, EOS where it belongs, and ids that come back as the text."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from skd_lib.config import TaskConfig
from skd_lib.data.examples import make_example
from skd_lib.data.formats import tokenize_row
from skd_lib.data.tokenize import answer_end_id, decode_answer, encode, encode_all, encode_prompt
from skd_lib.errors import SkdError
from tests.conftest import BOS, EOS, PAD, TURN

TASK = TaskConfig(prompt="translate: {source}")
PLAIN = TaskConfig(prompt="translate: {source} =", chat_template=False)


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(tiny_tokenizer)


def test_the_chat_template_is_applied_once_with_one_bos(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, TASK, "le fichier {source}")
    expected = f"{BOS}{TURN}user\ntranslate: le fichier {{source}}{EOS}\n{TURN}assistant\n"
    assert tokenizer.decode(ids) == expected
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_system_prompt_comes_first(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, TASK.model_copy(update={"system_prompt": "be brief"}), "a")
    assert tokenizer.decode(ids).startswith(f"{BOS}{TURN}system\nbe brief{EOS}\n{TURN}user\n")


@pytest.mark.parametrize("prompt", ["say {source}", f"{BOS}say {{source}}"])
def test_without_a_chat_template_there_is_one_bos_too(tokenizer: Any, prompt: str) -> None:
    ids = encode_prompt(tokenizer, TaskConfig(prompt=prompt, chat_template=False), "a b")
    assert tokenizer.decode(ids) == f"{BOS}say a b"


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 1), (EOS, 2)]
    )
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encode_prompt(tokenizer, PLAIN, "a")) == f"{BOS}translate: a ="


def test_the_response_is_the_reference_and_eos(tokenizer: Any) -> None:
    example = make_example("le fichier", "the file\nhas been saved.")
    encoded = encode(tokenizer, TASK, example, tokenizer.eos_token_id)
    assert encoded.response_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.response_ids[:-1]) == example.target
    assert BOS not in tokenizer.decode(encoded.response_ids)
    assert encoded.example_id == example.id


def test_a_response_that_is_cut_has_no_eos(tokenizer: Any) -> None:
    example = make_example("a", "one two three four five six")
    whole = encode(tokenizer, TASK, example, tokenizer.eos_token_id).response_ids
    exact = TASK.model_copy(update={"max_new_tokens": len(whole)})
    short = TASK.model_copy(update={"max_new_tokens": len(whole) - 1})
    assert encode(tokenizer, exact, example, tokenizer.eos_token_id).response_ids == whole
    assert encode(tokenizer, short, example, tokenizer.eos_token_id).response_ids == whole[:-1]


def test_a_special_token_in_the_reference_does_not_end_it(tokenizer: Any) -> None:
    target = f"write {EOS} at the end, or {PAD}"
    ids = encode(tokenizer, TASK, make_example("a", target), tokenizer.eos_token_id).response_ids
    assert not set(ids[:-1]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids[:-1]) == target
    # The tokenizer is left as it was: prompts still get their special tokens.
    assert tokenizer(EOS, add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]


def test_long_prompts_are_left_out_with_a_warning(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    examples = [make_example("short", "a"), make_example("long " * 50, "b")]
    limit = len(encode_prompt(tokenizer, TASK, "short"))
    with caplog.at_level(logging.WARNING):
        encoded = encode_all(tokenizer, TASK.model_copy(update={"max_prompt_tokens": limit}), examples, 2)
    assert [example.example_id for example in encoded] == [examples[0].id]
    assert f"1 of 2 examples are left out: their prompts exceed max_prompt_tokens ({limit})" in caplog.text


def test_no_prompt_that_fits_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(SkdError, match="every prompt is longer than 3 tokens"):
        encode_all(tokenizer, TASK.model_copy(update={"max_prompt_tokens": 3}), [make_example("a", "b")], 2)


def test_an_answer_ends_with_what_the_template_ends_a_turn_with(tokenizer: Any) -> None:
    assert answer_end_id(tokenizer, PLAIN) == tokenizer.eos_token_id
    assert answer_end_id(tokenizer, TASK) == tokenizer.convert_tokens_to_ids(EOS)
    # Like Gemma's: the turn ends with one token, the text with another.
    tokenizer.eos_token = PAD
    assert answer_end_id(tokenizer, TASK) == tokenizer.convert_tokens_to_ids(EOS)
    assert answer_end_id(tokenizer, PLAIN) == tokenizer.convert_tokens_to_ids(PAD)


def test_a_missing_or_refusing_chat_template_says_what_to_do(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(SkdError, match="System role not supported") as caught:
        encode_prompt(tokenizer, TASK.model_copy(update={"system_prompt": "be brief"}), "a")
    assert "task.system_prompt" in caught.value.hint
    tokenizer.chat_template = None
    with pytest.raises(SkdError, match="no chat template") as caught:
        encode_prompt(tokenizer, TASK, "a")
    assert "chat_template: false" in caught.value.hint


def test_an_answer_is_cut_at_the_first_stop_and_stripped(tokenizer: Any) -> None:
    ids = [*tokenizer(" the file ; saved\nand more", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert decode_answer(tokenizer, TASK, ids) == "the file ; saved\nand more"
    assert decode_answer(tokenizer, TASK.model_copy(update={"stop": ["\n"]}), ids) == "the file ; saved"
    assert decode_answer(tokenizer, TASK.model_copy(update={"stop": ["\n", " ;"]}), ids) == "the file"
    assert decode_answer(tokenizer, TASK, []) == ""


def test_a_row_of_texts_has_the_prompt_of_the_pipeline(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("how many?", f"{BOS}how many?", f"{BOS}how {{source}}?"):
        row = tokenize_row(tiny_tokenizer, {"prompt": text, "completion": "42"}, [2])
        assert row.prompt_ids == encode_prompt(tiny_tokenizer, TaskConfig(chat_template=False), text)
        assert row.prompt_ids.count(1) == 1
