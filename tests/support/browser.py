"""A real browser that looks at pages, which a server on this machine hands out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.support.http import Server

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LIGHT, DARK = ("--blink-settings=preferredColorScheme=1", "--blink-settings=preferredColorScheme=0")


def browser() -> str:
    """The browser's program; skips the test without one."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(NAMES)} is installed")
    return found


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A server of a folder: its address, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            asked.append(self.path)

    with Server(partial(Handler, directory=str(folder))) as server:
        yield server.url, asked


def browse(folder: Path, *options: str) -> tuple[str, list[str]]:
    """Run the browser once, with its profile in a folder; its output and what its console said."""
    done = subprocess.run(
        [
            browser(),
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
            *("--enable-logging=stderr", "--virtual-time-budget=5000", f"--user-data-dir={folder / 'profile'}"),
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(folder: Path, address: str, *options: str) -> tuple[dict[str, Any], list[str]]:
    """What a page that looks at others has put into its element `result`, as JSON; and what the console said."""
    output, console = browse(folder, *options, "--dump-dom", address)
    (result,) = re.findall('<pre id="result">(.*?)</pre>', output)
    return json.loads(unescape(result)), console
