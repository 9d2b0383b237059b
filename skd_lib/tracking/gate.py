"""The champion: replaced by a new student (the challenger) that passes the gate, or by hand.

For the gate the run that asks measures both (step `evaluate_champion`): their scores on the same test set, and their
speed-ups and tokens per call as drafts of the same teacher, in turns. The figures that the champion was registered with
may be of other data and another teacher, and decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from pydantic import Field

from skd_lib import storage
from skd_lib._core.uris import is_sqlite
from skd_lib.config import Section
from skd_lib.errors import SkdError
from skd_lib.tracking.registry import (
    BY_HAND,
    DIGEST_TAG,
    URI_TAG,
    ask_registry,
    find_version,
    history,
    restore_champion,
    set_champion,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

REMEDY = (
    "put its files back, give the alias champion to a version that has them (`skd promote`, `skd rollback`), or delete "
    "the alias in MLflow's page"
)
"""Remedy for a champion whose files are gone."""


class Rival(Section):
    """The registered champion as measured by this run; all empty where there is none."""

    version: str = Field("", description="Its version in the registry; empty: there is no champion.")
    is_this_student: bool = Field(False, description="It has the new student's very weights.")
    figures: dict[str, float] = Field({}, description="Its scores on this run's test set, by metric.")
    speedup: float | None = Field(None, description="Its speed-up as a draft of this run's teacher.")
    challenger_speedup: float | None = Field(None, description="The new student's, measured in turns with it.")
    tokens_per_call: float | None = Field(None, description="Its tokens for each call of this run's teacher.")
    challenger_tokens_per_call: float | None = Field(None, description="The new student's, on the same prompts.")
    gain_low: float | None = Field(
        None, description="Of the 95 % interval of the difference, over the prompts; none where these are too few."
    )
    gain_high: float | None = None
    missing: str = Field("", description="Why it could not be measured.")
    undrafted: str = Field("", description="Why it could not draft for this run's teacher.")

    def as_drafts(self) -> dict[str, float]:
        """Return the figures of both as drafts, as far as they were measured."""
        names = (
            "speedup",
            "challenger_speedup",
            "tokens_per_call",
            "challenger_tokens_per_call",
            "gain_low",
            "gain_high",
        )
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Decision:
    """The gate's decision, and why in one sentence."""

    promote: bool
    reason: str


def decide(
    challenger: Mapping[str, float],
    champion: Rival,
    metric: str,
    *,
    higher_is_better: bool = True,
    min_improvement: float = 0.0,
    max_slowdown: float = 0.0,
    before: float | None = None,
) -> Decision:
    """Compare both on the task's metric and as drafts.

    The first version is promoted unless distillation made the student worse, a later one if its score beats the
    champion's by more than `min_improvement` and its speed-up as a draft is at least 1 - `max_slowdown` times the
    champion's. A champion that cannot be measured cannot be beaten: the alias has to be moved by hand. One that cannot
    draft for this teacher is compared by score alone.

    Args:
        challenger: The new student's scores, by metric.
        champion: The registered champion, as measured by this run.
        metric: The metric that decides.
        higher_is_better: Its direction.
        min_improvement: In the metric's unit, 0 or more.
        max_slowdown: 0 to 1, a share of the champion's speed-up.
        before: The student's score before distillation, where that was better beyond chance.

    Raises:
        SkdError: the challenger has no such score, or it is not a number.
    """
    score = challenger.get(metric, math.nan)
    if math.isnan(score):
        raise SkdError(
            f"the student has no score `{metric}` to decide by",
            where="gate",
            hint=f"evaluation must yield the first of `task.metrics`; it yielded {sorted(challenger)}",
        )
    shown, name = f"{metric} {score:.2f}", f"the champion (version {champion.version})"
    if not champion.version and before is not None:
        return Decision(False, f"distillation made the student worse: {metric} {before:.2f} before, {score:.2f} after")
    if not champion.version:
        return Decision(True, f"first champion of this name, with {shown}")
    if champion.is_this_student:
        return Decision(True, f"{name} is this very student, with {shown}")
    rival = champion.figures.get(metric, math.nan)
    if math.isnan(rival):
        why = champion.missing or f"it has no {metric} on this data"
        hint = "set the alias champion by hand to replace it"
        return Decision(False, f"{name} could not be measured; {hint}: {why}")
    gain = score - rival if higher_is_better else rival - score
    better, verdict = _improved(gain, min_improvement)
    fast_enough, speeds = _fast_enough(champion, max_slowdown)
    return Decision(better and fast_enough, f"{shown} against {rival:.2f} of {name}: {verdict}{speeds}")


