"""Google Cloud Storage's objects over HTTP: generations, and preconditions on writing and on deleting.

The emulator of `tests/test_storage.py` ignores preconditions on deleting, and hangs when objects are read, written and
deleted by many at a time.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c


@contextmanager
def running() -> Iterator[str]:
    """The server's address."""
    objects: dict[str, tuple[dict[str, Any], bytes]] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _split(self) -> tuple[str, dict[str, str]]:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            return unquote(url.path.partition("/o/")[2]), query

        def _refused(self, name: str, query: dict[str, str]) -> bool:
            wanted = query.get("ifGenerationMatch")
            return wanted is not None and wanted != (objects[name][0]["generation"] if name in objects else "0")

        def do_POST(self) -> None:
            _, query = self._split()
            body = self.rfile.read(int(self.headers["Content-Length"]))
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            described, data = BytesParser(policy=HTTP).parsebytes(head + body).iter_parts()
            name, content = json.loads(described.get_payload(decode=True))["name"], data.get_payload(decode=True)
            with lock:
                if self._refused(name, query):
                    self._send(412, {"error": {"message": "conditionNotMet"}})
                    return
                objects[name] = (describe(name, content), content)
                self._send(200, objects[name][0])

        def do_GET(self) -> None:
            name, query = self._split()
            with lock:
                if not name:
                    found = [meta for key, (meta, _) in objects.items() if key.startswith(query.get("prefix", ""))]
                    self._send(200, {"items": found})
                elif name not in objects:
                    self._send(404, {"error": {"message": "not found"}})
                elif query.get("alt") == "media":
                    meta, content = objects[name]
                    self._send(200, content, **{"X-Goog-Hash": f"crc32c={meta['crc32c']}"})
                else:
                    self._send(200, objects[name][0])

        def do_DELETE(self) -> None:
            name, query = self._split()
            with lock:
                if name not in objects:
                    self._send(404, {"error": {"message": "not found"}})
                elif self._refused(name, query):
                    self._send(412, {"error": {"message": "conditionNotMet"}})
                else:
                    del objects[name]
                    self._send(204, b"")

        def _send(self, status: int, body: Any, **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def describe(name: str, content: bytes) -> dict[str, Any]:
    return {
        "name": name,
        "generation": str(time.time_ns()),
        "size": str(len(content)),
        "crc32c": base64.b64encode(google_crc32c.Checksum(content).digest()).decode(),
        "updated": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
    }
