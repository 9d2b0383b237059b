from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skd_lib.errors import SkdError
from skd_lib.models.loading import load_model, save_model
from skd_lib.models.student_init import prune_layers
from tests.conftest import CONFIGS, TinyModel


def tokens() -> torch.Tensor:
    """Longer than the sliding window of the tiny models."""
    return torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def without_layers(model: PreTrainedModel, dropped: set[int], ids: torch.Tensor) -> torch.Tensor:
    """Logits of the whole model with the dropped layers handing their input on unchanged."""
    handles = [model.model.layers[index].register_forward_hook(_hand_on, with_kwargs=True) for index in sorted(dropped)]
    try:
        logits: torch.Tensor = model(ids, use_cache=False).logits
        return logits
    finally:
        for handle in handles:
            handle.remove()


def _hand_on(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_computes_what_the_kept_layers_compute(
    arch: str, tmp_path: Path, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(arch, seed=1, layers=6)
    student = prune_layers(model, keep_first=2, keep_last=1)
    expected = without_layers(model, {2, 3, 4}, tokens())
    with torch.no_grad():
        assert not torch.allclose(model(tokens()).logits, expected)
        torch.testing.assert_close(student(tokens()).logits, expected)
        # The cache index of each layer is its new position: decoding with the cache gives the same.
        cached = student(tokens()[:, :30], use_cache=True)
        rest = student(tokens()[:, 30:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(rest, expected[:, 30:])

    save_model(student, tiny_tokenizer, tmp_path / "student")
    loaded = load_model(tmp_path / "student", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, expected)


def test_config_follows(tiny_model: TinyModel) -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = tiny_model("gemma3", layers=5, layer_types=types)
    student = prune_layers(model, keep_first=1, keep_last=2)
    assert student.config.num_hidden_layers == 3
    assert student.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]
    assert model.config.num_hidden_layers == 5
    assert model.config.layer_types == types


def test_student_and_teacher_share_no_weights(tiny_model: TinyModel) -> None:
    model = tiny_model(layers=4, dtype="bfloat16").to(torch.bfloat16)
    before = model(tokens()).logits.detach()
    student = prune_layers(model, 1, 1)
    assert student.dtype == torch.bfloat16
    assert not student.training
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight
    with torch.no_grad():
        for weight in student.parameters():
            weight.zero_()
    assert torch.equal(model(tokens()).logits, before)


@torch.no_grad()
def test_a_head_of_its_own_is_kept_whatever_the_config_says(tiny_model: TinyModel) -> None:
    model = tiny_model(seed=1, layers=4, tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    student = prune_layers(model, 1, 1)
    torch.testing.assert_close(student(tokens()).logits, without_layers(model, {1, 2}, tokens()))
    assert student.config.tie_word_embeddings is False
    assert student.lm_head.weight is not student.get_input_embeddings().weight


@pytest.mark.parametrize(("first", "last"), [(2, 2), (5, 1)])
def test_cuts_that_make_no_sense(first: int, last: int, tiny_model: TinyModel) -> None:
    with pytest.raises(SkdError, match="cuts nothing from a model of 4"):
        prune_layers(tiny_model(layers=4), first, last)
