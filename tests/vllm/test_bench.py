"""`skd bench engine` with a running server."""

from __future__ import annotations

import pytest

from skd_lib.bench.engine import PHASES, SIGNALS, bench_engine
from skd_lib.bench.setup import Settings
from skd_lib.vllm.client import Engine
from tests.vllm.conftest import GAMMA, NEW, Pair

pytestmark = pytest.mark.vllm


def test_both_engines_are_measured_in_turns(pair: Pair, server: Engine) -> None:
    teacher, student = (str(pair.folders[name]) for name in ("teacher", "student"))
    settings = Settings(teacher, student, prompt_tokens=12, gamma=GAMMA, repeats=2, top_k=100, dtype="float32")
    passes = []
    result = bench_engine(
        settings,
        batch_sizes=[2, 3],
        new_tokens=[6, NEW],
        urls=[server.url],
        on_progress=lambda done, total: passes.append((done, total)),
    )
    ways = {(turn.engine, turn.rows, turn.new_tokens, turn.signal) for turn in result.turns}
    engines, batches = ("transformers", "vllm"), (2, 3)
    sampled = {
        (engine, rows, new, kept) for engine in engines for rows in batches for new in (6, NEW) for kept in SIGNALS
    }
    assert ways == sampled | {(engine, rows, NEW, "") for engine in engines for rows in batches}
    assert passes == [(number + 1, 3 * len(result.turns)) for number in range(3 * len(result.turns))]
    for turn in result.turns:
        assert set(turn.seconds) == ({"sampling"} if turn.signal else set(PHASES))
        assert all(len(taken) == 2 for taken in turn.seconds.values())
        assert turn.statistics.tokens == turn.rows * turn.new_tokens
    assert all(turn.share("weights") > 0 for turn in result.turns if turn.engine == "vllm" and not turn.signal)
    accepted: dict[tuple[int, int], set[int]] = {}
    for turn in result.turns:
        if turn.signal:
            accepted.setdefault((turn.rows, turn.new_tokens), set()).add(turn.statistics.accepted)
    assert [len(counts) for counts in accepted.values()] == [1] * 4  # the same samples by all
