"""The folder of a local run.

runs/<name>/
  config.yaml     the configuration of the last run
  run.json        the run's id, kept while configuration, data, models and code stay the same
  logs/           one file a step, and kfp's own
  artifacts/      the outputs of the steps
  checkpoints/    training goes on from here after an interruption
  tracking/       records that MLflow has not taken yet
  .cache/         kfp's cache: which outputs belong to which inputs
  report.html     the page
  summary.json    the figures on it
  samples.jsonl   the training sequences on it
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock
import yaml

from skd_kfp.pipelines.local.reuse import Identity, is_same
from skd_lib.config import RunConfig
from skd_lib.config.parameters import to_struct
from skd_lib.errors import SkdError
from skd_lib.report.sources import PAGE, SUMMARY
from skd_lib.storage import write_text_atomic


class RunFolder:
    """The files of one run: its folder `root`, and the paths in it that the module lists."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.logs, self.artifacts, self.checkpoints = root / "logs", root / "artifacts", root / "checkpoints"
        self.records, self.cache, self.kfp_log = root / "tracking", root / ".cache", self.logs / "kfp.log"
        self.page, self.summary = root / PAGE, root / SUMMARY

    @classmethod
    def create(cls, runs: Path, name: str) -> RunFolder:
        """Create the folder of run `name` where it is missing."""
        folder = cls((runs / name).resolve())
        try:
            for path in (folder.logs, folder.artifacts, folder.cache, folder.checkpoints):
                path.mkdir(parents=True, exist_ok=True)
            write_text_atomic(folder.root / ".writable", "")
            (folder.root / ".writable").unlink()
        except OSError as error:
            raise SkdError(
                f"cannot write the run's folder: {error.strerror}",
                where=str(folder.root),
                hint="choose another with --runs-dir, or change its permissions",
            ) from error
        return folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder during the block; raise SkdError if one is in it."""
        lock = filelock.FileLock(self.root / ".lock", blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise SkdError(
                "another `skd run` or `skd compare` is using this folder",
                where=str(self.root),
                hint="wait for it, or give this run another `name`",
            ) from error
        try:
            yield
        finally:
            lock.release()

    def in_use(self) -> bool:
        """Return whether a run is in the folder now."""
        try:
            with filelock.FileLock(self.root / ".lock", blocking=False):
                return False
        except filelock.Timeout:
            return True
        except OSError:  # another user's folder, which this process may only read
            return False

    def link(self, name: str, target: Path) -> Path:
        """Point the link `name` at an artifact and return it, or the artifact where the file system has no links."""
        link, new = self.root / name, self.root / f".{name}.new"
        try:
            new.unlink(missing_ok=True)
            new.symlink_to(os.path.relpath(target, self.root), target_is_directory=True)
            new.replace(link)
        except OSError:
            return target
        return link

    def forget(self) -> None:
        """Delete cache and checkpoints; artifacts stay, since registered models are there."""
        for path in (self.cache, self.checkpoints):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()

    def run_id(self, config: RunConfig, identity: Identity, *, fresh: bool) -> str:
        """Return the run's id in MLflow, the same while its identity is: a resumed run continues its records."""
        file = self.root / "run.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        before: Identity = known.get("identity", {})
        if fresh or not is_same(before, identity):
            known = {"run_id": str(uuid.uuid4())}
            before = {}
            write_text_atomic(self.root / "config.yaml", yaml.safe_dump(to_struct(config), sort_keys=False))
        known["identity"] = {**before, **{name: text or before.get(name, "") for name, text in identity.items()}}
        write_text_atomic(file, json.dumps(known, indent=2) + "\n")
        return str(known["run_id"])
