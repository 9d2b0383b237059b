"""The convergence study of docs/evidence/plan.md: its runs, in order, and the claims that they are to judge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from problems import ProblemSpace
from skd_lib.config import DistillConfig, TaskConfig, TrainingConfig

SPACE = ProblemSpace(largest=99, operations=(2, 3), products=0.0)
TASK = TaskConfig(
    prompt="{source}\n",
    chat_template=False,
    answer="hash",
    metrics=["accuracy"],
    max_prompt_tokens=16,
    max_new_tokens=24,
)
TEACHER_PROBLEMS, VALIDATION, TEST = 20_000, 100, 500
WIDTH: dict[str, int] = {"hidden_size": 96, "intermediate_size": 288, "num_attention_heads": 4}
TEACHER_LAYERS, STUDENT_LAYERS = 3, 2
TEACHER_COST = TEACHER_LAYERS / STUDENT_LAYERS
"""Cost of a position for the teacher, in forward passes of the student: both have one width."""

SMALL_ADDENDS, BASE_PROBLEMS = (1, 5), 10_000
"""The students `sft` begin as a base that has learnt to write solutions from problems with small addends only."""
TRAINING = TrainingConfig(
    learning_rate=4e-3, lr_scheduler="cosine", max_steps=1200, batch_size=64, eval_steps=400, dropout=0
)
HORIZON, EVERY, PATIENCE = 300, 20, 4
"""Optimiser steps at most, steps between validations, and validations without a lower loss after which a run ends."""
RANDOM_HORIZON, LONG_HORIZON = 600, 1800
"""Steps at most from random weights, and in the round that lets these converge."""
CONVERGED_HORIZON = 1200
"""Steps at most in the round that lets students converge that were fine-tuned first."""
WARMUP = 0.05
"""Share of the steps at most over which the learning rate rises."""
STUDENT_TRAINING = TrainingConfig(
    learning_rate=2e-3,
    lr_scheduler="constant_with_warmup",
    warmup_ratio=WARMUP,
    batch_size=64,
    eval_steps=EVERY,
    dropout=0,
)
INIT_EPOCHS = 4
"""Epochs of the fine-tuning of the base on the student's own examples, which makes the student `sft`."""

_SAMPLING = {"student": {"temperature": 0.5, "top_p": 0.5}, "teacher": {"temperature": 0.2}}
"""The paper's for GSM8K."""


def _skd(top_k: Any) -> dict[str, Any]:
    return {"method": "skd", "sampling": {**_SAMPLING, "top_k": top_k}}


_SETTINGS: dict[str, dict[str, Any]] = {
    **{
        name: {"method": name, "sampling": _SAMPLING}
        for name in ("sft", "seqkd", "supervised_kd", "on_policy", "imitkd", "two_stage", "skd_mixed")
    },
    "skd": _skd(25),
    "skd-k1": _skd(1),
    "skd-k5": _skd(5),
    "skd-k25-to-1": _skd({"start": 25, "end": 1}),
    "skd-k1-to-25": _skd({"start": 1, "end": 25}),
    "skd-min-prob": {"method": "skd", "sampling": {**_SAMPLING, "rule": "min_prob"}},
    "skd-mixture": {"method": "skd", "sampling": {**_SAMPLING, "rule": "mixture", "mixture": 0.5}},
    "skd-replaced": {**_skd(25), "replaced_weight": 1.0},
    "skd-mode": {"method": "skd", "sampling": {**_SAMPLING, "teacher": {"temperature": 0}, "top_k": 25}},
    "skd-reverse-kl": {**_skd(25), "divergence": "reverse_kl"},
    "skd-jsd": {**_skd(25), "divergence": "jsd"},
    "skd-warm-student": {
        "method": "skd",
        "sampling": {**_SAMPLING, "student": {"temperature": 1.0, "top_p": 1.0}, "top_k": 25},
    },
    "skd-warm-teacher": {"method": "skd", "sampling": {**_SAMPLING, "teacher": {"temperature": 1.0}, "top_k": 25}},
    "skd-half-rate": _skd(25),
    "skd-double-rate": _skd(25),
}
VARIANTS = {name: DistillConfig.model_validate(settings) for name, settings in _SETTINGS.items()}
REFERENCE = "skd"
RULES = ("skd-k25-to-1", "skd-k1-to-25", "skd-min-prob", "skd-mixture", "skd-replaced", "skd-mode")
"""Rules that may beat the reference, each with its hypothesis in the plan."""
RECIPE = {
    "skd-reverse-kl": "reverse KL",
    "skd-jsd": "generalised JSD, beta 0.5",
    "skd-warm-student": "student at temperature 1, top-p 1",
    "skd-warm-teacher": "teacher at temperature 1",
    "skd-half-rate": "learning rate 1e-3",
    "skd-double-rate": "learning rate 4e-3",
}
"""Changes of one setting of the reference: what the default recipe rests on."""
RECIPE_AGAIN = "skd-warm-student"
"""The change of the recipe with the highest mean fine-tuned first, and ahead in every pair from random weights."""
LEARNING_RATES = {"skd-half-rate": 1e-3, "skd-double-rate": 4e-3}
"""Of the variants that have another one than `STUDENT_TRAINING`."""
SCHEDULED = ("two_stage", "skd-k25-to-1", "skd-k1-to-25", "skd-min-prob")
"""Variants that change over the horizon: they run to its end, whatever their validation loss."""
CORE = ("skd", "supervised_kd", "on_policy", "sft")
OTHERS = {
    "seqkd": "sequence-level KD",
    "imitkd": "ImitKD",
    "two_stage": "supervised KD, then on-policy",
    "skd_mixed": "SKD mixed with ground truth",
    "skd-k1": "K = 1",
    "skd-k5": "K = 5",
    "skd-k25-to-1": "K from 25 to 1",
    "skd-k1-to-25": "K from 1 to 25",
}
"""The other methods, and other K for the reference."""
SEEDS, MORE_SEEDS = (10, 11, 12), (13, 14, 15)
SECOND_SEEDS = (30, 31, 32)
"""Of the runs under the second teacher."""
FIFTH_SEEDS = tuple(range(40, 48))
"""Of the fifth round."""


