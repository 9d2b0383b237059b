"""The likelihood of reference answers under a model: no decoding, one forward pass."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skd_lib._core.events import Progress
from skd_lib.config import TaskConfig
from skd_lib.data.examples import Example
from skd_lib.data.tokenize import answer_end_id, encode
from skd_lib.distillation.batch import collate, response_states
from skd_lib.distillation.loss import cross_entropy_sum
from skd_lib.models.heads import embedding_rows
from skd_lib.models.vocabulary import check_ids, eos_ids, pad_id
from skd_lib.sampling.cache import position_limit

log = logging.getLogger(__name__)


class ReferenceLoss(NamedTuple):
    """The negative log-likelihood of a reference answer in nats, summed over its tokens, the final one included."""

    nll: float
    tokens: int


@torch.no_grad()
def reference_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: TaskConfig,
    *,
    batch_size: int,
) -> list[ReferenceLoss]:
    """Return the loss of every example's reference after its prompt, in the order of the examples.

    References are cut to `task.max_new_tokens`, as in training; prompts are not. One that does not fit the model's
    context with its prompt is not read, as `generate` does not answer it: its loss is NaN over 0 tokens. Logits are
    made in fp32 for a chunk of positions at a time.
    """
    end = answer_end_id(tokenizer, task)
    encoded = [encode(tokenizer, task, example, end, eos_ids(model, tokenizer)) for example in examples]
    check_ids(encoded, embedding_rows(model), where="evaluation")
    lengths = [len(row.prompt_ids) + len(row.response_ids) for row in encoded]
    limit = position_limit(model, 1)
    fitting = [row for row, length in enumerate(lengths) if limit is None or length <= limit]
    if len(fitting) < len(encoded):
        log.warning(
            "%d of %d references do not fit the model's context (%d tokens) with their prompts; perplexity omits them",
            len(encoded) - len(fitting),
            len(encoded),
            limit,
        )
    # Rows of like length next to each other, so that little padding is computed.
    order = sorted(fitting, key=lengths.__getitem__)
    losses: dict[int, ReferenceLoss] = {}
    progress = Progress("reading references", len(order))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        responses = [encoded[row].response_ids for row in rows]
        rollout = collate(
            [encoded[row].prompt_ids for row in rows],
            responses,
            pad_id=pad_id(tokenizer, embedding_rows(model)),
            source="ground_truth",
            device=model.device,
        )
        sizes = [len(response) for response in responses]
        states = torch.split(response_states(model, rollout), sizes)
        targets = torch.split(rollout.targets_N, sizes)
        for row, states_NH, targets_N in zip(rows, states, targets, strict=True):
            losses[row] = ReferenceLoss(float(cross_entropy_sum(model, states_NH, targets_N).loss), len(targets_N))
        progress.update(len(losses))
    return [losses.get(row, ReferenceLoss(math.nan, 0)) for row in range(len(encoded))]
