"""Section `distill`: method, loss, sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from skd_lib.config._base import ConfigSection
from skd_lib.config._base import Schedule, ScheduledCount, ScheduledDraftLength, ScheduledShare, Share
from skd_lib.config.training import MULTINODE_HELP, DistillTrainingConfig, MultinodeConfig, check_processes

Method = Literal["sft", "seqkd", "supervised_kd", "on_policy", "imitkd", "two_stage", "skd", "skd_mixed"]
DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "adaptive_kl"]
RuleName = Literal["top_k", "min_prob", "mixture", "lossless"]


def _warm_or_greedy(temperature: float) -> float:
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(f"below {LEAST_TEMPERATURE:g} logits overflow; 0 is greedy decoding, got {temperature:g}")
    return temperature + 0.0  # -0.0 becomes 0.0


LEAST_TEMPERATURE = 1e-6
"""Logits over a much smaller one leave the range of fp32."""
Temperature = Annotated[float, Field(ge=0, le=1000), AfterValidator(_warm_or_greedy)]


class SamplingParams(ConfigSection):
    """How one model samples. Never read from a model's `generation_config`."""

    temperature: Temperature = Field(
        1.0, description=f"Divides the logits; 0 is greedy decoding, the least other value is {LEAST_TEMPERATURE:g}."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus: smallest set of tokens with at least this mass.")


class InterleavedConfig(ConfigSection):
    """The sampler of SKD (Xu et al. 2025, arXiv 2410.11325, Algorithm 1).

    `top_k`, `gamma`, `min_prob` and `mixture` are numbers, or schedules over the training: `{start, end, shape}`.
    """

    rule: RuleName = Field(
        "top_k",
        description="Which drafted tokens the teacher lets stand in `skd` and `skd_mixed`. `top_k`: its K most likely "
        "(SKD). `min_prob`: those it gives at least that probability; its most likely token replaces others (CA-OPD, "
        "arXiv 2609.02401). `mixture`: so that tokens are samples of (1 - g) q + g p (IPD). `lossless`: so that "
        "they are samples of the teacher.",
    )
    top_k: ScheduledCount = Field(
        25,
        description="A drafted token is kept if it is among the teacher's K most likely; 0 is pure teacher sampling.",
    )
    min_prob: ScheduledShare = Field(
        Schedule[Share](start=0.5, end=0.25, shape="cosine"),
        description="`min_prob` only: least teacher probability of a drafted token that is kept.",
    )
    mixture: ScheduledShare = Field(
        0.5, description="`mixture` only: the teacher's share g; 0 is the student alone, 1 the teacher alone."
    )
    gamma: ScheduledDraftLength = Field(
        5, description="Tokens drafted per teacher call; the most, if `adaptive_gamma`."
    )
    adaptive_gamma: bool = Field(
        True,
        description="Draft fewer tokens where the measured acceptance says that more would be wasted. Only speed "
        "depends on it, the samples do not.",
    )
    student: SamplingParams = SamplingParams(temperature=0.5, top_p=0.5)
    teacher: SamplingParams = SamplingParams(temperature=0.5, top_p=1.0)


class TeacherSignalConfig(ConfigSection):
    """When the teacher is asked."""

    mode: Literal["online", "stored"] = Field(
        "online",
        description="`stored`: once, before training, which then needs no teacher in memory. For `supervised_kd` its "
        "most likely tokens at each position are stored, for `seqkd` one response to each prompt.",
    )
    top_k: int = Field(
        64,
        ge=1,
        le=2**20,
        description="`stored` only: tokens a position whose probabilities are stored; all others share one bucket, so "
        "that the loss is a divergence still, a little smaller. Takes 8 bytes each.",
    )


class SelectiveConfig(ConfigSection):
    """Token weights of SelecTKD (arXiv 2510.24021); `{}` takes the paper's."""

    top: int = Field(
        5,
        ge=1,
        le=2**20,
        description="A token counts in full if the student's most likely one is among so many of the teacher's.",
    )
    otherwise: float = Field(0.01, ge=0, le=1, description="Its weight in the divergence if not.")


class DistillConfig(ConfigSection):
    """How the student is trained under the teacher.

    What a method or a divergence does not read is ignored, so that one file can be run with each of them.
    """

    method: Method = Field(
        "skd",
        description="Where responses come from. `sft`: ground truth, no teacher. `seqkd`: the teacher, no divergence. "
        "`supervised_kd`: ground truth. `on_policy`: the student. `imitkd`: ground truth or the student, a sequence. "
        "`two_stage`: ground truth in the first half of the steps, then the student. `skd`: the student, corrected by "
        "the teacher. `skd_mixed`: ground truth or as `skd`, a sequence.",
    )
    divergence: DivergenceName = "forward_kl"
    beta: float = Field(
        0.5, ge=0, le=1, description="`jsd` only: weight of the teacher in the mixture (0: forward KL, 1: reverse KL)."
    )
    alpha: float = Field(
        0.1, ge=0, lt=1, description="`skew_kl`, `skew_reverse_kl` only: skewness; 0 is the forward or reverse KL."
    )
    temperature: float = Field(1.0, ge=1e-3, le=1000, description="Divides both models' logits in the loss.")
    temperature_squared: bool = Field(
        False, description="Multiply the divergence by the square of `temperature` (Hinton et al., arXiv 1503.02531)."
    )
    replaced_weight: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Weight of a cross-entropy that is added at tokens the teacher wrote in the student's response.",
    )
    selective: SelectiveConfig | None = Field(
        None, description="Lower the weight of tokens where teacher and student are far apart (SelecTKD); off if unset."
    )
    on_policy_fraction: ScheduledShare = Field(
        1.0,
        description="`on_policy` only: share of batches the student generates (lambda in GKD, arXiv 2306.13649); "
        "the others are ground truth.",
    )
    sampled_fraction: ScheduledShare = Field(
        0.5, description="`imitkd`, `skd_mixed` only: share of sequences that are sampled; the others are ground truth."
    )
    teacher_signal: TeacherSignalConfig = TeacherSignalConfig()
    sampling: InterleavedConfig = InterleavedConfig()
    training: DistillTrainingConfig = DistillTrainingConfig()
    multinode: MultinodeConfig | None = Field(None, description=MULTINODE_HELP)

    @model_validator(mode="after")
    def _several_nodes_fit(self) -> DistillConfig:
        check_processes(self.multinode, self.training)
        if self.multinode is not None and self.teacher_signal.mode == "stored":
            raise ValueError(
                "multinode: a stored teacher signal is in one machine's files, which the other nodes do not have; use "
                "`teacher_signal.mode: online`, or no multinode"
            )
        return self

    @model_validator(mode="after")
    def _shards_agree(self) -> DistillConfig:
        if self.training.fsdp and self.method == "skd_mixed":
            raise ValueError(
                "training.fsdp: all processes ask a sharded teacher at once, but with `skd_mixed` only those that have "
                "ground truth in their micro-batch would ask it; use method `skd`, or no fsdp"
            )
        return self

    @model_validator(mode="after")
    def _stored_signal_fits(self) -> DistillConfig:
        if self.teacher_signal.mode == "online" or self.method == "sft":
            return self
        if self.method not in ("supervised_kd", "seqkd"):
            raise ValueError(
                f"teacher_signal: what the teacher says cannot be stored for `{self.method}`: its responses are "
                "written again in every step, by a student that changes; use `mode: online`, or method `supervised_kd` "
                "or `seqkd`"
            )
        if self.method == "supervised_kd" and self.selective and self.selective.top > self.teacher_signal.top_k:
            raise ValueError(
                f"selective.top is {self.selective.top}, but only the teacher's {self.teacher_signal.top_k} most "
                "likely tokens are stored; raise teacher_signal.top_k"
            )
        return self
