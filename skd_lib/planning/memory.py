"""Estimates of the training steps' peak memory, and measurements of used and available memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from skd_lib._core import machine
from skd_lib.config import (
    DistillTrainingConfig,
    DivergenceName,
    MethodName,
    RunConfig,
    TaskConfig,
    TeacherPrecision,
    TrainingConfig,
)
from skd_lib.distillation.divergences import DIVERGENCES
from skd_lib.distillation.methods import METHODS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

GIB = 2**30


@dataclass(frozen=True)
class ModelSize:
    """The sizes on which a model's memory and arithmetic depend.

    Attributes:
        parameters: Number of weights, tied ones counted once.
        inside: Those that are neither of the embedding nor of the head.
        computing: Those that one token is multiplied with in the layers: of experts, the ones it is sent to.
        layers: Decoder layers.
        hidden: Width of the hidden states.
        attended: Width of the queries of one layer: all heads together.
        cache: Elements that one token takes in the KV cache of one layer: keys and values of all heads.
        vocabulary: Rows of the embedding.
        adapted: Inputs and outputs of all linear layers except the head: the weights of adapters of rank 1.
    """

    parameters: int
    inside: int
    computing: int
    layers: int
    hidden: int
    attended: int
    cache: int
    vocabulary: int
    adapted: int

    def pruned(self, layers: int) -> ModelSize:
        """Return the size with `layers` layers; the weights outside the layers are about the embedding."""
        inside, computing, adapted = (
            count * layers // self.layers for count in (self.inside, self.computing, self.adapted)
        )
        parameters = self.parameters - self.inside + inside
        return replace(self, parameters=parameters, inside=inside, computing=computing, layers=layers, adapted=adapted)

    @property
    def outside(self) -> int:
        """Return about the number of weights that are in no layer: one embedding."""
        return min(self.vocabulary * self.hidden, self.parameters)


@dataclass(frozen=True)
class Estimate:
    """Bytes that one training step takes, by purpose."""

    step: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Return the sum, in bytes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.parts.items() if size >= GIB / 20)
        return f"{self.step}: {self.total / GIB:.1f} GiB" + (f" ({parts})" if parts else "")


def config_size(config: Any) -> ModelSize:
    """Return the size of the causal language model that a transformers config describes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return skeleton_size(AutoModelForCausalLM.from_config(config))


def skeleton_size(model: PreTrainedModel) -> ModelSize:
    """Return the size of a model, which may be on the meta device."""
    import torch

    text = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    ends = {id(weight) for end in (head, model.get_input_embeddings()) for weight in end.parameters()}
    ends |= {
        id(weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for weight in module.parameters()
    }
    inner = [weight for weight in model.parameters() if id(weight) not in ends]
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    share = (getattr(text, "num_experts_per_tok", None) or 1) / experts
    # transformers holds all experts of a layer as one weight of three dimensions.
    computing = sum(weight.numel() * (share if weight.ndim > 2 else 1) for weight in inner if weight.ndim > 1)
    kept, queries = _heads(text)
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        inside=sum(weight.numel() for weight in inner),
        computing=int(computing),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        attended=queries,
        cache=2 * kept,
        vocabulary=text.vocab_size,
        adapted=sum(module.in_features + module.out_features for module in linear),
    )


def _heads(text: Any) -> tuple[int, int]:
    """Return the widths of a layer's keys and of its queries; 0 without attention (Mamba)."""
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return 0, 0
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return int(getattr(text, "num_key_value_heads", None) or heads) * width, int(heads) * width


def estimates(
    config: RunConfig,
    teacher: ModelSize,
    student: ModelSize,
    *,
    device: torch.device,
    processes: Mapping[str, int] | None = None,
) -> list[Estimate]:
    """Estimate the memory that each training step of a run takes on a device.

    Args:
        config: The run.
        teacher: Size of the teacher.
        student: Size of the student, after a cut.
        device: The device; `meta` stands for a GPU that this machine need not have.
        processes: Devices that share a step's rows, by step; one where it is not named.
    """
    found, task, distill, of_step = [], config.task, config.distill, {} if processes is None else processes
    trainings = (
        ("teacher_sft", config.teacher_sft.enabled, config.teacher_sft.training, teacher),
        ("student_init", config.student_init.trains, config.student_init.training, student),
    )
    for step, wanted, training, size in trainings:
        if wanted:
            several = of_step.get(step, 1)
            found.append(estimate(step, "sft", training, task, size, device=device, processes=several))
    online = METHODS[distill.method].needs_teacher and distill.teacher_signal.mode == "online"
    asked = estimate(
        "distill",
        distill.method,
        distill.training,
        task,
        student,
        teacher if online else None,
        divergence=distill.divergence,
        device=device,
        processes=of_step.get("distill", 1),
        head_only=distill.engine == "vllm",
    )
    return [*found, asked]


