"""The training methods: one entry each, from which configuration, help, docs and memory estimates are derived.

All methods are one training loop. They differ in the source of responses (`skd_lib.distillation.rollouts.Responses`)
and in the loss: a divergence from the teacher, or the response's cross-entropy. `METHODS.add` registers another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from skd_lib._core.registry import Registry
from skd_lib.config import DistillConfig, InterleavedConfig
from skd_lib.distillation.divergences import DIVERGENCES
from skd_lib.sampling.acceptance import RULES

if TYPE_CHECKING:
    from skd_lib.distillation.rollouts import Responses, Strategy

XU = "Xu et al. 2025, arXiv 2410.11325"


@dataclass(frozen=True)
class MethodEntry:
    """A method by its name in the configuration.

    Attributes:
        strategy: Combines sources of responses into the method's own.
        response: The writer of a response, for help texts and docs.
        cost: Cost of a step in addition to the student's forward and backward, for docs.
        source: Paper of the method.
        student_writes: The student writes tokens of the responses (drafts at least).
        teacher_writes: The teacher writes tokens of the responses.
        uses_divergence: The loss is a divergence from the teacher; else it is the response's cross-entropy.
        settings: Fields of `distill` that it reads, in addition to those that follow from the facts above.
        storable: The teacher can be asked before training: no response depends on the student.
        samples_always: Every response is sampled: the method never reads an answer of the data.
        shardable: All processes ask the teacher in the same micro-batches, as a sharded one needs.
    """

    strategy: Callable[[Responses], Strategy]
    response: str
    cost: str = ""
    source: str = ""
    student_writes: bool = False
    teacher_writes: bool = False
    uses_divergence: bool = True
    settings: tuple[str, ...] = ()
    storable: bool = False
    samples_always: bool = False
    shardable: bool = True

    @property
    def needs_teacher(self) -> bool:
        """True if the method asks a teacher at all."""
        return self.teacher_writes or self.uses_divergence

    @property
    def interleaves(self) -> bool:
        """True if the student drafts and the teacher replaces."""
        return self.student_writes and self.teacher_writes

    def __str__(self) -> str:
        loss = (
            "" if self.uses_divergence else "; cross-entropy" if self.needs_teacher else "; cross-entropy, no teacher"
        )
        return self.response + loss


def _paths() -> list[str]:
    """Return the fields of `distill` and of `distill.sampling`."""
    return [*DistillConfig.model_fields, *(f"sampling.{name}" for name in InterleavedConfig.model_fields)]


METHODS = Registry(
    "method",
    {
        "sft": MethodEntry(
            lambda make: make.ground_truth(),
            response="ground truth",
            cost="none; no teacher is loaded",
            uses_divergence=False,
        ),
        "seqkd": MethodEntry(
            lambda make: make.by_teacher(),
            response="the teacher's samples",
            cost="the teacher's generation, token by token; none with `teacher_signal.mode: stored`",
            source="Kim & Rush 2016, arXiv 1606.07947",
            teacher_writes=True,
            uses_divergence=False,
            storable=True,
            samples_always=True,
        ),
        "supervised_kd": MethodEntry(
            lambda make: make.ground_truth(),
            response="ground truth",
            cost="one teacher forward; none with `teacher_signal.mode: stored`",
            source="Hinton et al. 2015, arXiv 1503.02531",
            storable=True,
        ),
        "on_policy": MethodEntry(
            lambda make: make.in_some_steps(make.by_student(), make.distill.on_policy_fraction),
            response="the student's samples in a share `on_policy_fraction` (lambda) of the steps, else ground truth",
            cost="the student's generation, one teacher forward",
            source="GKD, Agarwal et al. 2024, arXiv 2306.13649, algorithm 1",
            student_writes=True,
            settings=("on_policy_fraction",),
        ),
        "imitkd": MethodEntry(
            lambda make: make.in_some_rows(make.by_student(), make.distill.sampled_fraction),
            response="the student's samples in a share `sampled_fraction` of the sequences, else ground truth",
            cost="as `on_policy`, for that share",
            source="Lin et al. 2020, arXiv 2009.07253",
            student_writes=True,
            settings=("sampled_fraction",),
        ),
        "two_stage": MethodEntry(
            lambda make: make.in_some_steps(make.by_student(), lambda step: float(2 * step >= make.steps)),
            response="ground truth in the first half of the optimiser steps, the student's samples in the second",
            cost="as `supervised_kd`, then as `on_policy`",
            source=XU,
            student_writes=True,
        ),
        "skd": MethodEntry(
            lambda make: make.interleaved(),
            response="the student drafts, the teacher replaces",
            cost="drafting, and a teacher forward a block; **no** second teacher forward: the states that verified the "
            "drafts are the loss's teacher signal",
            source=f"{XU}, section 3, algorithm 1",
            student_writes=True,
            teacher_writes=True,
            samples_always=True,
        ),
        "skd_mixed": MethodEntry(
            lambda make: make.in_some_rows(make.interleaved(), make.distill.sampled_fraction),
            response="as `skd` in a share `sampled_fraction` of the sequences, else ground truth",
            cost="as `skd` for that share, one teacher forward for the ground truth",
            source=XU,
            student_writes=True,
            teacher_writes=True,
            settings=("sampled_fraction",),
            shardable=False,  # only processes with ground truth in their micro-batch would ask it
        ),
    },
    section="distill",
    fields=_paths,
)
"""The methods of `distill.method`."""

_ALWAYS_READ = {"method", "training", "multinode", "sampling", "sampling.adaptive_gamma"}
_PARAMETERS = {"divergence", "sampling.top_k", "sampling.gamma"}
"""The pipeline's own parameters always have a value."""


def samples_every_response(distill: DistillConfig) -> bool:
    """Return whether a method with its settings trains on sampled responses alone, so that prompts are enough."""
    entry = METHODS[distill.method]
    shares = [getattr(distill, name) for name in entry.settings if name in ("on_policy_fraction", "sampled_fraction")]
    return entry.samples_always or (bool(shares) and all(share == 1 for share in shares))


def unread_settings(distill: DistillConfig) -> list[str]:
    """List the fields that differ from their defaults and that this method with this divergence never reads.

    The pipeline's own parameters (`divergence`, `top_k`, `gamma`) are left out: they always have a value.
    """
    default = DistillConfig()
    return [
        path
        for path, is_read in _reads(distill).items()
        if not is_read
        and path not in _PARAMETERS
        and reduce(getattr, path.split("."), distill) != reduce(getattr, path.split("."), default)
    ]


def reads_setting(distill: DistillConfig, path: str) -> bool:
    """Return True if this method with this divergence reads the field at `path` of `distill`, or a field in it."""
    return all(is_read for known, is_read in _reads(distill).items() if f"{path}.".startswith(f"{known}."))


def _reads(distill: DistillConfig) -> dict[str, bool]:
    """Map each field that not all methods, divergences and rules read to True if these do."""
    method, rule = METHODS[distill.method], RULES[distill.sampling.rule]
    read = set(method.settings)
    if method.uses_divergence:
        read |= {"divergence", "temperature", "temperature_squared", "selective"}
        read |= set(DIVERGENCES[distill.divergence].settings)
    if method.needs_teacher:
        read |= {"teacher_signal", "engine", "vllm"}
    if method.interleaves:
        read |= {"replaced_weight", *(f"sampling.{name}" for name in ("rule", "gamma", *rule.settings))}
    read |= {f"sampling.{name}" for name in ("student", "teacher") if getattr(method, f"{name}_writes")}
    return {path: path in read for path in _paths() if path not in _ALWAYS_READ}
