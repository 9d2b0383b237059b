"""Write tables of the guides: the memory that pairs of models take, which GPU has it, and plans of runs.

The figures are preflight's estimate (`skd_lib.planning.memory`), for models of known shapes
(`skd_lib.models.shapes`). No weight is loaded. Plans are those of the commands that stand above their tables.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from typer.testing import CliRunner

from skd_kfp.pipelines.cli import app
from skd_lib._core.format import duration
from skd_lib.config import RunConfig
from skd_lib.models.shapes import SHAPES
from skd_lib.planning.memory import GIB, ModelSize, config_size, estimates

GUIDES = Path(__file__).parent / "guides"
PAGES = [GUIDES / name for name in ("sizing.md", "planning.md", "kubeflow-gpus.md")]
PLANS = re.compile(
    r"(```sh\n((?:# \d+\n)?skd plan [^`]*)```\n\n<!-- (plan|plans), written by docs/sizing.py -->\n).*?(<!-- end -->)",
    flags=re.DOTALL,
)
COMMENT = re.compile(r"^# .*\n", flags=re.MULTILINE)
BLOCK = re.compile(r"(<!-- table of (\w+), written by docs/sizing.py -->\n).*?(<!-- end -->)", flags=re.DOTALL)
SHOWN_SECONDS = 0.1
"""A part of a training step that takes less in every plan has no column."""

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


def plans(commands: str) -> list[dict[str, Any]]:
    """Return the plans of `skd plan` commands."""
    found = []
    for command in COMMENT.sub("", commands).replace("\\\n", " ").strip().splitlines():
        done = CliRunner().invoke(app, [*shlex.split(command)[1:], "--json"], catch_exceptions=False)
        found.append(json.loads(done.stdout))
    return found


def steps_of(plan: dict[str, Any]) -> Iterator[str]:
    """Return the table of one plan's steps."""
    rows = [
        [
            step["name"],
            str(step["devices"]),
            _memory(step),
            duration(step["seconds"]) if step["seconds"] else "",
            f"{step['cost']:.2f}" if step["seconds"] else "",
        ]
        for step in plan["steps"]
    ]
    rows.append(["all", "", "", duration(plan["seconds"]), f"{plan['cost']:.2f}"])
    return _lines(["step", "GPUs", "GiB of each", "time", "$"], rows)


def _memory(step: dict[str, Any]) -> str:
    size = step["memory_bytes"]
    return "" if size is None else f"{size / GIB:.0f}" + ("" if step["fits"] else " (too much)")


def compared(found: list[dict[str, Any]]) -> Iterator[str]:
    """Return the table of the distillation of several plans."""
    parts = [part for plan in found for part in plan["distill_step"]]
    names = list(dict.fromkeys(part["name"] for part in parts if part["seconds"] >= SHOWN_SECONDS))
    rows = []
    for number, plan in enumerate(found, start=1):
        seconds = {part["name"]: part["seconds"] for part in plan["distill_step"]}
        steps = {step["name"]: step for step in plan["steps"]}
        distill = steps["distill"]
        memory = [_memory(step) for name, step in steps.items() if name.startswith("distill")]
        rows.append(
            [
                f"{number}: {plan['profile']}",
                ", ".join(memory),
                f"{sum(seconds.values()):.1f}",
                *(f"{seconds[name]:.1f}" if name in seconds else "" for name in names),
                f"{distill['seconds'] / 3600:.1f}",
                f"{distill['cost']:.0f}",
            ]
        )
    return _lines(["plan", "GiB: training, server", "seconds a step", *names, "hours", "$"], rows)


def written(page: str) -> str:
    """Return the page with its tables as they are now."""

    def planned(block: re.Match[str]) -> str:
        found = plans(block[2])
        table = steps_of(found[0]) if block[3] == "plan" else compared(found)
        return f"{block[1]}\n{''.join(table)}\n{block[4]}"

    if BLOCK.search(page):
        now = tables()
        page = BLOCK.sub(lambda block: f"{block[1]}\n{now[block[2]]}\n{block[3]}", page)
    return PLANS.sub(planned, page)


def main() -> None:
    """Write the tables of the guides."""
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
