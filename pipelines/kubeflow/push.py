"""Pub/Sub's pushed notifications of Google Cloud Storage, as an HTTP service, e.g. on Cloud Run.

Pub/Sub delivers an event at least once, and again until it gets an answer of 2xx.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from typing_extensions import override

from skd_kfp.pipelines.kubeflow.claims import Busy
from skd_kfp.pipelines.kubeflow.trigger import Decision
from skd_lib._core.bugs import explained
from skd_lib._core.documents import parse_json
from skd_lib.errors import SkdError
from skd_lib.storage import GCS

MAX_BYTES = 1 << 20
ISSUERS = {"accounts.google.com", "https://accounts.google.com"}
GOOGLE_CERTS = "https://www.googleapis.com/oauth2/v1/certs"
SOCKET_SECONDS = 10
"""A sender that says nothing for so long is cut off."""
MAX_THREADS = 64
LOCAL = "127.0.0.1"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushAuth:
    """Which tokens a push has to bring.

    Attributes:
        audience: The subscription's audience.
        account: E-mail of the service account as which the subscription pushes; empty: any that Google vouches for.
        certs_url: Where the issuer's keys are.
    """

    audience: str
    account: str = ""
    certs_url: str = GOOGLE_CERTS

    def accepts(self, authorization: str) -> bool:
        """Whether this `Authorization` header holds a token that is meant for us and valid now.

        Raises:
            TransportError: the issuer's keys cannot be had.
        """
        from google.auth.exceptions import GoogleAuthError, TransportError
        from google.auth.transport.requests import Request
        from google.oauth2.id_token import verify_token

        try:
            claims = verify_token(
                authorization.removeprefix("Bearer "), Request(), self.audience, certs_url=self.certs_url
            )
        except TransportError:
            raise
        except (GoogleAuthError, ValueError) as error:
            logger.warning("refused a push: %s", type(error).__name__)
            return False
        return claims.get("iss") in ISSUERS and (
            not self.account or (claims.get("email") == self.account and claims.get("email_verified") is True)
        )


def source_of(message: Mapping[str, Any], root: str, marker: str) -> str | None:
    """The folder whose completion an event announces; None if it announces nothing of the kind.

    Args:
        message: A Pub/Sub message of a notification by Google Cloud Storage.
        root: gs:// URI of the folder in which sources are.
        marker: Name of the object that completes one.
    """
    attributes = message.get("attributes") or {}
    uri = f"{GCS}{attributes.get('bucketId')}/{attributes.get('objectId')}"
    folder, _, name = uri.rpartition("/")
    inside = folder == root.rstrip("/") or folder.startswith(f"{root.rstrip('/')}/")
    return folder if attributes.get("eventType") == "OBJECT_FINALIZE" and name == marker and inside else None


def read_message(body: bytes) -> Mapping[str, Any]:
    """The message in a push.

    Raises:
        ValueError: it is none.
    """
    try:
        envelope = parse_json(body, where="push")
    except SkdError as error:
        raise ValueError(error.what) from error
    message = envelope.get("message") if isinstance(envelope, dict) else None
    if not isinstance(message, dict) or not isinstance(message.get("attributes", {}), dict):
        raise ValueError("no Pub/Sub message")
    try:
        base64.b64decode(message.get("data", ""), validate=True)
    except (binascii.Error, TypeError) as error:
        raise ValueError("data that is not base64") from error
    return message


def make_server(
    port: int, fire: Callable[[str], Decision], *, root: str, marker: str, auth: PushAuth | None
) -> ThreadingHTTPServer:
    """A server that answers pushes with `fire` on the source that they announce. It is not yet running.

    Without `auth` it takes pushes from this machine alone.

    Raises:
        SkdError: the port cannot be listened on.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = SOCKET_SECONDS

        def do_GET(self) -> None:
            """Tell a health check that we live."""
            self._answer(HTTPStatus.OK, {"status": "ok"})

        def do_POST(self) -> None:
            """Answer a push."""
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal():
                self._answer(HTTPStatus.LENGTH_REQUIRED, {"error": "no Content-Length"})
                return
            if int(length) > MAX_BYTES:
                self.rfile.read(min(int(length), 2 * MAX_BYTES))  # so that the sender gets to hear the answer
                self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": "too large"})
                return
            self._answer(*self._respond(self.rfile.read(int(length))))

        def _respond(self, body: bytes) -> tuple[HTTPStatus, dict[str, Any]]:
            if auth is not None:
                from google.auth.exceptions import TransportError

                try:
                    accepted = auth.accepts(self.headers.get("Authorization", ""))
                except TransportError as error:
                    logger.warning("cannot get the issuer's keys: %s", error)
                    return HTTPStatus.SERVICE_UNAVAILABLE, {"error": "tokens cannot be verified now"}
                if not accepted:
                    return HTTPStatus.UNAUTHORIZED, {"error": "no valid token"}
            try:
                source = source_of(read_message(body), root, marker)
            except ValueError as error:
                return HTTPStatus.BAD_REQUEST, {"error": f"not a push of Pub/Sub: {error}"}
            if source is None:
                return HTTPStatus.OK, Decision(fire=False, reason="the event completes no source").to_dict()
            try:
                decision = fire(source)
            except Busy as busy:
                return HTTPStatus.SERVICE_UNAVAILABLE, {"error": busy.brief}
            except Exception as error:  # noqa: BLE001 - Pub/Sub gets an answer whatever happens
                told = explained(error)
                logger.error("%s: %s", source, told)
                return HTTPStatus.INTERNAL_SERVER_ERROR, {"error": told.brief}
            logger.info("%s: %s", source, json.dumps(decision.to_dict()))
            return HTTPStatus.OK, decision.to_dict()

        def _answer(self, status: HTTPStatus, answer: dict[str, Any]) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named by http.server
            """One line a request, without its headers."""
            logger.debug(format, *args)

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # stopping waits for requests that are being answered
        request_queue_size = 128  # Pub/Sub opens many connections at once
        slots = threading.BoundedSemaphore(MAX_THREADS)

        @override
        def process_request(self, request: Any, client_address: Any) -> None:
            if self.slots.acquire(timeout=1):
                super().process_request(request, client_address)
            else:
                self.shutdown_request(request)  # Pub/Sub delivers it again

        @override
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                self.slots.release()

        @override
        def handle_error(self, request: Any, client_address: Any) -> None:
            """One line where a sender has gone, or a bug."""
            error = sys.exception()
            if isinstance(error, Exception):
                logger.warning("a request was not answered: %s", explained(error))

    try:
        return Server(("" if auth else LOCAL, port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SkdError(
            f"cannot listen on port {port}: {reason}", where="--listen", hint="choose another port"
        ) from error


def serve(server: ThreadingHTTPServer) -> None:
    """Serve until SIGTERM, then finish what is being answered."""

    def stop(_number: int, _frame: object) -> None:
        threading.Thread(target=server.shutdown).start()  # `shutdown` waits for the loop that we are in

    signal.signal(signal.SIGTERM, stop)
    with server:
        server.serve_forever(poll_interval=0.2)
