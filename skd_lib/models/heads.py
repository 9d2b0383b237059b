"""The two halves of a causal language model: the decoder that makes hidden states, the head that makes logits.

The sampler and the losses meet at the hidden state between them: a state is `hidden / vocabulary` times smaller
than the logits it stands for. Models wrapped by PEFT work unchanged: adapters live in the modules themselves, and the
wrapper hands on what it does not know.

Not every `get_decoder()` returns the decoder, and some heads do more with their logits than `lm_logits` knows. So
`check_supported` compares both halves with the model, once for each model.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from skd_lib.errors import SkdError
from skd_lib.models.modes import evaluating

_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Config fields that logits are multiplied by: Cohere's, Falcon-H1's, Muse's."""
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
"""Config fields that logits are divided by: Granite's and MiniCPM3's, Inkling's."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Config fields c of c * tanh(logits / c), after the factors: Gemma's, RecurrentGemma's, xLSTM's."""
_INVERSE = "hyperclovax"
"""HyperCLOVAX multiplies by what Granite, whose field it uses, divides by."""
_TOKENS = 8
_HINT = "use a decoder-only language model, e.g. Llama, Mistral, Qwen or Gemma"
_NOT_CAUSAL = {"cpmant", "prophetnet", "xlnet"}
_checked: WeakSet[nn.Module] = WeakSet()


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the decoder stack, whose `last_hidden_state` (after the final norm) is what the head reads."""
    return cast(nn.Module, model.get_decoder())


def lm_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Compute logits from final hidden states, with the logit scale or soft-cap that the architecture applies.

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
    """Return whether calling a head is more than a product with its weights: a bias, hooks, another `forward`."""
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
    """Return the decoder's part of the config: models of several modalities have one for each."""
    return model.config.get_text_config(decoder=True)


def check_supported(model: PreTrainedModel) -> None:
    """Check that decoder and head, called as the sampler and the losses call them, give the model's own logits.

    Runs the model on a few tokens, once for each model; of one on the meta device, only the structure is checked.
    """
    if model in _checked:
        return
    check_structure(model)
    if next(model.parameters()).is_meta:
        return
    _compare(model)
    _checked.add(model)


def check_structure(model: PreTrainedModel) -> None:
    """Check that a model has the parts of a causal decoder; reads no weights."""
    if model.config.is_encoder_decoder:
        raise _unsupported(model, "is an encoder-decoder")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise _unsupported(model, "is wrapped by PEFT with virtual tokens", "use adapters of weights, e.g. LoRA")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise _unsupported(model, "has no head that makes logits")
    inside = set(decoder(model).modules())
    if embedding not in inside or head in inside:
        raise _unsupported(model, "has a `get_decoder()` that does not return the part between embedding and head")
    if not _causal(model):
        raise _unsupported(model, "is not causal: its attention sees tokens to come")


def _causal(model: PreTrainedModel) -> bool:
    """Return whether a decoder declares that no token sees those after it; attention to an encoder does not count."""
    says = {
        module.is_causal
        for name, module in decoder(model).named_modules()
        if isinstance(getattr(module, "is_causal", None), bool) and not re.search(r"encoder_attn|cross_?att", name)
    }
    if says:
        return False not in says
    config = model.config.get_text_config(decoder=True)
    # BERT and its like, whose decoders are another setting of the encoder, have token types.
    encoder = getattr(config, "is_decoder", True) is False and hasattr(config, "type_vocab_size")
    return not encoder and config.model_type not in _NOT_CAUSAL


def outputs(model: PreTrainedModel) -> Tensor:
    """Return a model's own logits on two rows of a few tokens that differ in the last one, dropout off."""
    with torch.no_grad(), evaluating(model):
        logits: Tensor = model(input_ids=_tokens(model), use_cache=False).logits
        return logits.detach().clone()


def difference(ours: Tensor, expected: Tensor) -> str:
    """Say how far logits are from the expected ones; empty if only by rounding, which the latter's dtype decides."""
    if ours.shape != expected.shape:
        return f"shape {tuple(ours.shape)} instead of {tuple(expected.shape)}"
    if not expected.isfinite().all() or not ours.isfinite().all():
        # Masked logits of -inf are fine where both have them. NaN in both is a matter of the weights.
        expected, ours = torch.nan_to_num(expected.float()), torch.nan_to_num(ours.float())
    apart = float((ours.float() - expected.float()).abs().max())
    largest = float(expected.float().abs().max())
    share = 2e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    return "" if apart <= share * largest else f"up to {apart:.3g} apart, the largest is {largest:.3g}"


def _compare(model: PreTrainedModel) -> None:
    try:
        with torch.no_grad(), evaluating(model), _unobserved(decoder(model)):
            tokens = _tokens(model)
            theirs = model(input_ids=tokens, use_cache=False).logits
            ours = lm_logits(model, decoder(model)(input_ids=tokens, use_cache=False).last_hidden_state)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # code of any architecture, or that came with the model
        raise _unsupported(model, f"has a decoder that cannot be called: {type(error).__name__}: {error}") from error
    if apart := difference(ours, theirs.to(ours.dtype)):
        raise _unsupported(
            model, f"does more with its decoder's states than its head and the known scales and soft-caps ({apart})"
        )
    if apart := difference(theirs[1, :-1], theirs[0, :-1]):
        raise _unsupported(model, f"is not causal: its logits depend on tokens to come ({apart})")


def _tokens(model: PreTrainedModel) -> Tensor:
    """Return (2, few) ids, none of which stands for an image or the like; the rows differ in the last token."""
    config = model.config.to_dict()
    config |= config.get("text_config") or {}
    special = {value for name, value in config.items() if name.endswith(("_id", "_index")) and isinstance(value, int)}
    size = min(vocabulary_size(model), embedding_rows(model))
    spread = [size * part // (_TOKENS + 2) for part in range(1, _TOKENS + 2)]
    ids = [next((near for near in range(one, size) if near not in special), one) for one in spread]
    device = model.get_input_embeddings().weight.device
    return torch.tensor([ids[:_TOKENS], [*ids[: _TOKENS - 1], ids[_TOKENS]]], device=device)


@contextmanager
def _unobserved(module: nn.Module) -> Iterator[None]:
    """Leave out a module's hooks, which count the forwards of others; those that FSDP gathers weights by stay."""
    kept = {name: getattr(module, name) for name in ("_forward_hooks", "_forward_pre_hooks")}
    if isinstance(module, torch.distributed.fsdp.FSDPModule):
        kept = {}
    for name in kept:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for name, hooks in kept.items():
            setattr(module, name, hooks)


def _unsupported(model: PreTrainedModel, reason: str, hint: str = _HINT) -> SkdError:
    name = type(model.get_base_model() if hasattr(model, "peft_config") else model).__name__
    return SkdError(f"cannot use this `{model.config.model_type}` model: it {reason}", where=name, hint=hint)
