"""What the training tells vLLM's worker, and what the worker tells the training."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from skd_lib.config import SamplingParams
from skd_lib.config._base import ConfigSection
from skd_lib.errors import SkdError
from skd_lib.sampling.acceptance import RULES, Block
from skd_lib.sampling.distributions import warp

if TYPE_CHECKING:
    from skd_lib.sampling.acceptance import AcceptanceRule

SERVED_VERSION = "0.32."
"""vLLM's versions whose internals `runner_v1` and `runner_v2` know."""

_UNSERVED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("parallel_config.pipeline_parallel_size", (1,), "--pipeline-parallel-size"),
    ("parallel_config.prefill_context_parallel_size", (1,), "--prefill-context-parallel-size"),
    ("parallel_config.enable_batch_sharded_sampling", (None, False), "--enable-batch-sharded-sampling"),
    ("speculative_config.use_heterogeneous_vocab", (False,), "`use_heterogeneous_vocab` of --speculative-config"),
    ("speculative_config.parallel_drafting", (False,), "`parallel_drafting` of --speculative-config"),
)
"""Settings of vLLM with the values that can be served, and what they are called."""


def refusal(version: str, config: Any) -> str | None:
    """Say why a server cannot sample interleaved; None if it can.

    Args:
        version: vLLM's.
        config: Its `VllmConfig`.
    """
    if not version.startswith(SERVED_VERSION):
        return f"vLLM is {version}, and only {SERVED_VERSION}x has the internals that interleaved sampling needs"
    drafts = config.speculative_config
    if drafts is None or drafts.method != "draft_model":
        found = "no --speculative-config" if drafts is None else f"drafts by the method {drafts.method}"
        return f"the server was started with {found}: it needs a model that drafts, the method draft_model"
    if config.parallel_config.data_parallel_size > 1:
        return "the server was started with --data-parallel-size: start several servers and name all in `urls`"
    if config.scheduler_config.async_scheduling and not config.use_v2_model_runner:
        return "vLLM's model runner V1 schedules asynchronously: start it with --no-async-scheduling"
    for path, served, name in _UNSERVED:
        section, attribute = path.split(".")
        if getattr(getattr(config, section), attribute) not in served:
            return f"interleaved sampling does not work with vLLM's {name}"
    return None


class RolloutSettings(ConfigSection):
    """Sampling of the next responses, and the teacher's signal that is kept of them."""

    rule: str = Field("top_k", description="An acceptance rule that reads the teacher alone: `top_k` or `min_prob`.")
    value: float = Field(25, description="The rule's number.")
    student: SamplingParams = SamplingParams()
    teacher: SamplingParams = SamplingParams()
    vocabulary: int = Field(ge=1, description="Token ids from here on have probability 0.")
    signal: Literal["none", "states", "top_k"] = Field("none", description="Kept for each response token.")
    top_k: int = Field(64, ge=1, description="`signal: top_k` only: the teacher's most likely tokens.")
    temperature: float = Field(1.0, description="`signal: top_k` only: divides the teacher's logits.")

    def acceptance(self) -> AcceptanceRule:
        """Return the acceptance rule.

        Raises:
            SkdError: the rule needs the student's probabilities, or more than one number.
        """
        entry = RULES[self.rule]
        value: Any = int(self.value) if self.rule == "top_k" else self.value
        rule = entry.make(value)
        if rule.needs_student_probs or rule.accept is None or rule.bonus:
            raise SkdError(
                f"vLLM cannot sample by the rule `{self.rule}`, which reads the student's probabilities",
                where="distill.sampling.rule",
                hint="use top_k or min_prob, or `distill.engine: transformers`",
            )
        return rule

    def stands(self, drafts_BG: Tensor, teacher_logits_BGV: Tensor) -> Tensor:
        """Return (B, G) bool: the rule accepts the draft. An id of -1 is no draft and never stands.

        Args:
            drafts_BG: Drafted tokens.
            teacher_logits_BGV: Raw logits, those of padding rows included.
        """
        accept = self.acceptance().accept
        assert accept is not None  # noqa: S101 - `acceptance` has seen to it
        real_BG = (drafts_BG >= 0) & (drafts_BG < self.vocabulary)
        drafted_BG = drafts_BG.clamp(0, self.vocabulary - 1)
        # The rules served here draw nothing.
        unused_BG = drafted_BG.new_zeros(drafted_BG.shape, dtype=torch.float64)
        block = Block(drafted_BG, teacher_logits_BGV[..., : self.vocabulary], None, unused_BG, self.teacher)
        return accept(block) & real_BG

    def replacement(self, teacher_logits_MV: Tensor) -> Tensor:
        """Return (M, V) weights to draw the teacher's tokens from.

        Args:
            teacher_logits_MV: Raw logits, those of padding rows included.
        """
        probs_MV = warp(teacher_logits_MV[..., : self.vocabulary], self.teacher)
        correct = self.acceptance().correct
        return probs_MV if correct is None else correct(probs_MV, None)


def packed(tensor: Tensor) -> list[Any]:
    """Return a tensor as JSON: dtype, shape and base64 of its bytes."""
    raw = tensor.detach().cpu().contiguous()
    data = raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b""
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), base64.b64encode(data).decode()]


def unpacked(dtype: str, shape: list[int], data: str) -> Tensor:
    """Return the tensor that `packed` wrote."""
    kind = getattr(torch, dtype)
    raw = base64.b64decode(data)
    return torch.frombuffer(bytearray(raw), dtype=kind).reshape(shape) if raw else torch.empty(shape, dtype=kind)
