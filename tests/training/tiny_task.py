"""A task that a tiny model learns in a few steps, and one way to train on it, shared by tests and their processes."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler

from skd_lib.config import DistillConfig, InterleavedConfig, SamplingParams, TrainingConfig
from skd_lib.config.distill import VllmConfig
from skd_lib.distillation.methods import METHODS
from skd_lib.distillation.rollouts import SamplerAt
from skd_lib.interface import distill
from skd_lib.training.checkpoints import MARKER, Attempt, Checkpoints
from skd_lib.training.run import GivenSignals, TrainResult, train
from skd_lib.training.skd_config import SKDConfig
from skd_lib.training.skd_trainer import SKDTrainer

EOS = 2


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
    mirror: str = "",
    callbacks: list[TrainerCallback] | None = None,
    on_metrics: Any = None,
    distill: dict[str, Any] | None = None,
    signals: GivenSignals | None = None,
    sampler_at: SamplerAt | None = None,
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
        sampler_at=sampler_at,
        seed=11,
        max_new_tokens=8,
        eos_ids=(EOS,),
        pad_id=EOS,
        checkpoints=Checkpoints(folder, mirror),
        name="tiny",
        callbacks=callbacks or [],
        on_metrics=on_metrics,
    )


def saved(folder: Path, step: int) -> Path:
    """The checkpoint of a step, which one attempt has made."""
    (found,) = folder.glob(f"*/checkpoint-{step}")
    return found


def newest(folder: Path) -> Path:
    """The newest complete checkpoint of any attempt."""
    complete = [marker.parent for marker in folder.glob(f"*/checkpoint-*/{MARKER}")]
    return max(complete, key=lambda path: (int(path.name.removeprefix("checkpoint-")), path.parent.name))


class FirstGradients(TrainerCallback):
    """Keeps the gradients of the first optimiser step, as they are after clipping."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.gradients:
            named = kwargs["model"].named_parameters()
            self.gradients = {name: parameter.grad.clone() for name, parameter in named if parameter.requires_grad}


class AtStep(TrainerCallback):
    """Sends this process a signal once a step is done, as many times as told, while its checkpoint is not yet made."""

    def __init__(self, step: int, number: signal.Signals, times: int = 1) -> None:
        self.step, self.number, self.times = step, number, times

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class KillInWrite(TrainerCallback):
    """Kills the process while the second checkpoint is being written, or right after it is complete.

    The first one is let through. While the second one is written training must go on: it is its next step that kills.
    """

    def __init__(self, *, complete: bool) -> None:
        commit, started = Attempt.commit, threading.Event()
        self.writing, steps = started, []

        def watched(attempt: Attempt, step: int, *args: Any, **kwargs: Any) -> str:
            steps.append(step)
            if len(steps) == 2 and not complete:
                started.set()
                threading.Event().wait()
            place = commit(attempt, step, *args, **kwargs)
            if len(steps) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return place

        Attempt.commit = watched  # type: ignore[method-assign]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.writing.is_set():
            os.kill(os.getpid(), signal.SIGKILL)


