"""The speculative-decoding benchmark: students draft for their teacher (Leviathan et al. 2023, arXiv 2211.17192).

The teacher alone and with each draft model decode on the same engine, in the same process, in turns, on the same
prompts, so that the speed-up is that of drafting alone, and that the student before and after distillation can be
compared. Prefill is part of every pass.
"""

from __future__ import annotations

import time
from statistics import median

from transformers import PreTrainedModel

from skd_lib.config import SpecdecConfig
from skd_lib.errors import SkdError
from skd_lib.specdec.plan import Plan
from skd_lib.specdec.result import Setting, SpecdecResult
from skd_lib.specdec.theory import ForwardTimes, measure_forwards
from skd_lib.specdec.turns import OnProgress, Passes, Turns


def benchmark(plan: Plan, on_progress: OnProgress | None = None) -> dict[str, SpecdecResult]:
    """Decode the prompts with and without each draft model.

    Returns:
        The figures of each draft model, by its name.

    Raises:
        SkdError: no prompts, a response at temperature 0 that is not the teacher's own, or a batch that does not fit
            into memory.
    """
    if not plan.prompts:
        raise SkdError(
            "there are no prompts to decode", where="speculative decoding", hint="give the test split examples"
        )
    started = time.perf_counter()
    progress = Passes(
        on_progress, total=len(plan.batch_sizes) * len(plan.config.temperatures) * plan.passes(plan.first)
    )
    settings: dict[str, list[Setting]] = {name: [] for name in plan.drafts}
    for batch_size in plan.batch_sizes:
        forwards = {name: _forwards(plan, draft, batch_size) for name, draft in plan.drafts.items()}
        for temperature in plan.config.temperatures:
            for name, setting in Turns(plan, temperature, batch_size, forwards, progress).run().items():
                settings[name].append(setting)
    seconds = time.perf_counter() - started
    return {name: _result(plan.config, found, seconds) for name, found in settings.items()}


def _forwards(plan: Plan, draft: PreTrainedModel, batch_size: int) -> ForwardTimes:
    prompt = median(map(len, plan.prompts))
    positions = int(prompt) + plan.max_new_tokens // 2  # as many as halfway through a typical response
    return measure_forwards(plan.teacher, draft, rows=batch_size, positions=positions, gammas=plan.gammas)


def _result(config: SpecdecConfig, settings: list[Setting], seconds: float) -> SpecdecResult:
    headline = settings[0]
    at_gamma = next(length for length in headline.lengths if length.gamma == config.gamma)
    timed = headline.timed(config.gamma)
    return SpecdecResult(
        acceptance_rate=timed.acceptance_rate,
        tokens_per_teacher_call=timed.tokens_per_teacher_call,
        speedup=timed.speedup,
        gamma=config.gamma,
        temperature=headline.temperature,
        batch_size=headline.batch_size,
        prompts=headline.prompts,
        repeats=config.repeats,
        ties=sum(length.timed.ties for setting in settings for length in setting.lengths if length.timed),
        tokens=timed.tokens,
        teacher_only_tokens_per_second=headline.teacher_alone.tokens_per_second,
        speculative_tokens_per_second=timed.tokens_per_second,
        seconds=seconds,
        acceptance_by_position=timed.acceptance_by_position,
        theoretical_speedup=at_gamma.theoretical_speedup,
        theoretical_speedup_iid=at_gamma.theoretical_speedup_iid,
        best_gamma=headline.best_gamma,
        best_speedup=headline.best_speedup,
        latency=timed.latency,
        teacher_only_latency=headline.teacher_alone.latency,
        settings=settings,
    )
