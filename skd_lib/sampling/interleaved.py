"""`InterleavedSampler`: the sampler in the shape of transformers' `generate`, for use without the pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from skd_lib._core.seeds import derived
from skd_lib.config import SamplingParams, parse_section
from skd_lib.errors import SkdError
from skd_lib.sampling.acceptance import AcceptanceRule, lossless, student_only, teacher_only, top_k
from skd_lib.sampling.drafting import AdaptiveGamma
from skd_lib.sampling.engine import Sampler
from skd_lib.sampling.samples import SamplingStatistics

_READ = {"max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "eos_token_id", "pad_token_id"}
_NO_EFFECT = {
    *("bos_token_id", "use_cache", "return_dict_in_generate", "transformers_version", "decoder_start_token_id"),
    "token_type_ids",
}
_OFF: dict[str, Any] = {"top_k": 0, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "min_p": 0.0}
"""Settings of transformers that change samples, with the values that switch them off; the sampler has none of them."""


@dataclass(frozen=True)
class InterleavedOutput:
    """Sampled sequences, and who wrote them.

    B is the number of prompts, P their padded length, T the most new tokens of a row.

    Attributes:
        sequences: (B, P + T) the prompts as they came in, then the responses, padded on the right.
        response_mask: (B, T) True on response tokens, the end token included.
        by_teacher: (B, T) True where the teacher wrote the token.
        proposals: (B, T) the student's draft that the teacher replaced; -1 elsewhere.
        truncated: (B,) the response ended by the length limit.
        statistics: Counts over the batch: acceptance rate, tokens a teacher call, ...
    """

    sequences: Tensor
    response_mask: Tensor
    by_teacher: Tensor
    proposals: Tensor
    truncated: Tensor
    statistics: SamplingStatistics


class StreamedToken(NamedTuple):
    """One new token of a response.

    Attributes:
        token: Its id.
        by_teacher: The teacher wrote it.
        proposal: The student's draft that it replaced; -1 if none.
    """

    token: int
    by_teacher: bool
    proposal: int


class InterleavedSampler:
    """Sample from a student and a teacher, interleaved (algorithm 1 of Xu et al. 2025).

    The student drafts `gamma` tokens, the teacher scores them in one forward pass, and the rule decides which stand.
    With `rule=lossless()` this is speculative decoding: the samples are the teacher's own.

    Example:
        >>> sampler = InterleavedSampler(student, teacher, rule=top_k(25))
        >>> out = sampler.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=128)
        >>> tokenizer.batch_decode(out.sequences, skip_special_tokens=True)

    Args:
        student: Drafts; a causal language model of transformers.
        teacher: Scores and replaces; has the student's tokenizer.
        rule: Which drafts stand, see `skd_lib.sampling.acceptance`; those without a number by name, too. None is
            `top_k(25)`.
        gamma: Tokens drafted for each teacher call; the most, if `adaptive_gamma`.
        adaptive_gamma: Draft fewer where the measured acceptance says that more would be wasted.
        batch_size: Rows in flight; None takes all.

    Raises:
        SkdError: a model is of an architecture that the sampler does not support.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        rule: AcceptanceRule | str | None = None,
        gamma: int = 5,
        *,
        adaptive_gamma: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.rule = _rule(rule)
        self.gamma = AdaptiveGamma(gamma) if adaptive_gamma else gamma
        self.batch_size = batch_size

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        student_params: SamplingParams | None = None,
        teacher_params: SamplingParams | None = None,
        **options: Any,
    ) -> InterleavedOutput:
        """Sample one response to each prompt.

        A response depends on its prompt, its row and the seed alone: not on the other rows, on padding or on `gamma`.

        Args:
            input_ids: (B, P) prompts, padded on either side.
            attention_mask: (B, P) 0 at padding; None where nothing is padded.
            generation_config: `max_new_tokens` (or `max_length`), `do_sample`, `temperature`, `top_p`, `eos_token_id`,
                `pad_token_id`, for both models; the ids default to the models' own. As in transformers, decoding is
                greedy without `do_sample=True`.
            seed: Repeats the samples; None draws one from torch's generator.
            student_params: How the student samples, in place of `generation_config`'s values.
            teacher_params: How the teacher samples.
            **options: Fields of `generation_config`, which win.

        Raises:
            SkdError: a setting would change the samples and the sampler does not have it, or a prompt is empty or too
                long for a model's context.
        """
        prompts = _rows(input_ids, attention_mask)
        sampler, seeds = self._set_up(prompts, generation_config, seed, student_params, teacher_params, options)
        samples = sampler.sample(prompts, seeds)
        return InterleavedOutput(
            sequences=torch.cat([input_ids, samples.tokens_BT.to(input_ids.device)], dim=1),
            response_mask=samples.mask_BT,
            by_teacher=samples.source_BT.bool() & samples.mask_BT,
            proposals=samples.proposals_BT,
            truncated=samples.truncated_B,
            statistics=samples.statistics,
        )

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        student_params: SamplingParams | None = None,
        teacher_params: SamplingParams | None = None,
        **options: Any,
    ) -> Iterator[list[StreamedToken]]:
        """Yield the new tokens of one prompt's response after each round: those of `generate`, with its arguments."""
        prompts = _rows(input_ids, attention_mask)
        if len(prompts) != 1:
            raise SkdError(f"there are {len(prompts)} prompts", where="stream", hint="stream one at a time")
        sampler, seeds = self._set_up(prompts, generation_config, seed, student_params, teacher_params, options)
        told = 0
        for samples in sampler.rounds(prompts, seeds):
            length = int(samples.mask_BT.sum())
            columns = (samples.tokens_BT, samples.source_BT.bool(), samples.proposals_BT)
            rows = zip(*(column[0, told:length].tolist() for column in columns), strict=True)
            yield [StreamedToken(*row) for row in rows]
            told = length

    def _set_up(
        self,
        prompts: Sequence[list[int]],
        generation_config: GenerationConfig | None,
        seed: int | None,
        student_params: SamplingParams | None,
        teacher_params: SamplingParams | None,
        options: dict[str, Any],
    ) -> tuple[Sampler, list[int]]:
        """Return the sampler of a call, and a seed for each prompt."""
        config = _settings(generation_config, options)
        both = _params(config)
        end_ids = _ids(config.get("eos_token_id")) or self._own_eos_ids()
        sampler = Sampler(
            student=self.student if self.rule.drafts else None,
            teacher=self.teacher if self.rule.asks_teacher else None,
            rule=self.rule,
            eos_ids=end_ids,
            pad_id=int(config.get("pad_token_id", end_ids[0])),
            max_new_tokens=_length(config, max(map(len, prompts), default=0)),
            gamma=self.gamma,
            student_params=student_params or both,
            teacher_params=teacher_params or both,
            batch_size=self.batch_size,
        )
        base = int(torch.randint(2**62, ())) if seed is None else seed
        return sampler, [derived("row", base, 0, row) >> 1 for row in range(len(prompts))]

    def _own_eos_ids(self) -> tuple[int, ...]:
        ids = [
            one
            for model in (self.student, self.teacher)
            for holder in (model.generation_config, model.config)
            for one in _ids(getattr(holder, "eos_token_id", None))
        ]
        if not ids:
            raise SkdError("no end-of-sequence token is known", where="generate", hint="pass eos_token_id")
        return tuple(dict.fromkeys(ids))