def kill_after(events: int) -> None:
    """Kill the process as the kernel would, after so many things have happened: steps of the loop, opened files."""
    left = events

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open" and "checkpoint-" in str(args[0]):
            happened()

    def happened(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    call_event = CallbackHandler.call_event

    def counted(*args: Any, **kwargs: Any) -> Any:
        happened()
        return call_event(*args, **kwargs)

    CallbackHandler.call_event = counted  # type: ignore[method-assign]


class BreakLoss(TrainerCallback):
    """Makes the loss of the first micro-batch of a step not a number: its embeddings are not."""

    def __init__(self, step: int, student: PreTrainedModel) -> None:
        self.step, self.due = step, False
        student.get_input_embeddings().register_forward_hook(self.hook)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.due = state.global_step + 1 == self.step

    def hook(self, _module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not self.due or not torch.is_grad_enabled():
            return output
        self.due = False
        return output * torch.nan


def train_by_skd_trainer(options: dict[str, Any]) -> None:
    """Train with `SKDTrainer`, in a process of its own.

    Options: `student`, `teacher`, `output` (folders), `args` (of `SKDConfig`), `resume`; where to write the losses:
    `losses`.
    """
    torch.set_num_threads(1)
    trainer = SKDTrainer(
        model=options["student"],
        teacher_model=options["teacher"],
        args=SKDConfig(output_dir=options["output"], **options["args"]),
        train_dataset=[{"prompt": f"Add {n} and 1: ", "completion": str(n + 1)} for n in range(8)],
        eval_dataset=[{"prompt": f"Add {n} and 2: ", "completion": str(n + 2)} for n in range(3)],
    )
    trainer.train(resume_from_checkpoint=options.get("resume", False))
    trainer.save_model()
    loss = trainer.evaluate()["eval_loss"]
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in trainer.model.parameters())
    if trainer.is_world_process_zero():
        Path(options["losses"]).write_text(json.dumps({"eval_loss": loss, "held": held}))


@contextmanager
def servers(student: PreTrainedModel, options: dict[str, Any]) -> Iterator[tuple[PreTrainedModel | None, Any]]:
    """The teacher's head, and what `run` is given to sample by the vLLM servers of `urls`; nothing without."""
    if "urls" not in options:
        yield None, {}
        return
    from skd_lib.vllm.engine import vllm_engine

    warm = SamplingParams(temperature=1.0, top_p=0.9)
    sampling = InterleavedConfig(gamma=options["gamma"], student=warm, teacher=warm)
    with vllm_engine(
        DistillConfig(engine="vllm", vllm=VllmConfig(urls=options["urls"]), sampling=sampling),
        student=student,
        folders={name: Path(options[name]) for name in ("student", "teacher")},
        eos_ids=(EOS,),
        pad_id=EOS,
        max_new_tokens=8,
        longest=64,
        dtype=torch.float32,
    ) as engine:
        yield engine.head, {"signals": engine, "sampler_at": engine.sampler}


def main(options: dict[str, Any]) -> None:
    """Train in a process of its own, by `train_by_skd_trainer` if there are `args`, by `distill` if there is `config`.

    Options: `student`, `teacher` (folders), `checkpoints`, `training` (a dict); what happens in the process of the
    highest rank: `kill_at_step`, `kill_after_events`, `kill_in_write`, `sigterm_at_step`, `broken_step`; where to write
    what came of it: `gradients` (the first step's), `figures` (what was logged), `weights` (of the trained student),
    `held` (which share of the weights the process had). vLLM servers that sample: `urls`, and their `gamma`.
    """
    if "args" in options:
        train_by_skd_trainer(options)
        return
    if "config" in options:
        torch.set_num_threads(1)
        distill(options["config"], options["output"])
        return
    torch.set_num_threads(1)
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    student, teacher = (AutoModelForCausalLM.from_pretrained(options[name]) for name in ("student", "teacher"))
    first = FirstGradients()
    callbacks: list[TrainerCallback] = [first]
    if rank == processes - 1:
        if "kill_at_step" in options:
            callbacks.append(AtStep(options["kill_at_step"], signal.SIGKILL))
        if "kill_in_write" in options:
            callbacks.append(KillInWrite(complete=options["kill_in_write"] == "complete"))
        if "kill_after_events" in options:
            kill_after(options["kill_after_events"])
        if "sigterm_at_step" in options:
            callbacks.append(AtStep(options["sigterm_at_step"], signal.SIGTERM, times=2))
        if "broken_step" in options:
            callbacks.append(BreakLoss(options["broken_step"], student))
    figures: list[dict[str, float]] = []
    with servers(student, options) as (head, sources):
        result = run(
            student,
            head or teacher,
            Path(options["checkpoints"]),
            mirror=options.get("mirror", ""),
            callbacks=callbacks,
            on_metrics=lambda step, values: figures.append({"step": step, **values}),
            **sources,
            **options.get("training", {}),
        )
    if rank != 0:
        return
    if "gradients" in options:
        save_file(first.gradients, options["gradients"])
    if "figures" in options:
        Path(options["figures"]).write_text(json.dumps(figures))
    if "held" in options:
        local = [p.to_local() if isinstance(p, DTensor) else p for p in student.parameters()]
        Path(options["held"]).write_text(str(sum(p.numel() for p in local) / result.student.num_parameters()))
    if "weights" in options:
        save_file({name: tensor.contiguous() for name, tensor in result.student.named_parameters()}, options["weights"])
