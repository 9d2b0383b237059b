"""An HTTP server that answers `/v1/models` and `/v1/completions` with a real model, as servers were seen to.

With `ids` its answers have the fields and the errors of vLLM 0.32.0 (`vllm serve`, recorded in
`tests/served/vllm-0.32.0.json`, which a test compares with them); without, only those of OpenAI's API.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skd_lib.config import SamplingParams
from skd_lib.sampling.acceptance import student_only
from skd_lib.sampling.engine import Sampler
from tests.support import http

Json = dict[str, Any]
MODEL = "org/teacher"


class CompletionsServer(http.Server):
    """Serves one model.

    Attributes:
        ids: It takes and gives token ids, and log-probabilities of prompts.
        fail: Returns (status, headers, body) for a request's number in place of its answer, or None.
        requests: The bodies of all requests for completions.
        keys: Their headers `Authorization`.
        most_at_once: Requests that were at work at the same time, at most.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, context: int = 256) -> None:
        super().__init__(_Handler)
        self.model, self.tokenizer, self.context = model, tokenizer, context
        self.ids, self.max_logprobs = True, 20
        self.fail: Callable[[int], tuple[int, dict[str, str], str] | None] = lambda number: None
        self.requests: list[Json] = []
        self.keys: list[str | None] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._samplers: dict[Any, Sampler] = {}

    @property
    def url(self) -> str:
        return f"{super().url}/v1"

    def complete(self, body: Json) -> tuple[int, Json]:
        """Return status and answer."""
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else list(self.tokenizer(prompt)["input_ids"])
        if body["model"] != MODEL:
            return 404, _error(f"The model `{body['model']}` does not exist. Valid aliases: {MODEL}.", "model", 404)
        if len(ids) + body["max_tokens"] > self.context:
            return 400, _error(f"max_model_len={self.context}", "max_tokens", 400)
        known = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop"}
        if not self.ids and (isinstance(prompt, list) or set(body) - known):
            return 400, _error(f"Unrecognized request argument: {sorted(set(body) - known)}", "", 400)
        most = body.get("prompt_logprobs")
        if most is not None and most > self.max_logprobs:
            what = f"Requested prompt logprobs of {most}, which is greater than max allowed: {self.max_logprobs}"
            return 400, _error(f"{what} (parameter=prompt_logprobs, value={most})", "prompt_logprobs", 400)
        with self._lock:  # one forward at a time: what is counted is requests
            response = self._sampled(ids, body)
            log_probs = None if most is None else self._log_probs(ids, most)
        text = self.tokenizer.decode(response, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        finish = "stop" if response[-1] in self._ends(body) else "length"
        choice: Json = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        if self.ids:
            wanted = body.get("return_token_ids")
            choice |= {
                "stop_reason": None,
                "token_ids": response if wanted else None,
                "prompt_logprobs": log_probs,
                "prompt_token_ids": ids if wanted else None,
            }
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(response)}
        usage["total_tokens"] = sum(usage.values())
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": [choice], "usage": usage}

    def _ends(self, body: Json) -> list[int]:
        return [self.tokenizer.eos_token_id, *body.get("stop_token_ids", ())]

    def _sampled(self, ids: list[int], body: Json) -> list[int]:
        settings = (body["temperature"], body.get("top_p", 1.0), tuple(self._ends(body)), body["max_tokens"])
        if settings not in self._samplers:
            self._samplers[settings] = Sampler(
                student=self.model,
                teacher=None,
                rule=student_only(),
                student_params=SamplingParams(temperature=settings[0], top_p=settings[1]),
                eos_ids=settings[2],
                pad_id=0,
                max_new_tokens=settings[3],
            )
        return self._samplers[settings].sample([ids], [body.get("seed", 0)]).responses()[0]

    def _log_probs(self, ids: list[int], most: int) -> list[Json | None]:
        with torch.no_grad():
            log_p_TV = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        positions: list[Json | None] = [None]
        for token, log_p_V in zip(ids[1:], log_p_TV[:-1], strict=True):
            order = log_p_V.argsort(descending=True).tolist()
            positions.append(
                {
                    str(each): {
                        "logprob": float(log_p_V[each]),
                        "rank": order.index(each) + 1,
                        "decoded_token": self.tokenizer.decode([each]),
                    }
                    for each in dict.fromkeys([token, *order[:most]])
                }
            )
        return positions

    def enter(self, change: int) -> None:
        """Count a request that begins (1) or ends (-1)."""
        with self._count:
            self._at_once += change
            self.most_at_once = max(self.most_at_once, self._at_once)

    _count = threading.Lock()


class _Handler(http.Handler):
    server: CompletionsServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        card = {"id": MODEL, "object": "model"} | ({"max_model_len": self.server.context} if self.server.ids else {})
        self._send(200, {"object": "list", "data": [card]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = len(self.server.requests)
        self.server.requests.append(body)
        self.server.keys.append(self.headers["Authorization"])
        self.server.enter(1)
        failure = self.server.fail(number)
        status, answer = self.server.complete(body) if failure is None else (failure[0], {"error": failure[2]})
        self.server.enter(-1)
        self._send(status, answer, failure[1] if failure else {})

    def _send(self, status: int, answer: Json, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)


def _error(message: str, parameter: str, code: int) -> Json:
    return {"error": {"message": message, "type": "BadRequestError", "param": parameter, "code": code}}
