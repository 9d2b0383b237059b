"""A token for all of vLLM's routes, also those of weights and workers, which its own `--api-key` leaves open."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Awaitable, Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from skd_lib.vllm.upload import PREFIX, answer, take_file

TOKEN_VARIABLE = "SKD_ENGINE_TOKEN"  # noqa: S105 - the name of a variable
"""Environment variable with the token, of the server and of the training."""
FILES = "skd-files-"
"""Beginning of the name of a server's folder for files."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's name of it
_OPEN = ("/health", "/metrics")

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


def given_token() -> str:
    """Return the token of the environment, empty if there is none; a line's end that a Secret has is no part of it."""
    return os.environ.get(TOKEN_VARIABLE, "").strip()


def make_token() -> str:
    """Return the token of the environment; one is made and put there if there is none."""
    os.environ[TOKEN_VARIABLE] = given_token() or secrets.token_urlsafe(32)
    return os.environ[TOKEN_VARIABLE]


class Guard:
    """ASGI middleware for vLLM's `--middleware`; without a token in the environment it serves nothing.

    It also takes files, see `skd_lib.vllm.upload`.
    """

    def __init__(self, app: App, files: Path | None = None) -> None:
        self.app = app
        if files is not None:
            self.files = files

    @cached_property
    def files(self) -> Path:
        """The folder for files: one in memory that ends with this process, unless it is given."""
        shared = str(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
        self._folder = tempfile.TemporaryDirectory(prefix=FILES, dir=shared)
        return Path(self._folder.name)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Hand on a request that has the token; answer 401 to others."""
        if scope["type"] == "lifespan" or scope["path"] in _OPEN or _allowed(scope):
            if scope["type"] == "http" and scope["method"] == "PUT" and scope["path"].startswith(PREFIX):
                await take_file(self.files, scope, receive, send)
            else:
                await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await answer(send, 401, {"error": f"this engine wants the token of {TOKEN_VARIABLE}"})


def _allowed(scope: dict[str, Any]) -> bool:
    token = given_token()
    given = dict(scope["headers"]).get(b"authorization", b"")
    return bool(token) and secrets.compare_digest(given, f"Bearer {token}".encode())
