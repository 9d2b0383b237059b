"""How much memory the training steps will take, told before they start; an estimate, not a promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from skd_lib.config import DivergenceName, RunConfig, TrainingConfig
from skd_lib.errors import SkdError
from skd_lib.machine import total_memory
from skd_lib.methods import METHODS

GIB = 2**30
_LOSS_CHUNK = 2**26
"""Logits the loss works on at a time (`skd_lib.losses`)."""
_CROSS_ENTROPY_ARRAYS = 6
_DIVERGENCE_ARRAYS: Mapping[DivergenceName, int] = {
    "forward_kl": 7,
    "reverse_kl": 7,
    "jsd": 11,
    "skew_kl": 10,
    "skew_reverse_kl": 10,
    "tvd": 7,
    "adaptive_kl": 13,
}
"""fp32 arrays of a chunk's logits that forward and backward pass hold at most: measured peaks."""


@dataclass(frozen=True)
class ModelSize:
    """What decides how much memory a model takes.

    Attributes:
        parameters: Number of weights, tied ones counted once.
        layers: Decoder layers.
        hidden: Width of the hidden states.
        cache: Elements that one token takes in the KV cache of one layer: keys and values of all heads.
        vocabulary: Rows of the embedding.
    """

    parameters: int
    layers: int
    hidden: int
    cache: int
    vocabulary: int

    def pruned(self, layers: int) -> ModelSize:
        """The size with only so many layers; the weights outside the layers are about the embedding."""
        outside = min(self.vocabulary * self.hidden, self.parameters)
        inside = (self.parameters - outside) * layers // self.layers
        return replace(self, parameters=outside + inside, layers=layers)


@dataclass(frozen=True)
class Estimate:
    """Bytes that one training step takes, by purpose."""

    step: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All together, in bytes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.parts.items() if size >= GIB / 20)
        return f"{self.step}: {self.total / GIB:.1f} GiB" + (f" ({parts})" if parts else "")


def model_size(folder: Path, *, trust_remote_code: bool = False) -> ModelSize:
    """The size of a model from its config alone: its weights are not read, and need not be there.

    Raises:
        SkdError: the config is of no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        hint = "use a decoder-only language model that transformers knows"
        raise SkdError(f"not a causal language model: {error}", where=str(folder), hint=hint) from error
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        cache=2 * heads * head_dim,
        vocabulary=text.vocab_size,
    )


def estimates(config: RunConfig, teacher: ModelSize, student: ModelSize, *, element: int) -> list[Estimate]:
    """The memory of each training step of a run.

    Counted, with `P` weights, `R` rows in a forward pass, `T` prompt and new tokens, `L` layers of width `H`:

    - trained model: 4P fp32 master weights, 4P gradients, 8P AdamW's two moments;
    - frozen teacher: 4P, it is loaded in fp32; nothing where it is asked before training;
    - activations: 17 RTHL elements without an attention matrix (Korthikanti et al. 2022, arXiv 2205.05198, equation 1
      without its attention term), 1 RTHL with gradient checkpointing;
    - KV caches of a batch that is sampled: keys and values for RT tokens in each layer, for each model that writes;
    - loss: 6 to 13 fp32 arrays of the logits of one chunk (both models' logits and log-probabilities, gradients, and
      what the divergence keeps).

    Args:
        config: The run.
        teacher: Size of the teacher.
        student: Size of the student.
        element: Bytes of an element in the forward pass: 2 for bf16, 4 for fp32.
    """
    found = []
    if config.teacher_sft.enabled:
        found.append(Estimate("teacher_sft", _trained(config, config.teacher_sft.training, teacher, element)))
    if config.student_init.mode == "sft":
        found.append(Estimate("student_init", _trained(config, config.student_init.training, student, element)))
    method = METHODS[config.distill.method]
    arrays = _DIVERGENCE_ARRAYS[config.distill.divergence] if method.divergence else _CROSS_ENTROPY_ARRAYS
    parts = _trained(config, config.distill.training, student, element, arrays)
    # A teacher that is asked before training is in memory before optimiser and activations are.
    if method.needs_teacher and config.distill.teacher_signal.mode == "online":
        parts["teacher"] = 4 * teacher.parameters
        tokens = config.distill.training.batch_size * _length(config)
        writers = [
            model for model, writes in ((student, method.student_writes), (teacher, method.teacher_writes)) if writes
        ]
        if writers:
            parts["caches"] = tokens * element * sum(model.layers * model.cache for model in writers)
    found.append(Estimate("distill", parts))
    return found


def available_memory() -> tuple[int, str]:
    """Bytes of memory that training can use, and of what: this process's GPU, else this machine's memory, within the
    limit of its control group."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    return total_memory(), "this machine"


def _trained(
    config: RunConfig, training: TrainingConfig, model: ModelSize, element: int, arrays: int = _CROSS_ENTROPY_ARRAYS
) -> dict[str, int]:
    tokens = (training.micro_batch_size or training.batch_size) * _length(config)
    width = 1 if training.gradient_checkpointing else 17
    return {
        "weights": 4 * model.parameters,
        "gradients": 4 * model.parameters,
        "AdamW": 8 * model.parameters,
        "activations": width * tokens * model.hidden * model.layers * element,
        "loss": arrays * 4 * min(tokens * model.vocabulary, _LOSS_CHUNK),
    }


def _length(config: RunConfig) -> int:
    return config.task.max_prompt_tokens + config.task.max_new_tokens
