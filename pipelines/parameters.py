"""The parameters of the pipelines: one table for the form on Kubeflow's page, and for what chapters are given.

Most of them are options of step `preflight`, with their types, defaults and help.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from kfp import dsl

from skd_kfp.components.build import options_of
from skd_kfp.components.preflight.component import preflight
from skd_kfp.pipelines.profiles import Profile
from skd_kfp.pipelines.task_settings import CONFIG_MAP
from skd_lib.steps.preflight import main

Body = Callable[[Any], Any]
POOL: Mapping[str, type] = {"settings": str, "node_selector": dict, "node_tolerations": list}
"""Parameters that say where steps run, and where their records go. A chapter sees its own parameters only."""
PREFLIGHT: Mapping[str, type] = {
    name: option.parameter for name, option in options_of(main).items() if name in preflight.component_spec.inputs
}


class Parameter(NamedTuple):
    """One parameter of a pipeline: type, default and description."""

    type: type
    default: Any
    description: str


def form(profile: Profile, *, comparison: bool) -> dict[str, Parameter]:
    """Return the parameters of a pipeline, by name."""
    left_out = {"run_name", "comet", "training_method" if comparison else "comparison"}
    defaults = {name: parameter.default for name, parameter in inspect.signature(main).parameters.items()}
    defaults |= {"comparison": "{}", "reuse": True}
    given = {
        name: Parameter(type_, defaults[name], options_of(main)[name].help)
        for name, type_ in PREFLIGHT.items()
        if name not in left_out
    }
    labels, taints = profile.shared_pool
    nodes = "Labels of the nodes on which models are loaded, e.g. of a GPU pool; {} for any node."
    example = '`[{"key": "nvidia.com/gpu", "operator": "Exists"}]`'
    records = "The ConfigMap of the namespace that says where MLflow is and where checkpoints are kept."
    return {
        **given,
        "node_selector": Parameter(dict, labels, nodes),
        "node_tolerations": Parameter(list, taints, f"Taints of those nodes, as Kubernetes spells them: {example}."),
        "settings": Parameter(str, CONFIG_MAP, records),
    }


def pipeline(
    name: str, description: str, parameters: Mapping[str, Any], outputs: Mapping[str, Any] | None = None
) -> Callable[[Body], Callable[..., dsl.PipelineTask]]:
    """Return a decorator: `dsl.pipeline` with parameters from a table.

    The decorated function gets all `parameters` (each a `Parameter`, or its type alone) as attributes of its only
    argument, and returns `outputs` by name.
    """
    full = {
        key: each if isinstance(each, Parameter) else Parameter(each, inspect.Parameter.empty, "")
        for key, each in parameters.items()
    }

    made: Any = NamedTuple("Outputs", list(outputs.items())) if outputs else None  # as KFP wants them declared

    def decorate(body: Body) -> Any:
        def called(*channels: Any) -> Any:
            returned = body(SimpleNamespace(**dict(zip(full, channels, strict=True))))
            return made(**returned) if outputs else None

        described = [f"    {key}: {each.description}" for key, each in full.items() if each.description]
        called.__doc__ = "\n".join([description, "", "Args:", *described]) if described else None
        called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    key, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=each.default, annotation=each.type
                )
                for key, each in full.items()
            ],
            return_annotation=made,
        )
        return dsl.pipeline(name=name, description=description)(called)

    return decorate
