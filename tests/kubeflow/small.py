"""A pipeline of the shape of ours that compiles in a moment: nested pipelines, equal names, a loop, an exit handler."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler, dsl, kubernetes

from skd_kfp.pipelines.compiling import Documents
from skd_kfp.pipelines.kubeflow.submit import Package
from skd_lib.config import load_config
from skd_lib.config.parameters import to_parameters

IMAGE = "image@sha256:" + "0" * 64


def step(name: str) -> list[str]:
    return ["python", "-m", f"skd_lib.steps.{name}"]


@dsl.container_component
def preflight(config: str):
    return dsl.ContainerSpec(image=IMAGE, command=step("preflight"), args=[config])


@dsl.container_component
def import_model(x: str, model: dsl.Output[dsl.Model]):
    return dsl.ContainerSpec(image=IMAGE, command=step("import_model"), args=[x, model.uri])


@dsl.container_component
def evaluate(x: str, model: dsl.Input[dsl.Model]):
    return dsl.ContainerSpec(image=IMAGE, command=step("evaluate"), args=[x, model.uri])


@dsl.container_component
def finish(status: dsl.PipelineTaskFinalStatus):
    return dsl.ContainerSpec(image=IMAGE, command=step("finish"), args=[status])


def evaluated(x: str, model: Any, role: str) -> Any:
    return evaluate(x=x, model=model).set_retry(2, backoff_max_duration="1209600s").set_display_name(f"evaluate-{role}")


@dsl.pipeline(name="teacher")
def teacher(x: str) -> dsl.Model:
    model = import_model(x=x).set_retry(2)
    evaluated(x, model.output, "teacher")
    evaluated(x, model.output, "tuned")
    return model.output


@dsl.pipeline(name="students")
def students(x: str, model: dsl.Input[dsl.Model]):
    evaluated(x, model, "before")
    evaluated(x, model, "after")


def make(parameters: list[str], *, loop: bool) -> Documents:
    """Compile it, with these parameters of the pipeline (all texts)."""

    @dsl.pipeline(name="skd-small", description="A small pipeline. Profile tiny.")
    def small():
        with dsl.ExitHandler(finish()):
            checked = preflight(config="x").set_caching_options(False)
            kubernetes.use_secret_as_env(checked, "s", {"k": "K"}, optional=True)
            model = teacher(x="x").after(checked)
            students(x="x", model=model.output)
            if loop:
                with dsl.ParallelFor(items=["a", "b"]) as item:
                    evaluated(item, model.output, "trial")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.yaml"
        compiler.Compiler().compile(small, str(path))
        documents = list(yaml.load_all(path.read_text(encoding="utf-8"), yaml.CSafeLoader))
    documents[0]["root"]["inputDefinitions"] = {
        "parameters": {name: {"parameterType": "STRING", "isOptional": True} for name in parameters}
    }
    return documents


DEMO = Path(__file__).parents[2] / "pipelines/configs/demo.yaml"


@functools.lru_cache
def package(loop: bool = False) -> Package:
    """It with the parameters that a run is submitted with."""
    parameters = {*to_parameters(load_config(DEMO)), "mlflow_experiment", "settings", "reuse"}
    documents = make(sorted(parameters), loop=loop)
    path = Path(tempfile.mkdtemp()) / "small.yaml"
    path.write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    return Package.read(path)
