"""A whole run's figures and samples, small, and with text in it that means harm."""

from __future__ import annotations

from typing import Any

import pytest

from skd_lib.models.records import SampledSequence
from skd_lib.report.summary import Lengths, Summary, build_summary
from skd_lib.results import Course, PairedTest, Scores, Specdec

HOSTILE = "</span><script>parent.owned = 1</script><img src=x onerror=parent.owned=1>"
STEPS = (1, 10, 20, 30)
WAIT = {"p50": 0.0102, "p90": 0.02, "p99": 0.03}


def scores(chrf: float) -> Scores:
    chrf_score = {"score": chrf, "low": chrf - 2, "high": chrf + 2, "signature": "chrF2|nc:6"}
    bleu_score = {"score": chrf / 3, "low": chrf / 3 - 1, "high": chrf / 3 + 1}
    held_out = {
        "news": {"chrf": {"score": chrf - 5, "low": chrf - 8, "high": chrf - 2}, "examples": 20},
        "lost": {"missing": {"bleu": "the file is gone"}, "examples": 0, "seconds": 0.0},
    }
    missing = {"comet": "no network"}
    flat = {"chrf": chrf_score, "bleu": bleu_score, "examples": 64, "held_out": held_out, "missing": missing}
    return Scores.model_validate(flat)


def draft_length(gamma: int, speedup: float, timed: dict[str, Any] | None) -> dict[str, Any]:
    theory = {"theoretical_speedup": speedup, "theoretical_speedup_iid": speedup}
    return {"gamma": gamma, "expected_tokens_per_teacher_call": 1.5, **theory, "timed": timed}


def specdec(acceptance: float) -> Specdec:
    rates = {"acceptance_rate": acceptance, "acceptance_by_position": [acceptance], "tested_by_position": [9]}
    speed = {"speedup": 1.1, "tokens_per_second": 13.75, "tokens_per_teacher_call": 1 + acceptance, "tokens": 9}
    timed = {**rates, **speed, "latency": {"first_token": WAIT}, "ties": 0}
    values: dict[str, Any] = {
        "acceptance_rate": acceptance,
        "tokens_per_teacher_call": 1 + acceptance,
        "speedup": 1.5 * acceptance,
        "gamma": 3,
        "temperature": 0.0,
        "acceptance_by_position": [acceptance, acceptance - 0.1, acceptance - 0.2],
        "latency": {"first_token": WAIT, "per_token": None},
        "teacher_only_latency": {"first_token": WAIT, "per_token": WAIT},
        "theoretical_speedup": 1.8,
        "settings": [
            {
                "temperature": 0.5,
                "batch_size": 8,
                "prompts": 16,
                "teacher_alone": {"tokens_per_second": 12.5, "latency": {"first_token": WAIT}},
                "forwards": {"draft_seconds": 0.1, "draft_start_seconds": 0.1, "teacher_seconds": {"1": 1, "2": 1}},
                "lengths": [draft_length(1, 1.2, timed), draft_length(2, 1.3, None)],
                "best_gamma": 1,
                "best_speedup": 1.1,
            }
        ],
        "teacher_only_tokens_per_second": 12.5,
        "vllm": {"command": f"vllm serve teacher {HOSTILE}", "reasons": ["tokenizers differ"]},
    }
    return Specdec.model_validate(values)


@pytest.fixture(scope="session")
def summary() -> Summary:
    return build_summary(
        task_metric="chrf",
        scores={"teacher": scores(40.0), "student_before": scores(10.0), "student_after": scores(30.0)},
        specdec={"before": specdec(0.4), "after": specdec(0.6)},
        course=Course(
            steps=tuple(range(1, 31)),
            rejection_rate=tuple(0.3 - 0.005 * step for step in range(30)),
            tokens_per_teacher_call=tuple(2 + 0.05 * step for step in range(30)),
            training_steps=tuple(range(1, 31)),
            training_loss=tuple(3 - 0.05 * step for step in range(30)),
            response_length=(12.0,) * 30,
            validation_steps=(0, 10, 20, 30),
            validation_loss=(3.0, 2.0, 1.5, 1.6),
            validation_half=(0.3, 0.2, 0.15, 0.16),
            validation_tokens=(0, 1200, 2400, 3600),
            validation_student_tokens=(0, 4000, 8000, 12_000),
            validation_teacher_tokens=(0, 3000, 6000, 9000),
            validation_seconds=(0.0, 200.0, 400.0, 600.0),
            seconds={"rollout": 30.0, "loss": 10.0},
            peak_bytes={"process": 2_000_000_000, "rollout": 1_500_000_000},
        ),
        comparisons=[
            PairedTest(a=a, b="student_before", metric="chrf", difference=20, low=15, high=25, p_value=0.001, n=64)
            for a in ("student_after", "teacher")
        ],
        lengths={"teacher": Lengths(mean=9.5, longest=20, truncated_fraction=0.1, edges=(0, 10, 20), counts=(40, 24))},
        lineage={"teacher": "org/teacher", "student": f"org/student {HOSTILE}", "data fingerprint": "9f" * 32},
        run_name=f"demo {HOSTILE}",
        pipeline_run_id="run-1",
        mlflow_run_id="abc",
        mlflow_url="http://mlflow.example/#/experiments/1/runs/abc",
        mlflow_table_url="http://mlflow.example/#/experiments/1/runs?viewStateShareKey=skd",
    ).with_seconds({"distill": 40.0, "report": 1.0})


@pytest.fixture(scope="session")
def samples() -> list[SampledSequence]:
    return [
        SampledSequence.model_validate({"step": step, "row": row, "prompt": HOSTILE, "tokens": _tokens(4 + 4 * index)})
        for index, step in enumerate(STEPS)
        for row in range(2)
    ]


def _tokens(period: int) -> list[dict[str, Any]]:
    """Forty words, of which the teacher replaced the first and every `period`-th after it, and some nasty text."""
    proposal = {"text": f" dog{HOSTILE}", "rank": 31, "probability": 0.0004, "own_rank": 0, "own_probability": 0.93}
    tokens: list[dict[str, Any]] = [{"text": " word", "by": "student"} for _ in range(40)]
    tokens[::period] = [{"text": " cat", "by": "teacher", "proposal": proposal} for _ in tokens[::period]]
    nasty = (HOSTILE, "\u202eright to left\x1b[31m\x00\ud800", "x" * 100, "")
    return [*tokens, *({"text": text, "by": "student"} for text in nasty), {"text": "\n🙂", "by": "teacher"}]
