"""A small comparison with all that its page can show, for tests of it."""

from __future__ import annotations

from typing import Any

from skd_lib.comparison.table import Comparison, TrialResult, build_comparison
from skd_lib.results import Course, Score, Scores

HOSTILE = "<script>parent.owned = 1</script>"
SCORES = {"skd": (40.0, 44.0), "on_policy": (38.0, 39.0), "sft": (20.0, 23.0)}
TOKENS = {"skd": 3000, "on_policy": 4000, "sft": 1000}


def compared(seeds: int = 2, variants: int = 3, **changed: Any) -> Comparison:
    """Three methods or more, each with its seeds; the first is the reference, and one run failed."""
    scores = {**SCORES, **{f"skd-top_k-{number}": (30.0 + number, 31.0) for number in range(variants - 3)}}
    trials = [
        TrialResult(
            variant=variant,
            seed=seed,
            scores=Scores(metrics={"chrf": Score(score=score, low=score - 3, high=score + 3)}, examples=40),
            draft={"acceptance_rate": 0.5, "tokens_per_teacher_call": 2.0, "speedup": 1.1},
            acceptance_by_position=(0.8, 0.7 - 0.1 * seed, 0.6),
            objective="cross-entropy" if variant == "sft" else "jsd, beta 0.5",
            figures={
                "student_tokens": TOKENS.get(variant, 2000) * 2.0,
                "teacher_tokens": TOKENS.get(variant, 2000) * 1.0,
                "seconds_rollout": 300.0,
                "seconds_loss": 60.0,
            },
            course=course(variant, seed),
        ).model_copy(update=changed)
        for variant, found in scores.items()
        for seed, score in enumerate(found[:seeds])
    ]
    return build_comparison(
        name="methods",
        reference="skd",
        metrics=["chrf"],
        trials=[*trials, TrialResult(variant="sft", seed=9, reason=HOSTILE)],
        answers={},
        teacher={"chrf": Score(score=50, low=45, high=55)},
    )


def course(variant: str, seed: int) -> Course:
    """Three validations."""
    spent = [0, TOKENS.get(variant, 2000) / 2, TOKENS.get(variant, 2000)]
    losses = [2.0, 1.0 + seed / 10, 0.5 + seed / 10]
    return Course(
        validation_steps=(0, 5, 10),
        validation_loss=tuple(losses),
        validation_half=(0.2, 0.1, 0.1),
        validation_tokens=tuple(tokens / 2 for tokens in spent),
        validation_student_tokens=tuple(2 * tokens for tokens in spent),
        validation_teacher_tokens=tuple(spent),
        validation_seconds=(0.0, 180.0, 360.0),
    )
