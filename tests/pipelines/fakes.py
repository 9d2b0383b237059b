"""A pipeline of fake steps with the shape of the real one: an exit handler around cached and uncached steps."""

from pathlib import Path
from typing import Any

import yaml
from kfp import compiler, dsl

STEP = str(Path(__file__).with_name("fake_step.py"))


@dsl.container_component
def first(behaviour: str, value: str, model: dsl.Output[dsl.Model], result: dsl.OutputPath(dict)):
    """The first."""
    return dsl.ContainerSpec(
        image="fake:1",
        command=["python3", STEP],
        args=["first", behaviour, value, "--executor-input", "{{$}}"],
    )


@dsl.container_component
def second(behaviour: str, config: dict[str, Any], model: dsl.Input[dsl.Model], summary: dsl.OutputPath(dict)):
    """The second."""
    return dsl.ContainerSpec(
        image="fake:1",
        command=["python3", STEP],
        args=["second", behaviour, config, "--executor-input", "{{$}}"],
    )


@dsl.container_component
def choose(item: dict[str, Any], config: dict[str, Any], behaviour: dsl.OutputPath(str)):
    """The first in a round: says how the next is to behave."""
    return dsl.ContainerSpec(
        image="fake:1", command=["python3", STEP], args=["choose", item, config, "--executor-input", "{{$}}"]
    )


@dsl.container_component
def last(status: dsl.PipelineTaskFinalStatus):
    """The exit handler."""
    return dsl.ContainerSpec(
        image="fake:1", command=["python3", STEP], args=["last", "work", status, "--executor-input", "{{$}}"]
    )


def fake_pipeline(folder: Path, *, first_does: str = "work", second_does: str = "work") -> list[dict[str, Any]]:
    """The compiled pipeline; `first_does` and `second_does` are behaviours of `fake_step.py`."""

    # Nothing but the parameters of the real pipeline: the runner passes those.
    @dsl.pipeline(name="fake")
    def fake(
        run_name: str,
        teacher: str,
        student: str,
        method: str,
        divergence: str,
        top_k: int,
        gamma: int,
        max_steps: int,
        learning_rate: float,
        seed: int,
        tracking_uri: str,
        experiment: str,
        checkpoint_root: str,
        config: dict[str, Any],
    ):
        end = last().set_display_name("finish").set_caching_options(False)
        with dsl.ExitHandler(end, name="run"):
            one = first(behaviour=first_does, value=teacher).set_display_name("make").set_retry(2, "60s")
            two = second(behaviour=second_does, config=one.outputs["result"], model=one.outputs["model"])
            two.set_display_name("report").set_caching_options(False)
            three = second(behaviour="work", config=config, model=one.outputs["model"])
            three.set_display_name("use").after(two)

    path = folder / "fake.yaml"
    compiler.Compiler().compile(fake, str(path))
    return list(yaml.safe_load_all(path.read_text()))


def choosing_pipeline(folder: Path) -> list[dict[str, Any]]:
    """The choice of the real pipeline: one of two steps runs, and the next takes its result."""

    @dsl.pipeline(name="choosing")
    def choosing(
        run_name: str,
        teacher: str,
        student: str,
        method: str,
        divergence: str,
        top_k: int,
        gamma: int,
        max_steps: int,
        learning_rate: float,
        seed: int,
        tracking_uri: str,
        experiment: str,
        checkpoint_root: str,
        config: dict[str, Any],
    ):
        end = last().set_display_name("finish").set_caching_options(False)
        with dsl.ExitHandler(end, name="run"):
            one = first(behaviour="work", value=teacher).set_display_name("make")
            with dsl.If(student == "true", name="wanted"):
                yes = first(behaviour="work", value="yes").set_display_name("choice")
            with dsl.Else(name="unwanted"):
                no = first(behaviour="work", value="no").set_display_name("choice-off")
            chosen = dsl.OneOf(yes.outputs["result"], no.outputs["result"])
            second(behaviour="work", config=chosen, model=one.outputs["model"]).set_display_name("report")

    path = folder / "choosing.yaml"
    compiler.Compiler().compile(choosing, str(path))
    return list(yaml.safe_load_all(path.read_text()))


@dsl.container_component
def gather(failed: list[dict], values: list[dict], models: dsl.Input[list[dsl.Model]], summary: dsl.OutputPath(dict)):
    """What comes after a loop."""
    return dsl.ContainerSpec(
        image="fake:1", command=["python3", STEP], args=["gather", failed, values, "--executor-input", "{{$}}"]
    )


def looping_pipeline(folder: Path) -> list[dict[str, Any]]:
    """The loop of the real comparison: a round takes its item, an output of another step, and a parameter."""

    @dsl.pipeline(name="looping")
    def looping(
        run_name: str,
        teacher: str,
        student: str,
        method: str,
        divergence: str,
        top_k: int,
        gamma: int,
        max_steps: int,
        learning_rate: float,
        seed: int,
        tracking_uri: str,
        experiment: str,
        checkpoint_root: str,
        config: dict[str, Any],
        trials: list[dict],
        reference: str,
        drafts: bool,
        failed: list[dict],
    ):
        end = last().set_display_name("finish").set_caching_options(False)
        with dsl.ExitHandler(end, name="run"):
            one = first(behaviour="work", value=teacher).set_display_name("make")
            with dsl.ParallelFor(trials, name="rounds") as item:
                two = choose(item=item, config=one.outputs["result"]).set_display_name("choose")
                three = first(behaviour=two.outputs["behaviour"], value=student).set_display_name("train")
            gather(
                failed=failed,
                values=dsl.Collected(three.outputs["result"]),
                models=dsl.Collected(three.outputs["model"]),
            ).set_display_name("table").set_caching_options(False)

    path = folder / "looping.yaml"
    compiler.Compiler().compile(looping, str(path))
    return list(yaml.safe_load_all(path.read_text()))
