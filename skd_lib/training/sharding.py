"""Models sharded over processes (FSDP2), for students and teachers that do not fit on one device with all their states.

Each process holds a share of weights, gradients and optimiser states. A training step gathers the weights of one layer
after the other (PyTorch's `fully_shard`), which needs all processes to run the same layers at the same time. Sampling
cannot: the number of drafted and verified tokens depends on the samples. So before sampling and before a validation
every process gathers whole weights, and drops them afterwards (`gathered`).

The sharding is PyTorch's and not accelerate's, which works on accelerators only, and makes the head a unit of its own,
while the losses here run decoder and head apart, inside the forward pass of the whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import recursively_apply
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME

from skd_lib.errors import SkdError
from skd_lib.models.files import weight_files

T = TypeVar("T")
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check_processes(args: TrainingArguments, *, sharded: bool, where: str, setting: str) -> None:
    """Check that this process was started in a way that suits the sharding, or its absence."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise SkdError(
            "accelerate's FSDP does not support sampling between optimiser steps",
            where="accelerate config, use_fsdp",
            hint=f"launch with --multi_gpu instead of --use_fsdp, and set {setting}: true",
        )
    if sharded and args.world_size == 1:
        hint = "start with torchrun --nproc-per-node N, or leave it off"
        raise SkdError("sharding needs at least two processes", where=f"{where}, {setting}", hint=hint)


def place_teacher(teacher: PreTrainedModel | None, device: torch.device) -> PreTrainedModel | None:
    """Freeze a teacher and put it on its device; return it if it can be sharded.

    Quantized weights stay where they were loaded, and one with no more than a head is there already.
    """
    if teacher is None:
        return None
    teacher.eval().requires_grad_(requires_grad=False)
    if getattr(teacher, "is_quantized", False) or any(parameter.is_meta for parameter in teacher.parameters()):
        return None
    return cast(PreTrainedModel, teacher.to(device))


def shard(student: PreTrainedModel, teacher: PreTrainedModel | None, args: TrainingArguments) -> None:
    """Shard a student in fp32 that is trained, and a frozen teacher, over all processes, in place.

    Units are the student's layers and the rest of it; the teacher's embedding and head are used apart, and stay whole.
    With bf16, the student's weights are gathered in it, for computing in it; gradients are added up in fp32.
    """
    mesh = init_device_mesh(args.device.type, (args.world_size,))
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in (*_layers(student), student):
        fully_shard(unit, mesh=mesh, mp_policy=mixed if args.bf16 else MixedPrecisionPolicy())
    for layer in _layers(teacher) if teacher is not None else ():
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


@contextmanager
def gathered(*models: PreTrainedModel | None) -> Iterator[None]:
    """Gather sharded models' weights on every process inside, so that forward passes need no other process."""
    shards = [
        module for model in models if model is not None for module in model.modules() if isinstance(module, FSDPModule)
    ]
    roots: list[Any] = [model for model in models if isinstance(model, FSDPModule)]
    for root in roots:
        # The first forward pass of all must be the whole model's, which then knows its layers.
        through_wrapper(root, root, lambda: None)
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.set_reshard_after_forward(True, recurse=False)
            shard.reshard()


def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a sharded model in one piece on the main process, the same model on others; all call this together."""
    weights = get_model_state_dict(model, options=_WHOLE)
    if not PartialState().is_main_process:
        return model
    plain = AutoModelForCausalLM.from_config(
        model.config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    )
    plain.load_state_dict(weights)
    plain.generation_config = model.generation_config
    return cast(PreTrainedModel, plain.to(model.device).eval())


def whole_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gather a sharded model's weights on the main process, tied ones once; all processes call this together."""
    weights: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    return {name: weight for name, weight in weights.items() if name not in model.all_tied_weights_keys}


def whole_states(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Any:
    """Gather the states of a sharded model's optimiser on the main process; all processes call this together."""
    states = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    # Sharded states are gathered into new memory; the step counters still belong to the optimiser.
    return recursively_apply(lambda state: state if state.dim() else state.clone(), states)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint's whole weights, which the main process reads, into a sharded model."""
    weights: dict[str, Any] = {}
    if PartialState().is_main_process:  # another machine need not have the checkpoint
        for file in weight_files(checkpoint):
            weights |= load_file(file)
    options = StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)


def load_states(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Load a checkpoint's whole optimiser states into the optimiser of a sharded model."""
    states = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(model, optimizer, states, options=StateDictOptions(full_state_dict=True))


def through_wrapper(wrapped: nn.Module, model: nn.Module, function: Callable[..., T], *inputs: Any) -> T:
    """Call `function(*inputs)` as the forward pass of `wrapped`: the model or a distributed wrapper around it.

    A distributed wrapper prepares its gradient exchange in its own `forward`. The losses here run the decoder and the
    head of the model separately, so `function` takes the place of the model's `forward` for one call.
    """
    own_forward = model.__dict__.get("forward")

    def restore() -> None:
        if own_forward is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = own_forward

    def forward(*inputs: Any) -> T:
        restore()  # `function` may call `model` itself
        return function(*inputs)

    model.forward = forward
    try:
        return cast(T, wrapped(*inputs))
    finally:
        restore()


class Sharded(nn.Module):
    """Wraps a sharded model where the Trainer expects a distributed wrapper."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep whole gradients inside, until the step's last micro-batch adds them up over the processes."""
        assert isinstance(self.module, FSDPModule)  # noqa: S101 - the trainer made it so
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise SkdError(
            f"{type(model).__name__} does not name its layer classes (_no_split_modules), so it cannot be sharded",
            where="training.fsdp",
            hint="set fsdp: false",
        )
    return layers
