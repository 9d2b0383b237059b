"""A teacher on a server: responses to prompts, and its most likely tokens along given responses.

What a server can give beyond OpenAI's own fields is found out by asking it, not by its name:

- `return_token_ids` (vLLM, SGLang): prompts go over as token ids and responses come back as such. Without it prompts go
  over as text, if that is tokenised to the same ids again, and a response's ids are those of its text.
- `prompt_logprobs` (vLLM): the log-probabilities of the K most likely tokens at each position of a given text, at
  temperature 1. Without it there are no teacher signals and no perplexities.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState

from skd_lib._core.events import Progress
from skd_lib.config import SamplingParams, TaskConfig
from skd_lib.config.models import ServedTeacher
from skd_lib.data.tokenize import TokenizedExample, answer_end_id
from skd_lib.distillation.batch import Rollout, collate
from skd_lib.distillation.rollouts import RowKey, Strategy, row_seed
from skd_lib.distillation.teacher_signal import SparseSignal
from skd_lib.errors import SkdError
from skd_lib.served.answers import Answers
from skd_lib.served.client import RETRIES, Endpoint, Refused, in_flight

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

PROBE = "Tokens: 3.14 = π; naïve café, Привет, 你好 — don't\n\n\tdef f(x):  return x  # 🙂"
"""Text by which tokenizers are compared."""
_MOST_STOPS = 4
"""Stop strings that OpenAI's API takes; the answer is cut before any of them here, too."""
_FINISHED = ("stop", "eos_token", "stop_sequence")
"""Reasons for the end of a whole response; the last two are TGI's."""
_GREEDY = {"temperature": 0.0, "max_tokens": 1}
T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger(__name__)


class Unreadable(SkdError):
    """The server gives no log-probabilities along a given text."""


