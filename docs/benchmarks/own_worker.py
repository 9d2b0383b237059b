"""Run optimiser steps of this library one at a time, to be compared with those of others.

    python own_worker.py request.json

The request is that of `trl_worker`, with a `method` instead of a trainer, and `gamma`, `top_k` and `checkpointing`.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch

from skd_lib.config import DistillConfig, InterleavedConfig, SamplingParams, TrainingConfig
from skd_lib.data.tokenize import TokenizedExample
from skd_lib.training.checkpoints import Checkpoints
from skd_lib.training.run import train
from trl_worker import Finished, TakeTurns, load, take_over_stdout


def main() -> None:
    """Make the steps that the request in the file describes."""
    replies = take_over_stdout()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    plain = SamplingParams(temperature=1.0, top_p=1.0)
    sampling = InterleavedConfig(gamma=request["gamma"], top_k=request["top_k"], student=plain, teacher=plain)
    with suppress(Finished):
        train(
            method=request["method"],
            student=load(request["student"], "float32", request["device"]),
            teacher=load(request["teacher"], request["dtype"], request["device"]),
            train=[TokenizedExample(prompt, [0]) for prompt in request["prompts"]],
            validation=[TokenizedExample([0], [0])],
            training=TrainingConfig(
                learning_rate=request["learning_rate"],
                lr_scheduler="constant",
                warmup_ratio=0,
                max_steps=request["steps"],
                batch_size=len(request["prompts"]),
                eval_steps=request["steps"],
                checkpoint_minutes=100_000,  # none while it is measured
                dropout=0,
                precision="bf16" if request["bf16"] else "fp32",
                gradient_checkpointing=request["checkpointing"],
            ),
            distill=DistillConfig(divergence="jsd", beta=request["beta"], sampling=sampling),
            seed=request["seed"],
            max_new_tokens=request["new_tokens"],
            eos_ids=(),
            pad_id=0,
            checkpoints=Checkpoints(Path(request["folder"])),
            name=request["method"],
            callbacks=[TakeTurns(replies, torch.device(request["device"]))],
        )


if __name__ == "__main__":
    main()
