"""Sections `training` of every step that trains, and `multinode`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from skd_lib.config._base import ConfigSection

Quantity = Annotated[
    str,
    Field(
        pattern=r"^([0-9]*[1-9][0-9]*(\.[0-9]+)?|[0-9]+\.[0-9]*[1-9][0-9]*)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$",
        max_length=20,
        examples=["8", "64Gi"],
    ),
]
"""An amount of a resource as Kubernetes writes it; more than nothing."""
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Precision = Literal["auto", "fp32", "bf16"]
TeacherPrecision = Literal["auto", "bf16", "fp32", "8bit", "4bit"]


class LoraConfig(ConfigSection):
    """Train low-rank adapters (arXiv 2106.09685) added to frozen weights; the model that is saved has them merged in.

    Gradients and optimiser states are of the adapters alone, which saves 12 bytes a frozen weight.
    """

    rank: int = Field(16, ge=1, le=4096, description="Width of an adapter.")
    alpha: float = Field(32.0, ge=1e-6, le=1e6, description="An adapter's output is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of an adapter while training.")
    target_modules: list[str] = Field(
        [], description="Layers with adapters, by the end of their names, e.g. `q_proj`; empty: all but the head."
    )


class TrainingConfig(ConfigSection):
    """One training run. Defaults are the paper's (Xu et al. 2025, arXiv 2410.11325)."""

    learning_rate: float = Field(1e-5, ge=1e-12, le=10, description="Peak learning rate.")
    lr_scheduler: Scheduler = "linear"
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0, le=10)
    max_grad_norm: float = Field(1.0, ge=1e-9, le=1e9)
    epochs: float = Field(3, gt=0, le=100_000, description="Ignored when `max_steps` is set.")
    max_steps: int | None = Field(None, ge=1, le=10**9, description="Optimiser steps.")
    batch_size: int = Field(8, ge=1, le=65_536, description="Sequences per optimiser step, over all devices.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Sequences per forward and device; unset: as many as the optimiser step needs.",
    )
    eval_steps: int = Field(
        25, ge=1, le=10**9, description="Steps between validations and checkpoints; the best checkpoint is kept."
    )
    checkpoint_minutes: float = Field(
        10,
        gt=0,
        le=100_000,
        description="A checkpoint is also made this many minutes after the last one: the most that is lost where a "
        "machine is taken away, but for the time of a write. It is copied to host memory (12 bytes a trained weight; "
        "training waits where there is no room for that) and written while training goes on.",
    )
    keep_checkpoints: int = Field(
        1, ge=1, le=10**6, description="Number of recent checkpoints to keep, in addition to the best one."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Attention dropout while training; always off while sampling.")
    precision: Precision = Field(
        "auto",
        description="In which forward and backward passes compute, sampling included, and in which the model is saved. "
        "Weights in training, gradients and optimiser states are fp32 always. `auto` is bf16 on a GPU that multiplies "
        "in it (Ampere and later), on a CPU fp32 unless it has `amx_bf16`; the environment variable SKD_PRECISION "
        "(fp32 or bf16) replaces this choice on a machine. `bf16` elsewhere is often slower than fp32, and a warning "
        "of preflight. Evaluation and the benchmark of drafts compute in what `auto` is where they run.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute activations again in the backward pass: less memory, more time. Sampling keeps its cache.",
    )
    explosion_factor: float = Field(
        100,
        gt=1,
        le=1e12,
        description="A step is skipped if its loss is more than this many times the median of the last 50 steps', or "
        "if its loss or gradient is not finite.",
    )
    max_skipped_steps: int = Field(
        5,
        ge=1,
        le=10**9,
        description="Training stops, its last good checkpoint kept, when this many steps in a row were skipped.",
    )
    lora: LoraConfig | None = Field(None, description="Unset: all weights are trained.")
    fsdp: bool = Field(
        False,
        description="With several processes (torchrun): shard weights, gradients and optimiser states over them "
        "(PyTorch's FSDP2), instead of a copy of all on each device.",
    )

    @model_validator(mode="after")
    def _whole_weights_under_adapters(self) -> TrainingConfig:
        if self.fsdp and self.lora is not None:
            raise ValueError("fsdp: leave it off with `lora`: frozen weights have no optimiser states to be sharded")
        return self


class TeacherTrainingConfig(TrainingConfig):
    """As for the student, but for the schedule."""

    lr_scheduler: Scheduler = "cosine"


class DistillTrainingConfig(TrainingConfig):
    """As for fine-tuning, and how the teacher is held meanwhile."""

    teacher_precision: TeacherPrecision = Field(
        "auto",
        description="Of the frozen teacher's weights: `auto` is what `precision` comes to; "
        "`8bit` and `4bit` (NF4) need the package bitsandbytes (extra `quantization`); meant for GPUs, slow on a CPU. "
        "Under `precision: bf16` a teacher of fp32 weights computes in bf16 as well.",
    )


class PodsConfig(ConfigSection):
    """Pods that a step makes for its work: what each asks for, and its place."""

    resources: dict[str, Quantity] | None = Field(
        None,
        description="What a pod asks for, e.g. `{cpu: '8', memory: 64Gi, nvidia.com/gpu: '8'}`; unset: what the "
        "step's own container asks for, which then holds as much while it waits.",
    )
    shared_memory: Quantity = Field(
        "8Gi", description="Size of /dev/shm, by which the processes of a pod talk. It counts as the pod's memory."
    )
    node_selector: dict[str, str] | None = Field(
        None, description="Labels of the machines; unset: the selector and affinity of the step's own pod."
    )
    tolerations: list[dict[str, Any]] | None = Field(
        None, description="Tolerations, as Kubernetes writes them; unset: those of the step's own pod."
    )

    @property
    def gpus(self) -> int:
        """Accelerators that a pod asks for by `resources`."""
        return sum(int(count) for name, count in (self.resources or {}).items() if name.endswith("/gpu"))

    @field_validator("resources")
    @classmethod
    def _whole_accelerators(cls, resources: dict[str, str] | None) -> dict[str, str] | None:
        for name, count in (resources or {}).items():
            if name.endswith("/gpu") and not re.fullmatch("[0-9]{1,4}", count):
                raise ValueError(f"{name} must be a whole number, got {count!r}")
        return resources


class MultinodeConfig(PodsConfig):
    """Train on several machines, by a `TrainJob` of Kubeflow Trainer v2. Needs a cluster, and all artifacts in `gs://`.

    A node is like the step's own pod: the same image, service account, environment, resources and place.
    """

    nodes: int = Field(ge=2, le=10_000, description="Machines. One machine with several GPUs needs no `multinode`.")
    processes_per_node: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Processes on each node; unset: one for each of its GPUs, or one where it has none.",
    )
    labels: dict[str, str] = Field({}, description="Labels of the job, e.g. `{kueue.x-k8s.io/queue-name: gpus}`.")
    timeout_hours: float | None = Field(
        None,
        gt=0,
        le=100_000,
        description="The job is stopped, and the step fails, when it is older. Counts waiting for machines.",
    )
    runtime: str = Field(
        "skd-torch",
        description="Name of Trainer's runtime, which must be one for torch. The default is this project's own "
        "(`kubectl apply -n NAMESPACE -k pipelines/deploy/multinode`): where a node fails, all start again together.",
    )
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = Field(
        "TrainingRuntime",
        description="`TrainingRuntime`: one of the steps' namespace; `ClusterTrainingRuntime`: one of the cluster, as "
        "Trainer's own `torch-distributed`.",
    )
    trainer_version: Literal["2.1", "2.2"] = Field(
        "2.2",
        description="The cluster's Kubeflow Trainer: from 2.2 on a job patches its runtime by `runtimePatches`, in 2.1 "
        "by `podTemplateOverrides`.",
    )

    @property
    def least_processes(self) -> int:
        """Processes in all, as far as they are known before there is a node."""
        return self.nodes * (self.processes_per_node or max(1, self.gpus))


MULTINODE_HELP = "Train on several machines, by a TrainJob; unset: in the step's own pod."


def check_processes(multinode: MultinodeConfig | None, training: TrainingConfig) -> None:
    """Raise ValueError unless each process has its share of a batch."""
    if multinode is not None and training.batch_size % multinode.least_processes:
        raise ValueError(
            f"multinode: training.batch_size {training.batch_size} cannot be shared by {multinode.least_processes} "
            "processes; make it a multiple, over all nodes and their GPUs"
        )