def estimate(
    step: str,
    method: MethodName,
    training: TrainingConfig,
    task: TaskConfig,
    student: ModelSize,
    teacher: ModelSize | None = None,
    *,
    divergence: DivergenceName = "forward_kl",
    device: torch.device,
    processes: int = 1,
    head_only: bool = False,
) -> Estimate:
    """Estimate the memory of one training step on one of its devices.

    Counts, with `P` weights, `R` rows in a forward pass, `T` prompt and new tokens, `L` layers of width `H`:

    - trained model: 4P fp32 master weights, 4P gradients, 8P AdamW's two moments; with adapters the last two are of
      the adapters alone;
    - frozen teacher: P elements of its precision; nothing where its signal is stored before training;
    - checkpoint, on the CPU: 12P, the copy of trained weights and moments that is written while training goes on (a
      GPU's is in host memory); where there is no room for it, training waits instead;
    - activations: 17 RTHL elements without an attention matrix (Korthikanti et al. 2022, arXiv 2205.05198, equation 1
      without its attention term), 1 RTHL with gradient checkpointing;
    - KV caches of a batch that is sampled: keys and values for RT tokens in each layer, for each model that writes;
    - with `fsdp` each process has its part of weights, gradients and moments. Gradients that are added up over several
      forward passes are whole until the last; while responses are sampled, and gradients are gone, weights are whole.
      Several processes without it exchange gradients in buffers of their size;
    - loss: 6 to 13 fp32 arrays of the logits of one chunk (both models' logits and log-probabilities, gradients, and
      what the divergence keeps).

    Args:
        step: Name of the pipeline step.
        method: The training's method.
        training: Batches, adapters, checkpointing.
        task: Longest prompt and response.
        student: Size of the model that is trained.
        teacher: Size of the teacher, None if there is none in memory.
        divergence: The loss, for methods that minimise a divergence.
        device: The device; `meta` stands for any GPU.
        processes: Devices that share a step's rows.
        head_only: vLLM servers have the rest of the teacher, and sample.
    """
    from skd_lib.distillation.loss import CROSS_ENTROPY_ARRAYS, loss_chunk
    from skd_lib.models.precision import compute_dtype

    gpu = device.type != "cpu"
    precision = "bf16" if device.type == "meta" and training.precision == "auto" else training.precision
    element = compute_dtype(precision, device).itemsize
    length = task.max_prompt_tokens + task.max_new_tokens
    rows = -(-training.batch_size // processes)
    micro = min(training.micro_batch_size or rows, rows)
    tokens, shards = micro * length, processes if training.fsdp else 1
    width = 1 if training.gradient_checkpointing else 17
    adapters = 0 if training.lora is None else training.lora.rank * student.adapted
    trained = adapters or student.parameters
    facts = METHODS[method]
    arrays = DIVERGENCES[divergence].arrays if facts.uses_divergence else CROSS_ENTROPY_ARRAYS
    parts = {
        "weights": 4 * (student.parameters + adapters) // shards,
        "gradients": 4 * trained // (shards if micro == rows else 1),
        "AdamW": 8 * trained // shards,
        "activations": width * tokens * student.hidden * student.layers * element,
        "loss": arrays * 4 * min(tokens, loss_chunk(student.hidden, student.vocabulary, gpu=gpu)) * student.vocabulary,
    }
    if processes > shards:
        parts["exchange"] = 4 * trained
    if not gpu:
        parts["checkpoint"] = 12 * trained
    if teacher is None:
        return Estimate(step, parts)
    writers = [model for model, writes in ((student, facts.student_writes), (teacher, facts.teacher_writes)) if writes]
    if shards > 1 and writers:
        parts["gathered"] = max(0, student.parameters * element - parts["gradients"])
    if head_only:
        return Estimate(step, {**parts, "teacher": teacher.outside * element})
    of_teacher = training.teacher_precision if isinstance(training, DistillTrainingConfig) else "auto"
    parts["teacher"] = _frozen(teacher, of_teacher, element)
    if writers:
        cached = sum(model.layers * model.cache for model in writers)
        parts["caches"] = rows * length * element * cached
    return Estimate(step, parts)


def _frozen(model: ModelSize, precision: TeacherPrecision, element: int) -> int:
    """Return the bytes of a frozen model, of which only the layers are quantised."""
    whole = {"bf16": 2, "fp32": 4}.get(precision, element)
    bits = {"8bit": 8, "4bit": 4}.get(precision, 8 * whole)
    return model.outside * whole + (model.parameters - model.outside) * bits // 8


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use: on a CUDA GPU by tensors, elsewhere resident in this process since it began."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return machine.peak_memory()


def available_memory() -> tuple[int, str]:
    """Return the bytes that training can use, and the device's name: this process's GPU, else this machine's memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    return machine.total_memory(), "this machine"
