"""A PostgreSQL server of one's own, where Debian's package is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """The URI of an empty database; the test is skipped where there is no server or no driver.

    The server refuses to run as root: then it runs as the user `postgres` whom the package has made.
    """
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    if importlib.util.find_spec("psycopg2") is None:
        pytest.skip("no driver for PostgreSQL: pip install psycopg2-binary")
    user = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    folder = Path(tempfile.mkdtemp(prefix="skd-pg-", dir="/tmp"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def call(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [programs[-1].with_name(program), "-D", folder / "data", *arguments],
            cwd=folder,
            user=user.pw_uid if os.geteuid() == 0 else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    try:
        os.chown(folder, user.pw_uid, user.pw_gid)
        call("initdb", "--auth=trust", "--username=mlflow", "--no-sync", "--encoding=UTF8", "--locale=C")
        options = f"-c fsync=off -c listen_addresses=127.0.0.1 -p {port} -k {folder}"
        call("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", options)
        try:
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
