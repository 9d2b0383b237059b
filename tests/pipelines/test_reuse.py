"""What runs again when a model has changed: the real pipelines, whose steps only write outputs of the right kind."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from skd_kfp.pipelines.local import reuse, runner
from skd_kfp.pipelines.local.folder import RunFolder
from skd_kfp.pipelines.local.process import Outcome
from skd_kfp.pipelines.local.progress import Display
from skd_kfp.pipelines.local.runner import run_pipeline
from skd_lib.comparison.config import CompareConfig
from skd_lib.comparison.plan import plan
from skd_lib.config import RunConfig
from skd_lib.models.references import model_fingerprint
from skd_lib.preflight import PreflightReport
from skd_lib.steps import compare_variant, preflight
from skd_lib.steps.kfp_call import called, take_call
from skd_lib.steps.runtime import StepIO

REAL = {"preflight": preflight.main, "compare_variant": compare_variant.main}
NOTHING = {"STRING": "", "BOOLEAN": False, "NUMBER_INTEGER": 0, "STRUCT": {}, "LIST": []}
TEACHERS_OWN = {"teacher_sft", "evaluate_teacher"}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the names of a model's files in them."""
    folders = tmp_path / "teacher", tmp_path / "student"
    for folder in folders:
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "chat_template.jinja", "generation_config.json"):
            (folder / name).write_text("{}")
    return folders


@pytest.fixture
def config(models: tuple[Path, Path]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "reuse",
            "teacher": str(models[0]),
            "student": str(models[1]),
            "data": {"source": {"type": "files", "train": ["x.jsonl"]}},
            "task": {"metrics": ["chrf"]},
        }
    )


@pytest.fixture
def run(
    config: RunConfig,
    tmp_path: Path,
    compile_once: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., set[str]]:
    """Runs a pipeline in one folder; the names of the steps that were not reused."""

    def checks(run_config: RunConfig, *, variants: list[RunConfig], **_: Any) -> PreflightReport:
        named = {run_config.teacher, run_config.student, *(variant.student for variant in variants)}
        return PreflightReport(model_fingerprints={name: model_fingerprint(name) for name in named if name})

    monkeypatch.setattr("skd_lib.preflight.run_checks", checks)
    monkeypatch.setattr(reuse, "source_digest", lambda: "the same code")

    def again(variants: Mapping[str, Mapping[str, str]] | None = None) -> set[str]:
        pipeline = "compare_methods" if variants else "distillation"
        documents = compile_once(name=pipeline)
        monkeypatch.setattr(runner, "child_processes", lambda _: _steps(documents[0]))
        values = {"name": "reuse", "base": "base.yaml", "variants": variants, "drafts": True}
        finished = run_pipeline(
            config,
            RunFolder.create(tmp_path / "runs", pipeline),
            documents,
            Display(Console(file=io.StringIO()), 1),
            tracking_uri="",
            experiment="skd",
            comparison=plan(CompareConfig.model_validate(values), config, where="x.yaml") if variants else None,
        )
        return finished.outputs.keys() - finished.reused_steps

    return again


def _steps(spec: dict[str, Any]) -> Callable[..., Outcome]:
    executors = spec["deploymentSpec"]["executors"]
    kinds = {
        executors[component["executorLabel"]]["container"]["command"][2]: component.get("outputDefinitions", {})
        for component in spec["components"].values()
        if "executorLabel" in component
    }

    def start(_image: str, command: list[str], _env: Mapping[str, str], _log: Path, _on_event: Any) -> Outcome:
        module, arguments = command[2], command[3:]
        words, call = take_call(arguments)
        with called(call):
            if main := REAL.get(module.rpartition(".")[2]):
                app = typer.Typer()
                app.command()(main)
                app(words, standalone_mode=False)
                return Outcome(0, "", ())
            assert call.output_file is not None
            step = StepIO({name: call.output_file.parent / name for name in kinds[module].get("artifacts", {})})
            for path in step.paths.values():
                path.touch()
            for name, kind in kinds[module].get("parameters", {}).items():
                step.parameter(name, NOTHING[kind["parameterType"]])
            step.write()
            return Outcome(0, "", ())

    return start


def test_a_changed_model_runs_what_depends_on_it_again(run: Callable[..., set[str]], models: tuple[Path, Path]) -> None:
    teacher, student = models
    everything = run()
    (teacher / "README.md").write_text("a new card")
    (student / "model.safetensors").write_text("other weights")
    assert run() == everything - TEACHERS_OWN - {"prepare_data"}
    (teacher / "chat_template.jinja").write_text("another template")
    assert run() == everything - {"prepare_data"}


def test_a_comparison_knows_each_runs_student(run: Callable[..., set[str]], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    variants = {"a": {}, "b": {"student": str(other)}}
    everything = run(variants)
    (other / "config.json").write_text("changed")
    again = run(variants)
    of_one = {name for name in everything if name.endswith("-a-seed-0")}
    always = {"compare_variant-a-seed-0", "show-trial-a-seed-0"}
    assert again == everything - of_one - TEACHERS_OWN - {"prepare_data"} | always


def test_a_trial_that_comes_to_a_comparison_is_run_alone(run: Callable[..., set[str]]) -> None:
    few = {"a": {}, "b": {"distill.sampling.top_k": 5}}
    everything = run(few)
    always = {"preflight", "show-data", "compare_table", "finish"}
    chosen = {name for name in everything if name.startswith(("compare_variant", "show-trial"))}
    assert run(few) == always | chosen
    more = run({**few, "c": {"distill.sampling.top_k": 7}})
    new = {f"{step}-c-seed-0" for step in ("distill", "evaluate-student_after", "specdec_benchmark")}
    # Its student starts where the others' did, which is made once.
    assert more == always | chosen | new | {"compare_variant-c-seed-0", "show-trial-c-seed-0"}
