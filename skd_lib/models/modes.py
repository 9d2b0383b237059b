"""Switch models for a while: to evaluation, to casts that are kept, to a dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from skd_lib.errors import SkdError


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Turn dropout off inside; every module's mode is put back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def casting_once(model: nn.Module) -> Iterator[None]:
    """Let autocast keep its casts of frozen weights inside, where nothing may need gradients.

    It keeps those of weights that require gradients alone. A model with adapters would otherwise be cast again for each
    sampled token, which takes longer than to compute with it.
    """
    frozen = [weight for weight in model.parameters() if not weight.requires_grad and weight.is_floating_point()]
    try:
        for weight in frozen:
            weight.requires_grad = True
        yield
    finally:
        for weight in frozen:
            weight.requires_grad = False


@contextmanager
def attention_dropout(model: nn.Module, probability: float) -> Iterator[None]:
    """Set attention dropout inside, for modules in training mode; the saved configuration does not have it."""
    layers = [module for module in model.modules() if hasattr(module, "attention_dropout")]
    if probability and not layers:
        raise SkdError(
            f"{type(model).__name__} has no attention dropout to set", where="training.dropout", hint="set dropout: 0"
        )
    before = [layer.attention_dropout for layer in layers]
    for layer in layers:
        layer.attention_dropout = probability  # type: ignore[assignment]  # a float, not a module
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.attention_dropout = value
