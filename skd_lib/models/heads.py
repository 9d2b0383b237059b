"""The two halves of a causal language model: the decoder that makes hidden states, the head that makes logits.

The sampler and the losses meet at the hidden state between them: a state is `hidden / vocabulary` times smaller
than the logits it stands for. Models wrapped by PEFT work as they are: adapters live in the modules themselves, and the
wrapper hands on what it does not know.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Config fields that logits are multiplied by: Cohere's, Falcon-H1's, Muse's."""
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
"""Config fields that logits are divided by: Granite's and MiniCPM3's, Inkling's."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Config fields c of c * tanh(logits / c), after the factors: Gemma's, RecurrentGemma's, xLSTM's."""
_INVERSE = "hyperclovax"
"""HyperCLOVAX multiplies by what Granite, whose field it uses, divides by."""


def decoder(model: PreTrainedModel) -> nn.Module:
    """The decoder stack, whose `last_hidden_state` (after the final norm) is what the head reads."""
    return cast(nn.Module, model.get_decoder())


def lm_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits from final hidden states, with the logit scale or soft-cap that the architecture applies.

    `skd_lib.models.supported.check_supported` compares them with the model's own and refuses an architecture whose
    head does something else.

    Args:
        model: A causal language model with its head.
        hidden: (..., H) states of `decoder(model)`.

    Returns:
        (..., V) logits in the head's dtype, equal to what `model(...)` returns at these positions.
    """
    logits = _head(model.get_output_embeddings(), hidden)
    config = _text_config(model)
    for name in _FACTORS:
        if (factor := getattr(config, name, None)) is not None:
            logits = logits * factor
    for name in _DIVISORS:
        if (divisor := getattr(config, name, None)) is not None:
            inverse = name == "logits_scaling" and config.model_type.startswith(_INVERSE)
            logits = logits * divisor if inverse else logits / divisor
    for name in _CAPS:
        if (cap := getattr(config, name, None)) is not None:
            logits = torch.tanh(logits / cap) * cap
    if (unpadded := getattr(config, "unpadded_vocab_size", None)) is not None:  # Inkling
        logits = logits[..., :unpadded]
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
    """Return the number of logits of a position, those of padding rows included."""
    rows = int(model.get_output_embeddings().weight.shape[0])
    return min(rows, getattr(_text_config(model), "unpadded_vocab_size", None) or rows)


def common_vocabulary(*models: PreTrainedModel | None) -> int:
    """Return the number of token ids that all models have: padded vocabularies of one family differ in size."""
    return min(vocabulary_size(model) for model in models if model is not None)


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model can be given."""
    return int(model.get_input_embeddings().weight.shape[0])


def _text_config(model: PreTrainedModel) -> Any:
    """Return the part of the config that speaks of the decoder: models of several modalities have one for each."""
    return model.config.get_text_config(decoder=True)
