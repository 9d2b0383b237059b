"""Optimiser steps of TRL's trainers. Runs in TRL's environment, which has TRL and nothing of this library.

    python -I trl_worker.py request.json

The request names the `trainer`, the folders of `student` and `teacher`, the `prompts` (token ids) of every step and how
to train. For each line on standard input a step is made and a line of JSON written, see `TakeTurns`; it ends with its
input.

What decides the speed is set as well as TRL's trainers can: KV cache, no gradient checkpointing, no evaluation, no
saving, the fused optimiser, every response the student's own.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

ReturnT = TypeVar("ReturnT")


class Finished(Exception):
    """No more steps are wanted."""


class TakeTurns(TrainerCallback):
    """Callback that begins each optimiser step at a line on standard input, and replies after it.

    A reply is `{"seconds", "cpu_seconds", "figures", "peak_memory"}`: seconds of the whole step (data, rollout, loss,
    optimiser and logging), those that CPUs have worked for it, the figures that the trainer logged, and the most bytes
    that the process has taken, on a CUDA GPU by tensors, elsewhere resident.

    Args:
        replies: Where to write.
        device: Where the models are.
    """

    def __init__(self, replies: TextIO, device: torch.device) -> None:
        self._replies, self._device = replies, device
        self._started = self._cpu_started = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the first step."""
        self._wait()

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        """Reply after a step."""
        if "loss" not in logs:
            return
        reply = {
            "seconds": time.perf_counter() - self._started,
            "cpu_seconds": time.process_time() - self._cpu_started,
            "figures": logs,
            "peak_memory": peak_memory(self._device),
        }
        print(json.dumps(reply), file=self._replies, flush=True)
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise Finished
        self._started, self._cpu_started = time.perf_counter(), time.process_time()


def take_over_stdout() -> TextIO:
    """Return standard output for replies alone; all other output goes to standard error from now on."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use: on a CUDA GPU by tensors, elsewhere resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # the other figure begins with what the process had that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def load(folder: str, dtype: str, device: str) -> PreTrainedModel:
    """Load a saved model."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to(device)


class _Phases(TrainerCallback):
    """Adds the seconds of a step's phases, and the sampled tokens, to what TRL logs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._figures: dict[str, float] = {}
        self._optimiser_started = 0.0

    def timed(self, phase: str, function: Callable[..., ReturnT]) -> Callable[..., ReturnT]:
        """Return the function with its seconds added up."""

        def run(*args: Any, **kwargs: Any) -> ReturnT:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._add(phase, started)

        return run

    def watch(self, trainer: Trainer, student: PreTrainedModel) -> None:
        """Take the time of generation, and of all that a training step does besides."""
        generate = self.timed("rollout", student.generate)

        def counted(*args: Any, **kwargs: Any) -> Any:
            outputs = generate(*args, **kwargs)
            rows, length = getattr(outputs, "sequences", outputs).shape
            self._figures["response_tokens"] = rows * (length - kwargs["input_ids"].shape[1])
            return outputs

        student.generate = counted
        trainer.training_step = self.timed("training_step", trainer.training_step)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Gradients are clipped; the step comes next."""
        self._optimiser_started = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """End the step."""
        self._add("optimiser", self._optimiser_started)

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        """Prepare the reply."""
        if "loss" in logs:
            self._figures["seconds_loss"] = (
                self._figures.pop("seconds_training_step") - self._figures["seconds_rollout"]
            )
            logs.update(self._figures)
            self._figures.clear()

    def _add(self, phase: str, started: float) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        key = f"seconds_{phase}"
        self._figures[key] = self._figures.get(key, 0.0) + time.perf_counter() - started


def main() -> None:
    """Make the steps that the request in the file describes."""
    replies = take_over_stdout()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    device = torch.device(request["device"])
    student = load(request["student"], "float32", request["device"])
    teacher = load(request["teacher"], request["dtype"], request["device"]).eval()
    tokenizer = _tokenizer(student.config.vocab_size)
    # What a model brings along (EOS ids, top_k, penalties) fills the gaps of what it is given.
    student.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    trainer = {"GKDTrainer": _gkd, "DistillationTrainer": _distillation}[request["trainer"]](
        request, student, teacher, tokenizer
    )
    phases = _Phases(device)
    phases.watch(trainer, student)
    trainer.add_callback(phases)
    trainer.add_callback(TakeTurns(replies, device))
    with suppress(Finished):
        trainer.train()


def _gkd(
    request: dict[str, Any], student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Trainer:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = {"ids": request["prompts"] * request["steps"]}
    args = GKDConfig(lmbda=1.0, temperature=1.0, max_new_tokens=request["new_tokens"], **_arguments(request))

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Prompts; the responses, which are replaced, only say how many tokens there will be."""
        prompts = [example["ids"] for example in examples]
        width, count = max(map(len, prompts)), len(prompts)
        tokens_BP = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask_BP = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        responses_BT = torch.zeros(count, request["new_tokens"], dtype=torch.long)
        return {
            "prompts": tokens_BP,
            "prompt_attention_mask": mask_BP,
            "input_ids": torch.cat([tokens_BP, responses_BT], dim=1),
            "attention_mask": torch.cat([mask_BP, torch.ones_like(responses_BT)], dim=1),
            "labels": torch.cat([torch.full_like(tokens_BP, -100), responses_BT], dim=1),
        }

    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        data_collator=collate,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )


def _distillation(
    request: dict[str, Any], student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Trainer:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    texts = [" ".join(map(str, prompt)) for prompt in request["prompts"]]
    args = DistillationConfig(
        temperature=1.0,
        max_completion_length=request["new_tokens"],
        shuffle_dataset=False,
        **_arguments(request),
    )
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": texts * request["steps"]}),
        processing_class=tokenizer,
    )


def _arguments(request: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of both trainers."""
    return {
        "output_dir": request["folder"],
        "use_cpu": request["device"] == "cpu",
        "bf16": request["bf16"],
        "seed": request["seed"],
        "beta": request["beta"],
        "learning_rate": request["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "per_device_train_batch_size": len(request["prompts"]),
        "max_steps": request["steps"],
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Its words are the token ids themselves; no model can sample its EOS, so all responses have their full length."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {str(token): token for token in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel({**words, "<eos>": vocabulary}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "0"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


if __name__ == "__main__":
    main()
