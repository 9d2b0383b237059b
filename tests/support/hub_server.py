"""A small Hugging Face hub in this process: repositories, Git LFS and commits, as huggingface_hub 2.4 asks for them.

Made after its source, not after the hub: `HfApi.create_repo`, `model_info`, `create_commit` (hf_api.py), the preupload
and commit requests (_commit_api.py), LFS batch, upload and verify (lfs.py). Uploads over Xet, which the client prefers
where the package hf_xet is there, are not known here: HF_HUB_DISABLE_XET=1 makes the client take LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import http

TOKEN = "hf_of_this_test"
USER = "me"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def checkout(self, folder: Path) -> Path:
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder


@dataclass
class Hub:
    """What the hub holds, and what it was asked for."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Of Git LFS, by sha256."""
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Answer a request with the status and a JSON value."""
        self.asked.append(f"{method} {path}")
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})(/verify)?", path):
            return self._store(found[1], body) if found[2] is None else self._verify(found[1], json.loads(body))
        found = re.fullmatch(r"(?:/api/models)?/([\w-]+/[\w.-]+?)(?:\.git/info/lfs/objects/batch|/(\w+)/main)?", path)
        if found is None or found[1] not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.repositories[found[1]]
        match found[2]:
            case None if method == "GET":
                siblings = [{"rfilename": name} for name in repository.files]
                return 200, {"id": found[1], "private": repository.private, "siblings": siblings}
            case None:
                return self._batch(json.loads(body))
            case "preupload":
                return 200, {"files": [_mode(file) for file in json.loads(body)["files"]]}
            case "commit":
                return self._commit(found[1], repository, body)
        return 404, {"error": f"nothing at {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        owner, name = asked.get("organization") or USER, asked["name"]
        if owner != USER:
            return 403, {"error": f"You don't have the rights to create a model under the namespace {owner}"}
        full = f"{owner}/{name}"
        if full in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{full}"}
        private = asked["visibility"] == "private" if "visibility" in asked else asked["private"]
        self.repositories[full] = Repository(private)
        return 200, {"url": f"{self.url}/{full}"}

    def _batch(self, asked: dict[str, Any]) -> tuple[int, Any]:
        objects = []
        for each in asked["objects"]:
            at = f"{self.url}/lfs/{each['oid']}"
            actions = {"upload": {"href": at, "header": {}}, "verify": {"href": f"{at}/verify", "header": {}}}
            objects.append(each if each["oid"] in self.objects else {**each, "actions": actions})
        return 200, {"transfer": "basic", "objects": objects}

    def _store(self, oid: str, body: bytes) -> tuple[int, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "the content is not what was announced"}
        self.objects[oid] = body
        return 200, {}

    def _verify(self, oid: str, asked: dict[str, Any]) -> tuple[int, Any]:
        complete = oid in self.objects and len(self.objects[oid]) == asked["size"]
        return (200, {}) if complete else (400, {"error": "the upload is not complete"})

    def _commit(self, name: str, repository: Repository, body: bytes) -> tuple[int, Any]:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    repository.messages.append(value["summary"])
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.objects[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
        commit = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit}


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a hub on a port of this machine."""
    hub = Hub()

    class Handler(http.Handler):
        protocol_version = "HTTP/1.1"

        def _respond(self) -> None:
            body = self._body()
            path = self.path.partition("?")[0]
            signed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            anonymous = path.startswith("/lfs/") and self.command == "PUT"  # the address itself is the permission
            status, value = hub.answer(self.command, path, body) if signed or anonymous else (401, {"error": "no"})
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _respond

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

    with http.Server(Handler) as server:
        hub.url = server.url
        yield hub
