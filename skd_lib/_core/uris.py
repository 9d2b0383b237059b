"""URIs: forms without passwords for people, and the sqlite files that some of them name.

Messages print URIs as `shown`. `redacted` is the last line of defence, where text leaves a process: error texts of
libraries quote URIs whole.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast
from urllib.parse import quote, unquote

from skd_lib.errors import SkdError

HIDDEN = "***"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_SENSITIVE = r"[\w.-]*(?:token|secret|passw|pwd|key|signature|credential|auth)[\w.-]*"
_VIEW = "viewStateShareKey="  # the name of a view of MLflow's page
_QUERY = re.compile(rf"([?&;#](?!{_VIEW}){_SENSITIVE}=)([^\s&;#\"'<>)]+)", re.IGNORECASE)
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#\"'<>@]*@")
_SECRET_VARIABLE = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_KEY|ACCOUNT_KEY)$")
_WEBHOOK_VARIABLE = re.compile(r"WEBHOOK(_URL)?$")
_SHORTEST = 4
"""Of a secret that is looked for alone: a shorter one would be found in every other word."""


def shown(uri: str) -> str:
    """Return a URI for people and records: without user and password, and with tokens in its query hidden."""
    scheme, separator, rest = uri.partition("://")
    if not separator:  # not a URI; its scheme may have been left out
        return f"{HIDDEN}@{uri.rpartition('@')[2]}" if re.match(r"[^@/]*:[^@]*@", uri) else uri
    return _QUERY.sub(rf"\1{HIDDEN}", f"{scheme}://{_without_user(rest)}")


def holds_secret(uri: str) -> bool:
    """Return whether a URI holds a password or a token."""
    return shown(uri) != uri


def redacted(text: str) -> str:
    """Remove passwords and tokens from a text.

    Removed are those of all URLs in it, and wherever they stand those that this process knows: of URLs in its
    environment and on its command line, and the values of variables that are named as secrets are.
    """
    return redactor()(text)


def redactor() -> Callable[[str], str]:
    """Return `redacted` for many texts, with the secrets that this process knows now."""
    known = _known()

    def redact(text: str) -> str:
        for secret in known:
            text = text.replace(secret, HIDDEN)
        if "://" in text:
            text = _USER.sub(rf"\1{HIDDEN}@", text)
        return _QUERY.sub(rf"\1{HIDDEN}", text) if "=" in text else text

    return redact


@contextmanager
def redacted_output(*, outlive_readers: bool = False) -> Iterator[None]:
    """Pass standard output and errors through `redacted` in the body.

    `outlive_readers` drops output after the reader of a pipe has ended, instead of raising an error: when a pod is
    stopped, the reader of its output ends first, and the rest of the work must not fail for that.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, Redacted(stream, outlive_readers=outlive_readers)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class Redacted:
    """A text stream without secrets; see `redacted_output`."""

    def __init__(self, stream: TextIO, *, outlive_readers: bool = False) -> None:
        self._stream, self._redact, self._outlive = stream, redactor(), outlive_readers

    def write(self, text: str) -> int:
        """Write a text, and return its length."""
        with self._reader():
            self._stream.write(self._redact(text))
        return len(text)

    def flush(self) -> None:
        """Write the text that is held back."""
        with self._reader():
            self._stream.flush()

    def writelines(self, lines: list[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    @contextmanager
    def _reader(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            if not self._outlive:
                raise
            # For good: what is still held back would fail once more when the process ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def sqlite_uri(path: Path) -> str:
    """Return the URI by which MLflow opens a sqlite file; raises SkdError for a path that no URI can name."""
    plain = f"sqlite:///{path}"
    if not set("%?") & set(plain):
        return plain
    from sqlalchemy.engine import make_url

    # Versions of SQLAlchemy before 2.1 take a path as it is. With a driver's name in the URI MLflow does not take the
    # quoted path for that of a folder, which it would make.
    for tried in (f"sqlite+pysqlite:///{quote(str(path), safe='/ @:#,+')}", f"sqlite+pysqlite:///{path}"):
        if make_url(tried).database == str(path):
            return tried
    raise SkdError(
        "the path has a character that no sqlite URI can hold with this version of SQLAlchemy",
        where=str(path),
        hint="choose another folder with --runs-dir, or install SQLAlchemy 2.1",
    )


def default_store(runs_dir: Path) -> str:
    """Return the URI of the MLflow store of a folder of runs."""
    return sqlite_uri(runs_dir.resolve() / "mlflow.db")


def how_to_look(tracking_uri: str) -> str:
    """Return the way to a store's records: a command to be pasted into a shell, or the server's address."""
    if is_sqlite(tracking_uri):
        return shlex.join(["mlflow", "ui", "--backend-store-uri", tracking_uri])
    return shown(tracking_uri)


def is_sqlite(uri: str) -> bool:
    """Return whether a URI names a sqlite file, which this process opens itself."""
    return uri.partition(":")[0].partition("+")[0] == "sqlite"


def sqlite_file(uri: str) -> Path | None:
    """Return the file that a sqlite URI names; None for one in memory, or for other URIs."""
    if not is_sqlite(uri):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):
        return None
    name = url.database or ""
    if name.startswith("file:") and url.query.get("uri"):  # a URI of sqlite's own
        name = unquote(name.removeprefix("file:").partition("?")[0])
        name = name.removeprefix("//localhost").removeprefix("//") if name.startswith("//") else name
        if url.query.get("mode") == "memory":
            return None
    return Path(name) if name and name != ":memory:" else None


def _without_user(rest: str) -> str:
    """Remove user and password from the text after `://`; a password may hold any character, quoted or not."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, colon, port = authority.partition(":")
    cut_off = bool(user and colon) and not port.isdigit() and not user.startswith("[") and "@" in rest
    return rest.rpartition("@")[2] if "@" in authority or cut_off else rest


def _known() -> list[str]:
    """Secrets of this process, the longest first."""
    found: set[str] = set()
    for text in [*sys.argv, *os.environ.values()]:
        if "://" not in text:
            continue
        whole = [] if len(text.split()) > 1 else [text]  # a password may hold what ends a URL in a sentence
        for url in [*_URL.findall(text), *whole]:
            found |= _secrets_in(url)
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name):
            found.add(value.strip())
        elif _WEBHOOK_VARIABLE.search(name):
            found |= {value.strip(), "/" + value.partition("://")[2].partition("/")[2]}
    return sorted((secret for secret in found if len(secret) >= _SHORTEST), key=len, reverse=True)


def _secrets_in(url: str) -> set[str]:
    rest = url.partition("://")[2]
    bare = _without_user(rest)
    user = rest[: len(rest) - len(bare)].removesuffix("@")
    password = user.partition(":")[2] or user
    values = {password, *(match[1] for match in _QUERY.findall(url))}
    return {form for value in values for form in (value, unquote(value), quote(unquote(value), safe=""))}
