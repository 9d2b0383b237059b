"""Profiles of machines: resources of each step, one YAML file each, chosen when a pipeline is compiled.

A profile gives the resources of the three kinds of steps, and by step the differences. The nodes of steps that load
models can be changed when a run starts, by the pipeline's parameters `node_selector` and `node_tolerations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from skd_lib.config import ConfigSection, parse_section, read_yaml
from skd_lib.config.training import Quantity
from skd_lib.errors import SkdError, SkdErrors

FOLDER = Path(__file__).parent / "resources"
DEFAULT = "l4"
"""The profile of the committed pipelines."""
Kind = Literal["small", "data", "model"]
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("preflight", "prepare_data"), "data"),
    **dict.fromkeys(("teacher_sft", "student_init", "distill"), "model"),
    **dict.fromkeys(("evaluate", "evaluate_teacher", "evaluate_student", "evaluate_champion"), "model"),
    **dict.fromkeys(("specdec_benchmark", "comet_score"), "model"),
    **dict.fromkeys(("compare_variant", "compare_table", "show", "report", "register_model", "finish"), "small"),
}
SEVERAL_GPUS = ("teacher_sft", "distill")
"""The steps that train on all GPUs of their pod, one process each."""

Duration = Annotated[str, Field(pattern=r"^[1-9][0-9]*(s|m|h)$", examples=["90s", "12h"])]


class Toleration(ConfigSection):
    """A taint that a pod puts up with, in Kubernetes' words."""

    key: str = Field("", description="The taint's key; empty with `Exists`: every taint.")
    operator: Literal["Exists", "Equal"] = Field("Equal", description="Whether the taint's value counts.")
    value: str = Field("", description="The taint's value, for `Equal`.")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field("", description="Empty: every effect.")

    @model_validator(mode="after")
    def _check_operator(self) -> Toleration:
        if self.operator == "Exists" and self.value:
            raise ValueError("`Exists` goes by the key alone: leave out `value`")
        if self.operator == "Equal" and not self.key:
            raise ValueError("`Equal` needs a `key`")
        return self


class Retry(ConfigSection):
    """Further attempts after a pod has failed."""

    count: int = Field(2, ge=0, le=10, description="Further attempts; 0: none.")
    wait: Duration = Field("60s", description="Pause before the first of them.")
    factor: int = Field(2, ge=1, le=100, description="Each pause is the last one times this.")
    within: Duration = Field(
        "336h",
        description="Time from the start of the first attempt for all of them. Waiting for a node counts, and an "
        "attempt that runs when the time is over is stopped.",
    )


class Scratch(ConfigSection):
    """Part of the node's own disk, mounted at /tmp, for temporary files and models from the hub."""

    size: Quantity = Field(description="Limit; the pod is evicted beyond it.")


class Resources(ConfigSection):
    """Resources of one step's pod."""

    cpu: Quantity = Field(description="Cores requested; there is no limit, which would only throttle.")
    memory: Quantity = Field(description="Memory requested and allowed.")
    gpus: int = Field(0, ge=0, le=16, description="Accelerators.")
    gpu_type: str = Field("nvidia.com/gpu", description="Kubernetes' resource name of the accelerator.")
    shared_memory: Quantity | None = Field(
        None, description="Size of /dev/shm, for data loaders and collectives; counts as memory. Unset: 64 MiB."
    )
    scratch: Scratch | None = Field(None, description="Disk space at /tmp; unset: the container's own.")
    node_selector: dict[str, str] = Field({}, description="Labels that the node must have.")
    tolerations: list[Toleration] = Field([], description="Taints that the node may have.")
    retry: Retry = Field(Retry(), description="Further attempts after a failure.")
    timeout: Duration | None = Field(None, description="A pod that runs for longer is stopped, and counts as failed.")

    def plain_tolerations(self) -> list[dict[str, str]]:
        """Return the tolerations as Kubernetes spells them."""
        return [{"operator": each.operator, **each.model_dump(exclude_defaults=True)} for each in self.tolerations]

    @model_validator(mode="after")
    def _check_shared_memory(self) -> Resources:
        if self.gpus and not self.shared_memory:
            raise ValueError("a step with GPUs needs `shared_memory`: 64 MiB are too few for torch's collectives")
        return self


class Profile(ConfigSection):
    """Resources of all steps of a pipeline on one kind of machines."""

    description: str = Field(description="The machines that it is for.")
    small: Resources = Field(description="Steps that read and write small files.")
    data: Resources = Field(description="Steps that fetch models and data.")
    model: Resources = Field(description="Steps that load models: training, evaluation, the benchmark.")
    steps: dict[str, dict[str, Any]] = Field(
        {}, description="By step the fields that differ from its kind's; see `skd_kfp.pipelines.profiles.KINDS`."
    )

    @property
    def shared_pool(self) -> tuple[dict[str, str], list[dict[str, str]]]:
        """Node selector and tolerations of the steps that load models, as Kubernetes spells them."""
        return self.model.node_selector, self.model.plain_tolerations()

    def resources(self, step: str) -> Resources:
        """Return the resources of a step; its name may have a role: `evaluate-teacher`."""
        name = _step(step)
        kind: Resources = getattr(self, KINDS[name])
        return parse_section(Resources, _merged(kind.model_dump(), self.steps.get(name, {})), where=f"steps.{name}")

    def in_shared_pool(self, step: str) -> bool:
        """Tell whether the pipeline's parameters choose the nodes: the step loads models and has no pool of its own."""
        name = _step(step)
        return KINDS[name] == "model" and not {"node_selector", "tolerations"} & self.steps.get(name, {}).keys()


def profile_names() -> list[str]:
    """Return the names of this project's profiles."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_profile(name: str = DEFAULT) -> Profile:
    """Load a profile by its name in `pipelines/resources`, or from another YAML file."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        if not path.is_file():
            hint = f"one of {', '.join(profile_names())}, or a YAML file of your own"
            raise SkdError(f"there is no profile {name!r}", where="--profile", hint=hint)
    profile = parse_section(Profile, read_yaml(path), where=str(path))
    steps = dict.fromkeys([*KINDS, *profile.steps])
    problems = [problem for step in steps for problem in _problems(profile, step, str(path))]
    if problems:
        raise SkdErrors(problems)
    return profile


def _problems(profile: Profile, step: str, where: str) -> list[SkdError]:
    if step not in KINDS:
        hint = f"one of {', '.join(KINDS)}"
        return [SkdError(f"there is no step {step!r}", where=f"{where}, field `steps`", hint=hint)]
    try:
        resources = profile.resources(step)
    except SkdErrors as errors:
        return [SkdError(error.what, where=f"{where}, {error.where}", hint=error.hint) for error in errors.errors]
    if resources.gpus > 1 and step not in SEVERAL_GPUS:
        return [
            SkdError(
                f"step {step} uses one GPU, not {resources.gpus}",
                where=where,
                hint=f"set `gpus: 1` for the kind, and more under `steps` for {' and '.join(SEVERAL_GPUS)}",
            )
        ]
    return []


def _step(name: str) -> str:
    return name if name in KINDS else name.partition("-")[0]


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with changes; sections (`retry`, `scratch`) field by field, but selectors as a whole."""
    merged = dict(values)
    for name, change in changes.items():
        nested = isinstance(change, dict) and isinstance(values.get(name), dict) and name != "node_selector"
        merged[name] = _merged(values[name], change) if nested else change
    return merged
