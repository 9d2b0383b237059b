"""The two halves of a causal language model: the decoder that makes hidden states, the head that makes logits.

The sampler and the losses meet at the hidden state between them: a state is `hidden / vocabulary` times smaller
than the logits it stands for. Models wrapped by PEFT work as they are: adapters live in the modules themselves, and the
wrapper hands on what it does not know.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def decoder(model: PreTrainedModel) -> nn.Module:
    """The decoder stack, whose `last_hidden_state` (after the final norm) is what the head reads."""
    return cast(nn.Module, model.get_decoder())


def lm_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits from final hidden states, with the logit scale or soft-cap that the architecture applies.

    Args:
        model: A causal language model with its head.
        hidden: (..., H) states of `decoder(model)`.

    Returns:
        (..., V) logits in the head's dtype, equal to what `model(...)` returns at these positions.
    """
    logits = _head(model.get_output_embeddings(), hidden)
    config = model.config
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scaling
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits


def _head(head: nn.Module, hidden: Tensor) -> Tensor:
    fp32_on_cpu = hidden.device.type == "cpu" and hidden.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if type(head) is not nn.Linear or _is_changed(head) or torch.is_grad_enabled() or not fp32_on_cpu:
        return cast(Tensor, head(hidden))
    # There the product of a few rows and a large vocabulary takes half the time with the vocabulary first.
    rows_NH = hidden.reshape(-1, head.in_features)
    return (head.weight @ rows_NH.T).T.contiguous().view(*hidden.shape[:-1], head.out_features)


def _is_changed(head: nn.Linear) -> bool:
    """Whether calling it is more than a product with its weights: a bias, hooks, another `forward`."""
    hooks = head._forward_pre_hooks or head._forward_hooks
    return bool(hooks) or "forward" in vars(head) or getattr(head, "bias", None) is not None


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the head, padding rows included."""
    return int(model.get_output_embeddings().weight.shape[0])
