"""The command of a server's pod: take the models from the training that has made the pod, then serve them.

    python3 -m skd_lib.vllm.pod

Until it has the models it answers on vLLM's port in vLLM's place: files by `PUT /skd/files/teacher/...` and
`.../student/...`, then by `POST /skd/start` what they are served with. A container that starts again finds them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from skd_lib.storage import write_text_atomic
from skd_lib.vllm.guard import FILES, SHARED_MEMORY, Guard
from skd_lib.vllm.serve import Served, started, until_ended
from skd_lib.vllm.upload import answer

log = logging.getLogger(__name__)
ADDRESS_VARIABLE = "SKD_ENGINE_ADDRESS"
"""Environment variable with the address to listen at; the pod's own."""
PORT = 8000
START = "/skd/start"
_FOLDERS = ("teacher", "student")
_SETTINGS = "served.json"


def settings_of(served: Served) -> dict[str, Any]:
    """Return what `START` is told of a server's settings: all but where its models are."""
    return {name: value for name, value in asdict(served).items() if name not in _FOLDERS}


def main(folder: Path, port: int = PORT) -> int:
    """Serve the models of a folder, and wait for them where it has none; return vLLM's exit code."""
    address = os.environ.get(ADDRESS_VARIABLE, "127.0.0.1")
    settings = folder / _SETTINGS
    if not settings.is_file():
        log.info("waiting for the models, at %s port %d", address, port)
        asyncio.run(_receive(folder, address, port))
    if not settings.is_file():
        return 1  # stopped before they came
    for left in SHARED_MEMORY.glob(f"{FILES}*"):  # of a server that was killed
        shutil.rmtree(left, ignore_errors=True)
    values: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
    values |= {name: folder / name for name in _FOLDERS}
    with started(Served(**values), Path(sys.executable), port, host=address) as process:
        return until_ended(process)


async def _receive(folder: Path, address: str, port: int) -> None:
    import uvicorn

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if (scope["method"], scope["path"]) != ("POST", START):
            # To /health, by which a sender sees that it is there, it is too early.
            status = 425 if scope["path"] == "/health" else 503
            await answer(send, status, {"error": "this server waits for its models"})
            return
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        write_text_atomic(folder / _SETTINGS, (body + message["body"]).decode())
        await answer(send, 200, {})
        server.should_exit = True

    config = uvicorn.Config(
        Guard(app, folder),
        host=address,
        port=port,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=3,  # a connection that was just made is not closed, and may be asked for ever
    )
    server = uvicorn.Server(config)
    await server.serve()


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(main(Path(tempfile.gettempdir()) / "skd-models"))
