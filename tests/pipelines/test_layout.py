"""The pipelines as Kubeflow's page draws them: a person can follow the method in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pipelines.page import Layer, layers

LAYERS = layers()
WIDTHS = json.loads(Path(__file__).with_name("page_widths.json").read_text(encoding="utf-8"))
EVERYWHERE = pytest.mark.parametrize("name", LAYERS)


@EVERYWHERE
def test_a_layer_has_at_most_a_dozen_nodes(name: str) -> None:
    """Commit 9e44b4e: 44 nodes."""
    assert len(LAYERS[name].kinds) <= 12


@EVERYWHERE
def test_a_layer_is_as_wide_as_a_screen(name: str) -> None:
    """Commit 9e44b4e: nearly 7,000 pixels."""
    measured = WIDTHS.get(name, {"digest": "not measured"})
    assert measured["digest"] == LAYERS[name].digest, "the graph has changed: measure it, see tests/pipelines/page.py"
    assert measured["width"] <= 1400


@EVERYWHERE
def test_no_step_is_everyone_s_neighbour(name: str) -> None:
    """Where there are many: a chapter of five may have a first one."""
    layer = LAYERS[name]
    for task in layer.tasks:
        assert len(layer.neighbours(task)) <= max(4, len(layer.tasks) - 2), task


def test_the_chapters_are_the_method() -> None:
    tasks = [task.removeprefix("task.") for task in LAYERS["distillation exit-handler-1"].tasks]
    assert set(tasks) == {"prepare", "teacher-sft", "student-init", "distill", "measure", "register-model"}


def test_edges_through_an_artifact_do_not_count() -> None:
    layer = Layer({"task.a": "step", "artifact.a.x": "artifact", "task.b": "step"}, (("task.a", "artifact.a.x"),))
    assert layer.neighbours("task.a") == set()
