"""HTTP to one vLLM server with `skd_lib.vllm.worker`."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import requests

from skd_lib.errors import SkdError, Transient
from skd_lib.vllm.guard import TOKEN_VARIABLE, given_token
from skd_lib.vllm.upload import PREFIX

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_TRIES = 2.0
_SECONDS_TO_BE_SEEN = 30.0
_ENGINE_ENDED = "EngineCore encountered an issue"
LOOK_SECONDS, LOOKS = 20.0, 6
"""How often a server is asked whether it is there while it works, and its silences after which that is given up."""


class EngineGone(Exception):
    """The server cannot be reached, or was restarted: what it was told is lost."""


class Engine:
    """One server.

    Args:
        url: `http://host:port`.
        wait_s: How long to wait for a server that is starting, or that was restarted. A request may take any time while
            the server answers to others.
        alive: Raises an error if the server's process has ended, where it is known.
        shared: The server sees this machine's files; files are sent to it otherwise.
    """

    def __init__(self, url: str, wait_s: float = 3600.0, alive: Any = None, *, shared: bool = True) -> None:
        self.url, self.wait_s, self._alive, self._shared = url.rstrip("/"), wait_s, alive, shared
        self._http = requests.Session()
        # Servers are in a private network: no proxy leads to them, and no password of ~/.netrc is theirs.
        self._http.trust_env = False
        self._http.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        for scheme in ("http://", "https://"):  # a batch's rows are asked for at once
            self._http.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=1024))
        if token := given_token():
            self._http.headers["Authorization"] = f"Bearer {token}".encode()

    def answers(self) -> bool:
        """Return whether the server answers now.

        Raises:
            SkdError: its process has ended, where that is known.
        """
        if self._health() == requests.codes.ok:
            return True
        if self._alive is not None:  # asked last: it may be a request of its own
            self._alive()
        return False

    def _health(self) -> int:
        """Return the status of `/health`, 0 if there is no answer."""
        try:
            status: int = self._http.get(f"{self.url}/health", timeout=5).status_code
        except requests.RequestException:
            return 0
        return status

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            SkdError: it does not within `wait_s` seconds.
        """
        wait_for_one([self])

    def rpc(self, method: str, *args: Any) -> Any:
        """Call a method of the worker extension on all workers; return the first one's result.

        Raises:
            EngineGone: the server cannot be reached.
            SkdError: it refuses.
        """
        answer = self.post("/collective_rpc", {"method": method, "args": list(args)})
        return answer["results"][0] if answer else None

    def generate(self, prompt: list[int], params: dict[str, Any], salt: str) -> dict[str, Any]:
        """Return the first choice of a request for tokens."""
        body = {"token_ids": prompt, "sampling_params": params, "cache_salt": salt}
        choice: dict[str, Any] = self.post("/inference/v1/generate", body)["choices"][0]
        return choice

    def load_student(self, folder: Path, version: str) -> None:
        """Replace the student's weights by those of a folder with the file `model.safetensors`.

        Raises:
            EngineGone: the server cannot be reached.
            SkdError: it does not see the folder, or refuses the weights.
        """
        seen = str(folder) if self._shared else self.send(folder / "model.safetensors", "weights/model.safetensors")
        deadline = time.monotonic() + min(_SECONDS_TO_BE_SEEN, self.wait_s)
        while not self.rpc("skd_sees", seen)["seen"]:  # a network disk shows a new file a little later
            if time.monotonic() > deadline:
                raise SkdError(
                    f"the server does not see the student's weights in {seen}",
                    where=f"{self.url}, distill.vllm.exchange",
                    hint="name a folder that both machines mount at the same path, or leave `exchange` out, and the "
                    "weights are sent by HTTP",
                )
            time.sleep(_SECONDS_BETWEEN_TRIES)
        self.post("/start_draft_weight_update", {})
        try:
            self.post("/update_weights", {"update_info": {"folder": seen}})
        except SkdError as error:
            hint = "its log says why; if it was started with another student, start it again with this one"
            raise SkdError(error.what, where=error.where, hint=hint) from error
        self.post("/finish_weight_update", {"weight_version": version})

    def send(self, file: Path, name: str) -> str:
        """Send a file under a name; return the folder on the server's machine that it is in.

        Raises:
            EngineGone: the server cannot be reached.
            SkdError: it refuses.
        """
        with file.open("rb") as opened:
            return str(self._ask("PUT", PREFIX + name, data=opened)["folder"])

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send JSON; return the answer's JSON.

        Raises:
            EngineGone: the server cannot be reached.
            SkdError: it answers with an error.
        """
        return self._ask("POST", path, json=body)

    def _ask(self, method: str, path: str, **content: Any) -> Any:
        try:
            answer = self._patiently(
                partial(self._http.request, method, f"{self.url}{path}", timeout=(10, None), **content)
            )
        except requests.RequestException as error:
            raise EngineGone(str(error)) from error
        if answer.ok:
            return answer.json() if answer.content else None
        # An engine that has ended: the server answers so until it has ended, too.
        if answer.status_code in (502, 503, 504) or (answer.status_code == 500 and _ENGINE_ENDED in answer.text):
            raise EngineGone(f"{answer.status_code} at {path}")
        hints = {
            401: f"give this process the server's token in the environment variable {TOKEN_VARIABLE}",
            404: "the server was not started for SKD: start it with `skd engine start`",
            507: "make room there, or set `distill.vllm.exchange` to a folder that the server sees, too",
        }
        raise SkdError(
            f"the vLLM server answers {answer.status_code} to {path}: {answer.text[:500].strip()}",
            where=self.url,
            hint=hints.get(answer.status_code, "the server's log says more"),
        )

    def _patiently(self, request: Callable[[], requests.Response]) -> requests.Response:
        """Return a request's answer, however long it takes, as long as the server is there.

        A connection stays open where the machine is gone, and where vLLM waits for requests whose engine has ended.
        """
        answer: Future[requests.Response] = Future()

        def ask() -> None:
            try:
                answer.set_result(request())
            except BaseException as error:  # noqa: BLE001 - the asker gets it
                answer.set_exception(error)

        Thread(target=ask, daemon=True).start()  # one that is given up keeps no process from ending
        silent = 0
        while silent < LOOKS:
            if wait([answer], LOOK_SECONDS).done:
                return answer.result()
            is_there = 0 < self._health() < 500
            if not is_there and self._alive is not None:
                self._alive()
            silent = 0 if is_there else silent + 1
        raise EngineGone("the server answers no more")


def wait_for_one(engines: Sequence[Engine]) -> None:
    """Wait until one of some servers answers.

    Raises:
        Transient: none does within its `wait_s` seconds.
    """
    deadline = time.monotonic() + engines[0].wait_s
    said = False
    while not any(engine.answers() for engine in engines):
        urls = ", ".join(engine.url for engine in engines)
        if time.monotonic() > deadline:
            raise Transient(
                f"no vLLM server answers after {engines[0].wait_s / 60:g} minutes",
                where=urls,
                hint="start one with `skd engine start`, or correct `distill.vllm.urls`; if it loads its models still, "
                "raise `distill.vllm.wait_minutes`",
            )
        if not said:
            log.info("waiting for the vLLM server at %s", urls)
            said = True
        time.sleep(_SECONDS_BETWEEN_TRIES)


def wait_for_all(engines: Sequence[Engine]) -> None:
    """Wait until the servers that the main process starts answer; where that fails, its launcher ends this one, too.

    A collective operation would give up sooner: those of NCCL after ten minutes.
    """
    for engine in engines:
        Engine(engine.url, math.inf).wait()
