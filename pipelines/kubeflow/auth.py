"""Find the credentials for Kubeflow Pipelines. No secret is an option of a command or written to a log."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from skd_lib._core.uris import shown
from skd_lib.errors import SkdError

TOKEN, COOKIE = "SKD_KFP_TOKEN", "SKD_KFP_COOKIE"
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}


class Auth(StrEnum):
    """The kinds of credentials."""

    AUTO = "auto"
    NONE = "none"
    IN_CLUSTER = "in-cluster"
    ID_TOKEN = "id-token"  # noqa: S105 - the name of a kind
    COOKIE = "cookie"


Credentials: TypeAlias = Callable[[bool], dict[str, str]]
"""Returns the headers of a request. True asks for new ones, since the server refused the last; `SkdError` if there are
none."""


def anonymous(renew: bool = False) -> dict[str, str]:
    """Return no headers, for a port-forward or a cluster without authentication."""
    del renew
    return {}


def secret(read: Callable[[], str], header: str = "Authorization", prefix: str = "Bearer ") -> Credentials:
    """Return the credentials of a bearer token or session cookie that something else makes and renews.

    It is read before every request: the kubelet, or a sidecar, writes a renewed one to the same file.
    """
    return lambda _renew: {header: prefix + read()}


def id_token(audience: str) -> Credentials:
    """Return the credentials of OpenID Connect tokens that Google's application default credentials make and renew."""
    lock = threading.Lock()
    made: list[Any] = []

    def headers(renew: bool) -> dict[str, str]:
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import Request
        from google.oauth2.id_token import fetch_id_token_credentials

        with lock:
            try:
                if not made:
                    made.append(fetch_id_token_credentials(audience, Request()))  # type: ignore[no-untyped-call, unused-ignore]
                if renew or not made[0].valid:
                    made[0].refresh(Request())
            except GoogleAuthError as error:
                raise SkdError(
                    f"Google gives no id-token: {error}",
                    where=f"audience {audience}",
                    hint="run as a service account, or put a token into the file that SKD_KFP_TOKEN_FILE names",
                ) from error
            return {"Authorization": f"Bearer {made[0].token}"}

    return headers


def find_credentials(auth: Auth, host: str, audience: str = "") -> Credentials:
    """Return the credentials of a kind; `auto` takes the first that exist: in-cluster, id-token, cookie, none.

    - in-cluster: the service account's token, which the kubelet projects into the pod and renews. Its file is KFP's
      own: `KF_PIPELINES_SA_TOKEN_PATH`, or `/var/run/secrets/kubeflow/pipelines/token`.
    - id-token: from `SKD_KFP_TOKEN` or the file `SKD_KFP_TOKEN_FILE`, else from Google for `audience` (the OAuth client
      of Identity-Aware Proxy).
    - cookie: Dex's session, `NAME=VALUE`, from `SKD_KFP_COOKIE` or the file `SKD_KFP_COOKIE_FILE`.

    Raises SkdError where there are none of this kind, or they would go unencrypted over a network.
    """
    if auth is Auth.AUTO:
        auth = _present(audience)
    if auth in {Auth.ID_TOKEN, Auth.COOKIE}:
        _check_encrypted(host)
    match auth:
        case Auth.IN_CLUSTER:
            path = _service_account_token()
            return secret(lambda: _read(path))
        case Auth.ID_TOKEN if audience and not _is_set(TOKEN):
            return id_token(audience)
        case Auth.ID_TOKEN:
            return secret(_from_environment(TOKEN, "or name the audience with --audience"))
        case Auth.COOKIE:
            return secret(_from_environment(COOKIE, "log in and copy the session cookie"), "Cookie", "")
        case _:
            return anonymous


def _present(audience: str) -> Auth:
    if _service_account_token().is_file():
        return Auth.IN_CLUSTER
    if audience or _is_set(TOKEN):
        return Auth.ID_TOKEN
    return Auth.COOKIE if _is_set(COOKIE) else Auth.NONE


def _is_set(name: str) -> bool:
    return bool(os.environ.get(name) or os.environ.get(f"{name}_FILE"))


def _service_account_token() -> Path:
    from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH

    return Path(os.environ.get(KF_PIPELINES_SA_TOKEN_ENV) or KF_PIPELINES_SA_TOKEN_PATH)


def _from_environment(name: str, advice: str) -> Callable[[], str]:
    value, file = os.environ.get(name), os.environ.get(f"{name}_FILE")
    if file:
        return lambda: _read(Path(file))
    if value:
        return lambda: value
    raise SkdError("there are no credentials", where=name, hint=f"set {name} or {name}_FILE; {advice}")


def _read(path: Path) -> str:
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SkdError(f"cannot read the credentials: {type(error).__name__}", where=str(path)) from error
    if not secret or not secret.isprintable():
        raise SkdError("the file holds no credentials: one line of text is expected", where=str(path))
    return secret


def _check_encrypted(host: str) -> None:
    url = urlsplit(host)
    if url.scheme != "https" and url.hostname not in LOCAL_HOSTS:
        raise SkdError(
            "credentials would go unencrypted over the network", where=shown(host), hint="give an https:// host"
        )
