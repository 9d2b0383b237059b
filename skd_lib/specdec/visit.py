"""All requests to one vLLM server, timed, and what it says of their drafts."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple
from uuid import uuid4

import requests

from skd_lib._core.seeds import derived
from skd_lib.errors import SkdError
from skd_lib.results import DraftCounts, ServedPasses
from skd_lib.specdec.turns import Decoded
from skd_lib.vllm.client import Engine, EngineGone

_PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling as the temperature says, whatever the model's generation config holds."""


@dataclass(frozen=True)
class Load:
    """The requests that every server gets.

    Attributes:
        prompts: Token ids, as the teacher was trained with: vLLM applies no template.
        eos_ids: Ids that end a response, besides those that vLLM finds in the model's files.
        max_new_tokens: Length limit of a response.
        temperatures: The first one belongs to the headline figures.
        concurrencies: Requests in flight; likewise.
        repeats: Timed passes over the prompts for each setting.
        seed: Of what is sampled.
    """

    prompts: Sequence[Sequence[int]]
    eos_ids: Sequence[int]
    max_new_tokens: int
    temperatures: Sequence[float]
    concurrencies: Sequence[int]
    repeats: int
    seed: int = 0


class Answer(NamedTuple):
    """A response: its tokens, and how many drafts stood with 0, 1, ... of their tokens; empty without a draft."""

    tokens: list[int]
    accepted: list[int]


@dataclass
class Visit:
    """All requests to one server."""

    engine: Engine
    command: str
    load: Load
    progress: Decoded
    drafted: bool
    version: str = ""
    passes: list[ServedPasses] = field(default_factory=list)
    greedy: list[list[list[int]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Measure every setting."""
        self.version = str(self._get("/version").json()["version"])
        for temperature in self.load.temperatures:
            for concurrency in self.load.concurrencies:
                self.passes.append(self._measure(temperature, concurrency))
        counts = re.findall(r"^vllm:num_preemptions_total{.*} (\S+)", self._get("/metrics").text, re.MULTILINE)
        if preempted := sum(map(float, counts)):
            self.notes.append(
                f"vLLM interrupted {preempted:.0f} requests for want of memory for keys and values, which costs speed: "
                "give it more (--kv-cache-memory-bytes, --gpu-memory-utilization)."
            )

    def _measure(self, temperature: float, concurrency: int) -> ServedPasses:
        self._decode(temperature, concurrency, -1, self.load.prompts[:concurrency])
        rates, passes = [], []
        for repeat in range(self.load.repeats):
            start = time.perf_counter()
            answers = self._decode(temperature, concurrency, repeat, self.load.prompts)
            seconds = time.perf_counter() - start
            rates.append(sum(len(answer.tokens) for answer in answers) / seconds)
            passes.append(answers)
            if temperature == 0:
                self.greedy.append([answer.tokens for answer in answers])
            self.progress.add(len(self.load.prompts))
        drafted = passes if self.drafted else []
        by_prompt = [DraftCounts.of(answer.accepted for answer in row) for row in zip(*drafted, strict=True)]
        return ServedPasses(
            temperature=temperature,
            concurrency=concurrency,
            tokens_per_second=median(rates),
            slowest=min(rates),
            fastest=max(rates),
            tokens=sum(len(answer.tokens) for answers in passes for answer in answers),
            counts=DraftCounts.of(answer.accepted for answers in passes for answer in answers)
            if self.drafted
            else None,
            by_prompt=[counts.tokens_and_calls for counts in by_prompt],
        )

    def _decode(
        self, temperature: float, concurrency: int, repeat: int, prompts: Sequence[Sequence[int]]
    ) -> list[Answer]:
        """Send the prompts, `concurrency` of them in flight, and return the responses."""

        def ask(row: int) -> Answer:
            body = _PLAIN | {
                "prompt": list(prompts[row]),
                "max_tokens": self.load.max_new_tokens,
                "temperature": temperature,
                "seed": derived("served", self.load.seed, repeat, row) >> 1,
                "stop_token_ids": list(self.load.eos_ids),
                "return_token_ids": True,
                "cache_salt": uuid4().hex,
            }
            answer = self._post(body)
            drafts = answer["metrics"]["speculative_decoding"]["acceptance_histogram"] if self.drafted else []
            return Answer(answer["choices"][0]["token_ids"], drafts)

        with ThreadPoolExecutor(concurrency) as threads:
            return list(threads.map(ask, range(len(prompts))))

    def _post(self, body: dict[str, Any]) -> Any:
        try:
            return self.engine.post("/v1/completions", body)
        except EngineGone as error:
            self.engine.wait()  # says why, if the process has ended
            raise SkdError(f"vLLM dropped a request: {error}", where=self.engine.url) from error

    def _get(self, path: str) -> requests.Response:
        answer = requests.get(f"{self.engine.url}{path}", timeout=30)
        answer.raise_for_status()
        return answer
