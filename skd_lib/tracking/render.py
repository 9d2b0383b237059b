"""A version's lineage as a tree for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from skd_lib.tracking.lineage import Lineage, Weights


def render(lineage: Lineage) -> Tree:
    """The tree: the version at its root, below it what it was made of and by."""
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
    told = {name: value for name, value in values.items() if value not in ("", None)}
    if told:
        branch = tree.add(f"[cyan]{title}[/]")
        for name, value in told.items():
            branch.add(escape(f"{name}: {value}"))


def _add_weights(tree: Tree, name: str, weights: Weights) -> None:
    branch = tree.add(f"[cyan]{name}[/] {escape(weights.reference or 'not known')}")
    if weights.sha256:
        branch.add(f"weights sha256 {weights.sha256}")
    if weights.fingerprint:
        branch.add(f"fetched as {escape(weights.fingerprint)}")
