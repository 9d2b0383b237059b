"""How a model runs: in training or evaluation mode, with which dropout, in which precision, through which wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

from torch import nn

from skd_lib.errors import SkdError

T = TypeVar("T")
InputT = TypeVar("InputT")


@contextmanager
def attention_dropout(model: nn.Module, probability: float) -> Iterator[None]:
    """Attention dropout of `probability` inside, wherever the model is in training mode.

    It is set on the modules and not in the configuration, so that what is saved does not carry it.

    Raises:
        SkdError: dropout is asked for and the architecture has none to set.
    """
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


def through_wrapper(wrapped: nn.Module, model: nn.Module, function: Callable[[InputT], T], inputs: InputT) -> T:
    """Call `function(inputs)` as the forward pass of `wrapped`.

    A distributed wrapper prepares its gradient exchange in its own `forward`. The losses here run the decoder and the
    head of the model separately, so that work takes the place of the model's `forward` for one call.

    Args:
        wrapped: The model, or a wrapper (DistributedDataParallel, ...) around it.
        model: The model inside.
        function: Computes the loss with `model`'s parameters.
        inputs: Its argument.
    """
    own_forward = model.__dict__.get("forward")

    def restore() -> None:
        if own_forward is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = own_forward

    def forward(inputs: InputT) -> T:
        restore()  # `function` may call `model` itself
        return function(inputs)

    model.forward = forward
    try:
        return cast(T, wrapped(inputs))
    finally:
        restore()
