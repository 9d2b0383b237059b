"""A small Google Cloud Storage in this process: it keeps to preconditions and checksums, and fails when told to."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

from tests.support import http

Fault = str | int | None
"""What a request meets: a status (503); `lost` (the connection ends before anything is done); `answer lost` (after
it is done); `corrupt` (a byte of the content changes); `cut` (half of the content comes); `part kept` (of a piece of a
resumable upload only half is kept, as the answer says); None: nothing."""


def crc32c(content: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


def corrupted(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


@dataclass
class Store:
    """The objects of one bucket, what was asked for, and what goes wrong."""

    fault: Callable[[str, int], Fault] = lambda _kind, _count: None
    before: Callable[[str], None] = lambda _kind: None
    objects: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)
    seen: dict[str, list[bytes]] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    """Bytes of content that came, by kind of request."""
    sent: int = 0
    """Bytes of content that went out."""
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    page_size: int = 1000
    """How many objects an answer lists."""
    checks_hashes: bool = True
    """Whether a resumable upload is refused whose checksum is not the one that the client sends along."""
    generation: int = 1
    lock: threading.RLock = field(default_factory=threading.RLock)

    def clear(self) -> None:
        """Forget everything that was stored or asked; what is to go wrong, and how, stays."""
        with self.lock:
            for kept in (self.objects, self.written, self.seen, self.sessions):
                kept.clear()
            self.requests.clear()
            self.received.clear()
            self.sent = 0

    def put(self, name: str, content: bytes) -> None:
        with self.lock:
            self.generation += 1
            self.objects[name] = (content, self.generation)
            self.written[name] = time.time()
            self.seen.setdefault(name, []).append(content)

    def content(self, name: str) -> bytes | None:
        return self.objects[name][0] if name in self.objects else None


class Server:
    """The store behind HTTP, at an address that stays the same when it is stopped and started again."""

    def __init__(self) -> None:
        self.store = Store()
        self._port = 0
        self._server: http.Server | None = None

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"store": self.store})
        self._server = http.Server(handler, self._port).__enter__()
        self._port = self._server.server_port

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"


class _Handler(http.Handler):
    store: Store
    protocol_version = "HTTP/1.0"  # a connection a request: what is stopped answers nobody
    _corrupt = _cut = _part = _mute = False

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        kind = _kind(self.command, parts.path, query)
        if kind == "bucket":
            # Google's client asks this by the way, in a thread of its own, for its traces: no part of what is done.
            self._answer(200, {"name": "bucket", "location": "US", "projectNumber": "1"})
            return
        with self.store.lock:
            self.store.requests[kind] += 1
            self.store.received[kind] += len(body)
            fault = self.store.fault(kind, self.store.requests[kind])
        self.store.before(kind)
        if fault == "lost":
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._answer(fault, {"error": {"code": fault, "message": "not now"}})
            return
        self._corrupt, self._cut = fault == "corrupt", fault == "cut"
        self._part, self._mute = fault == "part kept", fault == "answer lost"
        with self.store.lock:
            getattr(self, f"_{kind}")(parts.path, query, body)

    # --- what can be asked ----------------------------------------------------------------------------------------

    def _stat(self, path: str, query: dict[str, str], body: bytes) -> None:
        name = _name(path)
        if self._present(name, query):
            self._answer(200, self._metadata(name))

    def _list(self, path: str, query: dict[str, str], body: bytes) -> None:
        after = query.get("pageToken", "")
        names = sorted(n for n in self.store.objects if n.startswith(query.get("prefix", "")) and n > after)
        page = names[: self.store.page_size]
        more = {"nextPageToken": page[-1]} if len(page) < len(names) else {}
        self._answer(200, {"items": [self._metadata(name) for name in page], **more})

    def _media(self, path: str, query: dict[str, str], body: bytes) -> None:
        name = _name(path)
        if not self._present(name, query):
            return
        content = self.store.objects[name][0]
        headers = {"X-Goog-Hash": f"crc32c={crc32c(content)}", "X-Goog-Generation": str(self.store.objects[name][1])}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        content = corrupted(content) if self._corrupt else content
        if self._mute:
            self.close_connection = True
            return
        self.send_response(206 if wanted else 200)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        content_sent = content[: len(content) // 2] if self._cut else content
        self.store.sent += len(content_sent)
        self.wfile.write(content_sent)

    def _multipart(self, path: str, query: dict[str, str], body: bytes) -> None:
        boundary = b"--" + re.search(r"boundary=\"?([^\";]+)", self.headers["Content-Type"])[1].encode()  # type: ignore[index]
        _, first, second, _ = body.split(boundary)
        metadata = json.loads(first.partition(b"\r\n\r\n")[2])
        if not self._unchanged(metadata["name"], query):
            return
        content = second.partition(b"\r\n\r\n")[2][:-2]
        content = corrupted(content) if self._corrupt else content
        self._store_new(metadata["name"], content, metadata.get("crc32c"))

    def _start(self, path: str, query: dict[str, str], body: bytes) -> None:
        name = json.loads(body)["name"]
        if not self._unchanged(name, query):
            return
        session = str(len(self.store.sessions))
        self.store.sessions[session] = {"name": name, "content": b"", "conditions": query}
        address = f"http://{self.headers['Host']}/upload/session?id={session}"
        self._answer(200, {}, {"Location": address})

    def _chunk(self, path: str, query: dict[str, str], body: bytes) -> None:
        session = self.store.sessions[query["id"]]
        if "metadata" in session:  # it is over: asked again it answers the same, and does nothing
            self._answer(200, session["metadata"])
            return
        start, total = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", self.headers["Content-Range"]).groups()  # type: ignore[union-attr]
        body = body[: len(body) // 2] if self._part else body
        session["content"] = session["content"][: int(start)] + (corrupted(body) if self._corrupt else body)
        if total == "*" or len(session["content"]) < int(total):
            self._answer(308, {}, {"Range": f"bytes=0-{len(session['content']) - 1}"})
        elif self._unchanged(session["name"], session["conditions"]):
            claimed = (self.headers.get("X-Goog-Hash") or "").removeprefix("crc32c=")
            session["metadata"] = self._store_new(
                session["name"], session["content"], claimed if self.store.checks_hashes else None
            )

    def _delete(self, path: str, query: dict[str, str], body: bytes) -> None:
        name = _name(path)
        if name in self.store.objects and not self._unchanged(name, query):
            return
        if self._present(name, query):
            del self.store.objects[name]
            self._answer(204, {})

    # --- how it is answered ---------------------------------------------------------------------------------------

    def _store_new(self, name: str, content: bytes, claimed: str | None) -> dict[str, Any]:
        if claimed and claimed != crc32c(content):
            answer = {"error": {"code": 400, "message": f"Provided CRC32C {claimed} does not match"}}
            self._answer(400, answer)
            return answer
        self.store.put(name, content)
        metadata = self._metadata(name)
        self._answer(200, metadata)
        return metadata

    def _unchanged(self, name: str, query: dict[str, str]) -> bool:
        present = self.store.objects.get(name, (b"", 0))[1]
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != present:
            self._answer(412, {"error": {"code": 412, "message": "precondition"}})
            return False
        return True

    def _present(self, name: str, query: dict[str, str]) -> bool:
        wanted = query.get("generation") or query.get("ifGenerationMatch")
        found = self.store.objects.get(name)
        if found is None or (wanted and int(wanted) != found[1]):
            self._answer(404, {"error": {"code": 404, "message": f"no {name}"}})
            return False
        return True

    def _metadata(self, name: str) -> dict[str, Any]:
        content, generation = self.store.objects[name]
        return {
            "name": name,
            "bucket": "bucket",
            "size": str(len(content)),
            "generation": str(generation),
            "crc32c": crc32c(content),
            "updated": datetime.fromtimestamp(self.store.written[name], UTC).isoformat().replace("+00:00", "Z"),
        }

    def _answer(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        if self._mute:
            self.close_connection = True
            return
        text = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def _kind(method: str, path: str, query: dict[str, str]) -> str:
    if method == "PUT":
        return "chunk"
    if method == "POST":
        return "multipart" if query.get("uploadType") == "multipart" else "start"
    if method == "DELETE":
        return "delete"
    if path.endswith("/o"):
        return "list"
    if "/o/" not in path:
        return "bucket"
    return "media" if query.get("alt") == "media" else "stat"


def _name(path: str) -> str:
    return unquote(path.rpartition("/o/")[2])
