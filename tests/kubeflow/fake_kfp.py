"""A Kubeflow Pipelines API server: the REST schema, checked by kfp-server-api's own models, over HTTP.

It does what the real one (2.17.0) was seen to do, or does by its source:

- names of experiments, pipelines and a pipeline's versions are unique, and the database (MySQL) knows no case: 409;
  those of runs and recurring runs are not unique (storage/*_store.go);
- people rename a pipeline's or a version's display name; its name stays (model/pipeline.go);
- a filter is decoded from a URL twice (server/list_request_util.go, parseAPIFilter); a page token holds it;
- a run's Workflow is made before its row in the database, whose characters have three bytes at most: then 500, and the
  Workflow runs (resource_manager.go, CreateRun); likewise a recurring run's ScheduledWorkflow (CreateJob);
- `[[CurrentTime]]` and the like in a parameter are replaced (template/v2_template.go, RunWorkflow);
- a cancelled run is FAILED after CANCELING (storage/run_store.go);
- unknown fields, missing references and wrong filters are refused; lists come in pages; healthz tells the version.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.parser import BytesParser
from email.policy import HTTP
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote_plus, urlsplit

import kfp_server_api
import yaml

from tests.support import http

API = kfp_server_api.ApiClient()
ROOT = "/apis/v2beta1"
RUNS = f"{ROOT}/runs"
LISTS = {
    "experiments": kfp_server_api.V2beta1ListExperimentsResponse,
    "pipelines": kfp_server_api.V2beta1ListPipelinesResponse,
    "pipeline_versions": kfp_server_api.V2beta1ListPipelineVersionsResponse,
    "runs": kfp_server_api.V2beta1ListRunsResponse,
    "recurring_runs": kfp_server_api.V2beta1ListRecurringRunsResponse,
}


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Fault:
    """Answer a request wrongly: with `status`, or not at all (0); `after` having done what was asked.

    With `orphan` the Workflow of a run or a schedule was made, and the row in the database was not.
    """

    method: str
    path: str
    status: int
    after: bool = False
    orphan: bool = False


def parse(model: str, body: bytes) -> Any:
    """A request's body as the model that the schema says it is."""
    try:
        value = API.deserialize(SimpleNamespace(data=body), model)
    except (ValueError, TypeError) as error:
        raise Refused(400, str(error)) from error
    known = API.sanitize_for_serialization(value)
    unknown = set(json.loads(body)) - set(known)
    if unknown:
        raise Refused(400, f"unknown fields {sorted(unknown)}")
    return value


