"""A token for all of vLLM's routes, also those of weights and workers, which its own `--api-key` leaves open."""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

TOKEN_VARIABLE = "SKD_ENGINE_TOKEN"  # noqa: S105 - the name of a variable
"""Environment variable with the token, of the server and of the training."""
_OPEN = ("/health", "/metrics")

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


class Guard:
    """ASGI middleware for vLLM's `--middleware`; without a token in the environment it serves nothing."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Hand on a request that has the token; answer 401 to others."""
        if scope["type"] == "lifespan" or scope["path"] in _OPEN or _allowed(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = b'{"error": "this engine wants the token of ' + TOKEN_VARIABLE.encode() + b'"}'
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _allowed(scope: dict[str, Any]) -> bool:
    token = os.environ.get(TOKEN_VARIABLE, "")
    given = dict(scope["headers"]).get(b"authorization", b"")
    return bool(token) and secrets.compare_digest(given, f"Bearer {token}".encode())
