"""LoRA (Hu et al. 2021, arXiv 2106.09685): small matrices are trained while the weights are frozen, and then merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from skd_lib.config import LoraConfig
from skd_lib.errors import SkdError
from skd_lib.models.heads import difference, outputs

_LINEAR = (nn.Linear, Conv1D)
_ADAPTED = (*_LINEAR, nn.Embedding, nn.Conv1d)
_NAMES_SHOWN = 12


def add_lora(model: PreTrainedModel, settings: LoraConfig, seed: int) -> Any:
    """Freeze a model and add trainable adapters to its weights, in place; before training they change no output.

    The wrapped model (`peft.PeftModel`) replaces it.
    """
    try:
        import peft
    except ImportError as error:
        hint = "pip install 'skd-lib[training]', or leave the section out"
        raise SkdError("LoRA needs the package peft", where="training.lora", hint=hint) from error
    check_lora(model, settings)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise SkdError(
            f"adapters cannot be added to {type(model).__name__}: {error}",
            where="training.lora.target_modules",
            hint="name other linear layers as they end in the model, e.g. q_proj",
        ) from error


def check_lora(model: PreTrainedModel, settings: LoraConfig) -> None:
    """Check that a model has the layers that adapters are asked for, and can hold them merged; weights are not read.

    The model may be on the meta device. Names of layers are as in PEFT: a whole name, or its end after a dot.
    """
    where, cannot = "training.lora.target_modules", f"adapters cannot be added to {type(model).__name__}"
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    modules = {name: module for name, module in model.named_modules() if name}
    layers = {name: module for name, module in modules.items() if isinstance(module, _LINEAR) and module is not head}
    chosen: dict[str, nn.Module] = {}
    for target in settings.target_modules:
        found = {name: module for name, module in modules.items() if name == target or name.endswith(f".{target}")}
        if not found:
            raise SkdError(f"{cannot}: it has no layer `{target}`", where=where, hint=_similar(target, layers))
        if unfit := [name for name, module in found.items() if not _takes_adapter(module, embedding)]:
            kind = type(found[unfit[0]]).__name__
            what = f"{cannot}: `{target}` is no linear layer, {unfit[0]} is a {kind}"
            raise SkdError(what, where=where, hint=_similar(target, layers))
        chosen |= found
    _check_untied(model, chosen, where)
    most = max((min(cast(Tensor, layer.weight).shape) for layer in (chosen or layers).values()), default=0)
    if settings.rank > most:
        raise SkdError(
            f"rank {settings.rank} is beyond that of every layer, which is at most {most}",
            where="training.lora.rank",
            hint="ranks of 4 to 64 are usual",
        )


def check_adapters(model: PreTrainedModel, settings: Any, where: str) -> None:
    """Check that a model can hold the adapters of a `peft.PeftConfig` merged; `where` names the config in the error."""
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = getattr(settings, "target_modules", None)
    if not targets or targets == "all-linear":  # what PEFT chooses by itself is neither head nor embedding
        return
    chosen = {name: one for name, one in model.named_modules() if name and check_target_module_exists(settings, name)}
    _check_untied(model, chosen, where)


def _check_untied(model: PreTrainedModel, chosen: Mapping[str, nn.Module], where: str) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight and (tied := [name for name, one in chosen.items() if one in (head, embedding)]):
        raise SkdError(
            f"{', '.join(f'`{name}`' for name in tied)} cannot have an adapter: embedding and head of this model are "
            "one tensor, and a merged adapter would change both",
            where=where,
            hint="leave it out of target_modules",
        )


def merge_lora(wrapped: Any) -> None:
    """Add the adapters to the weights and remove them: the wrapped model is then usable by itself."""
    before = outputs(wrapped)
    try:
        model = wrapped.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise SkdError(f"the adapters cannot be merged: {error}", where="training.lora") from error
    if apart := difference(outputs(model), before):
        raise SkdError(
            f"the model with merged adapters computes other logits than before they were merged ({apart})",
            where="training.lora",
            hint="name other layers in target_modules: a weight that several layers share cannot hold an adapter",
        )
    model.requires_grad_(requires_grad=True)


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights as `merge_lora` would leave them, one after the other; the model stays as it is.

    Names are those without adapters, also of layers that are trained as a whole beside them. Tied weights come once.

    Raises:
        SkdError: a layer's adapter is no plain sum with its weight, or its weight is another layer's too.
    """
    modules = dict(model.named_modules())
    _check_unshared(modules)
    tensors = [*model.named_parameters(), *_stored_buffers(modules)]
    for name, tensor in tensors:
        layer, adapted, rest = name.partition(".base_layer.")
        path = name.split(".")
        if adapted:
            yield f"{layer}.{rest}", _with_adapters(layer, modules[layer], tensor) if rest == "weight" else tensor
        elif "modules_to_save" in path:  # a copy that is trained, by the adapter's name
            place = path.index("modules_to_save")
            yield ".".join([*path[:place], *path[place + 2 :]]), tensor
        elif "original_module" not in path and not any(part.startswith("lora_") for part in path):
            yield name, tensor


def _check_unshared(modules: Mapping[str, nn.Module]) -> None:
    """Check that no weight with an adapter, or with a copy that is trained, is that of another layer too.

    The two layers would have different weights, and a tied model has one place for both.
    """
    holders: dict[int, list[str]] = {}
    for name, module in modules.items():
        for weight in module.parameters(recurse=False):
            holders.setdefault(id(weight), []).append(name)
    for names in holders.values():
        changed = [name for name in names if name.endswith((".base_layer", ".original_module"))]
        if changed and len(names) > 1:
            plain = [name.removesuffix(".base_layer").removesuffix(".original_module") for name in names]
            raise SkdError(
                f"{changed[0].rpartition('.')[0]} is trained apart from a weight that {' and '.join(plain)} share",
                where="distill.engine",
                hint="vLLM gets merged weights: leave the layer out of target_modules and modules_to_save, or use "
                "`engine: transformers`",
            )


def _stored_buffers(modules: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for name, module in modules.items():
        for own, buffer in module.named_buffers(recurse=False):
            if own not in module._non_persistent_buffers_set:
                yield f"{name}.{own}".lstrip("."), buffer


def _with_adapters(name: str, layer: Any, weight: Tensor) -> Tensor:
    plain = type(layer).__module__ == "peft.tuners.lora.layer" and not layer.lora_variant
    if not plain or not weight.is_floating_point() or any(layer.lora_bias.values()):
        raise SkdError(
            f"the weight of {name} with its adapter is not W + BA of a plain LoRA on a floating-point weight",
            where="distill.engine",
            hint="vLLM gets merged weights: use LoRA without DoRA, bias or quantization, or `engine: transformers`",
        )
    with torch.no_grad():
        return cast(Tensor, weight + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters))


def _takes_adapter(module: nn.Module, embedding: nn.Module) -> bool:
    """Return whether PEFT can call a layer with an adapter: not an embedding with its own way to look up rows (OPT)."""
    own_lookup = isinstance(module, nn.Embedding) and type(module) is not nn.Embedding and module is not embedding
    return isinstance(module, _ADAPTED) and not own_lookup


def _similar(target: str, layers: dict[str, nn.Module]) -> str:
    """Return a hint with the ends of layers' names, those like `target` first."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    near = get_close_matches(target.rpartition(".")[2], ends, n=_NAMES_SHOWN, cutoff=0.4)
    names = [*near, *(end for end in ends if end not in near)][:_NAMES_SHOWN]
    return f"name linear layers as they end in the model, here {', '.join(names)}, or leave it empty for all"
