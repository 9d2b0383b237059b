"""Prompts with their responses as tensors, and both models' states along them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib.distillation.teacher_signal import DenseSignal, TeacherSignal
from skd_lib.errors import SkdError
from skd_lib.models.heads import decoder
from skd_lib.sampling.samples import SamplingStatistics

Source = Literal["ground_truth", "student", "teacher", "interleaved"]
_TENSORS = ("input_ids_BL", "response_mask_BL", "by_teacher_BL", "proposals_BL")
"""The tensors of a `Rollout`."""


@dataclass(frozen=True)
class Rollout:
    """Prompts with their responses, ready for the loss.

    Attributes:
        input_ids_BL: Prompt, response, padding; right padded, so a causal decoder needs no attention mask: no real
            position sees a padded one.
        response_mask_BL: True at position i if token i + 1 belongs to the response, that is where the model's
            output predicts a response token. So the last prompt position is True (it predicts the first response
            token), the position before EOS is True (it predicts EOS), EOS itself and the last column are False.
            Made from lengths, never from token ids: a pad id equal to the EOS id hides nothing.
        by_teacher_BL: True at those of these positions whose response token the teacher wrote.
        proposals_BL: There the student's draft, where the teacher replaced it; -1 elsewhere.
        sources: Writer of each row's response.
        signals: The teacher's signal along each row's response; None where it is not known yet.
        statistics: The sampler's figures; None for ground truth that no server has read.
    """

    input_ids_BL: Tensor
    response_mask_BL: Tensor
    by_teacher_BL: Tensor
    proposals_BL: Tensor
    sources: tuple[Source, ...]
    signals: tuple[TeacherSignal | None, ...]
    statistics: SamplingStatistics | None = None

    @property
    def targets_N(self) -> Tensor:  # noqa: N802
        """The response tokens, in row-major order."""
        return self.input_ids_BL[:, 1:][self.response_mask_BL[:, :-1]]

    @property
    def by_teacher_N(self) -> Tensor:  # noqa: N802
        """True at those that the teacher wrote."""
        return self.by_teacher_BL[self.response_mask_BL]

    @property
    def proposals_N(self) -> Tensor:  # noqa: N802
        """The student's drafts in their place; -1 where nothing was replaced."""
        return self.proposals_BL[self.response_mask_BL]

    @property
    def lengths(self) -> list[int]:
        """Response tokens of each row, EOS included."""
        lengths: list[int] = self.response_mask_BL.sum(1).tolist()
        return lengths

    @property
    def tokens(self) -> int:
        """Number of response tokens, EOS included."""
        return int(self.response_mask_BL.sum())

    @property
    def sequence_lengths(self) -> list[int]:
        """Tokens of each row, prompt and response."""
        lengths: list[int] = self._row_lengths_B.tolist()
        return lengths

    def rows(self, chosen: Sequence[int]) -> Rollout:
        """Return some of the rows, cut to the longest of them, without statistics."""
        rows = torch.tensor(chosen, device=self.input_ids_BL.device)
        length = int(self._row_lengths_B[rows].max())
        sources, signals = (tuple(each[row] for row in chosen) for each in (self.sources, self.signals))
        return self._with(lambda x_BL: x_BL[rows, :length], sources=sources, signals=signals, statistics=None)

    def split(self, sizes: Sequence[int]) -> list[Rollout]:
        """Split into micro-batches of the given numbers of rows, without statistics.

        Rows of similar length go together, and each micro-batch is cut to its longest row: a sum over tokens does not
        depend on the grouping, its cost does.
        """
        order_B = self._row_lengths_B.argsort(stable=True)
        return [self.rows(rows.tolist()) for rows in torch.split(order_B, list(sizes))]

    def to(self, device: torch.device) -> Rollout:
        """Move to a device."""
        signals = tuple(None if signal is None else signal.to(device) for signal in self.signals)
        return self._with(lambda x_BL: x_BL.to(device), signals=signals)

    def _with(self, change: Callable[[Tensor], Tensor], **others: Any) -> Rollout:
        """Change all tensors in one way, and other fields."""
        tensors: dict[str, Any] = {name: change(getattr(self, name)) for name in _TENSORS}
        return replace(self, **tensors, **others)

    @property
    def _row_lengths_B(self) -> Tensor:  # noqa: N802
        """Tokens of each row, prompt and response."""
        columns_L = torch.arange(1, self.response_mask_BL.shape[1] + 1, device=self.response_mask_BL.device)
        # The last True column predicts the token after it.
        return (columns_L * self.response_mask_BL).amax(1) + 1


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int,
    source: Source,
    device: torch.device | str = "cpu",
) -> Rollout:
    """Pad prompts and responses into one batch; the teacher wrote all of a response whose source it is, else none."""
    if not all(prompts):
        raise SkdError("a prompt has no tokens", hint="use a chat template, or a tokenizer that adds a BOS token")
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    longest = max(map(len, rows))
    input_ids_BL = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], device=device)
    starts_B1 = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=device)
    ends_B1 = torch.tensor([[len(row) - 1] for row in rows], device=device)
    positions_L = torch.arange(longest, device=device)
    response_mask_BL = (positions_L >= starts_B1) & (positions_L < ends_B1)
    return Rollout(
        input_ids_BL,
        response_mask_BL,
        by_teacher_BL=response_mask_BL if source == "teacher" else torch.zeros_like(response_mask_BL),
        proposals_BL=torch.full_like(input_ids_BL, -1),
        sources=(source,) * len(rows),
        signals=(None,) * len(rows),
    )


def merge(parts: Sequence[Rollout], order: Sequence[int], pad_id: int) -> Rollout:
    """Merge all rows of the rollouts into one; the i-th of them becomes row `order[i]`."""
    longest = max(part.input_ids_BL.shape[1] for part in parts)
    position = sorted(range(len(order)), key=order.__getitem__)

    def together(name: str, fill: int) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([F.pad(tensor, (0, longest - tensor.shape[1]), value=fill) for tensor in tensors])[position]

    sources = [source for part in parts for source in part.sources]
    signals = [signal for part in parts for signal in part.signals]
    tensors: dict[str, Any] = {
        name: together(name, fill) for name, fill in zip(_TENSORS, (pad_id, 0, 0, -1), strict=True)
    }
    return Rollout(
        **tensors,
        sources=tuple(sources[row] for row in position),
        signals=tuple(signals[row] for row in position),
        statistics=sum((part.statistics for part in parts if part.statistics is not None), SamplingStatistics()),
    )


def response_states(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """Return (N, H) final hidden states of `model` at the positions that predict the rollout's response tokens."""
    hidden_BLH = decoder(model)(input_ids=rollout.input_ids_BL, use_cache=False).last_hidden_state
    return cast(Tensor, hidden_BLH[rollout.response_mask_BL])


def teacher_signals(teacher: PreTrainedModel | None, rollout: Rollout) -> list[TeacherSignal]:
    """Return the teacher's signal along each row's response: the rollout's own, and from one forward for other rows."""
    missing = [row for row, signal in enumerate(rollout.signals) if signal is None]
    fresh: dict[int, TeacherSignal] = {}
    if missing:
        if teacher is None:
            raise SkdError("the loss needs a teacher, or its signal along every response", where="distill")
        part = rollout.rows(missing)
        with torch.no_grad():
            states_NH = response_states(teacher, part)
        fresh = dict(zip(missing, DenseSignal(states_NH, teacher).split(part.lengths), strict=True))
    return [fresh[row] if signal is None else signal for row, signal in enumerate(rollout.signals)]