def _rule(rule: AcceptanceRule | str | None) -> AcceptanceRule:
    if rule is None:
        return top_k(25)
    if isinstance(rule, str):
        named = {"lossless": lossless, "student_only": student_only, "teacher_only": teacher_only}
        if rule not in named:
            hint = f"pass one of {', '.join(named)}, or a rule with its number, e.g. top_k(25)"
            raise SkdError("there is no such rule without a number", where=f"rule {rule!r}", hint=hint)
        return named[rule]()
    return rule


def _settings(config: GenerationConfig | None, options: dict[str, Any]) -> dict[str, Any]:
    given = {} if config is None else config.to_diff_dict()
    settings = {
        name: value
        for name, value in (given | options).items()
        if value is not None and not name.startswith("_") and name not in _NO_EFFECT
    }
    for name, value in settings.items():
        if name == "streamer":
            raise SkdError("there are no streamers", where="generate", hint="use `InterleavedSampler.stream`")
        if name in _READ or (isinstance(value, bool | int | float) and value in (_OFF.get(name), False)):
            continue
        if not hasattr(GenerationConfig(), name):
            near = get_close_matches(name, _READ, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(_READ))}"
            raise SkdError("there is no such setting", where=f"generate, {name}", hint=hint)
        what = "it changes samples and is not supported"
        raise SkdError(what, where=f"generate, {name}", hint=f"leave it out; supported are {', '.join(sorted(_READ))}")
    return settings


def _params(settings: dict[str, Any]) -> SamplingParams:
    if not settings.get("do_sample", False):
        return SamplingParams(temperature=0.0)
    given = {name: settings[name] for name in ("temperature", "top_p") if name in settings}
    return parse_section(SamplingParams, given, where="generate")


def _length(settings: dict[str, Any], longest_prompt: int) -> int:
    if "max_new_tokens" in settings:
        return int(settings["max_new_tokens"])
    if "max_length" in settings:
        left = int(settings["max_length"]) - longest_prompt
        if left < 1:
            what = f"max_length is {settings['max_length']}, and the longest prompt has {longest_prompt} tokens"
            raise SkdError(what, where="generate", hint="pass max_new_tokens instead")
        return left
    raise SkdError("no length limit is given", where="generate", hint="pass max_new_tokens")


def _ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _rows(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    input_ids = torch.as_tensor(input_ids)
    if input_ids.dim() != 2:
        raise SkdError(
            f"input_ids has the shape {tuple(input_ids.shape)}", where="generate", hint="pass (rows, tokens)"
        )
    if attention_mask is None:
        rows: list[list[int]] = input_ids.tolist()
        return rows
    if attention_mask.shape != input_ids.shape:
        raise SkdError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}",
            where="generate",
        )
    return [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
