"""The graph that Kubeflow's page draws of one layer of a pipeline (kubeflow/pipelines, master of August 2026:
frontend/src/lib/v2/StaticFlow.ts, `buildDag` and `buildGraphLayout`; read).

Every task is a node, every output artifact, and every input artifact of the layer. The page has them laid out by dagre
0.8.5, from top to bottom, as boxes of 224 x 48 pixels, and draws them wider: a sub-DAG 308 with its button, a step 256,
an artifact 240 (frontend/src/components/graph/*.tsx).

The widths in `page_widths.json` are dagre's own. After a change of a pipeline's graph they are made again by

    python -m tests.pipelines.page | node tests/pipelines/page_widths.js > tests/pipelines/page_widths.json

with dagre where node finds it (`npm install dagre@0.8.5`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skd_kfp.pipelines.compiling import PIPELINES, compiled_path
from skd_lib._core.documents import parse_yaml_documents, read_text
from skd_lib.data.prepared import digest

Spec = Mapping[str, Any]
DRAWN = {"sub-DAG": 308, "step": 256, "artifact": 240}
"""Pixels of what the page draws."""


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        kinds: What each node is, by its id: `sub-DAG`, `step` or `artifact`. dagre goes by their order, too.
        edges: From node to node.
    """

    kinds: Mapping[str, str]
    edges: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        """Digest of all that the layout depends on."""
        return digest([list(self.kinds.items()), self.edges])[:12]

    def neighbours(self, task: str) -> set[str]:
        """Return the tasks that a task has an edge to or from, not through an artifact."""
        near = {end for edge in self.edges if task in edge for end in edge}
        return {end for end in near - {task} if self.kinds[end] != "artifact"}

    @property
    def tasks(self) -> list[str]:
        """The nodes that are tasks."""
        return [node for node, kind in self.kinds.items() if kind != "artifact"]


def layers() -> dict[str, Layer]:
    """Return every layer of the compiled pipelines, by pipeline and component; `root` is the top."""
    found: dict[str, Layer] = {}
    for name in PIPELINES:
        spec = parse_yaml_documents(read_text(compiled_path(name)), where=name)[0]
        for key, component in {"root": spec["root"], **spec["components"]}.items():
            if "dag" in component:
                found[f"{name} {key.removeprefix('comp-')}"] = _layer(component, spec["components"])
    return found


def _layer(component: Spec, components: Spec) -> Layer:
    tasks: Spec = component["dag"]["tasks"]
    inner = {key: components[task["componentRef"]["name"]] for key, task in tasks.items()}
    given = component.get("inputDefinitions", {}).get("artifacts", {})
    made = {key: list(spec.get("outputDefinitions", {}).get("artifacts", {})) for key, spec in inner.items()}
    kinds = {f"task.{key}": "sub-DAG" if "dag" in spec else "step" for key, spec in inner.items()}
    kinds |= {f"artifact..{name}": "artifact" for name in given}
    kinds |= {f"artifact.{key}.{name}": "artifact" for key, names in made.items() for name in names}
    edges = [(f"task.{key}", f"artifact.{key}.{name}") for key, names in made.items() for name in names]
    waits: list[tuple[str, str]] = []
    for key, task in tasks.items():
        for source in task.get("inputs", {}).get("artifacts", {}).values():
            output = source.get("taskOutputArtifact", {})
            name = output.get("outputArtifactKey", source.get("componentInputArtifact"))
            edges.append((f"artifact.{output.get('producerTask', '')}.{name}", f"task.{key}"))
        parameters = task.get("inputs", {}).get("parameters", {}).values()
        taken = [source["taskOutputParameter"] for source in parameters if "taskOutputParameter" in source]
        waits += [(f"task.{source['producerTask']}", f"task.{key}") for source in taken]
    waits += [
        (f"task.{other}", f"task.{key}") for key, task in tasks.items() for other in task.get("dependentTasks", [])
    ]
    return Layer(kinds, (*edges, *dict.fromkeys(waits)))


if __name__ == "__main__":
    graphs = {
        name: {"digest": layer.digest, "kinds": layer.kinds, "edges": layer.edges} for name, layer in layers().items()
    }
    json.dump({"drawn": DRAWN, "layers": graphs}, sys.stdout)
