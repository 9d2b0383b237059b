"""Start one run for new data, however often and in whatever order the data is announced.

The decision depends on what is in storage now, not on what an event says. Three guards know of earlier runs: Kubeflow's
list of runs, a tag in MLflow, and the claim, which also keeps processes from starting the same run at the same time.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from skd_kfp.pipelines.kubeflow.api import KubeflowPipelines, Unsettled
from skd_kfp.pipelines.kubeflow.claims import claim, claim_uri, remembered
from skd_kfp.pipelines.kubeflow.states import FAILED, was_cancelled
from skd_kfp.pipelines.kubeflow.submit import SHORT_DIGEST, Package, Submission, Target
from skd_lib import storage
from skd_lib.config import FilesSource, HubSource, RunConfig
from skd_lib.data.files import is_there, stored_files
from skd_lib.data.prepared import data_fingerprint, digest
from skd_lib.errors import SkdError
from skd_lib.steps.environment import EXPERIMENT_VARIABLE
from skd_lib.tracking import triggered

if TYPE_CHECKING:
    from mlflow.entities import Run

PLACEHOLDER = "{source}"
MARKER = "_SUCCESS"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """The decision about a source.

    `name` is the same for the same data, settings and pipeline, and empty while data is missing; `run_id` is the run
    that was started, or the earlier one.
    """

    fire: bool
    reason: str
    name: str = ""
    run_id: str = ""


@dataclass(frozen=True)
class Trigger:
    """Starts runs of one configuration.

    `{source}` in the data files of `config` stands for the source, where `marker` is written last. `claims` is a local
    folder or gs:// URI; empty: only the processes of this machine are kept apart. Where `attempts` runs of the same
    data have failed no more are started. For `max_drop` see `Drift`; None: always.
    """

    config: RunConfig
    package: Package
    target: Target
    api: KubeflowPipelines
    claims: str = ""
    marker: str = MARKER
    attempts: int = 1
    tracking_uri: str = ""
    max_drop: float | None = None

    def explain(self, source: str) -> Decision:
        """Say what `fire` would do, and start nothing."""
        submission = self._plan(source)
        if isinstance(submission, Decision):
            return submission
        decision = self._look(submission.name, self._memory(), remembered(self.claims, submission.name))
        return self._needed(decision, source)

    def fire(self, source: str) -> Decision:
        """Start a run on the data at `source`, if it is complete and there is none yet.

        Raises Busy where another process is about to start it.
        """
        submission = self._plan(source)
        if isinstance(submission, Decision):
            return submission
        name, memory = submission.name, self._memory()
        # Before the claim, which a measurement could outlast.
        decision = wanted = self._needed(self._look(name, memory, remembered(self.claims, name)), source)
        if not decision.fire:
            return decision
        run = submission.prepare(self.api, reason=f"skd trigger {source}")
        with claim(self.claims, name) as held:
            decision = self._look(name, memory, held.run_id)
            if not decision.fire:
                return decision
            try:
                made = submission.start(self.api, run, before=held.expires)
            except Unsettled:
                held.kept = True
                raise
            held.run_id = made.run_id
            if memory.note(name, made.run_id, self.config.name):
                held.run_id = ""  # MLflow remembers it
            return replace(wanted, run_id=made.run_id)

    def _needed(self, decision: Decision, source: str) -> Decision:
        """Return the decision, turned down where a run could start but the champion is still accepted well enough."""
        if self.max_drop is None or not decision.fire:
            return decision
        from skd_kfp.pipelines.kubeflow.drift import Drift  # with all that loads models

        memory = f"{claim_uri(self.claims, decision.name)}.acceptance" if self.claims else ""
        drift = Drift(reading_from(self.config, source), self.tracking_uri, self.max_drop, memory)
        fire, reason = drift.decide()
        return replace(decision, fire=fire, reason=f"{decision.reason}; {reason}" if fire else reason)

    def _memory(self) -> _Memory:
        experiment = self.target.mlflow_experiment or os.environ.get(EXPERIMENT_VARIABLE) or "skd"  # as the steps do
        return _Memory(self.tracking_uri, experiment)

    def _plan(self, source: str) -> Submission | Decision:
        """Return the run for the data that is at `source` now, or why there cannot be one yet."""
        config = reading_from(self.config, source)
        marker = f"{source.rstrip('/')}/{self.marker}"
        files = config.data.source
        # A commit of the hub is complete; files are complete once the marker is there.
        data = [*files.train, *files.validation, *files.test] if isinstance(files, FilesSource) else []
        for uri in [marker, *data] if data else []:
            if not (storage.exists(uri) if uri == marker else is_there(uri)):
                return Decision(fire=False, reason=f"the data is not complete: there is no {uri}")
        submission = Submission.plan(config, self.package, self.target)
        # The places of records and artifacts are not part of the identity.
        settings = config.model_dump(mode="json", exclude={"data"})
        identity = {"data": data_fingerprint(config.data), "pipeline": self.package.digest, "settings": settings}
        # Read last: a file that was overwritten before the fingerprint was taken is newer than the marker.
        written = _modified(marker) if data else math.inf
        for uri in data:
            for stored in stored_files(uri):
                if stored.modified > written:
                    reason = f"the data is being replaced: {stored.uri} is newer than {marker}"
                    return Decision(fire=False, reason=reason)
        return replace(submission, name=f"skd-{digest(identity)[:SHORT_DIGEST]}")

    def _look(self, name: str, memory: _Memory, started: str) -> Decision:
        """Decide by the runs of this name that Kubeflow lists, and by those that MLflow and the claim remember.

        `started`, which the claim remembers, is read before Kubeflow is asked: a run that is started in between is then
        in Kubeflow's list.
        """
        experiment = self.api.find_experiment(self.target.experiment)
        runs = self.api.runs_named(name, experiment) if experiment else []
        for run in reversed(runs):
            # A run that is neither known to have failed nor to have been cancelled may run, or have succeeded.
            if was_cancelled(run) or run.state != FAILED:
                state = "cancelled by a person" if was_cancelled(run) else (run.state or "PENDING").lower()
                reason = f"there is a run for this data already, {state}"
                return Decision(fire=False, reason=reason, name=name, run_id=run.run_id)
        if len(runs) >= self.attempts:
            many = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
            reason = f"{many} on this data failed: correct it, or raise --attempts"
            return Decision(fire=False, reason=reason, name=name, run_id=runs[-1].run_id)
        # A run that failed before it reached MLflow is still open there: Kubeflow's list of failed runs comes first.
        failed = [run.run_id for run in runs]
        known = memory.run_for(name, failed=failed)
        if known is not None:
            what = f"{triggered.how_it_ended(known).lower()}, which MLflow alone still knows: {known.info.run_id}"
            way_out = f"to run it again, delete that MLflow run or its tag {triggered.TRIGGER_TAG}"
            reason = f"there is a run for this data already, {what}; {way_out}"
            return Decision(fire=False, reason=reason, name=name)
        if started and started not in failed:
            reason = (
                f"a run for this data was started, {started}, which Kubeflow no longer knows; "
                f"to run it again, delete {claim_uri(self.claims, name)}"
            )
            return Decision(fire=False, reason=reason, name=name)
        reason = f"there is no run for this data yet{', but failed ones' if runs else ''}"
        return Decision(fire=True, reason=reason, name=name)


def _modified(marker: str) -> float:
    """Return when the marker was written."""
    found = storage.list_objects(marker)
    name = marker.rpartition("/")[2]
    if [stored.uri.rpartition("/")[2] for stored in found] != [name]:
        raise SkdError("the marker is a folder, not a file", where=marker, hint="write a file of that name")
    return found[0].modified


class _Memory:
    """The runs that MLflow remembers.

    Without an answer Kubeflow and the claim decide alone, and MLflow is not asked again, so that a server that is away
    is waited for once.
    """

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        self._tracking_uri, self._experiment = tracking_uri, experiment
        self._asked = bool(tracking_uri)

    def run_for(self, name: str, failed: Collection[str]) -> Run | None:
        """Return `triggered.run_for`; None also without an answer."""
        if not self._asked:
            return None
        try:
            return triggered.run_for(name, failed=failed, tracking_uri=self._tracking_uri)
        except SkdError as error:
            log.warning("MLflow cannot tell of earlier runs on this data, Kubeflow alone decides: %s", error.brief)
            self._asked = False
            return None

    def note(self, name: str, run_id: str, run_name: str) -> bool:
        """Write the tag by `triggered.note`, and return whether MLflow took it."""
        if not self._asked:
            return False
        try:
            triggered.note(
                name,
                pipeline_run_id=run_id,
                run_name=run_name,
                tracking_uri=self._tracking_uri,
                experiment=self._experiment,
            )
        except SkdError as error:
            log.warning("run %s was started, but MLflow does not know of it: %s", run_id, error.brief)
            return False
        return True


def check_source(config: RunConfig, source: str) -> None:
    """Check that a configuration reads from a source, and that it exists: a misspelt one would wait for ever."""
    files = reading_from(config, source).data.source
    if not isinstance(files, FilesSource):
        return
    if not storage.is_remote(source) and "://" not in source and not Path(source).is_absolute():
        hint = "give a gs:// URI, or the absolute path of a volume that is mounted here as in the steps' pods"
        raise SkdError("the cluster cannot read a relative path of this machine", where=f"SOURCE {source}", hint=hint)
    if not storage.exists(source):
        hint = "check the spelling; a folder in a bucket is there once a file is in it"
        raise SkdError("there is no such folder", where=f"SOURCE {source}", hint=hint)


def reading_from(config: RunConfig, source: str) -> RunConfig:
    """Return the configuration with the source for `{source}` in its files; raise SkdError if it reads elsewhere."""
    files = config.data.source
    hint = f"write {PLACEHOLDER} for the folder in data.source.train, validation and test"
    if isinstance(files, HubSource) and files.dataset == source:
        return config
    if not isinstance(files, FilesSource):
        raise SkdError(
            "the configuration does not read its data from there",
            where=source,
            hint=hint if not isinstance(files, HubSource) else f"its dataset is {files.dataset}",
        )
    folder = source.rstrip("/")
    splits = {
        split: [uri.replace(PLACEHOLDER, folder) for uri in uris]
        for split, uris in (("train", files.train), ("validation", files.validation), ("test", files.test))
    }
    if not any(uri == folder or uri.startswith(f"{folder}/") for uris in splits.values() for uri in uris):
        raise SkdError("the configuration does not read its data from there", where=source, hint=hint)
    data = config.data.model_copy(update={"source": files.model_copy(update=splits)})
    return config.model_copy(update={"data": data})
