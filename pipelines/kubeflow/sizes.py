"""Compute the size of a run in the cluster's records, before it runs.

Argo keeps the state of a run, a node status for each step, DAG and driver, in one Kubernetes object (see
`node_statuses`). Beyond `SHOWN` Argo compresses the nodes, and Kubeflow's page stops following the run;
beyond `KEPT` (compressed) Argo can no longer write, and the run never ends. Both were seen, with Argo 4.0.8 and
Kubeflow Pipelines 2.17.0, and so were these sizes of runs of an earlier pipeline:

    distillation at its end         1,125 kB   computed 1,025 kB
    comparison, 4 trials, wrapped   2,810 kB   computed 2,860 kB; compressed 326 kB, computed 340 kB
"""

from __future__ import annotations

import base64
import gzip
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skd_kfp.pipelines.kubeflow.node_statuses import NodeStatuses, Outputs, Spec, to_json
from skd_lib._core.ascii_json import ascii_json
from skd_lib.config import RunConfig
from skd_lib.errors import SkdError

if TYPE_CHECKING:
    from skd_lib.comparison.plan import Plan

SHOWN = 1024 * 1024
"""Bytes of a run's object, as JSON, up to which Kubeflow's API and page follow its tasks."""
KEPT = 900_000
"""Bytes of compressed nodes that leave room to Argo's 1,048,576."""
ARGUMENT = 64 * 1024
"""Bytes of one argument that a step may get. Linux refuses 128 KiB."""
_LESS_ALIKE = 1.31  # the most by which a real run compresses worse than the computed one


@dataclass(frozen=True)
class Sizes:
    """The bytes of a run: of its nodes, of the whole object, of the nodes compressed, and of the longest argument."""

    nodes: int
    workflow: int
    compressed: int
    argument: int
    argument_of: str


def measure(
    documents: list[dict[str, Any]], parameters: Spec, outputs: Outputs | None = None, *, wrapped: bool = False
) -> Sizes:
    """Measure a run of a compiled pipeline at its end.

    `parameters` that are left out have their defaults, `outputs` short values. `wrapped`: each node has a second one
    around it, as with the manifests of Kubeflow Pipelines 2.17.0.
    """
    run = NodeStatuses(documents, outputs or (lambda *_: {}), wrapped).run(parameters)
    text = to_json({node["id"]: node for node in run.nodes}).encode()
    compressed = int(len(base64.b64encode(gzip.compress(text, mtime=0))) * _LESS_ALIKE)
    place, longest = max(run.arguments, key=lambda found: found[1], default=("", 0))
    return Sizes(len(text), len(text) + run.template_bytes(), compressed, longest, place)


def expected(config: RunConfig, plan: Plan | None = None) -> Outputs:
    """Return the output parameters of a run's steps, at their greatest length."""
    from skd_lib.comparison.trials import Trial
    from skd_lib.config.step import StepConfig
    from skd_lib.steps.compare_variant import outputs_of
    from skd_lib.steps.preflight import settings_of

    trials = plan.trials if plan else []
    models = {config.teacher, config.student or "", *(trial.config(config).student or "" for trial in trials)}
    digest = "x" * 64
    settings = settings_of(config, plan, data=digest, models=dict.fromkeys(sorted(models), digest))
    settings["problems"] = ""

    def outputs(component: str, inputs: Spec, declared: Spec) -> Spec:
        if component == "preflight":
            return settings
        if component == "compare-variant":
            base = StepConfig.model_validate_json(inputs["config"])
            return outputs_of(Trial.model_validate_json(inputs["trial"]), base, {})
        return _figures(declared, len(config.task.metrics), served=config.specdec.engine == "vllm")

    return outputs


def _figures(declared: Spec, metrics: int, *, served: bool = False) -> Spec:
    """Return the declared parameters that hold figures, at their greatest length."""
    from skd_lib.report.measured import longest

    sizes = {"measured": longest(metrics, served=served), "scores": longest(1)}
    figure = '"chrf":35.31234567890123,'
    return {name: (figure * sizes[name])[: sizes[name]] for name in declared.get("parameters", {}) if name in sizes}


def too_large(sizes: Sizes) -> list[SkdError]:
    """Return the errors of a run that is too large to work."""
    remedy = "give long settings (prompts, lists of files) in a YAML file, and its URI as `config` or `task`"
    problems = []
    if sizes.argument > ARGUMENT:
        what = f"an argument of {sizes.argument / 1000:,.0f} kB; a step's command takes {ARGUMENT / 1000:,.0f} kB"
        problems.append(SkdError(what, where=f"step {sizes.argument_of}", hint=remedy))
    if sizes.compressed > KEPT:
        what = (
            f"the run's state would take {sizes.compressed / 1000:,.0f} kB, and Argo keeps {KEPT / 1000:,.0f} kB of it"
        )
        problems.append(SkdError(what, where="the run", hint=f"make several comparisons, or {remedy}"))
    return problems


def of_compiled(documents: list[dict[str, Any]], trials: int = 1) -> str:
    """Return a sentence on the size of a run with short settings, without and with the manifests of KFP 2.17.0."""
    items = [ascii_json({"variant": f"skd-{number}", "seed": 0}) for number in range(trials)]

    def outputs(component: str, _inputs: Spec, declared: Spec) -> Spec:
        return {"trials": items} if component == "preflight" else _figures(declared, 2)

    plain, wrapped = (measure(documents, {}, outputs, wrapped=twice) for twice in (False, True))
    return (
        f"a run with short settings takes {plain.workflow / 1000:,.0f} kB of Kubeflow's records, with the manifests of "
        f"2.17.0 {wrapped.workflow / 1000:,.0f} kB; its page follows up to {SHOWN / 1000:,.0f} kB. Compressed it takes "
        f"{wrapped.compressed / 1000:,.0f} kB: more than {KEPT / 1000:,.0f} kB are refused, since Argo keeps 1,049 kB"
    )


def notice(sizes: Sizes) -> str:
    """Return a sentence on the steps that Kubeflow will not show for a run of this size; empty where it shows all."""
    if sizes.workflow <= SHOWN:
        return ""
    return (
        f"the run's state will take {sizes.workflow / 1000:,.0f} kB; beyond {SHOWN / 1000:,.0f} kB Kubeflow's page "
        "does not show its last steps: see MLflow, or the message at its end"
    )
