"""How large a run grows in the cluster's records, before it runs.

Argo keeps the state of a run, a node status for each step, DAG and driver, in one Kubernetes object (see
`pipelines.node_statuses`). Beyond `SHOWN` Argo compresses the nodes, and Kubeflow's page stops to follow the run;
beyond `KEPT` (compressed) Argo can no longer write, and the run never ends. Both were seen, with Argo 4.0.8 and
Kubeflow Pipelines 2.17.0, and so were these sizes of runs of an earlier pipeline:

    distillation at its end         1,125 kB   computed 1,000 kB
    comparison, 4 trials, wrapped   2,810 kB   computed 2,790 kB; compressed 326 kB, computed 340 kB
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.node_statuses import NodeStatuses, Outputs, Spec, to_json

SHOWN = 1024 * 1024
"""Bytes of a run's object, as JSON, up to which Kubeflow's API and page follow its tasks."""
KEPT = 900_000
"""Bytes of compressed nodes that leave room to Argo's 1,048,576."""
ARGUMENT = 64 * 1024
"""Bytes of one argument that a step may get. Linux refuses 128 KiB."""
_LESS_ALIKE = 1.25  # real runs compress worse than what is computed, by as much at the most


@dataclass(frozen=True)
class Sizes:
    """What a run takes.

    Attributes:
        count: Node statuses.
        nodes: Bytes of the node statuses as JSON.
        workflow: Bytes of the whole object: the nodes, and what is to run.
        compressed: Bytes of the nodes as Argo keeps them beyond `SHOWN`.
        argument: Bytes of the longest argument of a step.
        argument_of: That step.
        by_task: Bytes of the nodes of a task, with its driver's, by task.
    """

    count: int
    nodes: int
    workflow: int
    compressed: int
    argument: int
    argument_of: str
    by_task: Mapping[str, int]


def measure(
    documents: list[dict[str, Any]], parameters: Spec, outputs: Outputs | None = None, *, wrapped: bool = False
) -> Sizes:
    """Measure a run of a compiled pipeline at its end.

    Args:
        documents: The compiled pipeline.
        parameters: Values of its parameters; the others have their defaults.
        outputs: What steps give as parameters. Short texts and empty lists where it says nothing.
        wrapped: Each node has a second one around it, as with the manifests of Kubeflow Pipelines 2.17.0.
    """
    run = NodeStatuses(documents, outputs or (lambda *_: {}), wrapped).run(parameters)
    text = to_json({node["id"]: node for node in run.nodes}).encode()
    compressed = int(len(base64.b64encode(gzip.compress(text, mtime=0))) * _LESS_ALIKE)
    place, longest = max(run.arguments, key=lambda found: found[1], default=("", 0))
    return Sizes(len(run.nodes), len(text), len(text) + run.template_bytes(), compressed, longest, place, run.by_task)
