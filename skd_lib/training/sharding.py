"""Models sharded over processes (FSDP2), for students and teachers that do not fit on one device with all their states.

Each process holds a share of weights, gradients and optimiser states. A training step gathers the weights of one layer
after the other (PyTorch's `fully_shard`), which needs all processes to run the same layers at the same time. Sampling
cannot: the number of drafted and verified tokens depends on the samples. So before sampling and before a validation
every process gathers whole weights, and drops them afterwards (`gathered`).

The sharding is PyTorch's and not accelerate's, which works on accelerators only, and makes the head a unit of its own,
while the losses here run decoder and head apart, inside the forward pass of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from skd_lib.errors import SkdError
from skd_lib.models.files import weight_files
from skd_lib.training.trainer import DistillationTrainer, through_wrapper

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard_trained(model: PreTrainedModel, mesh: DeviceMesh, *, bf16: bool) -> None:
    """Shard a model in fp32 that is trained, in place: each layer, and the rest as one unit.

    With `bf16`, weights are gathered in it, for computing in it; gradients are added up in fp32.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = policy if bf16 else MixedPrecisionPolicy()
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def shard_frozen(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard the layers of a frozen model, in place. Its embedding and head are used apart, and stay whole."""
    for layer in _layers(model):
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


class ShardedTrainer(DistillationTrainer):
    """The training loop for a student that `shard_trained` has sharded, and for a teacher that `shard_frozen` has.

    Checkpoints hold whole weights and optimiser states, so that another number of processes can go on from them.
    """

    def __init__(self, *, teacher: PreTrainedModel | None, **options: Any) -> None:
        self._teacher = teacher
        super().__init__(**options)

    def _gathered(self) -> AbstractContextManager[None]:
        return gathered(self.model, self._teacher)

    def _wrap_model(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        # accelerate would replicate an unwrapped model (DistributedDataParallel).
        return model if isinstance(model, _Sharded) else _Sharded(model)

    def _trained_weights(self) -> dict[str, Tensor]:
        """Gather the weights; called by all processes."""
        weights: dict[str, Any] = get_model_state_dict(self.model, options=_WHOLE)
        tied = self.model.all_tied_weights_keys
        return {name: weight for name, weight in weights.items() if name not in tied}

    def _optimizer_states(self) -> Any:
        """Gather the optimiser's states; called by all processes."""
        states = get_optimizer_state_dict(self.model, self._plain_optimizer, options=_WHOLE)
        # Sharded states are gathered into new memory; the step counters still belong to the optimiser.
        return recursively_apply(lambda state: state if state.dim() else state.clone(), states)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights: dict[str, Any] = {}
        if PartialState().is_main_process:  # another machine need not have the checkpoint
            for file in weight_files(Path(resume_from_checkpoint)):
                weights |= load_file(file)
        options = StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=True)
        set_model_state_dict(model or self.model, weights, options=options)

    def _load_weights_of_best(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        whole = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, self._plain_optimizer, states, options=whole)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))


class _Sharded(nn.Module):
    """Wraps a sharded model where the Trainer expects a distributed wrapper."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
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
