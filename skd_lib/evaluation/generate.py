"""Models loaded for measuring, and their greedy answers, by the same engine that samples training responses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skd_lib._core.events import Progress
from skd_lib.config import SamplingParams, TaskConfig
from skd_lib.data.examples import Question
from skd_lib.data.tokenize import TokenizedExample, answer_end_id, decode_answer, encode_prompt
from skd_lib.models.files import load_tokenizer
from skd_lib.models.heads import embedding_rows
from skd_lib.models.loading import default_device, load_model
from skd_lib.models.precision import compute_dtype
from skd_lib.models.vocabulary import check_ids, eos_ids, pad_id
from skd_lib.sampling.acceptance import student_only
from skd_lib.sampling.engine import Sampler

log = logging.getLogger(__name__)

GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Answer:
    """A model's answer, cut before the first stop string; its tokens count the stop string and EOS."""

    text: str
    tokens: int
    truncated: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    task: TaskConfig,
    *,
    batch_size: int,
    references: Sequence[str] = (),
    what: str = "evaluating",
) -> list[Answer]:
    """Answer every question by greedy decoding; the prompt is that of training, for which `references` decide.

    Prompts longer than `task.max_prompt_tokens` are answered in full (with a warning): a test set from which the long
    examples are missing would give another score. For the same reason a prompt that does not fit the model's context
    together with its answer gets an empty answer, cut off before it began. `what` names the work in its progress.
    """
    prompts = [
        encode_prompt(tokenizer, task, question, reference)
        for question, reference in zip_longest(questions, references, fillvalue="")
    ]
    numbered = (TokenizedExample(prompt, [], str(number)) for number, prompt in enumerate(prompts))
    check_ids(numbered, embedding_rows(model), where="evaluation")
    long = sum(len(prompt) > task.max_prompt_tokens for prompt in prompts)
    if long:
        log.warning(
            "%d of %d prompts are longer than max_prompt_tokens (%d); they are answered in full",
            long,
            len(prompts),
            task.max_prompt_tokens,
        )
    sampler = Sampler(
        student=model,
        teacher=None,
        rule=student_only(),
        student_params=GREEDY,
        eos_ids=ending_ids(model, tokenizer, task),
        pad_id=pad_id(tokenizer, embedding_rows(model)),
        max_new_tokens=task.max_new_tokens,
        batch_size=batch_size,
        stop=stop_condition(tokenizer, task.stop),
    )
    longest = sampler.longest_row
    fitting = [i for i, prompt in enumerate(prompts) if longest is None or len(prompt) + task.max_new_tokens <= longest]
    if 0 < len(fitting) < len(prompts):
        log.warning(
            "%d of %d prompts and their answers do not fit the model's context (%d tokens); they count as not answered",
            len(prompts) - len(fitting),
            len(prompts),
            longest,
        )
    # Prompts of one length next to each other, so that little padding is computed.
    # Where none fits, the sampler says so.
    order = sorted(fitting or range(len(prompts)), key=lambda index: len(prompts[index]))
    progress = Progress(what, len(order))
    samples = sampler.sample([prompts[index] for index in order], [0] * len(order), on_progress=progress.update)
    answers = {
        index: Answer(decode_answer(tokenizer, task, tokens, questions[index]), len(tokens), truncated)
        for index, tokens, truncated in zip(order, samples.responses(), samples.truncated_B.tolist(), strict=True)
    }
    return [answers.get(index, Answer("", 0, truncated=True)) for index in range(len(prompts))]


def load_for_inference(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer on this process's device, in the precision that `auto` is there.

    All models are measured alike, whatever they were trained in: scores and seconds are compared with each other.
    """
    device = default_device()
    model = load_model(path, dtype=compute_dtype("auto", device), device=device)
    return model, load_tokenizer(path)


def ending_ids(model: PreTrainedModel | Path, tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> tuple[int, ...]:
    """Return every id that ends an answer: those the model's files name, and the one that training puts after answers.

    They differ where a chat template ends turns with a token that no file lists as end of sequence.
    """
    return tuple(dict.fromkeys([*eos_ids(model, tokenizer), answer_end_id(tokenizer, task)]))


def stop_condition(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """Return a function that finds one of the strings in a response so far; None if there are no strings.

    The answer is cut before the string anyway: this only spares the tokens after it.
    """
    if not stop:
        return None
    # A token that is not special is at least one byte of text, so the string that the last token completed lies in
    # this many tokens. One more, since tokenizers drop a blank at the beginning.
    reach = max(len(text.encode()) for text in stop) + 1

    def found_in(ids: list[int]) -> bool:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return any(string in text for string in stop)

    # What part of a response decodes to may differ from that part of the text: the whole has the last word.
    return lambda ids: found_in(ids[-reach:]) and found_in(ids)
