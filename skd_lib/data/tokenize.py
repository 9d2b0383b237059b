"""From an example to token ids, and from token ids to an answer.

Prompt and response are tokenised apart and never again: the ids that a sampler returns are the ids a loss sees.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skd_lib.config import TaskConfig
from skd_lib.data.examples import Example
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """The token ids of one example, without padding.

    Attributes:
        prompt_ids: The prompt, with BOS and chat template.
        response_ids: The reference answer and EOS; no EOS where the answer was cut at the length limit.
        example_id: The example's id.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    example_id: str = ""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, task: TaskConfig, source: str) -> list[int]:
    """The prompt's token ids, of any length, with exactly the BOS that the model wants.

    With a chat template the template alone decides about BOS; without one the tokenizer does, unless the prompt's
    text starts with BOS itself.

    Raises:
        SkdError: the tokenizer has no chat template, or the template refuses the messages.
    """
    text = task.prompt.replace("{source}", source)
    if task.chat_template:
        messages = _messages(task, text)
        return _apply_template(tokenizer, task, messages, add_generation_prompt=True)
    starts_with_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids = list(tokenizer(text, add_special_tokens=not starts_with_bos)["input_ids"])
    # Tokenizers made for encoders end every text with EOS; a prompt that ends so would be a finished text.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def encode(tokenizer: PreTrainedTokenizerBase, task: TaskConfig, example: Example, eos_id: int) -> TokenizedExample:
    """Tokenise one example; the response is cut to `task.max_new_tokens`, and then does not end with EOS.

    Special tokens that stand in the reference as text are tokenised as text: they must not end the response.

    Args:
        tokenizer: The models' tokenizer.
        task: Template and limits.
        example: The example.
        eos_id: What ends an answer, see `answer_end_id`.
    """
    target = tokenizer(example.target, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    response = [*target, eos_id][: task.max_new_tokens]
    return TokenizedExample(encode_prompt(tokenizer, task, example.source), response, example.id)


def encode_all(
    tokenizer: PreTrainedTokenizerBase, task: TaskConfig, examples: Iterable[Example], eos_id: int
) -> list[TokenizedExample]:
    """Tokenise examples; those whose prompt is longer than `task.max_prompt_tokens` are left out, with a warning.

    Raises:
        SkdError: none is left.
    """
    encoded = [encode(tokenizer, task, example, eos_id) for example in examples]
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
    """The id that ends an answer: with a chat template the special token that the template puts after the assistant's
    text (`<end_of_turn>` of Gemma, `<|im_end|>` of Qwen), else the tokenizer's EOS.

    Raises:
        SkdError: the tokenizer has no EOS, or no chat template although the task wants one.
    """
    if task.chat_template:
        answer = "answer"
        messages = [*_messages(task, "question"), {"role": "assistant", "content": answer}]
        start = len(_apply_template(tokenizer, task, messages[:-1], add_generation_prompt=True))
        tail = _apply_template(tokenizer, task, messages, add_generation_prompt=False)[start:]
        added = tokenizer.added_tokens_decoder.items()
        special = {*tokenizer.all_special_ids, *(token_id for token_id, token in added if token.special)}
        for token in tail:
            if token in special:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise SkdError("the tokenizer has no end-of-sequence token", hint="use a model whose tokenizer has one")
    return int(tokenizer.eos_token_id)


def decode_answer(tokenizer: PreTrainedTokenizerBase, task: TaskConfig, ids: Sequence[int]) -> str:
    """The answer's text: special tokens left out, cut before the first stop string, white space around it removed."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    for stop in task.stop:
        text = text.partition(stop)[0]
    return text.strip()


def _messages(task: TaskConfig, text: str) -> list[dict[str, str]]:
    system = [{"role": "system", "content": task.system_prompt}] if task.system_prompt else []
    return [*system, {"role": "user", "content": text}]


def depends_on_date(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> bool:
    """Return whether the prompts of a task are others on another day, because the chat template prints the date.

    Raises:
        SkdError: the tokenizer has no chat template although the task wants one, or the template cannot be rendered.
    """
    if not task.chat_template:
        return False
    days = ("2021-02-03", "2034-11-25")
    prompts = {_render(tokenizer, _messages(task, "question"), date=day, add_generation_prompt=True) for day in days}
    return len(prompts) > 1


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, task: TaskConfig, messages: list[dict[str, str]], *, add_generation_prompt: bool
) -> list[int]:
    text = _render(tokenizer, messages, date=task.date, add_generation_prompt=add_generation_prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, date: str, add_generation_prompt: bool
) -> str:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if not tokenizer.chat_template:
        hint = "set `task.chat_template: false`, or use an instruction-tuned model"
        raise SkdError("the tokenizer has no chat template", where=str(tokenizer.name_or_path), hint=hint)
    now = datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()
    try:
        # The clock cannot be handed over as a variable: transformers lets only plain data into a template.
        _compile_jinja_template(tokenizer.get_chat_template()).globals["strftime_now"] = now.strftime
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:
        hint = (
            "leave `task.system_prompt` out if the model has no system role" if messages[0]["role"] == "system" else ""
        )
        raise SkdError(f"the chat template refuses the messages: {error}", hint=hint) from error