@dataclass(frozen=True)
class Arm:
    """Students of one quality at the start (`sft`, `cut`, `random`), their training problems, steps at most, teacher,
    and warm-up.

    The same commands train another teacher on another CPU, whose rounding differs: it is numbered, and every comparison
    is among the runs of one.
    """

    init: str
    examples: int
    horizon: int = HORIZON
    teacher: int = 1
    warmup: float = WARMUP

    @property
    def name(self) -> str:
        """Name of the arm in the stored results."""
        long = "-long" if self.horizon > RANDOM_HORIZON else ""
        second = f"-t{self.teacher}" if self.teacher > 1 else ""
        return f"study-{self.init}-{self.examples}{long}{second}"


SFT, CUT, RANDOM = Arm("sft", 1000), Arm("cut", 1000), Arm("random", 1000, horizon=RANDOM_HORIZON)
FEW = Arm("sft", 100)
ARMS = (SFT, CUT, RANDOM, FEW)
RULES_ARM = RANDOM
"""The only start at which the teacher replaces more than one token in a hundred: elsewhere rules differ by little."""

SECOND_ARMS = tuple(replace(arm, teacher=2) for arm in ARMS)
RECIPE_ARMS = (SECOND_ARMS[0], SECOND_ARMS[2])
LONG = Arm("random", 1000, horizon=LONG_HORIZON, teacher=2)
CONVERGED = Arm("sft", 1000, horizon=CONVERGED_HORIZON, teacher=2, warmup=WARMUP * HORIZON / CONVERGED_HORIZON)
"""Its warm-up is as long as that of the arm with fewer steps, so that it differs from that in one thing."""
ALL_ARMS = (*ARMS, *SECOND_ARMS, LONG, CONVERGED)
LONG_VARIANTS, LONG_SEEDS = ("skd", "supervised_kd", "on_policy"), (*SEEDS, *MORE_SEEDS[:1])
"""The third round: the methods whose best checkpoint was the last, with three times the steps."""


@dataclass(frozen=True)
class Cell:
    """One run: an arm, a variant, a seed."""

    arm: Arm
    variant: str
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """What its row in the stored results begins with."""
        return self.arm.name, self.variant, self.seed


def cells() -> Iterator[Cell]:
    """Return the runs in their order: what most claims need first, seed by seed."""
    yield from _cells(ARMS, CORE, SEEDS)
    yield from _cells(ARMS[:3], OTHERS, SEEDS[:1])
    yield from _cells(ARMS, CORE, MORE_SEEDS)
    for seed in SEEDS:
        if seed != SEEDS[0]:
            yield from _cells([SFT], ("skd-k1", "imitkd"), [seed])
            yield from _cells([RANDOM], ("skd-k1",), [seed])
        known = OTHERS if seed == SEEDS[0] else ()
        yield from _cells([RULES_ARM], [rule for rule in RULES if rule not in known], [seed])
    for seed in AGAIN_SEEDS:
        for arm, variant in dict.fromkeys((claim.arm, name) for claim in AGAIN for name in (claim.better, claim.worse)):
            yield Cell(arm, variant, seed)
        yield from _cells([RULES_ARM], RULES_AGAIN, [seed])
    yield from _cells(RECIPE_ARMS, (REFERENCE, *RECIPE), SECOND_SEEDS)
    yield from _cells([LONG], LONG_VARIANTS, LONG_SEEDS)
    yield from _cells([CONVERGED], CORE, LONG_SEEDS)
    for seed in SECOND_SEEDS:
        yield from _cells(RECIPE_ARMS, OTHERS, [seed])
        yield from _cells([arm for arm in SECOND_ARMS if arm not in RECIPE_ARMS], (REFERENCE, *OTHERS), [seed])
    yield from _cells(RECIPE_ARMS[::-1], (REFERENCE, RECIPE_AGAIN), FIFTH_SEEDS)


def _cells(arms: Sequence[Arm], variants: Iterable[str], seeds: Iterable[int]) -> Iterator[Cell]:
    return (Cell(arm, variant, seed) for seed in seeds for arm in arms for variant in variants)


