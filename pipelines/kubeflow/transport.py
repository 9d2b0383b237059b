"""Send requests to Kubeflow Pipelines: with timeouts, credentials that are renewed, and repetitions.

Only a request that changes nothing is repeated after an answer that may be a passing fault. The server makes a run's
Workflow before its own record of the run (`ResourceManager.CreateRun`), so that after any failure of a creation a
workflow may run that it does not list.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from kfp_server_api.exceptions import ApiException
from kfp_server_api.rest import RESTClientObject
from typing_extensions import override
from urllib3.exceptions import ConnectTimeoutError, HTTPError

from skd_kfp.pipelines.kubeflow.auth import Credentials
from skd_lib.errors import SkdError

TIMEOUT_SECONDS = (10, 60)  # to connect, and for an answer
READ_PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Before each further attempt at a request that only reads, in units of the client's `backoff`: about a minute."""
PATIENCE_SECONDS = 100
"""After this time no request is repeated: each answer of a server that hangs costs `TIMEOUT_SECONDS`."""
TIMEOUT, TOO_MANY = 408, 429
_UNREADABLE = "Failed to parse"  # the generated client's words

ODD_ANSWERS = (TypeError, ValueError, AttributeError, KeyError, RecursionError)
"""Errors of the generated client on an answer of another shape than the API's."""
FAILURES = (ApiException, HTTPError, *ODD_ANSWERS)


class _LoginPage(ApiException):  # type: ignore[misc, unused-ignore]
    """A login page in place of an answer."""

    def __init__(self, reason: str) -> None:
        super().__init__(status=401, reason=reason)
        self.body = b""


class Transport(RESTClientObject):  # type: ignore[misc, unused-ignore]
    """The generated client's transport, with timeouts, credentials that are renewed, and no login pages.

    `backoff` is the unit of `READ_PAUSES`, in seconds; `notice` prints a remark once for each request that waits.
    """

    def __init__(
        self, configuration: Any, credentials: Credentials, backoff: float, notice: Callable[[str], None]
    ) -> None:
        configuration.retries = False  # urllib3 would repeat what it must not; all repetition is below
        super().__init__(configuration)
        self._credentials, self._backoff, self._notice = credentials, backoff, notice

    @override
    def request(self, method: str, url: str, headers: Any = None, _request_timeout: Any = None, **options: Any) -> Any:
        if method != "GET":
            return self._authorised(method, url, headers, **options)
        begun = time.monotonic()
        for number, pause in enumerate(READ_PAUSES):
            try:
                return self._authorised(method, url, headers, **options)
            except (ApiException, HTTPError) as error:
                if isinstance(error, ApiException) and not _may_pass(error.status):
                    raise
                if time.monotonic() - begun > PATIENCE_SECONDS:
                    raise
                if number == 0:
                    self._notice(f"the server does not answer ({briefly(error)}): asking again for a minute or two")
            time.sleep(pause * self._backoff)
        return self._authorised(method, url, headers, **options)

    def _authorised(self, method: str, url: str, headers: Any, **options: Any) -> Any:
        """Send a request once, or twice where the server refuses our credentials: it has then done nothing."""
        try:
            return self._once(method, url, headers, renew=False, **options)
        except ApiException as error:
            if error.status != 401 or (method != "GET" and isinstance(error, _LoginPage)):
                raise
            return self._once(method, url, headers, renew=True, **options)

    def _once(self, method: str, url: str, headers: Any, *, renew: bool, **options: Any) -> Any:
        sent = {**(headers or {}), **self._credentials(renew)}
        try:
            response = super().request(method, url, headers=sent, _request_timeout=TIMEOUT_SECONDS, **options)
        except ApiException as error:
            if error.status is not None and 300 <= error.status < 400:
                raise _LoginPage("redirected to a login page") from error
            error.body = error.body or b""  # `ApiClient` decodes it, and fails on None, which a TLS error has
            raise
        if "json" not in response.getheader("content-type", ""):
            raise _LoginPage("the answer is a web page, as of a login")
        return response


def was_not_received(error: Exception) -> bool:
    """Return whether a request with this failure cannot have been carried out."""
    if isinstance(error, ApiException):
        return bool(error.status == TOO_MANY)
    return isinstance(error, ConnectTimeoutError)  # a refused connection is one of them


def was_refused(error: Exception) -> bool:
    """Return whether the server has refused the request."""
    return isinstance(error, ApiException) and 400 <= (error.status or 0) < 500 and not _may_pass(error.status)


def _may_pass(status: int | None) -> bool:
    """Return whether a status is that of a fault that may pass by itself."""
    return status in (TIMEOUT, TOO_MANY) or (status or 0) >= 500


def is_conflict(error: Exception) -> bool:
    """Return whether the server has something of that name already."""
    return isinstance(error, ApiException) and bool(error.status == 409)


def briefly(error: Exception) -> str:
    """Return a failure in a few words."""
    if isinstance(error, ApiException):
        return f"HTTP {error.status}"
    cause = getattr(error, "__cause__", None)
    return (isinstance(cause, OSError) and cause.strerror) or type(error).__name__


def away(host: str, reason: str) -> SkdError:
    """Return the error of a server that cannot be reached."""
    hint = "check --host, the network, and that the server runs"
    return SkdError(f"cannot be reached: {reason}", where=host, hint=hint)


def explained(error: Exception, host: str) -> SkdError:
    """Return a failure as an error that says what to do."""
    if isinstance(error, ODD_ANSWERS) or (isinstance(error, ApiException) and _UNREADABLE in str(error.reason)):
        said = " ".join(str(getattr(error, "reason", error)).split())[:200]
        hint = "check that --host is the API of Kubeflow Pipelines v2: behind the dashboard it ends in /pipeline"
        return SkdError(f"the answer is not one of Kubeflow Pipelines: {said}", where=host, hint=hint)
    if not isinstance(error, ApiException):
        return away(host, briefly(error))
    said = f": {_message(error)}" if _message(error) else ""
    match error.status:
        case 0:
            hint = "check that the host serves https, and that its certificate is trusted here"
            return SkdError(f"no secure connection{said}", where=host, hint=hint)
        case 401:
            hint = "log in again and renew the token or cookie, or choose other credentials with --auth"
            return SkdError(f"the server does not accept our credentials{said}", where=host, hint=hint)
        case 403:
            hint = "ask for a role that may create runs in this namespace (see docs/guides/kubeflow-triggers.md)"
            return SkdError(f"access denied{said}", where=host, hint=hint)
        case 404:
            hint = "check that --host is the API of Kubeflow Pipelines: behind the dashboard it ends in /pipeline"
            return SkdError(f"not found{said}", where=host, hint=hint)
        case status if _may_pass(status):
            return SkdError(f"the server fails (HTTP {status}){said}", where=host, hint="try again later")
        case status:
            return SkdError(f"the server refuses the request (HTTP {status}){said}", where=host)


def _message(error: ApiException) -> str:
    """Return the server's message, without the headers that `str(error)` would show."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body
    try:
        answer = json.loads(body or "")
    except ValueError:
        return str(error.reason or "")
    said = answer.get("message") or answer.get("error_message") if isinstance(answer, dict) else ""
    return " ".join(str(said or error.reason or "").split())