@dataclass
class FakeKfp:
    """The server's state, and how it is to behave."""

    version: str = "2.17.0"
    page_size: int = 200
    tokens: set[str] | None = None
    cookies: set[str] | None = None
    multi_user: bool = False
    faults: list[Fault] = field(default_factory=list)
    course: list[dict[str, Any]] = field(default_factory=list)
    experiments: list[dict[str, Any]] = field(default_factory=list)
    pipelines: list[dict[str, Any]] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    recurring_runs: list[dict[str, Any]] = field(default_factory=list)
    workflows: list[str] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    host: str = ""

    def asked(self, method: str, path: str) -> int:
        return sum(m == method and re.fullmatch(path, p) is not None for m, p, _ in self.requests)

    def handle(self, method: str, path: str, query: dict[str, str], body: bytes, kind: str) -> Any:
        match method, path.removeprefix(ROOT).strip("/").split("/"):
            case "GET", ["healthz"]:
                return {"commit_sha": "unknown", "tag_name": self.version, "multi_user": self.multi_user}
            case "GET", ["recurringruns", recurring_id]:
                return next(run for run in self.recurring_runs if run["recurring_run_id"] == recurring_id)
            case "GET", ["pipelines", pipeline_id, "versions"]:
                return self._page("pipeline_versions", self.versions, query, pipeline_id=pipeline_id)
            case "GET", ["runs", run_id]:
                return self._run(run_id)
            case "GET", ["experiments" | "pipelines" | "runs" as name]:
                return self._page(name, getattr(self, name), query)
            case "GET", ["recurringruns"]:
                return self._page("recurring_runs", self.recurring_runs, query)
            case "POST", ["experiments"]:
                made = parse("V2beta1Experiment", body)
                return self._unique(self.experiments, made, "experiment_id", namespace=made.namespace)
            case "POST", ["pipelines"]:
                made = parse("V2beta1Pipeline", body)
                made.name = made.name or made.display_name
                return self._unique(self.pipelines, made, "pipeline_id", "name", namespace=made.namespace)
            case "POST", ["pipelines", "upload_version"]:
                return self._upload(query, body, kind)
            case "POST", ["runs"]:
                made = self._checked(parse("V2beta1Run", body))
                self._make_workflow(made)
                return self._add(self.runs, {**made, "state": "PENDING"}, "run_id")
            case "POST", ["recurringruns"]:
                made = self._checked(parse("V2beta1RecurringRun", body))
                cron = made["trigger"]["cron_schedule"]["cron"]
                if len(cron.split()) != 6:
                    raise Refused(400, f"bad cron {cron}")
                self._make_workflow(made)
                return self._add(self.recurring_runs, {**made, "status": "ENABLED"}, "recurring_run_id")
        raise Refused(404, "not found")

    def _make_workflow(self, made: dict[str, Any]) -> None:
        """Make it, and then fail where the database cannot hold the rest."""
        self.workflows.append(made["display_name"])
        if max(map(ord, json.dumps(made, ensure_ascii=False))) > 0xFFFF:
            raise Refused(500, "Incorrect string value for column run_details.PipelineRuntimeManifest")
        parameters = made["runtime_config"].setdefault("parameters", {})
        for name, value in parameters.items():
            if isinstance(value, str):
                parameters[name] = value.replace("[[CurrentTime]]", "20260101000000")
        made["runtime_config"]["parameters"] = {**parameters, **self.changes}

    def _unique(
        self, kept: list[dict[str, Any]], made: Any, key: str, named: str = "display_name", **scope: Any
    ) -> dict[str, Any]:
        if self.multi_user and not made.namespace:
            raise Refused(400, "a namespace is required")
        value = API.sanitize_for_serialization(made)
        if any(same(item[named], value[named]) and matches(item, scope) for item in kept):
            raise Refused(409, f"The name {value[named]} already exist. Please specify a new name")
        return self._add(kept, value, key)

    def _add(self, kept: list[dict[str, Any]], value: dict[str, Any], key: str) -> dict[str, Any]:
        value[key] = str(uuid.uuid4())
        value["created_at"] = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=len(kept))).isoformat()
        kept.append(value)
        return value

    def _checked(self, made: Any) -> dict[str, Any]:
        value: dict[str, Any] = API.sanitize_for_serialization(made)
        reference = made.pipeline_version_reference
        version = reference and next(
            (v for v in self.versions if v["pipeline_version_id"] == reference.pipeline_version_id), None
        )
        if not version or version["pipeline_id"] != reference.pipeline_id:
            raise Refused(400, "no such pipeline version")
        if not any(e["experiment_id"] == made.experiment_id for e in self.experiments):
            raise Refused(400, "no such experiment")
        known = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
        unknown = set(made.runtime_config.parameters) - set(known)
        if unknown:
            raise Refused(400, f"unknown parameters {sorted(unknown)}")
        return value

    def _upload(self, query: dict[str, str], body: bytes, kind: str) -> dict[str, Any]:
        if not any(p["pipeline_id"] == query.get("pipelineid") for p in self.pipelines):
            raise Refused(400, "Failed to create a pipeline version")
        message = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
        (upload,) = message.iter_parts()
        if upload.get_param("name", header="content-disposition") != "uploadfile":
            raise Refused(400, "Failed to read pipeline from file")
        content = upload.get_payload(decode=True)
        documents = documents_of(content)
        made = kfp_server_api.V2beta1PipelineVersion(
            pipeline_id=query["pipelineid"],
            name=query["name"],
            display_name=query["name"],
            description=query.get("description"),
            pipeline_spec={"pipeline_spec": documents[0], "platform_spec": documents[1]},
        )
        value = API.sanitize_for_serialization(made)
        if any(v["name"] == made.name and v["pipeline_id"] == made.pipeline_id for v in self.versions):
            raise Refused(409, "Failed to create a pipeline version")
        return self._add(self.versions, value, "pipeline_version_id")

    def _page(self, name: str, kept: list[dict[str, Any]], query: dict[str, str], **scope: Any) -> dict[str, Any]:
        if self.multi_user and name in {"experiments", "pipelines"} and "namespace" not in query:
            raise Refused(400, "a namespace is required")
        start, _, encoded = query.get("page_token", "").partition(" ")
        encoded = encoded or query["filter"]
        if re.search(r"%(?![0-9a-fA-F]{2})", encoded):
            raise Refused(400, f"failed to parse valid filter from {encoded}: invalid URL escape")
        wanted = parse("V2beta1Filter", unquote_plus(encoded).encode())
        keys = {"display_name", "name"} if name in {"pipelines", "pipeline_versions"} else {"display_name"}
        if any(p.operation != "EQUALS" or p.key not in keys for p in wanted.predicates):
            raise Refused(400, "unsupported filter")
        for key in ("experiment_id", "namespace"):
            if query.get(key):
                scope[key] = query[key]
        found = [
            item
            for item in kept
            if matches(item, scope) and all(same(item[p.key], p.string_value) for p in wanted.predicates)
        ]
        first, size = int(start or 0), min(self.page_size, int(query.get("page_size") or 20))
        more = {"next_page_token": f"{first + size} {encoded}"} if first + size < len(found) else {}
        page = LISTS[name](**{name: found[first : first + size]}, total_size=len(found), **more)
        return API.sanitize_for_serialization(page)

    def _run(self, run_id: str) -> dict[str, Any]:
        run = next((run for run in self.runs if run["run_id"] == run_id), None)
        if run is None:
            raise Refused(404, f"run {run_id} not found")
        now = self.course.pop(0) if len(self.course) > 1 else (self.course or [{}])[0]
        return {**run, **now}


