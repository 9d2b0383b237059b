"""Pruning: a student that is cut out of its teacher."""

from __future__ import annotations

import copy
import re
from typing import Any, cast

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from skd_lib.errors import SkdError
from skd_lib.models.skeleton import untie

_LAYER = re.compile(r"(?P<prefix>(?:.*\.)?layers\.)(?P<index>\d+)(?P<rest>\..*)")
_PER_LAYER_FIELDS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Config fields with one entry a layer."""


def prune_layers(model: PreTrainedModel, keep_first: int, keep_last: int) -> PreTrainedModel:
    """Return a copy of `model` without a contiguous block of its middle layers.

    The first layers build features and the last ones turn them into predictions; those between refine, and a model
    loses least without them (Men et al. 2024, arXiv 2403.03853; Gromov et al. 2024, arXiv 2403.17887).

    The copy is built from the shortened config rather than by deleting modules, so that everything an architecture
    derives from a layer's position (cache index, sliding window, rotary base) is derived for the new position and
    the kept layer's type.

    Returns:
        A model with its own weights, on the same device, in the same dtype and in eval mode.
    """
    total = int(model.config.get_text_config().num_hidden_layers)
    if keep_first + keep_last >= total:
        raise SkdError(
            f"keeping {keep_first} + {keep_last} layers cuts nothing from a model of {total}",
            where="student_init",
            hint=f"keep_first + keep_last must be less than {total}",
        )
    kept = [*range(keep_first), *range(total - keep_last, total)]
    config = _shortened(model.config, kept)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        untie(config)
    with no_init_weights():  # the weights are filled in below
        student = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    try:
        student.load_state_dict(_kept_weights(model, kept), strict=True)
    except RuntimeError as error:
        raise SkdError(
            f"{type(model).__name__} is not a plain stack of layers, so none can be cut out: {error}",
            where="student_init",
            hint="start from a smaller model of the family (`mode: as_is` or `sft`)",
        ) from error
    student.tie_weights()
    student.generation_config = copy.deepcopy(model.generation_config)
    return cast(PreTrainedModel, student.to(model.device).eval())


def _shortened(config: Any, kept: list[int]) -> Any:
    shortened = copy.deepcopy(config)
    text = shortened.get_text_config()
    for field in _PER_LAYER_FIELDS:
        if getattr(text, field, None) is not None:
            setattr(text, field, [getattr(text, field)[index] for index in kept])
    text.num_hidden_layers = len(kept)
    return shortened


def _kept_weights(model: PreTrainedModel, kept: list[int]) -> dict[str, Any]:
    new_index = {old: new for new, old in enumerate(kept)}
    weights = {}
    for name, tensor in model.state_dict().items():
        found = _LAYER.fullmatch(name)
        if found is None:
            weights[name] = tensor
        elif (old := int(found["index"])) in new_index:
            weights[f"{found['prefix']}{new_index[old]}{found['rest']}"] = tensor
    return weights