@dataclass(frozen=True)
class Claim:
    """`better` beats `worse`: a paired t test is to show it.

    Attributes:
        number: In its table.
        text: What is claimed.
        arm: Where.
        better, worse: The two variants.
        seeds: Of the pairs of runs in the arm that are planned.
        second: The arm under the second teacher, and the seeds of the pairs there.
    """

    number: str
    text: str
    arm: Arm
    better: str
    worse: str
    seeds: tuple[int, ...] = (*SEEDS, *MORE_SEEDS)
    second: tuple[Arm, tuple[int, ...]] | None = None

    def pairs(self) -> list[tuple[str, int]]:
        """Return the planned pairs, as the arm's name and the seed: both runs of a pair are under one teacher."""
        places = ((self.arm, self.seeds), *((self.second,) if self.second else ()))
        return [(arm.name, seed) for arm, seeds in places for seed in seeds]


CLAIMS = (
    Claim("1a", "SKD is better than supervised KD", SFT, "skd", "supervised_kd"),
    Claim("1b", "SKD is better than SFT", SFT, "skd", "sft"),
    Claim("1c", "SKD is better than on-policy", SFT, "skd", "on_policy"),
    Claim("2", "supervised KD lacks the student's own states: on-policy is better", SFT, "on_policy", "supervised_kd"),
    Claim("3a", "on-policy fails where the student starts poorly (random)", RANDOM, "supervised_kd", "on_policy"),
    Claim("3b", "on-policy fails where the student starts poorly (cut)", CUT, "supervised_kd", "on_policy"),
    Claim("4a", "SKD holds there: better than on-policy (random)", RANDOM, "skd", "on_policy"),
    Claim("4b", "SKD holds there: better than on-policy (cut)", CUT, "skd", "on_policy"),
    Claim("4c", "SKD holds there: better than supervised KD (random)", RANDOM, "skd", "supervised_kd"),
    Claim("4d", "SKD holds there: better than supervised KD (cut)", CUT, "skd", "supervised_kd"),
    Claim("5a", "with few examples SKD is better than supervised KD", FEW, "skd", "supervised_kd"),
    Claim("5b", "with few examples SKD is better than SFT", FEW, "skd", "sft"),
    Claim("6a", "K = 25 is better than K = 1", SFT, "skd", "skd-k1", SEEDS),
    Claim("6b", "K = 25 is better than K = 1 (random)", RANDOM, "skd", "skd-k1", SEEDS),
    Claim("7", "SKD is better than ImitKD", SFT, "skd", "imitkd", SEEDS),
)
"""The claims of Xu et al. (2025) as comparisons of this study; Holm's correction is over all of them."""

AGAIN_SEEDS = tuple(range(20, 28))
AGAIN = tuple(replace(claim, seeds=AGAIN_SEEDS) for claim in CLAIMS if claim.number in ("1b", "3a", "4a", "5a", "5b"))
"""The second round: claims that the first one suggests, on seeds of their own, corrected for these alone."""
RULES_AGAIN = ("skd-k25-to-1",)
"""The rule with the highest mean in the first round, once more on the second round's seeds."""

LONG_CLAIMS = tuple(
    replace(claim, arm=LONG, seeds=LONG_SEEDS) for claim in CLAIMS if claim.number in ("3a", "4a", "4c")
)
"""The claims on random weights, on runs that may converge; Holm's correction is over these."""

CONVERGED_CLAIMS = tuple(
    replace(claim, arm=CONVERGED, seeds=LONG_SEEDS) for claim in CLAIMS if claim.number in ("1a", "1b", "1c")
)
"""The claims on students that were fine-tuned first, on runs that may converge; Holm's correction is over these."""

RECIPE_CLAIMS = tuple(
    Claim(f"{number}{letter}", text, arm, variant, REFERENCE, SECOND_SEEDS)
    for arm, letter in zip(RECIPE_ARMS, "ab", strict=True)
    for number, (variant, text) in enumerate(RECIPE.items(), start=1)
)
"""Whether one of these changes is better than the default; Holm's correction is over all of them."""


RECIPE_AGAIN_CLAIMS = tuple(
    replace(claim, seeds=FIFTH_SEEDS) for claim in RECIPE_CLAIMS if claim.better == RECIPE_AGAIN
)
"""The fifth round: that change once more, on seeds of its own; Holm's correction is over both starts."""


def _planned_seeds(arm: Arm, variant: str) -> tuple[int, ...]:
    """Return the seeds of a variant in the first round."""
    return tuple(cell.seed for cell in cells() if (cell.arm, cell.variant) == (arm, variant) and cell.seed in SEEDS)


OTHER_CLAIMS = tuple(
    Claim(
        f"{number}{letter}",
        text,
        arm,
        variant,
        REFERENCE,
        _planned_seeds(arm, variant),
        second=(replace(arm, teacher=2), SECOND_SEEDS),
    )
    for arm, letter in zip(ARMS, "abcd", strict=True)
    for number, (variant, text) in enumerate(OTHERS.items(), start=1)
)
"""Whether another method or K is better than the default, under both teachers; Holm's correction is over all."""
