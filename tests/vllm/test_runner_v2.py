"""vLLM's model runner V2, the default on GPUs, in Triton's interpreter: the same checks as of V1, with fewer rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from skd_lib.vllm.client import Engine
from skd_lib.vllm.serve import serving
from tests.support.triton_interpreter import variables
from tests.vllm.conftest import Pair, served
from tests.vllm.test_rollouts import (
    CRAMPED,
    pytestmark,  # noqa: F401 - the marker and the time limit hold here, too
    test_new_weights_arrive_with_each_step,  # noqa: F401
    test_samples_are_those_of_the_own_engine,  # noqa: F401
    test_signals_along_given_responses,  # noqa: F401
    test_slots_chunks_prefixes_and_lost_memory_change_nothing,  # noqa: F401
    test_the_teachers_most_likely_tokens_come_back,  # noqa: F401
)


@pytest.fixture(scope="module")
def server(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A server whose memory is enough for all tests but one."""
    folder = tmp_path_factory.mktemp("v2")
    with pytest.MonkeyPatch.context() as patch:
        try:
            for name, value in variables().items():
                patch.setenv(name, value)
        except RuntimeError as error:
            pytest.skip(str(error))
        with serving(served(pair, 6, *CRAMPED), folder) as engine:
            assert "Using V2 Model Runner" in (folder / "vllm.log").read_text(encoding="utf-8")
            yield engine


@pytest.fixture(scope="module")
def cramped(server: Engine) -> Engine:
    return server


@pytest.fixture
def rows() -> int:
    return 6
