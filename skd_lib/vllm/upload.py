"""Files that a training sends to a server with which it shares no disk: `PUT /skd/files/NAME`, behind the token."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

PREFIX = "/skd/files/"


async def take_file(root: Path, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Any) -> None:
    """Write a request's body to the file below `root` that its path names; answer with the file's folder."""
    root = root.resolve()
    target = (root / scope["path"].removeprefix(PREFIX)).resolve()
    if target == root or not target.is_relative_to(root):
        await answer(send, 400, {"error": "the name of a file is expected"})
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    more = True
    try:
        with partial.open("wb") as file:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    partial.unlink()
                    return
                file.write(message.get("body", b""))
                more = message.get("more_body", False)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)  # it fills memory
        while more:  # the sender reads no answer before it has sent all
            more = (await receive()).get("more_body", False)
        await answer(send, 507, {"error": f"{target.name} cannot be written to {target.parent}: {error.strerror}"})
        return
    await answer(send, 200, {"folder": str(target.parent)})


async def answer(send: Any, status: int, content: dict[str, Any]) -> None:
    """Send JSON."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