def decide_drafts(
    champion: Rival, tokens_per_call: float | None, *, min_improvement: float = 0.0, max_slowdown: float = 0.0
) -> Decision:
    """Compare both as drafts alone, by tokens per teacher call and by speed-up, as `decide` does with a score.

    The difference has to be beyond `min_improvement` with all of its interval, where there is one.

    Args:
        champion: The registered champion, as measured by this run.
        tokens_per_call: The new student's, by the benchmark, None without one; decides about a first champion only,
            which needs more than 1.
        min_improvement: In tokens, 0 or more.
        max_slowdown: 0 to 1, a share of the champion's speed-up.
    """
    name = f"the champion (version {champion.version})"
    measured = "" if tokens_per_call is None else f", with {tokens_per_call:.2f} tokens per teacher call"
    if not champion.version and tokens_per_call is not None and tokens_per_call <= 1:
        return Decision(False, f"the teacher accepts none of its drafts{measured}")
    if not champion.version:
        return Decision(True, f"first champion of this name{measured}")
    if champion.is_this_student:
        return Decision(True, f"{name} is this very student{measured}")
    new, old = champion.challenger_tokens_per_call, champion.tokens_per_call
    if new is None or old is None:
        why = champion.missing or champion.undrafted or "it was not measured as a draft"
        hint = "set the alias champion by hand to replace it"
        return Decision(False, f"{name} could not be measured as a draft; {hint}: {why}")
    low, high = champion.gain_low, champion.gain_high
    better, verdict = _improved(new - old if low is None else low, min_improvement)
    how = "too few prompts for an interval" if low is None else f"95 % interval of the gain {low:+.2f} to {high:+.2f}"
    fast_enough, speeds = _fast_enough(champion, max_slowdown)
    reason = f"{new:.2f} tokens per teacher call against {old:.2f} of {name}, {how}: {verdict}{speeds}"
    return Decision(better and fast_enough, reason)


def _improved(gain: float, least: float) -> tuple[bool, str]:
    better = gain > least
    return better, f"{'' if better else 'not '}{f'more than {least:g} better' if least else 'better'}"


def _fast_enough(champion: Rival, max_slowdown: float) -> tuple[bool, str]:
    """Return whether the challenger drafts fast enough, and the speeds as the end of a reason."""
    if champion.speedup is None or champion.challenger_speedup is None:
        return True, f"; not compared as drafts: {champion.undrafted}" if champion.undrafted else ""
    fast_enough = champion.challenger_speedup >= (1 - max_slowdown) * champion.speedup
    verdict = f"{'not ' if fast_enough else ''}more than {100 * max_slowdown:g} % slower"
    return fast_enough, f"; as draft {champion.challenger_speedup:.2f}x against {champion.speedup:.2f}x: {verdict}"


@dataclass(frozen=True)
class Move:
    """A move of the alias: the champion now, and the one before (empty: none)."""

    model: str
    version: str
    before: str


def promote(*, tracking_uri: str, model: str, version: str, by: str, why: str) -> Move:
    """Make a version the champion.

    `by` (a person) and `why` are kept in the registry.

    Raises:
        SkdError: there is no such model or version, it is the champion already, it is no student of the pipeline, or
            its weights are gone.
    """

    def work(client: MlflowClient) -> Move:
        wanted = find_version(client, model, version)
        records = history(client, model)
        if records and records[-1].version == version and records[-1].why != BY_HAND:
            hint = f"`skd lineage {quote(model)}` shows since when"
            raise SkdError(f"version {version} is the champion already", where=model, hint=hint)
        _check_usable(wanted, model, tracking_uri)
        set_champion(client, model, version, by=by, why=why)
        return Move(model, version, records[-1].version if records else "")

    return ask_registry(tracking_uri, model, work)


def rollback(*, tracking_uri: str, model: str, by: str, why: str) -> Move:
    """Make the champion before the present one the champion again; a second time, the one before that.

    `by` (a person) and `why` are kept in the registry.

    Raises:
        SkdError: there is no champion, none before it, or its weights are gone.
    """

    def work(client: MlflowClient) -> Move:
        records = history(client, model)
        if not records:
            hint = f"make one: `skd promote {quote(model)} VERSION --why ...`"
            raise SkdError("no champion to roll back from", where=model, hint=hint)
        if len(records) == 1:
            what = f"version {records[0].version} is the first champion that is known: there is none to go back to"
            hint = f"name the version that is to be champion: `skd promote {quote(model)} VERSION --why ...`"
            raise SkdError(what, where=model, hint=hint)
        _check_usable(find_version(client, model, records[-2].version), model, tracking_uri)
        restore_champion(client, model, by=by, why=why)
        return Move(model, records[-2].version, records[-1].version)

    return ask_registry(tracking_uri, model, work)


def _check_usable(version: ModelVersion, model: str, tracking_uri: str) -> None:
    where = f"{model} version {version.version}"
    if DIGEST_TAG not in version.tags:
        what = "this version is no student that the pipeline registered: the digest of its weights is not known"
        raise SkdError(what, where=where, hint="promote a version that has the tag `weights_sha256`")
    weights = version.tags.get(URI_TAG, "")
    # A path of another machine cannot be looked at from here; behind a server it may be one. Kubeflow's own storage is
    # seen from inside the cluster alone, and people move aliases from their own machines.
    remote = storage.is_remote(weights) and not weights.startswith("minio://")
    visible = remote or (is_sqlite(tracking_uri) and "://" not in weights) or Path(weights).exists()
    if visible and not storage.exists(weights):
        what = f"its weights are gone: there is nothing at {weights}"
        raise SkdError(what, where=where, hint="promote another version")
