"""Whether the two halves of a model that the sampler and the losses use are the model itself.

Every causal language model of transformers has a decoder and a head, but not every `get_decoder()` returns the
decoder, and some heads do more with their logits than `lm_logits` knows. Code that comes with a model can do
anything. So what is used is compared with what the model computes, once for each model.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from skd_lib.errors import SkdError
from skd_lib.models.heads import decoder, embedding_rows, lm_logits, vocabulary_size
from skd_lib.models.modes import evaluating

_TOKENS = 8
_HINT = "use a decoder-only language model, e.g. Llama, Mistral, Qwen or Gemma"
_NOT_CAUSAL = {"cpmant", "prophetnet", "xlnet"}
_checked: WeakSet[nn.Module] = WeakSet()


def check_supported(model: PreTrainedModel) -> None:
    """See that decoder and head, called as the sampler and the losses call them, give the model's own logits.

    Runs the model on a few tokens, once for each model; one on the meta device is looked at only.

    Raises:
        SkdError: they do not, or the model sees tokens to come. The architecture is named.
    """
    if model in _checked:
        return
    check_structure(model)
    if next(model.parameters()).is_meta:
        return
    _compare(model)
    _checked.add(model)


def check_structure(model: PreTrainedModel) -> None:
    """See that a model has the parts of a causal decoder; looks at no weights.

    Raises:
        SkdError: it has not. The architecture is named.
    """
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
    """Whether a decoder says of itself that no token sees those after it; attention to an encoder says nothing."""
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


def difference(ours: Tensor, theirs: Tensor) -> str:
    """Say how far logits are from what they should be; empty if only by rounding.

    Args:
        ours: Logits.
        theirs: What they should be; its dtype decides what counts as rounding.
    """
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    if not theirs.isfinite().all() or not ours.isfinite().all():
        # Masked logits of -inf are fine where both have them. NaN in both is a matter of the weights.
        theirs, ours = torch.nan_to_num(theirs.float()), torch.nan_to_num(ours.float())
    apart = float((ours.float() - theirs.float()).abs().max())
    largest = float(theirs.float().abs().max())
    share = 2e-3 if theirs.dtype in (torch.float32, torch.float64) else 5e-2
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
