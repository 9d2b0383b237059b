"""Call Kubeflow Pipelines' REST API safely.

This uses `kfp_server_api`, the client that `kfp.Client` wraps. `kfp.Client` itself does not serve unattended processes:
it prints from every call, writes into the home folder, sets no timeouts, waits for ever for a cancelled run, and reads
the login page of an expired session as an empty list.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import kfp_server_api
from kfp_server_api.exceptions import ApiException

from skd_kfp.pipelines.kubeflow import transport
from skd_kfp.pipelines.kubeflow.auth import Credentials
from skd_kfp.pipelines.kubeflow.checks import Version, read_version
from skd_kfp.pipelines.kubeflow.transport import FAILURES, TIMEOUT_SECONDS
from skd_lib._core.uris import shown
from skd_lib.errors import SkdError

CREATE_ATTEMPTS = 4
PAGE_SIZE = 100
MAX_PAGES = 1000
KNOCKS = (0.0, 1.0, 2.0)
"""Seconds before each attempt to connect, where a person waits."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Unsettled(SkdError):
    """The server did not answer whether it created something; it may still create it."""


class KubeflowPipelines:
    """The API of one Kubeflow Pipelines server. Safe to use from several threads.

    Reading is repeated while the server is away, for a minute or two. Creating is repeated where it is safe:
    where the server keeps names unique (experiments, pipelines, versions), and where the request did not arrive. The
    server may have created a run or recurring run that it does not list yet, so these are only looked for.

    `namespace` is empty in a single-user installation; `backoff` is in seconds, and each repetition waits twice as
    long; `notice` prints a remark for the person who waits.
    """

    def __init__(
        self,
        host: str,
        credentials: Credentials,
        namespace: str = "",
        backoff: float = 1.0,
        notice: Callable[[str], None] = log.warning,
    ) -> None:
        self.host, self.namespace, self.notice = shown(host.rstrip("/")), namespace, notice
        self._backoff = backoff
        configuration = kfp_server_api.Configuration(host=host.rstrip("/"))
        self._client = client = kfp_server_api.ApiClient(configuration)
        client.rest_client = transport.Transport(configuration, credentials, backoff, notice)
        self._experiments = kfp_server_api.ExperimentServiceApi(client)
        self._pipelines = kfp_server_api.PipelineServiceApi(client)
        self._uploads = kfp_server_api.PipelineUploadServiceApi(client)
        self._runs = kfp_server_api.RunServiceApi(client)
        self._recurring = kfp_server_api.RecurringRunServiceApi(client)

    def check_listening(self) -> None:
        """Check within seconds that a server listens; later requests are repeated for longer."""
        url = urlsplit(self.host)
        failure: OSError | None = None
        for pause in KNOCKS:
            time.sleep(pause)
            try:
                socket.create_connection(
                    (url.hostname, url.port or {"http": 80}.get(url.scheme, 443)), TIMEOUT_SECONDS[0]
                ).close()
            except OSError as error:
                failure = error
            else:
                return
        reason = (failure and failure.strerror) or type(failure).__name__
        raise transport.away(self.host, reason) from failure

    def version(self) -> Version | None:
        """Return the server's version; None where it does not say."""
        try:
            # The generated model of this answer leaves the version out.
            return self._ask(lambda: read_version(self._get("healthz")))
        except SkdError as error:
            refusal = error.__cause__
            if isinstance(refusal, ApiException) and refusal.status in (403, 404):
                return None  # a gateway that does not pass this path on
            raise

    def experiment(self, name: str) -> str:
        """Return the id of the experiment `name`, which is created where there is none."""
        body = kfp_server_api.V2beta1Experiment(display_name=name, namespace=self.namespace or None)
        made = self._create(
            "experiment_id",
            lambda: self._experiment(name),
            lambda: self._experiments.experiment_service_create_experiment(experiment=body),
        )
        if made.display_name != name:
            self.notice(f"the server takes the experiment {made.display_name!r} for {name!r}: it is used")
        return str(made.experiment_id)

    def find_experiment(self, name: str) -> str | None:
        """Return the id of the experiment `name`; None if there is none."""
        found = self._experiment(name)
        return str(found.experiment_id) if found else None

    def _experiment(self, name: str) -> Any | None:
        call = self._experiments.experiment_service_list_experiments
        return self._find(call, "experiment", name, namespace=self.namespace)

    def pipeline_version(self, pipeline: str, version: str, package: Path, description: str) -> Any:
        """Return the version `version` of the pipeline `pipeline`; both are created where they are missing.

        The server keeps the names of pipelines, and of a pipeline's versions, unique: of several who create one, one
        succeeds and the others find it. The display name, which people may change on Kubeflow's page, is not read.
        """
        list_pipelines = self._pipelines.pipeline_service_list_pipelines
        list_versions = self._pipelines.pipeline_service_list_pipeline_versions
        body = kfp_server_api.V2beta1Pipeline(name=pipeline, display_name=pipeline, namespace=self.namespace or None)
        made = self._create(
            "pipeline_id",
            lambda: self._find(list_pipelines, "pipeline", pipeline, "name", namespace=self.namespace),
            lambda: self._pipelines.pipeline_service_create_pipeline(pipeline=body),
        )
        of = made.pipeline_id
        return self._create(
            "pipeline_version_id",
            lambda: self._find(list_versions, "pipeline_version", version, "name", pipeline_id=of),
            lambda: self._uploads.upload_pipeline_version(
                str(package), name=version, pipelineid=of, description=description
            ),
        )

    def runs_named(self, name: str, experiment_id: str) -> list[Any]:
        """Return all runs of exactly that name in an experiment, in the order of their creation."""
        found = self._list(self._runs.run_service_list_runs, "run", name, experiment_id=experiment_id)
        runs = [run for run in found if run.display_name == name]
        return sorted(runs, key=lambda run: run.created_at.timestamp() if run.created_at else 0.0)

    def create_run(self, run: Any, before: float = math.inf) -> Any:
        """Start a run.

        Its description has to be unique, which names are not: it distinguishes our run from others. No request is sent
        that might last beyond `before`, on the monotonic clock. Raises Unsettled where it may have been created, or be
        created later.
        """
        columns = r"RUN:.metadata.annotations.pipelines\.kubeflow\.org/run_name,WORKFLOW:.metadata.name"
        look = (
            f"a run may have started that Kubeflow's page does not show: before you submit again, look for "
            f"{run.display_name!r} in `{self._kubectl('workflows')} -l pipeline/runid "
            f"-o custom-columns='{columns},PHASE:.status.phase'`, and delete its workflow"
        )
        create = self._runs.run_service_create_run
        find = functools.partial(_same, self.runs_named, run)
        return self._create("run_id", find, lambda: create(run=run), before, look)

    def run(self, run_id: str) -> Any:
        """Return a run as it is now.

        The server version without MLMD lists its tasks on demand, in a field that the generated model does not know:
        they are in the attribute `tasks`, as plain values.
        """

        def read() -> Any:
            answer = self._get(f"runs/{run_id}")
            if answer.get("task_count"):
                answer = self._get(f"runs/{run_id}", view="FULL")
            run = self._client.deserialize(SimpleNamespace(data=json.dumps(answer)), "V2beta1Run")
            run.tasks = answer.get("tasks") or []
            return _known(run, "run_id")

        return self._ask(read)

    def recurring_runs_named(self, name: str, experiment_id: str) -> list[Any]:
        """Return all recurring runs of exactly that name in an experiment."""
        call = self._recurring.recurring_run_service_list_recurring_runs
        found = self._list(call, "recurring_run", name, experiment_id=experiment_id)
        return [recurring for recurring in found if recurring.display_name == name]

    def create_recurring_run(self, recurring: Any) -> Any:
        """Create a recurring run; its description has to be unique, see `create_run`."""
        look = (
            "a schedule may have been made that Kubeflow's page does not show: before you submit again, look at "
            f"`{self._kubectl('scheduledworkflows')}`, and delete the newest one"
        )
        create = self._recurring.recurring_run_service_create_recurring_run
        find = functools.partial(_same, self.recurring_runs_named, recurring)
        return self._create("recurring_run_id", find, lambda: create(recurring_run=recurring), look=look)

    def recurring_run(self, recurring_run_id: str) -> Any:
        """Return a recurring run as the server keeps it."""
        call = self._recurring.recurring_run_service_get_recurring_run
        return self._ask(lambda: _known(call(recurring_run_id=recurring_run_id), "recurring_run_id"))

    def _get(self, path: str, **query: str) -> dict[str, Any]:
        """Return an answer as plain values, where the generated models leave something out."""
        answer = self._client.call_api(
            f"/apis/v2beta1/{path}",
            "GET",
            query_params=list(query.items()),
            header_params={"Accept": "application/json"},
            response_type="object",
            _return_http_data_only=True,
        )
        if not isinstance(answer, dict):
            raise ValueError("it is no object")
        return answer

    def _kubectl(self, kind: str) -> str:
        return f"kubectl get {kind} -n {self.namespace or 'kubeflow'}"

    def _create(
        self,
        key: str,
        find: Callable[[], T | None],
        create: Callable[[], T],
        before: float = math.inf,
        look: str = "",
    ) -> T:
        """Create something, and find it where the answer was lost.

        `key` is the field that holds its id. `look` says how a person finds what may have been created; empty where
        names are unique: it is looked for first, and a repeated request cannot create two.
        """
        if not look and (found := find()) is not None:
            return found
        failure: Exception | None = None
        for attempt in range(CREATE_ATTEMPTS):
            if time.monotonic() + sum(TIMEOUT_SECONDS) > before:
                break
            if failure is None or not look or transport.was_not_received(failure):
                try:
                    return _known(create(), key)
                except FAILURES as error:
                    failure = error
                if transport.was_refused(failure) and not transport.is_conflict(failure):
                    raise transport.explained(failure, self.host) from failure
            # A gateway may answer for the server before it has done what it was asked.
            time.sleep(self._backoff * 2**attempt)
            found = find()
            if found is not None:
                return found
            if transport.is_conflict(failure):
                problem = transport.explained(failure, self.host)
                raise SkdError(problem.what, where=problem.where, hint="there is one that we may not see") from failure
        if failure is None:
            raise SkdError("it has become too late to ask the server", where=self.host, hint="try again")
        problem = transport.explained(failure, self.host)
        if look and transport.was_not_received(failure):
            raise problem from failure
        raise Unsettled(problem.what, where=problem.where, hint=look or problem.hint) from failure

    def _find(
        self, call: Callable[..., Any], kind: str, name: str, key: str = "display_name", **query: str
    ) -> Any | None:
        """Return the item of exactly that name, else one that the server takes for it, else None.

        MySQL's usual collation ignores case and accents: a list for `Exp` may hold `exp`, and then the server refuses
        to create `Exp`.
        """
        found = list(self._list(call, kind, name, key, **query))
        return next((item for item in found if getattr(item, key) == name), found[0] if found else None)

    def _list(
        self, call: Callable[..., Any], kind: str, name: str, key: str = "display_name", **query: str
    ) -> Iterator[Any]:
        """Yield the items of a kind whose field `key` is, for the server, `name`."""
        scope = {field: value for field, value in query.items() if value}
        asked = {"filter": name_filter(name, key)}

        def read_page() -> tuple[list[Any], str]:
            page = call(page_size=PAGE_SIZE, **scope, **asked)
            return [_known(item, f"{kind}_id") for item in getattr(page, f"{kind}s") or []], page.next_page_token or ""

        for _ in range(MAX_PAGES):
            items, token = self._ask(read_page)
            yield from items
            if not token:
                return
            asked = {"page_token": token}  # which holds the filter
        raise transport.explained(ValueError(f"more than {MAX_PAGES} pages"), self.host)

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except FAILURES as error:
            raise transport.explained(error, self.host) from error


def _known(answer: T, key: str) -> T:
    """Check that an item of an answer has an id; any JSON object is read as one without."""
    if not getattr(answer, key, None):
        raise ValueError(f"it has no {key}")
    return answer


def _same(named: Callable[[str, str], list[Any]], wanted: Any) -> Any | None:
    """Return the run or recurring run with the name and description of the wanted one; None if there is none."""
    found = named(wanted.display_name, wanted.experiment_id)
    return next((each for each in found if each.description == wanted.description), None)


def name_filter(name: str, key: str = "display_name") -> str:
    """Return the filter for the items whose field `key` equals `name`.

    The server decodes a filter from a URL once more than it was encoded (`parseAPIFilter` in
    backend/src/apiserver/server/list_request_util.go): a `+` becomes a space, and a `%` that begins no code an error.
    As escapes of JSON both arrive however often it is decoded.
    """
    text = json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "string_value": name}]})
    return text.replace("+", "\\u002b").replace("%", "\\u0025")
