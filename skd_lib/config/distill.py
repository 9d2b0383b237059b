"""Section `distill`: method, loss, sampling."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from skd_lib._core.registry import NameIn
from skd_lib.config._base import ConfigSection, Schedule, ScheduledCount, ScheduledDraftLength, ScheduledShare, Share
from skd_lib.config.names import check_url
from skd_lib.config.training import (
    MULTINODE_HELP,
    DistillTrainingConfig,
    MultinodeConfig,
    PodsConfig,
    Quantity,
    check_processes,
)

_METHOD = NameIn("skd_lib.distillation.methods", "METHODS", "The source of responses.")
_DIVERGENCE = NameIn("skd_lib.distillation.divergences", "DIVERGENCES", "The loss, of teacher p and student q.")
_RULE = NameIn("skd_lib.sampling.acceptance", "RULES", "Drafted tokens t that stand in `skd` and `skd_mixed`.")
MethodName = Annotated[str, _METHOD]
DivergenceName = Annotated[str, _DIVERGENCE]
RuleName = Annotated[str, _RULE]


def _warm_or_greedy(temperature: float) -> float:
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(f"below {LEAST_TEMPERATURE:g} logits overflow; 0 is greedy decoding, got {temperature:g}")
    return temperature + 0.0  # -0.0 becomes 0.0


LEAST_TEMPERATURE = 1e-6
"""Logits over a much smaller one leave the range of fp32."""
Temperature = Annotated[float, Field(ge=0, le=1000), AfterValidator(_warm_or_greedy)]

_TEMPERATURE = f"Divides the logits; 0 is greedy decoding, the least other value is {LEAST_TEMPERATURE:g}."
_TOP_P = "Nucleus: smallest set of tokens with at least this mass."


class SamplingParams(ConfigSection):
    """Sampling of one model. Never read from a model's `generation_config`."""

    temperature: Temperature = Field(1.0, description=_TEMPERATURE)
    top_p: float = Field(1.0, gt=0, le=1, description=_TOP_P)


class StudentSampling(SamplingParams):
    """Sampling of the student. Never read from a model's `generation_config`."""

    temperature: Temperature = Field(0.5, description=_TEMPERATURE)
    top_p: float = Field(0.5, gt=0, le=1, description=_TOP_P)


class TeacherSampling(SamplingParams):
    """Sampling of the teacher. Never read from a model's `generation_config`."""

    temperature: Temperature = Field(0.5, description=_TEMPERATURE)


class InterleavedConfig(ConfigSection):
    """The sampler of SKD (Xu et al. 2025, arXiv 2410.11325, Algorithm 1).

    `top_k`, `gamma`, `min_prob` and `mixture` are numbers, or schedules over the training: `{start, end, shape}`.
    """

    rule: RuleName = "top_k"
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
    student: StudentSampling = StudentSampling()
    teacher: TeacherSampling = TeacherSampling()

    @field_validator("student", "teacher", mode="before")
    @classmethod
    def _of_params(cls, value: Any) -> Any:
        return value.model_dump() if isinstance(value, SamplingParams) else value


class TeacherSignalConfig(ConfigSection):
    """The time at which the teacher is asked."""

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


class EnginePodsConfig(PodsConfig):
    """vLLM servers in pods of their own, which the step makes in its cluster and deletes at its end.

    A server's pod gets both models and, after each step, the student's weights from the step. It opens no
    connection itself.
    """

    count: int = Field(1, ge=1, le=256, description="Servers; rows are spread over them.")
    resources: dict[str, Quantity] | None = Field(
        None,
        description="What a pod asks for, e.g. `{cpu: '8', memory: 64Gi, nvidia.com/gpu: '2'}`; unset: what the step's "
        "own container asks for, with `tensor_parallel` GPUs if it has any.",
    )
    image: str = Field("", description="The image `vllm` (images/README.md); empty: the one of the pipeline's release.")


