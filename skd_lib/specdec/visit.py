"""All requests to one vLLM server, timed, and its counters of them."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from uuid import uuid4

import requests

from skd_lib._core.seeds import derived
from skd_lib.errors import SkdError
from skd_lib.results import DraftCounts, ServedPasses
from skd_lib.specdec.turns import Passes
from skd_lib.vllm.client import Engine, EngineGone

_COUNTED_WITHIN = 10.0
_DRAFTS = "vllm:spec_decode_num_drafts_total"
_DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens_total"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
_TOKENS = "vllm:generation_tokens_total"
_PREEMPTIONS = "vllm:num_preemptions_total"
Counters = dict[tuple[str, int], float]
"""By name and position in a block; position 0 for counters without positions."""
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


@dataclass
class Visit:
    """All requests to one server."""

    engine: Engine
    command: str
    load: Load
    progress: Passes
    drafted: bool
    version: str = ""
    passes: list[ServedPasses] = field(default_factory=list)
    greedy: list[list[list[int]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tokens: int = 0

    def run(self) -> None:
        """Measure every setting."""
        self.version = str(self._get("/version").json()["version"])
        for temperature in self.load.temperatures:
            for concurrency in self.load.concurrencies:
                self.passes.append(self._measure(temperature, concurrency))
        if preempted := self._counters(self.tokens).get((_PREEMPTIONS, 0)):
            self.notes.append(
                f"vLLM interrupted {preempted:.0f} requests for want of memory for keys and values, which costs speed: "
                "give it more (--kv-cache-memory-bytes, --gpu-memory-utilization)."
            )

    def _measure(self, temperature: float, concurrency: int) -> ServedPasses:
        self._decode(temperature, concurrency, -1, self.load.prompts[:concurrency])
        before, rates, tokens = self._counters(self.tokens), [], 0
        for repeat in range(self.load.repeats):
            start = time.perf_counter()
            responses = self._decode(temperature, concurrency, repeat, self.load.prompts)
            seconds = time.perf_counter() - start
            written = sum(map(len, responses))
            tokens += written
            rates.append(written / seconds)
            if temperature == 0:
                self.greedy.append(responses)
            self.progress.advance()
        after = self._counters(self.tokens)
        grown = {key: int(value - before.get(key, 0)) for key, value in after.items()}
        counts = None
        if self.drafted:
            by_position = [grown[key] for key in sorted(grown) if key[0] == _ACCEPTED]
            counts = DraftCounts(
                drafts=grown[_DRAFTS, 0], draft_tokens=grown[_DRAFT_TOKENS, 0], accepted_by_position=by_position
            )
        return ServedPasses(
            temperature=temperature,
            concurrency=concurrency,
            tokens_per_second=median(rates),
            slowest=min(rates),
            fastest=max(rates),
            tokens=tokens,
            counts=counts,
        )

    def _decode(
        self, temperature: float, concurrency: int, repeat: int, prompts: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Send the prompts, `concurrency` of them in flight, and return the responses' tokens."""

        def ask(row: int) -> list[int]:
            body = _PLAIN | {
                "prompt": list(prompts[row]),
                "max_tokens": self.load.max_new_tokens,
                "temperature": temperature,
                "seed": derived("served", self.load.seed, repeat, row) >> 1,
                "stop_token_ids": list(self.load.eos_ids),
                "return_token_ids": True,
                "cache_salt": uuid4().hex,
            }
            return list(self._post(body)["choices"][0]["token_ids"])

        with ThreadPoolExecutor(concurrency) as threads:
            responses = list(threads.map(ask, range(len(prompts))))
        self.tokens += sum(map(len, responses))
        return responses

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

    def _counters(self, tokens: int) -> Counters:
        """Return vLLM's counters once they have all response tokens: it counts a step just after it answers."""
        deadline = time.monotonic() + _COUNTED_WITHIN
        while True:
            found = read_counters(self._get("/metrics").text)
            if found.get((_TOKENS, 0), 0) >= tokens:
                return found
            if time.monotonic() > deadline:
                counted = found.get((_TOKENS, 0), 0)
                raise SkdError(
                    f"vLLM has counted {counted:.0f} of {tokens} response tokens",
                    where=f"{self.engine.url}/metrics",
                    hint="run the measurement again; nothing else may use this server",
                )
            time.sleep(0.05)


def read_counters(text: str) -> Counters:
    """Read the counters that are needed of Prometheus' text: by name and `position`, summed over vLLM's engines."""
    found: Counters = {}
    for line in text.splitlines():
        name, _, rest = line.partition("{")
        if name in (_DRAFTS, _DRAFT_TOKENS, _ACCEPTED, _TOKENS, _PREEMPTIONS):
            labels, _, value = rest.rpartition("} ")
            position = re.search(r'\bposition="(\d+)"', labels)
            key = (name, int(position[1]) if position else 0)
            found[key] = found.get(key, 0.0) + float(value.split()[0])
    return found
