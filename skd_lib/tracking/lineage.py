"""The lineage of a registered version: data, teacher, settings, images, code, the pipeline run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from rich.markup import escape
from rich.tree import Tree

from skd_lib.errors import SkdError
from skd_lib.tracking.ending import STATE_TAG
from skd_lib.tracking.entries import PARAM_PREFIX
from skd_lib.tracking.locate import IMAGE_TAG, PIPELINE_RUN_TAG, TASK_TAG, children_of, get_run, search_everywhere
from skd_lib.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    DIGEST_TAG,
    FIGURE_PREFIX,
    FINGERPRINT_TAG,
    GATE_TAG,
    REGISTERED_BY_TAG,
    SIGNATURE_PREFIX,
    URI_TAG,
    aliased,
    ask_registry,
    find_version,
    registered_model,
    versions_of,
)
from skd_lib.tracking.registry import PIPELINE_RUN_TAG as VERSION_PIPELINE_RUN_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

_NAMED = {
    *(URI_TAG, DIGEST_TAG, FINGERPRINT_TAG, GATE_TAG, VERSION_PIPELINE_RUN_TAG, REGISTERED_BY_TAG, "code_version"),
    *("teacher", "teacher_weights_sha256", "teacher_fingerprint"),
    *("base_student", "base_student_fingerprint", "initial_weights_sha256"),
}
"""Tags of a version with a field of their own; the others are the settings of the distillation."""


class Weights(BaseModel):
    """A model, the sha256 of its weights, the fingerprint of all files that were fetched; empty where unknown."""

    reference: str
    sha256: str
    fingerprint: str = ""


class DataSplit(BaseModel):
    """A part of the prepared data, as a step read it."""

    name: str
    use: str
    rows: int | None
    sha256: str
    source: str


class Step(BaseModel):
    """A step of the pipeline run, with its role in its name; the image is empty outside of a container."""

    name: str
    run_id: str
    status: str
    code_version: str
    image: str


class Lineage(BaseModel):
    """The origin of a registered version; `missing` says what could not be traced, and why.

    `base` is the student before the distillation. `data_objects` are size, generation and checksum of each object that
    was read, or the wheel or hub revision. `registered_by` is another run than `pipeline_run_id` where that took the
    student from the cache. Steps from the cache, which another run has made, come first. Times are in milliseconds.
    """

    model: str
    version: str
    aliases: list[str]
    registered: int
    student: Weights
    teacher: Weights
    base: Weights
    distillation: dict[str, str]
    data_fingerprint: str
    data_source: dict[str, str] = {}
    data_objects: list[dict[str, Any]] = []
    data: list[DataSplit] = []
    code_version: str
    images: list[str] = []
    pipeline_run_id: str
    registered_by: str = ""
    mlflow_run_id: str
    state: str = ""
    steps: list[Step] = []
    figures: dict[str, float]
    gate: str
    champion: dict[str, str]
    missing: list[str] = []


def parse_model(reference: str) -> tuple[str, str, str]:
    """Return name, version and alias in `MODEL`, `MODEL/VERSION` or `MODEL@ALIAS`; empty where not given."""
    name, at, alias = reference.partition("@")
    version = ""
    if not at:
        head, slash, tail = reference.rpartition("/")
        if slash:
            name, version = head, tail
    if not name or (at and not alias) or (version and not version.isdigit()):
        hint = "write MODEL, MODEL@champion or MODEL/3 (a version)"
        raise SkdError("not a registered model", where=reference, hint=hint)
    return name, version, alias


def trace(*, tracking_uri: str, reference: str) -> Lineage:
    """Return the lineage of `MODEL/VERSION`, `MODEL@ALIAS`, or `MODEL`: its champion, else its challenger."""
    name, version, alias = parse_model(reference)

    def work(client: MlflowClient) -> Lineage:
        found = _find(client, name, version, alias)
        return _with_runs(client, _of_version(found), found.run_id)

    return ask_registry(tracking_uri, name, work)


def _find(client: MlflowClient, name: str, version: str, alias: str) -> ModelVersion:
    wanted = [alias] if alias else [CHAMPION, CHALLENGER]
    if not version:
        found = next((found for each in wanted if (found := aliased(client, name, each))), None)
        if found is None:
            raise _no_alias(client, name, alias)
        version = str(found.version)
    return find_version(client, name, version)


def _no_alias(client: MlflowClient, name: str, alias: str) -> SkdError:
    aliases = registered_model(client, name).aliases
    given = ", ".join(f"`{each}` (version {version})" for each, version in sorted(aliases.items())) or "none"
    what = f"no alias `{alias}`" if alias else f"neither alias `{CHAMPION}` nor `{CHALLENGER}`"
    versions = ", ".join(versions_of(client, name)) or "none"
    return SkdError(what, where=name, hint=f"its aliases are: {given}; its versions: {versions} (write {name}/VERSION)")


def _of_version(version: ModelVersion) -> Lineage:
    tags = version.tags

    def prefixed(prefix: str) -> dict[str, str]:
        return {name.removeprefix(prefix): value for name, value in tags.items() if name.startswith(prefix)}

    def weights(name: str, digest: str) -> Weights:
        fingerprint = tags.get(f"{name}_fingerprint", "")
        return Weights(reference=tags.get(name, ""), sha256=tags.get(digest, ""), fingerprint=fingerprint)

    other = (FIGURE_PREFIX, SIGNATURE_PREFIX, "champion.")
    return Lineage(
        model=version.name,
        version=str(version.version),
        aliases=list(version.aliases),
        registered=version.creation_timestamp,
        student=Weights(reference=tags.get(URI_TAG, version.source), sha256=tags.get(DIGEST_TAG, "")),
        teacher=weights("teacher", "teacher_weights_sha256"),
        base=weights("base_student", "initial_weights_sha256"),
        distillation={n: value for n, value in tags.items() if n not in _NAMED and not n.startswith(other)},
        data_fingerprint=tags.get(FINGERPRINT_TAG, ""),
        code_version=tags.get("code_version", ""),
        pipeline_run_id=tags.get(VERSION_PIPELINE_RUN_TAG, ""),
        registered_by=tags.get(REGISTERED_BY_TAG, ""),
        mlflow_run_id=version.run_id or "",
        figures={name: float(value) for name, value in prefixed(FIGURE_PREFIX).items()},
        gate=tags.get(GATE_TAG, ""),
        champion=prefixed("champion."),
    )


def _with_runs(client: MlflowClient, lineage: Lineage, run_id: str | None) -> Lineage:
    """Add what the records of the pipeline run and its steps hold."""
    parent = get_run(client, run_id) if run_id else None
    if parent is None:
        gone = f"the MLflow run {run_id} was deleted for good" if run_id else "the version names no MLflow run"
        return lineage.model_copy(update={"missing": [gone]})
    children = [run for run in children_of(client, parent) if TASK_TAG in run.data.tags]
    children = [*_reused(client, lineage, children), *children]
    steps = [_step(run) for run in children]
    prepared = next((run for run in children if run.data.tags.get(TASK_TAG) == "prepare_data"), None)
    missing = [] if prepared else ["no step `prepare_data` in this store: the data was prepared elsewhere"]
    update: dict[str, Any] = {
        "pipeline_run_id": lineage.pipeline_run_id or parent.data.tags.get(PIPELINE_RUN_TAG, ""),
        "state": parent.data.tags.get(STATE_TAG, ""),
        "steps": steps,
        "images": sorted({step.image for step in steps if step.image}),
    }
    if prepared:
        prefix = f"{PARAM_PREFIX}data.source."
        source = {
            name.removeprefix(prefix): value
            for name, value in prepared.data.params.items()
            if name.startswith(prefix) and value not in ("null", "[]", "{}")
        }
        objects = _manifest(client, prepared).get("source", [])
        if not objects:
            missing.append("the manifest of the prepared data, which holds the objects' checksums")
        update |= {"data": _splits(prepared), "data_source": source, "data_objects": objects}
    return lineage.model_copy(update={**update, "missing": missing})


def _reused(client: MlflowClient, lineage: Lineage, own: list[Run]) -> list[Run]:
    """Return the runs, in any experiment, of steps whose results the run took from the cache."""
    made = {
        "prepare_data": (FINGERPRINT_TAG, lineage.data_fingerprint),
        "teacher_sft": (DIGEST_TAG, lineage.teacher.sha256),
        "student_init": (DIGEST_TAG, lineage.base.sha256),
    }
    known = {run.data.tags.get(TASK_TAG) for run in own}
    found: list[Run] = []
    for task, (tag, value) in made.items():
        if value and task not in known:
            wanted = f"tags.`{TASK_TAG}` = '{task}' and tags.`{tag}` = '{value}' and attributes.status = 'FINISHED'"
            made_it = search_everywhere(client, wanted, order_by=["attributes.start_time DESC"], max_results=1)
            found += sorted(made_it, key=lambda run: int(run.info.start_time))[-1:]
    return found


def _step(run: Run) -> Step:
    tags = run.data.tags
    return Step(
        name=tags.get(TASK_TAG, run.info.run_name or ""),
        run_id=run.info.run_id,
        status=run.info.status,
        code_version=tags.get("code_version") or (f"skd-lib {tags['skd.version']}" if "skd.version" in tags else ""),
        image=tags.get(IMAGE_TAG, ""),
    )


def _splits(run: Run) -> list[DataSplit]:
    splits = []
    for used in run.inputs.dataset_inputs if run.inputs else []:
        profile = json.loads(used.dataset.profile or "{}")
        context = {tag.key: tag.value for tag in used.tags}.get("mlflow.data.context", "")
        split = DataSplit(
            name=used.dataset.name,
            use=context,
            rows=profile.get("num_rows"),
            sha256=profile.get("sha256", used.dataset.digest),
            source=json.loads(used.dataset.source).get("uri", ""),
        )
        splits.append(split)
    return splits


def _manifest(client: MlflowClient, run: Run) -> dict[str, Any]:
    """Return the manifest that `prepare_data` wrote; empty if the run has no such file."""
    from skd_lib.data.prepared import MANIFEST

    if all(artifact.path != MANIFEST for artifact in client.list_artifacts(run.info.run_id)):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = client.download_artifacts(run.info.run_id, MANIFEST, folder)
        manifest: dict[str, Any] = json.loads(Path(path).read_bytes())
    return manifest


def render(lineage: Lineage) -> Tree:
    """Return a tree for the terminal: the version at its root, below it what made it."""
    aliases = f" [green]{escape(', '.join(lineage.aliases))}[/]" if lineage.aliases else ""
    registered = datetime.fromtimestamp(lineage.registered / 1000, tz=UTC).isoformat(timespec="seconds")
    tree = Tree(f"[bold]{escape(lineage.model)}[/] version {lineage.version}{aliases}, registered {registered}")
    _add(tree, "champion", lineage.champion)
    for name in ("student", "teacher", "base"):
        _add_weights(tree, name, getattr(lineage, name))
    _add(tree, "distillation", lineage.distillation)
    data = tree.add(f"[cyan]data[/] fingerprint {lineage.data_fingerprint or 'not known'}")
    _add(data, "source", lineage.data_source)
    for item in lineage.data_objects:
        data.add(escape("object " + ", ".join(f"{key} {value}" for key, value in item.items() if value)))
    for split in lineage.data:
        rows = "" if split.rows is None else f", {split.rows} rows"
        data.add(escape(f"{split.name} ({split.use}{rows}) sha256 {split.sha256} from {split.source}"))
    _add(tree, "code", {"version": lineage.code_version})
    images = tree.add("[cyan]images[/]")
    for image in lineage.images or ["not known: the steps did not run in containers of this pipeline"]:
        images.add(escape(image))
    run = tree.add(f"[cyan]pipeline run[/] {escape(lineage.pipeline_run_id or 'not known')} {lineage.state}".rstrip())
    if lineage.registered_by not in ("", lineage.pipeline_run_id):
        run.add(escape(f"registered by a later run, {lineage.registered_by}"))
    if lineage.mlflow_run_id:
        run.add(f"MLflow run {lineage.mlflow_run_id}")
    for step in lineage.steps:
        run.add(escape(f"{step.name} {step.status} (MLflow run {step.run_id})"))
    _add(tree, "figures", {name: f"{value:.4g}" for name, value in lineage.figures.items()} | {"gate": lineage.gate})
    for reason in lineage.missing:
        tree.add(f"[yellow]not traced[/] {escape(reason)}")
    return tree


def _add(tree: Tree, title: str, values: Mapping[str, Any]) -> None:
    known = {name: value for name, value in values.items() if value not in ("", None)}
    if known:
        branch = tree.add(f"[cyan]{title}[/]")
        for name, value in known.items():
            branch.add(escape(f"{name}: {value}"))


def _add_weights(tree: Tree, name: str, weights: Weights) -> None:
    branch = tree.add(f"[cyan]{name}[/] {escape(weights.reference or 'not known')}")
    if weights.sha256:
        branch.add(f"weights sha256 {weights.sha256}")
    if weights.fingerprint:
        branch.add(f"fetched as {escape(weights.fingerprint)}")
