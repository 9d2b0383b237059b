"""Compile the pipelines to YAML that is kept in git: a pure function of their definition, so that drift is found."""

from __future__ import annotations

import copy
import importlib
import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from skd_kfp.components.images import COMET, TRAIN
from skd_kfp.pipelines.compile_checks import find_problems
from skd_kfp.pipelines.graph import STEPS, producers
from skd_kfp.pipelines.profiles import DEFAULT, load_profile
from skd_lib._core.documents import parse_yaml_documents, read_text
from skd_lib.config import RunConfig
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.storage import write_text_atomic
from skd_lib.tracking.locate import IMAGE_VARIABLE

PIPELINES = {
    "distillation": "distillation",
    "distillation_comet": "distillation",
    "compare_methods": "compare_methods",
}
COMPILED = Path(__file__).parent / "compiled"
IN_SOURCE_TREE = (Path(__file__).resolve().parents[1] / "pyproject.toml").is_file()
"""Whether this is a source tree, whose compiled pipelines are kept in git, and not an installed package."""
PROFILE_WORD = "Profile"
"""Comes before the profile's name at the end of a compiled pipeline's description."""
HEADER = "# Compiled from pipelines/{module}.py by `skd compile`. Do not edit.\n"
RECORD_IMAGE = ("preflight", "teacher_sft", "student_init", "distill")
"""Steps that record their image: in the run, and in the models that they train."""
Documents = list[dict[str, Any]]


def profile_of(documents: Documents) -> str:
    """Return the name of the profile that a pipeline was compiled for; empty where it does not say."""
    try:
        description = str(documents[0]["pipelineInfo"].get("description", ""))
    except (IndexError, KeyError, TypeError, AttributeError):  # no compiled pipeline
        return ""
    return description.rpartition(f" {PROFILE_WORD} ")[2].rstrip(".") if f" {PROFILE_WORD} " in description else ""


def images_of(documents: Documents) -> list[str]:
    """Return the images that a pipeline's steps run in, each once."""
    executors = documents[0]["deploymentSpec"]["executors"].values()
    return list(dict.fromkeys(each["container"]["image"] for each in executors if "container" in each))


def pipeline_for(config: RunConfig) -> str:
    """Return the name of the pipeline that does a run: one with a step for COMET only where its task asks for it."""
    return "distillation_comet" if config.task.wants_comet else "distillation"


def compiled_path(name: str = "distillation") -> Path:
    """Return the file of a compiled pipeline."""
    return COMPILED / f"{name}.yaml"


def compile_pipeline(
    image: str | None = None,
    comet_image: str | None = None,
    *,
    name: str = "distillation",
    profile: str = DEFAULT,
    release: bool = False,
) -> Documents:
    """Return a pipeline as KFP's YAML documents: the pipeline spec, then the Kubernetes settings.

    `image` and `comet_image` replace the published ones, and in a `release` every image must be named by its digest.
    Raises SkdErrors for what `load_profile` and `find_problems` find.
    """
    pipeline = getattr(importlib.import_module(f"skd_kfp.pipelines.{PIPELINES[name]}"), name)(load_profile(profile))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        documents: Documents = parse_yaml_documents(path.read_text(encoding="utf-8"), where="compiled pipeline")
    for component in documents[0]["components"].values():
        # Kubeflow's page does not show these descriptions, and its records would hold each several times.
        for side in ("inputDefinitions", "outputDefinitions"):
            for definitions in component.get(side, {}).values():
                for definition in definitions.values():
                    definition.pop("description", None)
        for task in component.get("dag", {}).get("tasks", {}).values():
            if "dependentTasks" in task:
                task["dependentTasks"].sort()  # kfp takes them from a set
    info = documents[0]["pipelineInfo"]
    info["description"] = f"{info['description']} {PROFILE_WORD} {Path(profile).stem}."
    images = {TRAIN: image or TRAIN, COMET: comet_image or COMET}
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        set_image(executor["container"], images[executor["container"]["image"]])
    problems = find_problems(documents, release=release)
    if problems:
        raise SkdErrors([SkdError(problem, where="compiled pipeline") for problem in problems])
    return documents


def as_kept(documents: Documents) -> Documents:
    """Return the documents without the lines by which a task waits for those whose outputs it takes.

    `kfp.local` needs them; Kubeflow waits anyway, and its page draws a second edge for each.
    """
    kept = copy.deepcopy(documents)
    for component in (kept[0]["root"], *kept[0]["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            named = [other for other in task.pop("dependentTasks", []) if other not in producers(task)]
            if named:
                task["dependentTasks"] = named
    return kept


def set_image(container: dict[str, Any], image: str) -> None:
    """Set the image of a container, and tell it to the steps that record it."""
    container["image"] = image
    if container["command"][-1].removeprefix(STEPS) in RECORD_IMAGE:
        container["env"] = [
            *(variable for variable in container.get("env", []) if variable["name"] != IMAGE_VARIABLE),
            {"name": IMAGE_VARIABLE, "value": image},
        ]


def to_text(documents: Documents, *, name: str = "distillation") -> str:
    """Return the documents as text, keys sorted: KFP's own header lists defaults in an order that changes."""
    return HEADER.format(module=PIPELINES[name]) + yaml.safe_dump_all(
        documents, sort_keys=True, width=120, allow_unicode=True
    )


def write_compiled(
    path: Path,
    image: str | None = None,
    comet_image: str | None = None,
    *,
    name: str = "distillation",
    profile: str = DEFAULT,
    release: bool = False,
) -> Documents:
    """Compile, write `path`, and return what was compiled; see `compile_pipeline`."""
    documents = as_kept(compile_pipeline(image, comet_image, name=name, profile=profile, release=release))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, to_text(documents, name=name))
    return documents


def check_compiled(path: Path, *, name: str = "distillation", profile: str = DEFAULT, release: bool = False) -> None:
    """Check that `path` is what its definition compiles to; the KFP version that compiled it may differ."""
    if not path.is_file():
        raise SkdError("the compiled pipeline is missing", where=str(path), hint="run `skd compile`")
    committed: Documents = parse_yaml_documents(read_text(path), where=str(path))
    fits = profile_of(committed)
    if fits and fits != Path(profile).stem:
        what = f"the file is compiled for profile {fits}, and not for {Path(profile).stem}"
        raise SkdError(what, where=str(path), hint=f"check it with --profile {fits}")
    fresh = as_kept(compile_pipeline(name=name, profile=profile, release=release))
    differing = [
        place
        for old, new in zip(_without_version(committed), _without_version(fresh), strict=False)
        for place in _differences(old, new)
    ]
    if differing or len(committed) != len(fresh):
        shown = ", ".join(differing[:5]) + (" ..." if len(differing) > 5 else "")
        raise SkdError(
            f"the compiled pipeline differs from its definition at {shown or 'its number of documents'}",
            where=str(path),
            hint="run `skd compile` and commit the result",
        )


def _without_version(documents: Documents) -> Documents:
    return [{key: value for key, value in document.items() if key != "sdkVersion"} for document in documents]


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Paths at which two YAML values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            found
            for key in sorted(old.keys() | new.keys())
            for found in _differences(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
        ]
    return [] if old == new else [place]
