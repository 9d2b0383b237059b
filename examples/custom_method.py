"""A method and an acceptance rule of your own, registered under names, and a student trained with them.

    python examples/custom_method.py TEACHER STUDENT train.jsonl --output student

TEACHER and STUDENT are names or folders of causal language models with one tokenizer. Each line of the data has
`messages`, or `prompt` and `completion`, or `prompt` alone. Once registered, the names also work in a run's YAML file
(`distill.method`, `distill.sampling.rule`) and in `skd_lib.distill`, in processes that import this module.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from skd_lib import SKDConfig, SkdError, SKDTrainer
from skd_lib.data.readers import read_rows
from skd_lib.distillation.methods import METHODS, MethodEntry
from skd_lib.distillation.rollouts import Responses, Strategy
from skd_lib.models.references import parse_reference
from skd_lib.sampling.acceptance import RULES, AcceptanceRule, Block, RuleEntry


def near_best(share: float) -> AcceptanceRule:
    """Accept a draft that is at least `share` times as likely, to the teacher, as its most likely token."""

    def accept(block: Block) -> torch.Tensor:
        log_p_BGV = block.teacher_logits_BGV.float().log_softmax(-1)
        drafted_BG = log_p_BGV.gather(-1, block.drafts_BG.unsqueeze(-1)).squeeze(-1)
        return drafted_BG >= log_p_BGV.amax(-1) + torch.tensor(share).log()

    return AcceptanceRule(f"near_best({share:g})", accept)


def skd_then_on_policy(make: Responses) -> Strategy:
    """Sample interleaved in the first half of the training, and from the student alone in the second."""
    interleaved, alone = make.interleaved(), make.by_student()
    return lambda rows, keys: (interleaved if 2 * keys[0].step < make.steps else alone)(rows, keys)


RULES.add(
    "near_best",
    RuleEntry(near_best, accepts="p(t) >= `min_prob` times max p", replaces="sample p", settings=("min_prob",)),
)
METHODS.add(
    "skd_then_on_policy",
    MethodEntry(
        skd_then_on_policy,
        response="as `skd` in the first half of the optimiser steps, the student's samples in the second",
        student_writes=True,
        teacher_writes=True,
    ),
)


def main() -> None:
    """Train with both, and save the student."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("student"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()

    for name in (options.teacher, options.student):
        parse_reference(name)  # a folder that does not exist is an error now, not after requests to the hub
    trainer = SKDTrainer(
        model=options.student,
        teacher_model=options.teacher,
        args=SKDConfig(
            output_dir=str(options.output),
            method="skd_then_on_policy",
            rule="near_best",
            min_prob=0.1,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=read_rows(options.data),
        processing_class=AutoTokenizer.from_pretrained(options.teacher),
    )
    trainer.train()
    trainer.save_model()
    print(f"the student is in {options.output}")


if __name__ == "__main__":
    try:
        main()
    except SkdError as error:
        raise SystemExit(f"error: {error}") from None
