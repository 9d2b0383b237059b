"""Teachers in 8 and 4 bits: bitsandbytes itself, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from skd_lib.config import SamplingParams
from skd_lib.models.loading import load_model
from skd_lib.sampling.acceptance import nothing
from skd_lib.sampling.engine import Sampler
from tests.conftest import SaveTinyModel, TinyModel

pytest.importorskip("bitsandbytes")
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
        nothing(),
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
