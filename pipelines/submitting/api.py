"""Kubeflow Pipelines' REST API, made safe to repeat.

This is `kfp_server_api`, the client that `kfp.Client` wraps, and not `kfp.Client` itself, which is of no use where
nobody watches: it prints from every call, writes into the home folder, sets no timeouts, waits for ever for a run that
was cancelled, and reads the login page that an expired session gets as an empty list.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import kfp_server_api
import urllib3
from kfp_server_api.exceptions import ApiException
from kfp_server_api.rest import RESTClientObject
from typing_extensions import override

from pipelines.submitting.credentials import Credentials
from skd_lib.errors import SkdError
from skd_lib.uris import shown

TIMEOUT_SECONDS = (10, 60)  # to connect, and for an answer
RETRIES = 7
TRANSIENT = frozenset({429, 500, 502, 503, 504})
CREATE_ATTEMPTS = 4
_UNREADABLE = "Failed to parse"  # the generated client's words
PAGE_SIZE = 100
LIVE = frozenset({None, "RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "CANCELING", "PAUSED"})

MAX_PAGES = 1000
ODD_ANSWERS = (TypeError, ValueError, AttributeError, KeyError, RecursionError)
"""What the generated client raises on an answer of another shape than the API's."""
KNOCKS = (0.0, 1.0, 2.0)
"""Seconds before each attempt to connect, where a person waits."""

T = TypeVar("T")


class Unsettled(SkdError):
    """The server did not say whether it did what it was asked; it may still do it."""


class _Transport(RESTClientObject):  # type: ignore[misc, unused-ignore]
    """The generated client's transport, with timeouts, credentials that are renewed, and no login pages."""

    def __init__(self, configuration: Any, credentials: Credentials) -> None:
        super().__init__(configuration)
        self._credentials = credentials

    @override
    def request(self, method: str, url: str, headers: Any = None, _request_timeout: Any = None, **options: Any) -> Any:
        try:
            return self._once(method, url, headers, renew=False, **options)
        except ApiException as error:
            if error.status != 401:
                raise
            return self._once(method, url, headers, renew=True, **options)

    def _once(self, method: str, url: str, headers: Any, *, renew: bool, **options: Any) -> Any:
        sent = {**(headers or {}), **self._credentials.headers(renew=renew)}
        try:
            response = super().request(method, url, headers=sent, _request_timeout=TIMEOUT_SECONDS, **options)
        except ApiException as error:
            if error.status is not None and 300 <= error.status < 400:
                raise _not_logged_in("redirected to a login page") from error
            error.body = error.body or b""  # `ApiClient` decodes it, and fails on None, which a TLS error has
            raise
        if "json" not in response.getheader("content-type", ""):
            raise _not_logged_in("the answer is a web page, as of a login")
        return response


def _not_logged_in(reason: str) -> ApiException:
    error = ApiException(status=401, reason=reason)
    error.body = b""
    return error


