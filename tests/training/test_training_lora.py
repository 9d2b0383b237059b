"""LoRA students: adapters are trained and checkpointed, a plain model comes out."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from skd_lib.errors import SkdError
from tests.training.nursery import Nursery
from tests.training.tiny_task import run, saved

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}


def test_adapters_are_trained_and_merged(
    models: dict[str, Any], tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    student, teacher = (AutoModelForCausalLM.from_pretrained(models[name]) for name in ("student", "teacher"))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    result = run(student, teacher, tmp_path / "checkpoints", lora=LORA, max_steps=12, eval_steps=4)
    assert result.best_validation_loss < 0.9 * result.first_validation_loss

    best = saved(tmp_path / "checkpoints", result.best_step)
    assert not (best / "model.safetensors").exists()
    adapters = load_file(best / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapters)
    assert not any("lm_head" in name or "embed" in name for name in adapters)

    # A plain model, which anything can load, and which answers as the base with its adapters does.
    student.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert set(merged.state_dict()) == set(before)
    assert torch.equal(merged.state_dict()["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    base = AutoModelForCausalLM.from_pretrained(models["student"])
    tokens = torch.arange(3, 20).unsqueeze(0)
    untrained = base(tokens).logits
    expected = PeftModel.from_pretrained(base, best).eval()(tokens).logits
    torch.testing.assert_close(merged.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - untrained).abs().max() > 0.1
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.slow
class Casts(TorchDispatchMode):
    """Counts the casts of one weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight, self.count = weight.data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() == self._weight:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_frozen_weights_are_cast_once_while_a_batch_is_sampled(models: dict[str, Any], tmp_path: Path) -> None:
    student, teacher = (AutoModelForCausalLM.from_pretrained(models[name]) for name in ("student", "teacher"))
    with Casts(student.model.layers[0].mlp.down_proj.weight) as seen:
        run(student, teacher, tmp_path, method="on_policy", precision="bf16", lora=LORA, max_steps=1)
    # once for the rollout, for the loss, and for each of the three batches of two validations
    assert seen.count == 1 + 1 + 2 * 3


def test_adapters_resume_exactly(nursery: Nursery, models: dict[str, Any], tmp_path: Path) -> None:
    training = {"max_steps": 6, "eval_steps": 2, "lora": LORA, "gradient_checkpointing": True}
    killed = {**models, "checkpoints": str(tmp_path / "killed"), "training": training}
    assert nursery.run({**killed, "kill_at_step": 4}) == [-signal.SIGKILL]
    weights = [tmp_path / name for name in ("killed.safetensors", "whole.safetensors")]
    assert nursery.run({**killed, "weights": str(weights[0])}) == [0]
    assert nursery.run({**killed, "checkpoints": str(tmp_path / "whole"), "weights": str(weights[1])}) == [0]
    resumed, uninterrupted = map(load_file, weights)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())


def test_adapters_need_layers_to_be_on(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    with pytest.raises(SkdError, match=r"training.lora.target_modules: adapters cannot be added(.|\n)*q_proj"):
        run(tiny_model(vocab_size=64), None, tmp_path, method="sft", lora={"target_modules": ["attention"]})
