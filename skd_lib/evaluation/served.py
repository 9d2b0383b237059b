"""Greedy answers, and the likelihood of reference answers, of a teacher on a server.

`served_answers` and `served_losses` are `generate` and `reference_losses` of a model in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from skd_lib._core.events import Progress
from skd_lib.config import TaskConfig
from skd_lib.data.examples import Example, Question
from skd_lib.data.tokenize import answer_end_id, decode_answer, encode, encode_prompt
from skd_lib.evaluation.generate import GREEDY, Answer, ending_ids
from skd_lib.evaluation.perplexity import ReferenceLoss
from skd_lib.models.files import load_tokenizer, served_in
from skd_lib.served.client import in_flight
from skd_lib.served.teacher import RemoteTeacher

log = logging.getLogger(__name__)


def remote_teacher(folder: Path, task: TaskConfig, *, private: bool = False) -> RemoteTeacher | None:
    """Return the teacher on a server that a folder stands for; None for a folder with weights.

    With `private` data errors quote no words of the server.
    """
    served = served_in(folder)
    if served is None:
        return None
    tokenizer = load_tokenizer(folder)
    return RemoteTeacher(served, tokenizer, task, ending_ids(folder, tokenizer, task), private=private)


def served_answers(
    teacher: RemoteTeacher, questions: Sequence[Question], task: TaskConfig, references: Sequence[str] = ()
) -> list[Answer]:
    """Answer every question by greedy decoding; what does not fit the server's context counts as not answered."""
    tokenizer: PreTrainedTokenizerBase = teacher.tokenizer
    prompts = [
        encode_prompt(tokenizer, task, question, reference)
        for question, reference in zip_longest(questions, references, fillvalue="")
    ]
    longest = teacher.context
    fitting = [
        row for row, prompt in enumerate(prompts) if longest is None or len(prompt) + task.max_new_tokens <= longest
    ]
    if len(fitting) < len(prompts):
        lost = len(prompts) - len(fitting)
        log.warning("%d of %d prompts do not fit the server's context (%s tokens)", lost, len(prompts), longest)
    responses = teacher.responses(
        [prompts[row] for row in fitting],
        [0] * len(fitting),
        GREEDY,
        max_new_tokens=task.max_new_tokens,
        stop=task.stop,
        what="evaluating",
    )
    answers = {}
    for row, ids in zip(fitting, responses, strict=True):
        stopped = bool(ids) and ids[-1] in teacher.ends
        answers[row] = Answer(decode_answer(tokenizer, task, ids, questions[row]), len(ids), truncated=not stopped)
    return [answers.get(row, Answer("", 0, truncated=True)) for row in range(len(prompts))]


def served_losses(teacher: RemoteTeacher, examples: Sequence[Example], task: TaskConfig) -> list[ReferenceLoss]:
    """Return the loss of every example's reference after its prompt."""
    end = answer_end_id(teacher.tokenizer, task)
    encoded = [encode(teacher.tokenizer, task, example, end, teacher.ends) for example in examples]
    progress = Progress("reading references", len(encoded))
    losses: dict[int, ReferenceLoss] = {}

    def read(row: int) -> ReferenceLoss:
        prompt, response = encoded[row].prompt_ids, encoded[row].response_ids
        positions = teacher.read(prompt, response, 0)
        return ReferenceLoss(-sum(found[id_] for id_, found in zip(response, positions, strict=True)), len(response))

    for row, loss in in_flight(range(len(encoded)), read):
        losses[row] = loss
        progress.update(len(losses))
    return [losses[row] for row in range(len(encoded))]
