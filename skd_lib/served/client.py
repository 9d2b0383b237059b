"""Requests to a model behind an OpenAI-compatible API: `GET URL/models` and `POST URL/completions`.

Prompts are the project's own rendering, so that `/chat/completions`, where the server renders, is not used.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import requests

from skd_lib._core.http import UNQUOTED, patient_session
from skd_lib.config.models import TEACHER_KEY, ServedTeacher
from skd_lib.errors import SkdError

IN_FLIGHT = 32
"""Requests at once. A server queues what it has no room for; one with a quota answers 429, which makes a pause."""
RETRIES = 9
"""With pauses from 2 to 60 seconds: a server may be away for about five minutes."""
TIMEOUT_S = (10.0, 600.0)
"""To connect, and between two bytes of an answer."""
T = TypeVar("T")
R = TypeVar("R")


class Refused(SkdError):
    """The server understands the request and refuses it: a parameter that it does not have, or a value too large."""


class Endpoint:
    """One model of a server.

    Args:
        served: Where it is.
        retries: Further tries of a request.
        private: Errors do not quote the server, which may quote a prompt.

    Attributes:
        spent: Tokens and requests so far: `prompt_tokens`, `completion_tokens`, `requests`.
    """

    def __init__(self, served: ServedTeacher, retries: int = RETRIES, *, private: bool = False) -> None:
        self.served, self._private = served, private
        self.spent: Counter[str] = Counter(prompt_tokens=0, completion_tokens=0, requests=0)
        self._lock = threading.Lock()
        self._http = patient_session(retries=retries, parallel=IN_FLIGHT, key_variable=served.key_env, pause_s=1)

    def models(self) -> dict[str, dict[str, Any]]:
        """Return what the server says of its models, by name."""
        listed = self._send("GET", "/models").get("data")
        return {str(each.get("id")): each for each in listed or [] if isinstance(each, dict)}

    def complete(self, prompt: list[int] | str, **fields: Any) -> dict[str, Any]:
        """Return the first choice of a completion; `fields` are those of the request.

        Raises:
            Refused: the server does not take the fields, or their values.
            SkdError: it cannot be reached, or refuses the model or the key, or its answer is no completion.
        """
        answer = self._send("POST", "/completions", {"model": self.served.model, "prompt": prompt, **fields})
        try:
            usage = dict(answer.get("usage") or {})
            choice: dict[str, Any] = {"text": "", **answer["choices"][0], "usage": usage}
            counts = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        except (LookupError, TypeError, ValueError) as error:
            raise self._error(f"the answer is no completion: {self._quoted(str(answer), 200)}") from error
        with self._lock:
            self.spent.update({"requests": 1, **counts})
        return choice

    def _send(self, verb: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            # A redirect would carry the prompts, and perhaps the key, to another server.
            answer = self._http.request(
                verb, f"{self.served.url}{path}", json=body, timeout=TIMEOUT_S, allow_redirects=False
            )
        except requests.RequestException as error:
            hint = "check `teacher.url`, and that the server runs; then start again: a training keeps what is answered"
            raise self._error(f"it does not answer: {str(error)[:300]}", hint) from error
        if answer.status_code == requests.codes.ok:
            try:
                found = answer.json()
            except ValueError:
                found = None
            if isinstance(found, dict):
                return found
            raise self._error(f"the answer is no JSON object: {self._quoted(answer.text, 200)}")
        what = f"it answers {answer.status_code} to {path}: {self._quoted(answer.text, 400)}"
        if answer.status_code in (400, 413, 422):
            raise Refused(what, where=self._where, hint="the server's words, or its log, say what it does not take")
        raise self._error(what, self._hint(answer.status_code))

    def _quoted(self, text: str, length: int) -> str:
        """Return the beginning of a server's words, without the key, which some quote; none of private data."""
        if self._private:
            return UNQUOTED
        key = os.environ.get(self.served.key_env)
        return (text.replace(key, "[key]") if key else text)[:length].strip()

    def _hint(self, status: int) -> str:
        if 300 <= status < 400:
            return "it sends on to another address, which is not followed: put that into `teacher.url`"
        if status in (401, 403):
            variable = self.served.key_env
            in_cluster = " (in a cluster: Secret `skd-teacher`, key `api-key`)" if variable == TEACHER_KEY else ""
            return f"put the key into the environment variable {variable}{in_cluster}"
        if status in (404, 405):
            return "`teacher.url` must be the base of an API with /completions, `teacher.model` a name that it lists"
        return "start again later: a training keeps what is answered"

    def _error(self, what: str, hint: str = "") -> SkdError:
        hint = hint or "`teacher.url` must be the base of an OpenAI-compatible API, e.g. http://vllm:8000/v1"
        return SkdError(what, where=self._where, hint=hint)

    @property
    def _where(self) -> str:
        return f"teacher {self.served}"


def in_flight(jobs: Iterable[T], work: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Yield each job with its result as it is done, `IN_FLIGHT` of them at work at a time.

    After an error no more are begun; those at work are waited for and yielded, and then it is raised.
    """
    errors: list[BaseException] = []
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        waiting: dict[Future[R], T] = {}

        def some(most: int) -> Iterator[tuple[T, R]]:
            while len(waiting) > most:
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    job = waiting.pop(done)
                    if error := done.exception():
                        errors.append(error)
                    else:
                        yield job, done.result()

        for job in jobs:
            waiting[pool.submit(work, job)] = job
            yield from some(IN_FLIGHT - 1)
            if errors:
                break
        yield from some(0)
    if errors:
        raise errors[0]
