"""`SKDTrainer`, used as a script would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, TrainerCallback

from skd_lib.errors import SkdError
from skd_lib.training.skd_trainer import SKDConfig, SKDTrainer
from tests.conftest import TinyModel

CHAT = [
    {"messages": [{"role": "user", "content": f"Add {n} and 1"}, {"role": "assistant", "content": f"{n + 1}"}]}
    for n in range(8)
]
PLAIN = [{"prompt": f"Add {n} and 1: ", "completion": f"{n + 1}"} for n in range(8)]


@pytest.fixture
def make(tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    def make(
        rows: list[dict[str, Any]] = CHAT,
        *,
        folder: str = "out",
        callbacks: Any = None,
        peft: Any = None,
        **options: Any,
    ):
        options = {"max_steps": 2, "max_new_tokens": 6, "per_device_train_batch_size": 2} | options
        args = SKDConfig(
            output_dir=str(tmp_path / folder),
            gradient_accumulation_steps=2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            learning_rate=1e-3,
            **options,
        )
        return SKDTrainer(
            model=tiny_model(seed=1),
            teacher_model=tiny_model(seed=2, hidden=64),
            args=args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:4]),
            processing_class=tiny_tokenizer,
            callbacks=callbacks,
            peft_config=peft,
        )

    return make


@pytest.mark.parametrize("rows", [CHAT, PLAIN], ids=["messages", "prompt-completion"])
def test_it_trains_and_tells_what_was_replaced(make: Any, rows: list[dict[str, Any]]) -> None:
    trainer = make(rows, max_steps=12)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    steps = [entry for entry in trainer.state.log_history if "rejection_rate" in entry]
    assert len(steps) == 12
    assert all(0 <= entry["rejection_rate"] <= 1 for entry in steps)


@pytest.mark.parametrize("method", ["sft", "seqkd", "supervised_kd", "on_policy", "imitkd", "two_stage", "skd_mixed"])
def test_every_method_trains(make: Any, method: str) -> None:
    assert make(method=method).train().training_loss > 0


def test_a_resumed_training_equals_an_uninterrupted_one(make: Any) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    whole = make(max_steps=6, save_steps=3, save_strategy="steps", folder="whole")
    whole.train()
    make(max_steps=6, save_steps=3, save_strategy="steps", folder="parts", callbacks=[Stop()]).train()
    rest = make(max_steps=6, save_steps=3, save_strategy="steps", folder="parts")
    rest.train(resume_from_checkpoint=True)
    for ours, theirs in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_micro_batches_make_one_step(make: Any) -> None:
    """The gradient of a step depends on its rows, not on how they are cut into micro-batches."""
    one = make(per_device_train_batch_size=4, max_steps=1, lr_scheduler_type="constant")
    one.args.gradient_accumulation_steps = 1
    two = make(per_device_train_batch_size=2, max_steps=1, lr_scheduler_type="constant")
    assert one.train().training_loss == pytest.approx(two.train().training_loss, rel=1e-5)


def test_adapters_are_trained_alone(make: Any) -> None:
    trainer = make(peft=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2))
    trainer.train()
    assert {name.split(".")[-2] for name, weight in trainer.model.named_parameters() if weight.requires_grad} == {
        "default"
    }


def test_names_of_gkd_mean_what_they_mean_there() -> None:
    config = SKDConfig(output_dir="x", lmbda=0.5, beta=0.3, temperature=0.9, report_to="none").distill_config()
    assert (config.method, config.sampled_fraction, config.divergence, config.beta) == ("skd_mixed", 0.5, "jsd", 0.3)
    assert config.sampling.student.temperature == config.sampling.teacher.temperature == 0.9
    assert SKDConfig(output_dir="x", seq_kd=True, report_to="none").distill_config().method == "seqkd"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"method": "skdd"}, "method"), ({"top_k": -1}, "top_k"), ({"divergence": "kl"}, "divergence")],
)
def test_wrong_settings_are_named(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SkdError, match=message):
        make(**options)


def test_prompts_alone_are_enough_where_every_response_is_sampled(make: Any) -> None:
    rows = [{"prompt": row["prompt"]} for row in PLAIN]
    trainer = make(rows, eval_strategy="no")
    trainer.train()
    with pytest.raises(SkdError, match="no response"):
        trainer.evaluate()
    with pytest.raises(SkdError, match="no response"):
        make(rows, method="supervised_kd").train()
