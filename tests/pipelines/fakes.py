"""A pipeline of fake steps with the shape of the real one: an exit handler around cached and uncached steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler, dsl

from skd_kfp.components.build import step_container
from skd_kfp.pipelines.parameters import PREFLIGHT, pipeline
from skd_lib.steps.kfp_call import ARTIFACT_OPTION

FORM = {
    name: type_
    for name, type_ in PREFLIGHT.items()
    if name not in ("run_name", "comparison", "training_method", "reuse", "comet")
}
"""Parameters of both real pipelines that the runner passes."""
STEP = str(Path(__file__).with_name("fake_step.py"))


def fake_container(arguments: list[Any], outputs: Mapping[str, Any], *, lists: bool = False) -> dsl.ContainerSpec:
    """A container whose command line ends as a real step's does."""
    options = list(step_container("fake", "fake:1", {}, outputs, lists=lists).args)
    for name, output in outputs.items():
        if not isinstance(output, dsl.placeholders.OutputParameterPlaceholder):
            options += [ARTIFACT_OPTION, f"{name}={output.path}"]
    return dsl.ContainerSpec(image="fake:1", command=["python3", STEP], args=[*arguments, *options])


@dsl.container_component
def first(behaviour: str, value: str, model: dsl.Output[dsl.Model], result: dsl.OutputPath(dict)):
    """The first."""
    return fake_container(["first", behaviour, value], {"model": model, "result": result})


@dsl.container_component
def second(behaviour: str, config: dict[str, Any], model: dsl.Input[dsl.Model], summary: dsl.OutputPath(dict)):
    """The second."""
    return fake_container(["second", behaviour, config], {"summary": summary})


@dsl.container_component
def reads_text(behaviour: str, config: str, model: dsl.Input[dsl.Model], summary: dsl.OutputPath(dict)):
    """The second, with a text."""
    return fake_container(["second", behaviour, config], {"summary": summary})


@dsl.container_component
def expand(comparison: str, config: str, trials: dsl.OutputPath(list), failed: dsl.OutputPath(list)):
    """The trials of a comparison, as preflight lists them."""
    return fake_container(["expand", config, comparison], {"trials": trials, "failed": failed})


@dsl.container_component
def choose(item: dict[str, Any], config: dict[str, Any], behaviour: dsl.OutputPath(str)):
    """The first in a round: says how the next is to behave."""
    return fake_container(["choose", item, config], {"behaviour": behaviour})


@dsl.container_component
def gather(failed: list, values: list[dict], models: dsl.Input[list[dsl.Model]], summary: dsl.OutputPath(dict)):
    """What comes after a loop."""
    return fake_container(["gather", failed, values], {"summary": summary}, lists=True)


@dsl.container_component
def last(status: dsl.PipelineTaskFinalStatus):
    """The exit handler."""
    return fake_container(["last", "work", status], {})


def compiled(pipeline: Any, folder: Path) -> list[dict[str, Any]]:
    """The documents of a pipeline."""
    path = folder / f"{pipeline.name}.yaml"
    compiler.Compiler().compile(pipeline, str(path))
    return list(yaml.safe_load_all(path.read_text()))


def fake_pipeline(folder: Path, *, first_does: str = "work", second_does: str = "work") -> list[dict[str, Any]]:
    """The compiled pipeline; `first_does` and `second_does` are behaviours of `fake_step.py`."""

    @pipeline("fake", "A fake run.", {**FORM, "training_method": str})
    def fake(given: Any):
        end = last().set_display_name("finish").set_caching_options(False)
        with dsl.ExitHandler(end, name="run"):
            one = first(behaviour=first_does, value=given.model_teacher).set_display_name("make").set_retry(2, "60s")
            two = second(behaviour=second_does, config=one.outputs["result"], model=one.outputs["model"])
            two.set_display_name("report").set_caching_options(False)
            three = reads_text(behaviour="work", config=given.config, model=one.outputs["model"])
            three.set_display_name("use").after(two)

    return compiled(fake, folder)


def looping_pipeline(folder: Path) -> list[dict[str, Any]]:
    """The loop of the real comparison: a round takes its item, an output of another step, and a parameter."""

    @dsl.pipeline(name="rounds")
    def rounds(trials: list, failed: list, result: dict, value: str):
        with dsl.ParallelFor(trials, name="rounds") as item:
            two = choose(item=item, config=result).set_display_name("choose")
            three = first(behaviour=two.outputs["behaviour"], value=value).set_display_name("train")
        table = gather(
            failed=failed,
            values=dsl.Collected(three.outputs["result"]),
            models=dsl.Collected(three.outputs["model"]),
        )
        table.set_display_name("table").set_caching_options(False)

    @pipeline("looping", "A fake comparison.", {**FORM, "comparison": str})
    def looping(given: Any):
        end = last().set_display_name("finish").set_caching_options(False)
        with dsl.ExitHandler(end, name="run"):
            plan = (
                expand(comparison=given.comparison, config=given.config)
                .set_display_name("expand")
                .set_caching_options(False)
            )
            one = first(behaviour="work", value=given.model_teacher).set_display_name("make").after(plan)
            rounds(
                trials=plan.outputs["trials"],
                failed=plan.outputs["failed"],
                result=one.outputs["result"],
                value=given.model_student,
            )

    return compiled(looping, folder)
