"""A clock that only forwards advance: timings that are exact, and the same on a busy machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from transformers import PreTrainedModel

from skd_lib.models.heads import decoder


@dataclass
class FakeClock:
    now: float = 0.0

    def charge(self, model: PreTrainedModel, seconds: float) -> PreTrainedModel:
        """From here on each forward of the model takes so long."""

        def advance(*_: object) -> None:
            self.now += seconds

        decoder(model).register_forward_pre_hook(advance)
        return model


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(time, "perf_counter", lambda: fake.now)
    return fake