class RemoteTeacher:
    """A teacher on a server, in the tokens of the student.

    Args:
        served: Where it is.
        tokenizer: The student's, which must be the teacher's.
        task: Decides about the id that ends an answer.
        ends: All ids that end an answer.
        retries: Further tries of a request.
        private: Errors quote no words of the server, see `Endpoint`.
    """

    def __init__(
        self,
        served: ServedTeacher,
        tokenizer: PreTrainedTokenizerBase,
        task: TaskConfig,
        ends: Sequence[int],
        retries: int = RETRIES,
        *,
        private: bool = False,
    ) -> None:
        self.endpoint = Endpoint(served, retries, private=private)
        self._answers: Answers | None = None
        self._all_answers: list[Answers] = []
        self.tokenizer, self.ends, self._end = tokenizer, tuple(ends), answer_end_id(tokenizer, task)

    @property
    def where(self) -> str:
        """The teacher's name in messages."""
        return f"teacher {self.endpoint.served}"

    @cached_property
    def context(self) -> int | None:
        """The most tokens of a prompt with its response; None where the server does not say."""
        listed = self.endpoint.models()
        name = self.endpoint.served.model
        if listed and name not in listed:
            hint = f"set `teacher.model` to one of: {', '.join(sorted(listed)[:10])}"
            raise SkdError("the server has no model of this name", where=self.where, hint=hint)
        length = listed.get(name, {}).get("max_model_len")
        return int(length) if length else None

    @cached_property
    def takes_ids(self) -> bool:
        """Whether prompts and responses are token ids.

        Raises:
            SkdError: the server's tokens are not those of the student.
        """
        text = PROBE + (self.tokenizer.eos_token or "")
        ours = list(self.tokenizer(text)["input_ids"])
        try:
            choice = self.endpoint.complete(text, **_GREEDY, return_token_ids=True)
        except Refused:
            choice = self.endpoint.complete(text, **_GREEDY)
        theirs = choice.get("prompt_token_ids")
        count = choice["usage"].get("prompt_tokens")
        if (theirs is not None and list(theirs) != ours) or count not in (None, len(ours)):
            what = f"its tokens are not the student's: {str(theirs or f'{count} of them')[:200]} for {str(ours)[:200]}"
            hint = "take a student of the same family, whose tokenizer is the teacher's"
            raise SkdError(what, where=self.where, hint=hint)
        return theirs is not None and choice.get("token_ids") is not None

    @cached_property
    def _tokens(self) -> int:
        """Ids below this may be tokens of the tokenizer."""
        return int(max(self.tokenizer.get_vocab().values())) + 1

    @cached_property
    def reads(self) -> bool:
        """Whether it gives log-probabilities along a given text."""
        ids = list(self.tokenizer("Hello, world")["input_ids"])
        try:
            return bool(self.read(ids[:1], ids[1:], 0))
        except Unreadable:
            return False

    def responses(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        what: str = "teacher responses",
    ) -> list[list[int]]:
        """Return one response to each prompt; one that was cut at `max_new_tokens` ends with none of `ends`.

        Args:
            prompts: Token ids.
            seeds: One for each.
            sampling: Of the teacher.
            max_new_tokens: The longest response.
            stop: Texts that end a response, too.
            what: Name of the progress.
        """
        fields: dict[str, Any] = {"max_tokens": max_new_tokens, **sampling.model_dump()}
        if stop:
            fields["stop"] = list(stop[:_MOST_STOPS])
        if self.takes_ids:
            # Sampling defaults that come with the model have no say.
            fields |= {"stop_token_ids": list(self.ends), "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

        def ask(row: int) -> list[int]:
            choice = self._complete(prompts[row], seed=seeds[row] % 2**31, **fields)
            return self._ids(choice)[:max_new_tokens]

        keys = [_key(prompt, [seed]) for prompt, seed in zip(prompts, seeds, strict=True)]
        found = dict(self._all(range(len(prompts)), keys.__getitem__, ask, what))
        cut = sum(not ids or ids[-1] not in self.ends for ids in found.values())
        log.info("%d of %d responses of the teacher were cut at %d tokens", cut, len(found), max_new_tokens)
        return [found[row] for row in range(len(prompts))]

    def signals(
        self, examples: Sequence[TokenizedExample], *, k: int, vocabulary: int
    ) -> Iterator[tuple[TokenizedExample, SparseSignal]]:
        """Yield examples with the teacher's `k` most likely tokens along their responses, in any order.

        Args:
            examples: With responses.
            k: Tokens a position.
            vocabulary: Rows of the student's head.

        Raises:
            SkdError: the server gives none, or not that many, or of tokens that the student does not have.
        """
        k = min(k, vocabulary)

        def ask(example: TokenizedExample) -> list[str]:
            ids_NK, log_p_NK = top_k(self.read(example.prompt_ids, example.response_ids, k), k)
            if np.isnan(log_p_NK).any():
                hint = "look into the server's log: its model may overflow in its precision"
                raise SkdError("it answers log-probabilities that are no numbers", where=self.where, hint=hint)
            self._check_known(ids_NK, vocabulary)
            return [base64.b64encode(part.tobytes()).decode() for part in (ids_NK, with_rest(log_p_NK, vocabulary))]

        def key(example: TokenizedExample) -> str:
            return _key(example.prompt_ids, example.response_ids)

        for example, parts in self._all(examples, key, ask, "teacher signal"):
            ids_N, log_p_N = (
                torch.frombuffer(bytearray(base64.b64decode(part)), dtype=dtype)
                for part, dtype in zip(parts, (torch.int32, torch.float32), strict=True)
            )
            rows = len(example.response_ids)
            yield example, SparseSignal(log_p_N.view(rows, -1), ids_N.view(rows, -1), 1.0, vocabulary)

    def strategy(self, sampling: SamplingParams, seed: int, pad_id: int, max_new_tokens: int) -> Strategy:
        """Return the source of responses that this teacher alone writes; `seed` is the run's."""

        def strategy(examples: Sequence[TokenizedExample], keys: Sequence[RowKey]) -> Rollout:
            prompts, seeds = [example.prompt_ids for example in examples], [row_seed(seed, key) for key in keys]
            responses = self.responses(prompts, seeds, sampling, max_new_tokens=max_new_tokens)
            return collate(prompts, responses, pad_id=pad_id, source="teacher")

        return strategy

    def keep(self, folder: Path, remote: str = "") -> None:
        """Keep further answers in a folder, and at a URI if there is one, for the next attempt at the same work."""
        self._answers = Answers(folder, remote, PartialState().process_index)
        self._all_answers.append(self._answers)

    def forget(self) -> None:
        """Remove all answers that were kept."""
        for answers in self._all_answers:
            answers.remove()

    def costs(self) -> dict[str, float]:
        """Return the requests of this process, and the tokens that the server has counted for them; log them, too."""
        spent = {f"served_{name}": float(count) for name, count in self.endpoint.spent.items()}
        log.info("asked of %s: %s", self.where, ", ".join(f"{count:,.0f} {name}" for name, count in spent.items()))
        return spent

    def _all(
        self, jobs: Sequence[T], key: Callable[[T], str], ask: Callable[[T], R], what: str
    ) -> Iterator[tuple[T, R]]:
        """Yield each job with its answer, in any order: those kept from before, then those that are asked for now."""
        progress, kept, missing = Progress(what, len(jobs)), self._answers, []
        for job in jobs:
            if kept is not None and (answer := kept.get(key(job))) is not None:
                yield job, answer
            else:
                missing.append(job)
        try:
            for done, (job, answer) in enumerate(in_flight(missing, ask), len(jobs) - len(missing) + 1):
                if kept is not None:
                    kept.add(key(job), answer)
                progress.update(done)
                yield job, answer
        finally:
            if kept is not None:
                kept.upload()

    def read(self, prompt: Sequence[int], response: Sequence[int], k: int) -> list[dict[int, float]]:
        """Return log-probabilities by token at each position of a response: the `k` most likely, and its own.

        Raises:
            SkdError: the server gives none, or not that many.
        """
        if not self.takes_ids:
            raise self._reads_nothing("it takes no token ids")
        try:
            choice = self.endpoint.complete([*prompt, *response], **_GREEDY, prompt_logprobs=k)
        except Refused as error:
            if k == 0 or not self.reads:
                raise self._reads_nothing("it refuses `prompt_logprobs`") from error
            hint = f"of vLLM, start the server with `--max-logprobs {max(k, 20)}` (its default is 20), or lower "
            hint += "`distill.teacher_signal.top_k`; and with a --max-model-len above the longest prompt and response"
            raise SkdError(error.what, where=self.where, hint=hint) from error
        positions = choice.get("prompt_logprobs")
        if not positions or len(positions) != len(prompt) + len(response):
            raise self._reads_nothing("its answer has no `prompt_logprobs`")
        try:
            own = [
                {int(token): float(found["logprob"]) for token, found in position.items()}
                for position in positions[len(prompt) :]
            ]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._reads_nothing("its `prompt_logprobs` are not as vLLM gives them") from error
        if any(token not in position for token, position in zip(response, own, strict=True)):
            raise SkdError("its log-probabilities are of other tokens than those it was given", where=self.where)
        return own

    def _check_known(self, ids: ArrayLike, vocabulary: int) -> None:
        """Refuse ids that are no tokens of the student."""
        unknown = [token for token in np.ravel(ids).tolist() if not 0 <= token < vocabulary]
        if unknown:
            what = f"it answers with token {unknown[0]}, and the student's tokens are 0 to {vocabulary - 1}"
            raise SkdError(what, where=self.where, hint="take a student with the teacher's vocabulary")

    def _reads_nothing(self, why: str) -> Unreadable:
        hint = "serve the teacher with vLLM, or use method `seqkd` and metrics other than perplexity"
        return Unreadable(f"it gives no log-probabilities along a given text: {why}", where=self.where, hint=hint)

    def _complete(self, prompt: Sequence[int], **fields: Any) -> dict[str, Any]:
        if self.takes_ids:
            return self.endpoint.complete(list(prompt), return_token_ids=True, **fields)
        choice = self.endpoint.complete(self._text(prompt), **fields)
        if (count := choice["usage"].get("prompt_tokens")) not in (None, len(prompt)):
            what = f"it read a prompt of {len(prompt)} tokens as {count}"
            hint = "it must tokenise special tokens in a prompt as such, and put BOS before it as the tokenizer does"
            raise SkdError(what, where=self.where, hint=hint)
        return choice

    def _text(self, prompt: Sequence[int]) -> str:
        """Return text that is tokenised to the prompt, with the special tokens that a tokenizer adds by itself."""
        for ids in (prompt, prompt[1:]):
            text = str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
            if list(self.tokenizer(text)["input_ids"]) == list(prompt):
                return text
        what = "a prompt's text is not tokenised to its own tokens again, and the server takes text only"
        hint = "use a server that takes token ids (vLLM, SGLang)"
        raise SkdError(what, where=self.where, hint=hint)

    def _ids(self, choice: dict[str, Any]) -> list[int]:
        given = choice.get("token_ids" if self.takes_ids else "text")
        if given is None:
            hint = "it did before: serve the model by servers of one kind and version"
            raise SkdError("an answer has no tokens", where=self.where, hint=hint)
        if self.takes_ids:
            ids = list(given)
            self._check_known(ids, self._tokens)
        else:
            ids = list(self.tokenizer(given, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        finish = choice.get("finish_reason")
        if finish not in ("length", *_FINISHED):
            what = f"it does not say that a response is whole: `finish_reason` is {finish!r}"
            raise SkdError(what, where=self.where, hint="use another server, or a newer version of this one")
        if finish == "length" or (ids and ids[-1] in self.ends):
            return ids
        # Ended by an id that only the server knows as an end.
        if ids and self.takes_ids and ids[-1] in self.tokenizer.all_special_ids:
            ids = ids[:-1]
        return [*ids, self._end]


def top_k(positions: Sequence[dict[int, float]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, k) ids and log-probabilities of the most likely tokens, in descending order.

    A position has k + 1 where its own token is not among the k.

    Raises:
        SkdError: a position has fewer.
    """
    if short := min((len(position) for position in positions if len(position) < k), default=None):
        raise SkdError(f"the server gives {short} tokens a position where {k} are asked for", where="teacher")
    ordered = [sorted(position.items(), key=lambda pair: -pair[1])[:k] for position in positions]
    ids_NK, log_p_NK = ([[pair[part] for pair in row] for row in ordered] for part in (0, 1))
    return np.array(ids_NK, np.int32), np.array(log_p_NK, np.float64)


def with_rest(log_p_NK: np.ndarray, vocabulary: int) -> np.ndarray:
    """Add the log-probability of all other tokens together, unless there are none; each row sums to 1.

    The rest is 1 - sum of the others, so that it has their rounding: below 1e-6 it is 0.
    """
    if log_p_NK.shape[1] == vocabulary:
        rest_N1 = np.zeros((len(log_p_NK), 0))
    else:
        rest_N1 = 1 - np.exp(log_p_NK).sum(1, keepdims=True)
        rest_N1 = np.where(rest_N1 < 1e-6, 0, rest_N1)
    total_N1 = np.exp(log_p_NK).sum(1, keepdims=True) + rest_N1.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_p_NE = np.concatenate([log_p_NK, np.log(rest_N1)], 1) - np.log(total_N1)
    return np.asarray(log_p_NE, np.float32)


def _key(prompt: Sequence[int], rest: Sequence[int]) -> str:
    tokens = json.dumps([list(prompt), list(rest)])
    return hashlib.blake2b(tokens.encode(), digest_size=16).hexdigest()
