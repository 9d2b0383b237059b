"""How a driver finds the values of a task (backend/src/v2/driver/resolve.go, the same in 2.15.0 to 2.17.0)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tests.kubeflow.backend.records import Artifact, Execution
from tests.kubeflow.backend.versions import Version

Spec = Mapping[str, Any]
_PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['(.+?)'\]\}\}")
_SELECTOR = re.compile(r'^parseJson\(string_value\)\["(.+)"\]$')
_EQUALS = re.compile(r"^inputs\.parameter_values\['(.+?)'\] (==|!=) '(.*)'$")
_KINDS: dict[str, Any] = {
    "STRUCT": dict,
    "LIST": list,
    "BOOLEAN": bool,
    "NUMBER_INTEGER": (int, float),
    "NUMBER_DOUBLE": (int, float),
}


class DriverError(Exception):
    """A driver failed: its task is Omitted, nothing is written to the records, the DAGs above stay RUNNING (seen)."""


class Resolver:
    """Resolves a run's inputs.

    Args:
        version: Of the backend.
        run: Its name, id and resource name, which placeholders stand for.
        components: By name.
    """

    def __init__(self, version: Version, run: Spec, components: Spec) -> None:
        self.version, self.run, self.components = version, run, components

    def parameters(
        self, task: Spec, component: Spec, dag: Execution, siblings: Mapping[str, Execution]
    ) -> dict[str, Any]:
        """Find the parameters of a task.

        A DAG gets the defaults of its component, a step does not (`resolveInputs`; read). Types are checked: a text
        for a struct fails the driver (read), so does null (seen).
        """
        declared = component.get("inputDefinitions", {}).get("parameters", {})
        given = task.get("inputs", {}).get("parameters", {})
        values: dict[str, Any] = {}
        if "dag" in component:
            values = {k: v.get("defaultValue") for k, v in declared.items() if k not in given and v.get("isOptional")}
        for name, source in given.items():
            value = self.parameter(source, dag, siblings)
            if found := _SELECTOR.match(source.get("parameterExpressionSelector", "")):
                value = (json.loads(value) if isinstance(value, str) else value)[found[1]]
            values[name] = value
        item = task.get("parameterIterator", {}).get("itemInput")
        for name, spec in declared.items():
            if name == item:
                continue
            if name not in values and not spec.get("isOptional") and "defaultValue" not in spec:
                raise DriverError(f'neither value nor default value provided for non-optional parameter "{name}"')
            if name in given:
                values[name] = _checked(name, values[name], spec["parameterType"])
        return values

    def parameter(self, source: Spec, dag: Execution, siblings: Mapping[str, Execution]) -> Any:
        """Resolve one parameter: of the DAG, of a sibling, a constant, or how the DAG before ended."""
        if "componentInputParameter" in source:
            name = source["componentInputParameter"]
            if name not in dag.inputs:
                raise DriverError(f"parent DAG does not have input parameter {name}")
            return dag.inputs[name]
        if "taskOutputParameter" in source:
            producer = source["taskOutputParameter"]
            return self.output(siblings[producer["producerTask"]], "parameters", producer["outputParameterKey"])
        if "taskFinalStatus" in source:
            ended = siblings[source["taskFinalStatus"]["producerTask"]]
            # Two of KFP's versions tell the state alone; the error stays empty there (seen).
            error = {} if self.version.metadata else {"message": ended.message}
            names = {"pipelineJobResourceName": self.run["resource"], "pipelineTaskName": ended.name}
            return {"state": ended.state, "error": error, **names}
        constant = source["runtimeValue"]["constant"]
        known = {"{{$.pipeline_job_name}}": "name", "{{$.pipeline_job_uuid}}": "id"}
        known["{{$.pipeline_job_resource_name}}"] = "resource"
        # Only where the placeholder is the whole constant.
        return self.run[known[constant]] if isinstance(constant, str) and constant in known else constant

    def artifacts(self, task: Spec, dag: Execution, siblings: Mapping[str, Execution]) -> dict[str, list[Artifact]]:
        """Find the input artifacts of a task."""
        found: dict[str, list[Artifact]] = {}
        for name, source in task.get("inputs", {}).get("artifacts", {}).items():
            if "componentInputArtifact" in source:
                found[name] = dag.files[source["componentInputArtifact"]]
            else:
                producer = source["taskOutputArtifact"]
                found[name] = self.output(
                    siblings[producer["producerTask"]], "artifacts", producer["outputArtifactKey"]
                )
        return found

    def output(self, producer: Execution, kind: str, key: str) -> Any:
        """Find an output, through nested DAGs and branches down to the step that made it.

        A loop gives a list in the order of its iterations (`CollectInputs`; seen), and nothing where it had none: the
        driver fails (2.15.0 to 2.17.0; read). Of a `OneOf` the branch counts that is COMPLETE or CACHED.
        """
        if producer.is_loop:
            if not producer.children and self.version.metadata:
                raise DriverError("subTaskName, , not in tasks")
            collected = [self.output(iteration, kind, key) for iteration in producer.children]
            return collected if kind == "parameters" else [artifact for several in collected for artifact in several]
        if not producer.total:
            found = producer.parameters if kind == "parameters" else producer.artifacts
            if key not in found:
                raise DriverError(f"no output {key} of {producer.name}")
            return found[key] if kind == "parameters" else [found[key]]
        selectors, names = _selectors(self.components[producer.component], kind, key)
        if len(selectors) > 1 and kind == "artifacts" and not self.version.one_of_artifacts:
            selectors = selectors[-1:]
        children = {child.name: child for child in producer.children}
        for selector in selectors:
            child = children.get(selector["producerSubtask"])
            if child and (len(selectors) == 1 or child.state in ("COMPLETE", "SUCCEEDED", "CACHED")):
                return self.output(child, kind, selector[names])
        raise DriverError(f"processing OneOf: No successful task found for output key {key}")

    def arguments(self, container: Spec, component: Spec, values: Spec) -> list[str]:
        """Put parameters into a step's arguments, as far as this version's driver does, else as its launcher does."""
        defaults = {
            name: spec["defaultValue"]
            for name, spec in component.get("inputDefinitions", {}).get("parameters", {}).items()
            if "defaultValue" in spec
        }
        filled: list[str] = []
        for part in [*container.get("command", []), *container.get("args", [])]:
            # What names an output is left to the launcher.
            by_driver = self.version.driver_fills_arguments and "$.outputs" not in part
            known = values if by_driver else {**defaults, **values}
            for name in _PLACEHOLDER.findall(part):
                if name not in known and by_driver:
                    what = f'parameter "{name}" not found in executor input'
                    raise DriverError(f"failed to resolve container args: failed to resolve input parameters: {what}")
            pieces = _PLACEHOLDER.split(part)  # text, name, text, ...
            pieces[1::2] = [text(known.get(name, f"no parameter {name}")) for name in pieces[1::2]]
            filled.append("".join(pieces))
        return filled


def triggers(condition: str, values: Spec) -> bool:
    """Evaluate the condition of a branch, in the few forms that KFP's compiler writes."""
    if not condition:
        return True
    if " && " in condition:
        return all(triggers(part, values) for part in condition.split(" && "))
    if condition.startswith("!(") and condition.endswith(")"):
        return not triggers(condition[2:-1], values)
    name, operator, wanted = _EQUALS.match(condition).groups()  # type: ignore[union-attr]
    return bool((text(values[name]) == wanted) == (operator == "=="))


def text(value: Any) -> str:
    """Write a value as KFP does in an argument (`pbValueToString`)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), sort_keys=True)


def _selectors(component: Spec, kind: str, key: str) -> tuple[list[Spec], str]:
    chosen = component["dag"]["outputs"][kind][key]
    if kind == "artifacts":
        return chosen["artifactSelectors"], "outputArtifactKey"
    if "valueFromOneof" in chosen:
        return chosen["valueFromOneof"]["parameterSelectors"], "outputParameterKey"
    return [chosen["valueFromParameter"]], "outputParameterKey"


def _checked(name: str, value: Any, kind: str) -> Any:
    if value is None:
        raise DriverError(f'got null for input parameter "{name}"')
    if kind == "STRING":
        return value if isinstance(value, str) else text(value)
    expected = _KINDS.get(kind)
    if expected and (not isinstance(value, expected) or (isinstance(value, bool) and kind != "BOOLEAN")):
        raise DriverError(f'input parameter "{name}" type mismatch: expect {kind}, got {type(value).__name__}')
    return value