class VllmConfig(ConfigSection):
    """vLLM as the engine that samples: `distill.engine: vllm`.

    The teacher and a copy of the student are in the servers; the training holds the student and the teacher's head.
    """

    urls: list[str] = Field(
        [],
        description="Servers that `skd engine start` started, `http://host:port` each; rows are spread over them. "
        "Empty: the step starts one on its own machine, or those of `pods`.",
    )
    pods: EnginePodsConfig | None = Field(
        None, description="On Kubeflow: servers in pods of their own, e.g. `{count: 2}`; unset: none."
    )
    signal: Literal["states", "top_k"] = Field(
        "states",
        description="What comes back of the teacher for each response token: its last hidden state, or the "
        "log-probabilities of its `top_k` most likely tokens and of all others together.",
    )
    top_k: int = Field(64, ge=1, le=2**20, description="`signal: top_k` only: tokens kept.")
    exchange: str = Field(
        "",
        description="`urls` only: folder that the training and the servers share, for the student's weights after each "
        "step. Empty: the weights are sent to each server by HTTP.",
    )
    max_rows: int = Field(64, ge=1, le=2**16, description="`urls: []` only: rows in flight.")
    tensor_parallel: int = Field(1, ge=1, le=64, description="`urls: []` only: GPUs that share the teacher.")
    memory: float | None = Field(
        None,
        gt=0,
        description="`urls: []` only: the share of a GPU's memory that vLLM takes (its own default is 0.92; the "
        "student in training needs the rest), or GiB for keys and values on a CPU (1).",
    )

    wait_minutes: float = Field(
        60,
        gt=0,
        le=10_000,
        description="`urls` and `pods` only: time for a server to answer, which loads its models first (those of "
        "`pods` wait for a machine and the image, too), after which the step fails. A request has no limit.",
    )

    @field_validator("urls")
    @classmethod
    def _are_servers(cls, urls: list[str]) -> list[str]:
        checked = [check_url(url, "SKD_ENGINE_TOKEN") for url in urls]
        if len(set(checked)) < len(checked):
            raise ValueError("names a server twice; leave one of the two out")
        return checked

    @model_validator(mode="after")
    def _pods_fit(self) -> VllmConfig:
        if self.pods is None:
            return self
        if self.urls:
            raise ValueError("pods: the step makes servers of its own, but `urls` names some; leave one of them out")
        if self.pods.gpus and self.pods.gpus != self.tensor_parallel:
            raise ValueError(
                f"pods.resources asks for {self.pods.gpus} GPUs in each pod, and a server uses tensor_parallel: "
                f"{self.tensor_parallel}; make them equal"
            )
        return self


class SelectiveConfig(ConfigSection):
    """Token weights of SelecTKD (arXiv 2510.24021); `{}` takes the paper's."""

    top: int = Field(
        5,
        ge=1,
        le=2**20,
        description="A token counts in full if the student's most likely one is among the teacher's `top` most likely.",
    )
    otherwise: float = Field(0.01, ge=0, le=1, description="Its weight in the divergence if not.")


class DistillConfig(ConfigSection):
    """Training of the student under the teacher.

    A setting that the method or the divergence does not read is ignored, so that one file can be run with each of them.
    """

    method: MethodName = "skd"
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
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="What samples: this project's own engine, or vLLM servers with the same samples."
    )
    vllm: VllmConfig = VllmConfig()
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
        if self.multinode is not None and self.engine == "vllm" and self.vllm.pods is not None:
            raise ValueError("multinode: its nodes make no servers; name some in `vllm.urls`, not `vllm.pods`")
        return self

    @model_validator(mode="after")
    def _shards_agree(self) -> DistillConfig:
        whole_teacher = self.engine == "vllm"  # the servers have it
        if self.training.fsdp and not whole_teacher and not _METHOD.registry[self.method].shardable:
            raise ValueError(
                f"training.fsdp: all processes ask a sharded teacher at once, but with `{self.method}` only those that "
                "have ground truth in their micro-batch would ask it; use method `skd`, or no fsdp"
            )
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> DistillConfig:
        if self.engine == "transformers":
            return self
        found = {
            "multinode is set and vllm.urls is empty": self.multinode is not None and not self.vllm.urls,
            "teacher_signal.mode is `stored`": self.teacher_signal.mode == "stored",
            "sampling.gamma is a schedule": isinstance(self.sampling.gamma, Schedule),
            f"sampling.rule is `{self.sampling.rule}`": self.sampling.rule not in ("top_k", "min_prob"),
        }
        if problems := [problem for problem, is_so in found.items() if is_so]:
            raise ValueError(
                "engine: vllm samples by the rules top_k and min_prob with a fixed gamma, online, on several machines "
                f"by servers that all of them reach, but {' and '.join(problems)}; change that, or use `engine: "
                "transformers`"
            )
        return self

    def needs_of_weights(self) -> list[str]:
        """Return what this training does that a teacher's answers over HTTP are not enough for."""
        method = _METHOD.registry[self.method]
        if not method.needs_teacher:
            return []
        if not method.storable:
            return [
                f"method `{self.method}` asks the teacher about what the student writes in each step, use "
                "`supervised_kd` or `seqkd`, or give the teacher's weights (`distill.engine: vllm` serves them)"
            ]
        needs = []
        if self.teacher_signal.mode == "online":
            needs.append("it is asked before training, set `distill.teacher_signal.mode: stored`")
        if method.uses_divergence and self.temperature != 1:
            needs.append(
                "its log-probabilities are of temperature 1, and of the tokens that it leaves out the sum alone is "
                "known, which gives none of another temperature, set `distill.temperature: 1`"
            )
        return needs

    @model_validator(mode="after")
    def _stored_signal_fits(self) -> DistillConfig:
        if self.teacher_signal.mode == "online":  # of all defaults, which are validated before there are registries
            return self
        method = _METHOD.registry[self.method]
        if not method.needs_teacher:
            return self
        if not method.storable:
            raise ValueError(
                f"teacher_signal: the teacher's signal cannot be stored for `{self.method}`: its responses are written "
                "again in every step, by a student that changes; use `mode: online`, or method `supervised_kd` or "
                "`seqkd`"
            )
        if method.uses_divergence and self.selective and self.selective.top > self.teacher_signal.top_k:
            raise ValueError(
                f"selective.top is {self.selective.top}, but only the teacher's {self.teacher_signal.top_k} most "
                "likely tokens are stored; raise teacher_signal.top_k"
            )
        return self