class KubeflowPipelines:
    """The API of one Kubeflow Pipelines server. Safe to use from several threads.

    Reading is repeated while the server is away, for about two minutes. So is creating, which first looks whether what
    it makes is there already: the answer to a request that succeeded may have got lost.

    Args:
        host: URL of the API server, e.g. `https://kubeflow.example.com/pipeline`.
        credentials: Who we are.
        namespace: Profile in a multi-user installation; empty in a single-user one.
        backoff: Seconds before the first repetition; each further one takes twice as long.
    """

    def __init__(self, host: str, credentials: Credentials, namespace: str = "", backoff: float = 0.5) -> None:
        self.host, self.namespace, self._backoff = shown(host.rstrip("/")), namespace, backoff
        configuration = kfp_server_api.Configuration(host=host.rstrip("/"))
        # Of HTTP methods only those are repeated that change nothing; a redirection is a login page.
        configuration.retries = urllib3.Retry(
            total=RETRIES,
            redirect=False,
            status_forcelist=TRANSIENT,
            allowed_methods=["GET"],
            backoff_factor=backoff,
            raise_on_status=False,
        )
        client = kfp_server_api.ApiClient(configuration)
        client.rest_client = _Transport(configuration, credentials)
        self._experiments = kfp_server_api.ExperimentServiceApi(client)
        self._pipelines = kfp_server_api.PipelineServiceApi(client)
        self._uploads = kfp_server_api.PipelineUploadServiceApi(client)
        self._runs = kfp_server_api.RunServiceApi(client)
        self._recurring = kfp_server_api.RecurringRunServiceApi(client)

    def check_listening(self) -> None:
        """See within seconds that there is a server; what it is asked later is repeated for minutes.

        Raises:
            SkdError: nothing listens at the host.
        """
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
        raise self._away(failure) from failure

    def experiment(self, name: str) -> str:
        """The id of the experiment `name`, which is made where there is none."""
        body = kfp_server_api.V2beta1Experiment(display_name=name, namespace=self.namespace or None)
        list_all = self._experiments.experiment_service_list_experiments
        made = self._get_or_create(
            "experiment_id",
            lambda: self._named("experiment_id", list_all, "experiments", name, namespace=self.namespace),
            lambda: self._experiments.experiment_service_create_experiment(experiment=body),
        )
        return str(made.experiment_id)

    def find_experiment(self, name: str) -> str | None:
        """The id of the experiment `name`; None if there is none."""
        list_all = self._experiments.experiment_service_list_experiments
        found = self._named("experiment_id", list_all, "experiments", name, namespace=self.namespace)
        return str(found.experiment_id) if found else None

    def pipeline_version(self, pipeline: str, version: str, package: Path, description: str) -> Any:
        """The version `version` of the pipeline `pipeline`; both are made where they are missing.

        The server lets one pipeline have a name, and one version of a pipeline: of several who make it one succeeds,
        and the others find it.
        """
        list_pipelines, list_versions = (
            self._pipelines.pipeline_service_list_pipelines,
            self._pipelines.pipeline_service_list_pipeline_versions,
        )
        body = kfp_server_api.V2beta1Pipeline(name=pipeline, display_name=pipeline, namespace=self.namespace or None)
        pipeline_id = self._get_or_create(
            "pipeline_id",
            lambda: self._named("pipeline_id", list_pipelines, "pipelines", pipeline, namespace=self.namespace),
            lambda: self._pipelines.pipeline_service_create_pipeline(pipeline=body),
        ).pipeline_id
        return self._get_or_create(
            "pipeline_version_id",
            lambda: self._named(
                "pipeline_version_id", list_versions, "pipeline_versions", version, pipeline_id=pipeline_id
            ),
            lambda: self._uploads.upload_pipeline_version(
                str(package), name=version, pipelineid=pipeline_id, description=description
            ),
        )

    def runs_named(self, name: str, experiment_id: str) -> list[Any]:
        """All runs of that name in an experiment, in the order in which they were made."""
        runs = self._list("run_id", self._runs.run_service_list_runs, "runs", name, experiment_id=experiment_id)
        return sorted(runs, key=lambda run: run.created_at.timestamp() if run.created_at else 0.0)

    def create_run(self, run: Any, before: float = math.inf) -> Any:
        """Start a run.

        Args:
            run: The run. Names are not unique, its description has to be: by it we tell our run from another's.
            before: When all is to be over, on the monotonic clock: nothing is begun that might last longer.

        Raises:
            Unsettled: the run may have been made, or be made later.
            SkdError: it was not made.
        """
        return self._create(
            "run_id",
            lambda: next(
                (
                    found
                    for found in self.runs_named(run.display_name, run.experiment_id)
                    if found.description == run.description
                ),
                None,
            ),
            lambda: self._runs.run_service_create_run(run=run),
            before,
        )

    def run(self, run_id: str) -> Any:
        """A run as it is now, with its tasks."""
        return self._ask(lambda **query: _known(self._runs.run_service_get_run(**query), "run_id"), run_id=run_id)

    def recurring_run(self, recurring: Any) -> Any:
        """The recurring run of that name in its experiment, which is made where there is none."""
        list_all = self._recurring.recurring_run_service_list_recurring_runs
        return self._get_or_create(
            "recurring_run_id",
            lambda: self._named(
                "recurring_run_id",
                list_all,
                "recurring_runs",
                recurring.display_name,
                experiment_id=recurring.experiment_id,
            ),
            lambda: self._recurring.recurring_run_service_create_recurring_run(recurring_run=recurring),
        )

    def _get_or_create(self, key: str, find: Callable[[], T | None], create: Callable[[], T]) -> T:
        return find() or self._create(key, find, create)

    def _create(self, key: str, find: Callable[[], T | None], create: Callable[[], T], before: float = math.inf) -> T:
        failure: Exception | None = None
        for attempt in range(CREATE_ATTEMPTS):
            if time.monotonic() + sum(TIMEOUT_SECONDS) > before:
                break
            try:
                return _known(create(), key)
            except (ApiException, urllib3.exceptions.HTTPError, *ODD_ANSWERS) as error:
                failure = error
            conflict = isinstance(failure, ApiException) and failure.status == 409
            if isinstance(failure, ApiException) and not conflict and failure.status not in TRANSIENT:
                raise self._explained(failure) from failure
            # Whoever answers for a server may do so before the server has done what it was asked.
            time.sleep(self._backoff * 2**attempt)
            found = find()
            if found is not None:
                return found
            if conflict:
                raise self._explained(failure) from failure
        if failure is None:
            raise SkdError("it has become too late to ask the server", where=self.host, hint="try again")
        what = self._explained(failure)
        hint = f"look in Kubeflow whether it was done after all; {what.hint}"
        raise Unsettled(what.what, where=what.where, hint=hint) from failure

    def _named(self, key: str, call: Callable[..., Any], field: str, name: str, **query: Any) -> Any | None:
        return next(self._list(key, call, field, name, **query), None)

    def _list(self, key: str, call: Callable[..., Any], field: str, name: str, **query: Any) -> Iterator[Any]:
        predicate = {"operation": "EQUALS", "key": "display_name", "string_value": name}
        query = {
            "filter": json.dumps({"predicates": [predicate]}),
            "page_size": PAGE_SIZE,
            **{key: value for key, value in query.items() if value},
        }

        def read_page(**asked: Any) -> tuple[list[Any], str]:
            page = call(**asked)
            return [_known(item, key) for item in getattr(page, field) or []], page.next_page_token or ""

        token = ""
        for _ in range(MAX_PAGES):
            items, token = self._ask(read_page, page_token=token, **query)
            yield from items
            if not token:
                return
        raise self._explained(ValueError(f"more than {MAX_PAGES} pages"))

    def _ask(self, call: Callable[..., T], **query: Any) -> T:
        try:
            return call(**query)
        except (ApiException, urllib3.exceptions.HTTPError, *ODD_ANSWERS) as error:
            raise self._explained(error) from error

    def _away(self, reason: object) -> SkdError:
        said = (isinstance(reason, OSError) and reason.strerror) or type(reason).__name__
        hint = "check --host, the network, and that the server runs"
        return SkdError(f"cannot be reached: {said}", where=self.host, hint=hint)

    def _explained(self, error: Exception) -> SkdError:
        if isinstance(error, ODD_ANSWERS) or (isinstance(error, ApiException) and _UNREADABLE in str(error.reason)):
            said = " ".join(str(getattr(error, "reason", error)).split())[:200]
            hint = "check that --host is the API of Kubeflow Pipelines v2: behind the dashboard it ends in /pipeline"
            return SkdError(f"the answer is not one of Kubeflow Pipelines: {said}", where=self.host, hint=hint)
        if not isinstance(error, ApiException):
            return self._away(getattr(error, "reason", None) or error)
        said = f": {_message(error)}" if _message(error) else ""
        match error.status:
            case 0:
                hint = "check that the host serves https, and that its certificate is trusted here"
                return SkdError(f"no secure connection{said}", where=self.host, hint=hint)
            case 401:
                hint = "log in again and renew the token or cookie, or choose other credentials with --auth"
                return SkdError(f"the server does not accept our credentials{said}", where=self.host, hint=hint)
            case 403:
                hint = "ask for a role that may create runs in this namespace (see docs/kubeflow.md)"
                return SkdError(f"access denied{said}", where=self.host, hint=hint)
            case 404:
                hint = "check that --host is the API of Kubeflow Pipelines: behind the dashboard it ends in /pipeline"
                return SkdError(f"not found{said}", where=self.host, hint=hint)
            case status if status in TRANSIENT:
                return SkdError(f"the server fails (HTTP {status}){said}", where=self.host, hint="try again later")
            case status:
                return SkdError(f"the server refuses the request (HTTP {status}){said}", where=self.host)


def _known(answer: T, key: str) -> T:
    """See that what the server tells of has an id; any JSON object is read as one without."""
    if not getattr(answer, key, None):
        raise ValueError(f"it has no {key}")
    return answer


def _message(error: ApiException) -> str:
    """What the server said, without the headers that `str(error)` would show."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body
    try:
        answer = json.loads(body or "")
    except ValueError:
        return str(error.reason or "")
    said = answer.get("message") or answer.get("error_message") if isinstance(answer, dict) else ""
    return " ".join(str(said or error.reason or "").split())
