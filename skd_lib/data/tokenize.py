"""Tokenisation of examples, and decoding of answers.

Prompt and response are tokenised apart and once only: the ids that a sampler returns are the ids that a loss gets.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skd_lib.config import TaskConfig
from skd_lib.data.chat import ChatLayout, chat_layout, depends_on_date
from skd_lib.data.examples import Example, Question
from skd_lib.data.template_text import plain_ids
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TokenizedExample",
    "answer_end_id",
    "decode_answer",
    "depends_on_date",
    "encode",
    "encode_all",
    "encode_prompt",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """The token ids of one example, without padding.

    Attributes:
        prompt_ids: The prompt, with BOS and chat template.
        response_ids: The reference answer and EOS; no EOS where the answer was cut at the length limit. Nothing where
            the example has no answer.
        example_id: The example's id.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    example_id: str = ""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, task: TaskConfig, question: Question, answer: str = ""
) -> list[int]:
    """Return the prompt's token ids, of any length, with one BOS where the model wants it.

    With a chat template the prompt is all that the template writes before an answer, and the template alone decides
    about BOS; without one the tokenizer does, unless the prompt's text starts with BOS itself. Thinking models have one
    prompt before thinking and another before an answer without: the question's reference answer decides, if there is
    one (`answer`, or a conversation's own), in training and in scoring.
    """
    if task.chat_template:
        return _ids(tokenizer, _parted(chat_layout(tokenizer, task), task, question, answer)[0])
    if not isinstance(question, str):
        raise SkdError(
            "the data hold messages, which only a chat template can write",
            where="task.chat_template",
            hint="set it to true, or give prompts and answers as text",
        )
    text = task.prompt.replace("{source}", question)
    starts_with_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids = list(tokenizer(text, add_special_tokens=not starts_with_bos)["input_ids"])
    # Tokenizers made for encoders end every text with EOS; a prompt that ends so would be a finished text.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _parted(layout: ChatLayout, task: TaskConfig, question: Question, answer: str) -> tuple[str, str]:
    """Return the prompt and the answer as the chat template writes them; no answer where there is none."""
    if not isinstance(question, str) and question.answer is not None:
        if not question.is_plain:
            return layout.whole(task, question)
        answer = str(question.answer["content"])
    return layout.parted(task, question, answer) if answer else (layout.prompt(task, question), "")


def encode(
    tokenizer: PreTrainedTokenizerBase, task: TaskConfig, example: Example, eos_id: int, ends: Collection[int] = ()
) -> TokenizedExample:
    """Tokenise one example; the response is cut to `task.max_new_tokens`, and then does not end with EOS.

    With a chat template, prompt and response together are the template's text for the whole conversation. Special
    tokens in the reference are tokenised as text: they must not end the response. An answer with calls of tools is all
    that the template writes for it, special tokens included. `eos_id` is `answer_end_id`; `ends` are the ids at which
    the model stops: where the template ends a call with one of them (`<|call|>` of gpt-oss), no other end follows.
    """
    talk = example.conversation
    if not task.chat_template or not example.target:
        prompt = encode_prompt(tokenizer, task, example.question)
        response = [*plain_ids(tokenizer, example.target), eos_id] if example.target else []
    else:
        layout = chat_layout(tokenizer, task)
        before, said = _parted(layout, task, example.question, example.target)
        prompt = _ids(tokenizer, before)
        if talk is not None and not talk.is_plain:
            response = _ended(tokenizer, _ids(tokenizer, said), eos_id, ends)
        else:
            response = [*layout.tokens(tokenizer, said), *layout.closing[:-1], eos_id]
    return TokenizedExample(prompt, response[: task.max_new_tokens], example.id)


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int], eos_id: int, ends: Collection[int]) -> list[int]:
    """Return the ids of an answer up to its end; `eos_id` is put after an answer that has none."""
    if eos_id in ids:
        return ids[: ids.index(eos_id) + 1]
    last = max((place for place, token in enumerate(ids) if token in ends), default=len(ids))
    after = str(tokenizer.decode(ids[last + 1 :]))
    return ids[: last + 1] if last < len(ids) and not after.strip() else [*ids, eos_id]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of text that a chat template wrote."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    examples: Iterable[Example],
    eos_id: int,
    ends: Collection[int] = (),
) -> list[TokenizedExample]:
    """Tokenise examples; those whose prompt is longer than `task.max_prompt_tokens` are left out, with a warning."""
    encoded = [encode(tokenizer, task, example, eos_id, ends) for example in examples]
    kept = [example for example in encoded if len(example.prompt_ids) <= task.max_prompt_tokens]
    if len(kept) < len(encoded):
        longest = max(len(example.prompt_ids) for example in encoded)
        log.warning(
            "%d of %d examples are left out: their prompts exceed max_prompt_tokens (%d); the longest has %d tokens",
            len(encoded) - len(kept),
            len(encoded),
            task.max_prompt_tokens,
            longest,
        )
    if encoded and not kept:
        shortest = min(len(example.prompt_ids) for example in encoded)
        raise SkdError(
            f"every prompt is longer than {task.max_prompt_tokens} tokens; the shortest has {shortest}",
            where="task.max_prompt_tokens",
            hint="raise it, or shorten the prompt template",
        )
    return kept


def answer_end_id(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> int:
    """Return the id that ends an answer.

    With a chat template the last of the special tokens that it puts after the assistant's text (`<end_of_turn>` of
    Gemma, `<|im_end|>` of Qwen), else the tokenizer's EOS.
    """
    if task.chat_template and (closing := chat_layout(tokenizer, task).closing):
        return closing[-1]
    if tokenizer.eos_token_id is None:
        raise SkdError("the tokenizer has no end-of-sequence token", hint="use a model whose tokenizer has one")
    return int(tokenizer.eos_token_id)


def decode_answer(
    tokenizer: PreTrainedTokenizerBase, task: TaskConfig, ids: Sequence[int], question: Question = ""
) -> str:
    """Return the answer's text without the tokens that end it, cut before the first stop string, and stripped.

    Where a conversation's own answer has its thinking in a field, the text is what follows the thinking.
    """
    ends: tuple[int, ...] = ()
    tail = ""
    if task.chat_template and tokenizer.chat_template:
        layout = chat_layout(tokenizer, task)
        ends, tail = layout.closing, layout.tail.strip()
    # Not every token that ends answers is marked as a special one.
    kept = [token for token in ids if token not in ends]
    text = str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    if task.chat_template and not isinstance(question, str) and not question.is_plain:
        end = _ids(tokenizer, chat_layout(tokenizer, task).thinking_end(task, question))
        if written := tokenizer.decode(end, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip():
            text = text.rpartition(written)[2]
    for stop in task.stop:
        text = text.partition(stop)[0]
    return text.strip().removesuffix(tail).strip()
