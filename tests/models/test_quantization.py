"""Teachers in 8 and 4 bits: bitsandbytes itself, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from skd_lib.config import SamplingParams
from skd_lib.errors import SkdError
from skd_lib.models.loading import check_quantization, load_model
from skd_lib.sampling.acceptance import teacher_only
from skd_lib.sampling.engine import Sampler
from tests.conftest import SaveTinyModel, TinyModel

pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

Bits = Literal["8bit", "4bit"]
PROMPTS = [[1, 5, 9, 11, 30, 31, 8], [1, 40, 41]]


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_layers_are_quantised_and_the_head_is_not(bits: Bits, save_tiny_model: SaveTinyModel, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "teacher", hidden=64)
    whole, small = load_model(folder), load_model(folder, quantization=bits)
    dtypes = {module.weight.dtype for name, module in small.named_modules() if name.endswith("_proj")}
    assert dtypes == {torch.int8 if bits == "8bit" else torch.uint8}
    assert small.get_output_embeddings().weight.dtype == torch.float32
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        p, q = (model(ids).logits.log_softmax(-1) for model in (whole, small))
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    assert 0 < divergence < (0.01 if bits == "8bit" else 0.5)


def test_sampler_and_generate_agree(save_tiny_model: SaveTinyModel, tiny_model: TinyModel, tmp_path: Path) -> None:
    """In 4 bits: 8-bit products depend on the positions that are multiplied together, here other ones than there."""
    teacher = load_model(save_tiny_model(tmp_path / "teacher", hidden=64), quantization="4bit")
    greedy = SamplingParams(temperature=0)
    sampler = Sampler(
        tiny_model(seed=1),
        teacher,
        teacher_only(),
        gamma=1,
        max_new_tokens=8,
        eos_ids=(2,),
        pad_id=0,
        student_params=greedy,
        teacher_params=greedy,
    )
    for prompt in PROMPTS:
        samples = sampler.sample([prompt], seeds=[0])
        mine = samples.tokens_BT[0][samples.mask_BT[0]].tolist()
        theirs = teacher.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert mine == theirs[: len(mine)]
        assert len(mine) == len(theirs)


@pytest.mark.parametrize("flag", [0, 1])
def test_four_bits_compute_in_fp32_on_every_cpu(
    flag: int, save_tiny_model: SaveTinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX512_BF16 bitsandbytes has a kernel for bf16 alone, which takes no layer as narrow as the keys' here."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: flag)
    folder = save_tiny_model(tmp_path / "teacher", hidden=64, num_key_value_heads=1)
    whole, small = load_model(folder), load_model(folder, quantization="4bit")
    layers = {name: module for name, module in small.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = whole.get_submodule(name).weight
        unpacked = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        # A block's scale is the largest of 64 weights, about 2.4 times their deviation; NF4's steps are a tenth of it.
        assert (unpacked - weight).abs().mean() < 0.1 * weight.std(), name
        weight.data = unpacked
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)


def test_rows_that_are_no_whole_blocks_are_refused_on_a_cpu(save_tiny_model: SaveTinyModel, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "teacher", hidden=48)
    with pytest.raises(SkdError, match=r"teacher_precision 4bit: layer model.layers.0.self_attn.q_proj of .*48 inputs"):
        load_model(folder, quantization="4bit")
    check_quantization("4bit", folder, torch.device("cuda"))
    load_model(folder, quantization="8bit")
