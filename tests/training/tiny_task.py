"""A task that a tiny model learns in a few steps, and one way to train on it, shared by tests and their processes."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from skd_lib.config import DistillConfig, InterleavedConfig, SamplingParams, TrainingConfig
from skd_lib.methods import METHODS
from skd_lib.training.run import TrainResult, train
from skd_lib.training.stored_teacher import StoredSignals

EOS = 2
WORKER = Path(__file__)
ROOT = str(WORKER.parents[2])
"""For the PYTHONPATH of processes that tests start."""


@dataclass
class Tokens:
    prompt_ids: list[int]
    response_ids: list[int]


def examples(count: int, seed: int) -> list[Tokens]:
    """The answer to a prompt counts up from its last token; prompts and answers have several lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        prompt = torch.randint(10, 40, (int(torch.randint(2, 7, (1,), generator=generator)),), generator=generator)
        last = int(prompt[-1])
        rows.append(Tokens([1, *prompt.tolist()], [*range(last, last + 1 + last % 4), EOS]))
    return rows


def run(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    folder: Path,
    *,
    method: str = "skd",
    callbacks: list[TrainerCallback] | None = None,
    on_metrics: Any = None,
    distill: dict[str, Any] | None = None,
    signals: StoredSignals | None = None,
    **training: Any,
) -> TrainResult:
    """Train on the task, with settings that tests override."""
    warm = SamplingParams(temperature=1.0, top_p=0.9)
    settings = {"learning_rate": 1e-2, "max_steps": 6, "batch_size": 4, "eval_steps": 2, "dropout": 0.1, **training}
    return train(
        method=method,  # type: ignore[arg-type]
        student=student,
        teacher=teacher if METHODS[method].needs_teacher else None,  # type: ignore[index]
        train=examples(30, seed=0),  # type: ignore[arg-type]
        validation=examples(9, seed=1),  # type: ignore[arg-type]
        training=TrainingConfig(**settings),
        # Fixed: an adaptive length depends on the rows sampled together, and so would the figures of two processes.
        distill=DistillConfig(
            **{"sampling": InterleavedConfig(adaptive_gamma=False, student=warm, teacher=warm), **(distill or {})}
        ),
        signals=signals,
        seed=11,
        max_new_tokens=8,
        eos_ids=(EOS,),
        pad_id=EOS,
        checkpoint_dir=folder,
        name="tiny",
        callbacks=callbacks or [],
        on_metrics=on_metrics,
    )


class FirstGradients(TrainerCallback):
    """Keeps the gradients of the first optimiser step, as they are after clipping."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.gradients:
            named = kwargs["model"].named_parameters()
            self.gradients = {name: parameter.grad.clone() for name, parameter in named}


class KillAfter(TrainerCallback):
    """Kills the process as the kernel would, at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(options: dict[str, Any]) -> None:
    """Train in a process of its own.

    Options: `student`, `teacher` (folders), `checkpoints`, `training` (a dict), `kill_after` (a step), `gradients`
    (where to write the first step's), `figures` (where to write what was logged).
    """
    torch.set_num_threads(1)
    student, teacher = (AutoModelForCausalLM.from_pretrained(options[name]) for name in ("student", "teacher"))
    first = FirstGradients()
    figures: list[dict[str, float]] = []
    run(
        student,
        teacher,
        Path(options["checkpoints"]),
        callbacks=[first, KillAfter(options.get("kill_after", -1))],
        on_metrics=lambda step, values: figures.append({"step": step, **values}),
        **options.get("training", {}),
    )
    if int(os.environ.get("RANK", "0")) == 0 and "gradients" in options:
        save_file(first.gradients, options["gradients"])
        written = {"processes": torch.distributed.get_world_size(), "figures": figures}
        Path(options["figures"]).write_text(json.dumps(written))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