@functools.lru_cache
def documents_of(content: bytes) -> list[dict[str, Any]]:
    return list(yaml.load_all(content, yaml.CSafeLoader))


def matches(item: dict[str, Any], scope: dict[str, Any]) -> bool:
    return all(item.get(key) == value for key, value in scope.items())


def same(one: str, other: str) -> bool:
    """Whether the database takes two names for the same."""
    return one.casefold() == other.casefold()


@contextmanager
def running(fake: FakeKfp) -> Iterator[FakeKfp]:
    class Handler(http.Handler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._do("GET")

        def do_POST(self) -> None:
            self._do("POST")

        def _do(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            with fake.lock:
                fake.requests.append((method, url.path, dict(self.headers)))
                self._respond(method, url.path, query, body)

        def _respond(self, method: str, path: str, query: dict[str, str], body: bytes) -> None:
            if path == "/dex/auth":
                self._send(200, b"<html>log in</html>", "text/html")
                return
            if fake.cookies is not None and self.headers.get("Cookie") not in fake.cookies:
                self._send(302, b"", "text/html", Location="/dex/auth")
                return
            if fake.tokens is not None and self.headers.get("Authorization", "")[len("Bearer ") :] not in fake.tokens:
                self._send(401, b'{"message": "token expired"}')
                return
            fault = next((f for f in fake.faults if f.method == method and re.fullmatch(f.path, path)), None)
            if fault:
                fake.faults.remove(fault)
            try:
                answer = None
                if fault and fault.orphan:
                    fake.workflows.append(json.loads(body)["display_name"])
                if fault is None or fault.after:
                    answer = fake.handle(method, path, query, body, self.headers.get("Content-Type", ""))
            except Refused as refused:
                self._send(refused.status, json.dumps({"message": str(refused)}).encode())
                return
            if fault is None:
                self._send(200, json.dumps(answer).encode())
            elif fault.status:
                self._send(fault.status, b'{"message": "upstream error"}')
            else:
                self.close_connection = True

        def _send(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    with http.Server(Handler) as server:
        fake.host = server.url
        yield fake
