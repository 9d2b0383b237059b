"""Write the tables of docs/guides/sizing.md: the memory that pairs of models take, and which GPU has it.

The figures are preflight's estimate (`skd_lib.planning.memory`), for models of known shapes
(`skd_lib.models.shapes`). No weight is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer

from skd_lib.config import RunConfig
from skd_lib.models.shapes import SHAPES
from skd_lib.planning.memory import GIB, ModelSize, config_size, estimates

PAGE = Path(__file__).parent / "guides/sizing.md"
BLOCK = re.compile(r"(<!-- table of (\w+), written by docs/sizing.py -->\n).*?(<!-- end -->)", flags=re.DOTALL)


MODELS = {
    name: SHAPES[name.lower()]()
    for name in (
        *("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen2.5-32B"),
        *("Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.1-70B"),
    )
}
PAIRS = [
    ("Qwen2.5-1.5B", "Qwen2.5-0.5B"),
    ("Qwen2.5-7B", "Qwen2.5-0.5B"),
    ("Llama-3.1-8B", "Llama-3.2-1B"),
    ("Qwen2.5-14B", "Qwen2.5-1.5B"),
    ("Qwen2.5-32B", "Qwen2.5-3B"),
    ("Llama-3.1-70B", "Llama-3.1-8B"),
]
GPUS = {"24 GB": 22.0, "48 GB": 44.4, "80 GB": 79.1, "141 GB": 139.8}
"""What PyTorch has of an L4, an L40S, an H100 and an H200, in GiB."""
HEADROOM = 0.95
"""The share of it that an estimate may take: CUDA's own memory and fragmentation are in no estimate."""
ANY_GPU = torch.device("meta")
"""Stands for a GPU, which the machine that writes the tables need not have."""
LEAN = {"precision": "bf16", "micro_batch_size": 1, "gradient_checkpointing": True}
LORA = {"lora": {"rank": 16}}
TEACHER = {"all weights": {}, "LoRA": LORA}
STUDENT = {
    "as it is": {},
    "8-bit teacher": {"teacher_precision": "8bit"},
    "4-bit teacher": {"teacher_precision": "4bit"},
    "4-bit teacher, LoRA": {"teacher_precision": "4bit", **LORA},
}
"""What makes a training smaller and changes its result, the least change first."""


def needed(teacher: ModelSize, student: ModelSize, step: str, training: dict[str, Any]) -> float:
    """Return the estimate of a step with these settings, in GiB."""
    config = RunConfig.model_validate(
        {
            "name": "sizing",
            "teacher": "teacher",
            "student": "student",
            "task": {"name": "gsm8k", "max_prompt_tokens": 512, "max_new_tokens": 512},
            "data": {"source": {"type": "files", "train": ["train.jsonl"]}},
            "teacher_sft": {"training": LEAN | (training if step == "teacher_sft" else {})},
            "distill": {"training": LEAN | (training if step == "distill" else {})},
        }
    )
    found = {each.step: each.total for each in estimates(config, teacher, student, device=ANY_GPU)}
    return found[step] / GIB


def tables() -> dict[str, str]:
    """Return the Markdown tables."""
    sizes = {name: config_size(config) for name, config in MODELS.items()}
    estimated = {
        pair: {
            step: {name: needed(sizes[pair[0]], sizes[pair[1]], step, training) for name, training in ladder.items()}
            for step, ladder in (("teacher_sft", TEACHER), ("distill", STUDENT))
        }
        for pair in PAIRS
    }
    memory = [
        [*pair, *(f"{x:.0f}" for step in found.values() for x in step.values())] for pair, found in estimated.items()
    ]
    gpus = [
        [f"{pair[0]} → {pair[1]}", step, *(_first(found[step], room) for room in GPUS.values())]
        for pair, found in estimated.items()
        for step in found
    ]
    steps = [
        f"`{step}`, {name}" for step, ladder in (("teacher_sft", TEACHER), ("distill", STUDENT)) for name in ladder
    ]
    return {
        "memory": "".join(_lines(["teacher", "student", *steps], memory)),
        "gpus": "".join(_lines(["pair", "step", *GPUS], [[pair, f"`{step}`", *cells] for pair, step, *cells in gpus])),
    }


def _first(ladder: dict[str, float], room: float) -> str:
    return next((name for name, size in ladder.items() if size <= HEADROOM * room), "no")


def _lines(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    for line in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(line)} |\n"


def written(page: str) -> str:
    """Return the page with its tables as they are now."""
    now = tables()
    return BLOCK.sub(lambda block: f"{block[1]}\n{now[block[2]]}\n{block[3]}", page)


def main() -> None:
    """Write the tables of docs/guides/sizing.md."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
