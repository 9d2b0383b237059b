"""Ask a container registry for the digest of a tag: `HEAD /v2/<name>/manifests/<tag>` of the OCI distribution spec."""

from __future__ import annotations

import re
from typing import Any

import requests
from docker import auth as docker_auth
from dxf import DXF
from dxf.exceptions import DXFError

from skd_kfp.components.images import Image
from skd_lib.errors import SkdError

TIMEOUT_SECONDS = 30.0
_LOCAL = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def registry_digest(image: Image) -> str:
    """Return the digest of the manifest, or of the list of manifests by platform, that the image's version tag names.

    Credentials are those of `docker login`, credential helpers included; without them the registry is asked
    anonymously. As docker does, it speaks plain HTTP only to this machine.

    Raises:
        SkdError: the registry does not have the tag, does not let us see it, cannot be reached, or answers nonsense.
    """
    host, name = _locate(image.image)
    tag = f"{image.image}:{image.version}"
    insecure = bool(_LOCAL.fullmatch(host))
    try:
        with DXF(host, name, _log_in(image.image), insecure=insecure, timeout=TIMEOUT_SECONDS) as registry:
            digest, _ = registry.head_manifest_and_response(image.version)
    except requests.HTTPError as error:
        status = error.response.status_code
        if status == requests.codes.not_found:
            raise SkdError("the registry has no such image", where=tag, hint="build and push it first") from error
        if status == requests.codes.forbidden:
            raise _refused(tag, host) from error
        raise SkdError(f"the registry answered with status {status}", where=tag, hint="try again later") from error
    except DXFError as error:
        raise _refused(tag, host) from error
    except requests.RequestException as error:
        raise SkdError(
            f"the registry cannot be reached: {error}", where=tag, hint="check the name of its host"
        ) from error
    if not _DIGEST.fullmatch(digest or ""):
        raise SkdError(f"the registry gave {digest!r} where a sha256 digest was expected", where=tag)
    return str(digest)


def _refused(tag: str, host: str) -> SkdError:
    return SkdError("the registry does not let us see this image", where=tag, hint=f"docker login {host}")


def _locate(image: str) -> tuple[str, str]:
    """Return host and repository, by docker's rules for names without a host."""
    host, name = docker_auth.resolve_repository_name(image)
    if host != docker_auth.INDEX_NAME:
        return host, name
    return "registry-1.docker.io", name if "/" in name else f"library/{name}"


def _log_in(image: str) -> Any:
    """Return the function that answers a registry's challenge."""
    host, _ = docker_auth.resolve_repository_name(image)
    known = docker_auth.load_config().resolve_authconfig(host) or {}

    def answer(registry: DXF, response: requests.Response) -> None:
        registry.authenticate(
            known.get("Username") or known.get("username"),
            known.get("Password") or known.get("password"),
            response=response,
        )

    return answer
