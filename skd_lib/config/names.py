"""Names that MLflow takes, so that a bad one is refused before training and not after it.

MLflow's own rules (`mlflow.utils.validation`) are not all: a name must fit a column of its database, and be found again
by a search, whose filter has no escape for quotes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from urllib.parse import urlsplit

from skd_lib.errors import SkdError

_LONGEST = 250
_RESERVED = "/:@"  # `models:/NAME/VERSION`, `models:/NAME@ALIAS`


def check_model_name(name: str) -> str:
    """Return the name of a registered model, or raise ValueError if MLflow does not take it."""
    check_line(name, _LONGEST)
    if reserved := [sign for sign in _RESERVED if sign in name]:
        raise ValueError(f"must not contain {' or '.join(_RESERVED)}, got {reserved[0]}")
    if name in (".", ".."):
        raise ValueError(f"{name!r} is a folder, not a name")
    if "'" in name and '"' in name:
        raise ValueError("must not contain both kinds of quotes: MLflow could not search for it")
    return name


def check_not_blank(text: str) -> str:
    """Return the text, or raise ValueError for a blank one, which as a path would be the working folder."""
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def check_experiment(name: str) -> str:
    """Return the name of an MLflow experiment, or raise ValueError if MLflow does not take it."""
    return check_line(name, _LONGEST)


def check_line(name: str, longest: int = 128) -> str:
    """Return the name, or raise ValueError unless it is one line of text, neither blank nor too long."""
    if not name.strip():
        raise ValueError("must not be blank")
    if name != name.strip():
        raise ValueError(f"must not begin or end with a space, got {name[:80]!r}")
    if not name.isprintable():
        raise ValueError(f"must be one line of printable characters, got {name[:80]!r}")
    if len(name) > longest:
        raise ValueError(f"has {len(name)} characters, the limit is {longest}")
    return name


def check_url(url: str, key_variable: str) -> str:
    """Return the base URL of an API without a slash at its end, or raise ValueError; its key is in a variable."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    parts = urlsplit(url)
    if not parts.hostname or parts.port == 0 or not url.isprintable() or " " in url:
        raise ValueError("must be http://HOST[:PORT]/PATH")
    if parts.username is not None:
        raise ValueError(f"must hold no password, it would be logged; put a key into {key_variable}")
    return url.rstrip("/")


def run_name_from(text: str) -> str:
    """Make a run's name of any text, for example of the name that a person gave the run in Kubeflow's page."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:63].rstrip("-") or "run"


def checked(option: str, check: Callable[[str], str], name: str) -> str:
    """Return a name from the command line, or raise SkdError with the option if a check of this module fails."""
    try:
        return check(name)
    except ValueError as error:
        raise SkdError(str(error), where=option) from error
