"""The training steps as the pipeline runs them: files in, a model with its lineage out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from skd_lib.config import DataConfig
from skd_lib.data.prepared import PreparedData, prepare
from skd_lib.errors import Preempted, SkdError
from skd_lib.models.files import weights_digest
from skd_lib.report.samples import read_samples
from skd_lib.steps import distill, student_init, teacher_sft
from skd_lib.training.checkpoints import MARKER

ROOT = Path(__file__).parents[2]
TRAINING = {"learning_rate": 5e-3, "max_steps": 4, "batch_size": 4, "micro_batch_size": 2, "eval_steps": 2}
TASK = json.dumps({"prompt": "translate: {source}", "max_prompt_tokens": 128, "max_new_tokens": 12})


class Save(Protocol):
    def __call__(self, folder: Path, arch: str = "llama", seed: int = 0, **options: Any) -> Path: ...


class Step:
    """One step's arguments and what KFP would tell it."""

    def __init__(self, folder: Path, outputs: list[str], inputs: dict[str, dict[str, Any]] | None = None) -> None:
        self.folder = folder
        artifacts = {
            name: {"artifacts": [{"uri": f"gs://bucket/{name}", "metadata": metadata}]}
            for name, metadata in (inputs or {}).items()
        }
        wanted = {name: {"artifacts": [{"name": name, "uri": f"gs://bucket/out/{name}"}]} for name in outputs}
        task = {
            "inputs": {"artifacts": artifacts},
            "outputs": {"artifacts": wanted, "outputFile": str(folder / "output.json")},
        }
        self.arguments: dict[str, Any] = {
            "task_config": TASK,
            "seed": 3,
            "tracking_uri": "",
            "experiment": "skd",
            "checkpoint_root": str(folder.parent / "checkpoints"),
            "metrics_out": folder / "metrics.json",
            "executor_input": json.dumps(task),
        }

    @property
    def written(self) -> dict[str, Any]:
        output: dict[str, Any] = json.loads((self.folder / "output.json").read_text())
        return output

    def metadata(self, name: str) -> dict[str, Any]:
        metadata: dict[str, Any] = self.written["artifacts"][name]["artifacts"][0]["metadata"]
        return metadata

    @property
    def figures(self) -> dict[str, float]:
        figures: dict[str, float] = json.loads((self.folder / "metrics.json").read_text())
        assert {name: pytest.approx(value) for name, value in self.metadata("metrics").items()} == figures
        return figures


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"source": f"le fichier {n} du compte {n * 7}", "target": f"the file {n}"} for n in range(60)]
    rows += [rows[0], {"source": "une longue ligne " * 200, "target": "a long row"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "source": {"type": "files", "train": [str(folder / "rows.jsonl")]},
        "near_duplicate_threshold": 1,
        "student_examples": 20,
    }
    prepare(DataConfig.model_validate(config), folder / "prepared", seed=0)
    return folder / "prepared"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Save) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "teacher", seed=2, layers=4)


def test_from_teacher_to_distilled_student(teacher: Path, data: Path, tmp_path: Path) -> None:
    """The demo's chain: fine-tune the teacher, cut the student from it, distil; each step hands its lineage on."""
    fingerprint = PreparedData.load(data).fingerprint
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    tuning = Step(tmp_path / "1", ["tuned_teacher", "metrics"], {"teacher": {"reference": "org/teacher", "n": 7}})
    tuned = tmp_path / "1" / "model"
    section = json.dumps({"training": TRAINING})
    teacher_sft.main(teacher=teacher, data=data, teacher_out=tuned, config=section, **tuning.arguments)
    lineage = tuning.metadata("tuned_teacher")
    assert lineage["reference"] == "org/teacher"
    assert lineage["n"] == 7
    assert lineage["base_weights_sha256"] == weights_digest(teacher) != lineage["weights_sha256"]
    assert lineage["weights_sha256"] == weights_digest(tuned)
    assert lineage["data_fingerprint"] == fingerprint
    assert tuning.written["artifacts"]["tuned_teacher"]["artifacts"][0]["uri"] == "gs://bucket/out/tuned_teacher"
    assert tuning.figures["best_validation_loss"] < tuning.figures["first_validation_loss"]

    cutting = Step(tmp_path / "2", ["initial_student", "metrics"], {"teacher": lineage})
    initial = tmp_path / "2" / "model"
    section = json.dumps({"mode": "prune", "keep_first": 2.0, "keep_last": 1.0})  # as KFP passes integers
    student_init.main(student="", teacher=tuned, data=data, student_out=initial, config=section, **cutting.arguments)
    cut = cutting.metadata("initial_student")
    assert cut["base_student"] == "org/teacher, first 2 and last 1 layers"
    assert cut["student_init"] == "prune"
    assert cut["teacher_weights_sha256"] == lineage["weights_sha256"]
    assert cut["weights_sha256"] == weights_digest(initial)
    assert AutoModelForCausalLM.from_pretrained(initial).config.num_hidden_layers == 3

    training = Step(tmp_path / "3", ["distilled_student", "metrics", "samples"], {"student": cut, "teacher": lineage})
    training.arguments["tracking_uri"] = uri
    distilled = tmp_path / "3" / "model"
    section = json.dumps({"sampling": {"top_k": 3}, "training": {**TRAINING, "dropout": 0.1}})
    samples = tmp_path / "3" / "samples"
    paths = {"student": initial, "teacher": tuned, "data": data, "student_out": distilled, "samples_out": samples}
    distill.main(config=section, **paths, **training.arguments)
    final = training.metadata("distilled_student")
    assert final["weights_sha256"] == weights_digest(distilled) != cut["weights_sha256"]
    assert final["initial_weights_sha256"] == cut["weights_sha256"]
    assert (final["teacher"], final["base_student"]) == ("org/teacher", cut["base_student"])
    assert (final["method"], final["divergence"], final["top_k"]) == ("skd", "forward_kl", 3)
    assert lineage["precision"] == final["precision"] == "fp32"
    assert {"rejection_rate_first_tenth", "rejection_rate_last_tenth", "seconds_rollout"} <= set(training.figures)
    # Of the whole process, which is more than the tiny model's share of it.
    assert 0 < training.figures["estimated_memory_gib"] < training.figures["peak_memory_gib"] < 64
    course = training.written["parameterValues"]["course"]
    assert (course["steps"], course["validation_steps"]) == ([1, 2, 3, 4], [0, 2, 4])
    assert len(course["rejection_rate"]) == 4
    assert course["validation_loss"][0] == training.figures["first_validation_loss"]
    assert course["training_steps"] == [1, 2, 3, 4]
    assert all(0 < length <= 12 for length in course["response_length"])
    assert set(course["seconds"]) == {"rollout", "loss", "optimiser", "validation", "checkpoint"}
    assert course["peak_bytes"]["process"] > 10**8
    assert {sequence.step for sequence in read_samples(samples)} == {1, 2, 4}
    assert training.metadata("samples") == {**final, "sequences": 9}
    assert final["losses"] == {
        "train": {"rows": 50, "lost": {"repeated": 1}},
        "validation": {"rows": 6, "lost": {}},
        "test": {"rows": 6, "lost": {}},
        "train_teacher": {"rows": 49, "lost": {"with prompts over max_prompt_tokens": 1}},
        "train_student": {"rows": 20, "lost": {"with prompts over max_prompt_tokens": 1}},
    }

    # Any tool can load it, and its card says where it came from.
    model = AutoModelForCausalLM.from_pretrained(distilled)
    assert model.config.attention_dropout == 0
    assert model.config.use_cache
    assert AutoTokenizer.from_pretrained(distilled).chat_template
    card = (distilled / "README.md").read_text()
    assert all(text in card for text in ("org/teacher", fingerprint, "skd", "top_k", "| precision | fp32 |"))
    assert not list((tmp_path / "checkpoints").rglob("checkpoint-*"))
    _check_tracked(uri, final["weights_sha256"])


def _check_tracked(uri: str, digest: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("skd")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`kfp.task` = 'distill'")
    assert run.data.tags["weights_sha256"] == digest
    assert run.data.tags["precision"] == "fp32"
    assert run.data.params["skd/distill.sampling.top_k"] == "3"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "validation_loss")] == [0, 2, 4]
    assert {dataset.dataset.name for dataset in run.inputs.dataset_inputs} == {"train_student", "validation"}


def test_a_teacher_that_is_not_to_be_tuned_is_passed_on(teacher: Path, data: Path, tmp_path: Path) -> None:
    step = Step(tmp_path / "1", ["tuned_teacher", "metrics"])
    out = tmp_path / "1" / "model"
    teacher_sft.main(teacher=teacher, data=data, teacher_out=out, config='{"enabled": false}', **step.arguments)
    assert step.metadata("tuned_teacher")["weights_sha256"] == weights_digest(out) == weights_digest(teacher)
    assert step.figures == {"steps": 0}


@pytest.mark.parametrize("mode", ["as_is", "sft"])
def test_a_student_of_its_own(mode: str, teacher: Path, data: Path, tmp_path: Path, save_tiny_model: Save) -> None:
    own = save_tiny_model(tmp_path / "own", seed=5, vocab_size=384)  # padded further than the teacher's
    step = Step(tmp_path / "1", ["initial_student", "metrics"])
    out = tmp_path / "1" / "model"
    section = json.dumps({"mode": mode, "training": TRAINING})
    student_init.main(student=str(own), teacher=teacher, data=data, student_out=out, config=section, **step.arguments)
    metadata = step.metadata("initial_student")
    assert metadata["base_student"] == str(own)
    assert metadata["weights_sha256"] == weights_digest(out)
    assert (weights_digest(out) == weights_digest(own)) == (mode == "as_is")
    assert step.figures["steps"] == (0 if mode == "as_is" else 4)


def test_a_student_that_is_cut_and_fine_tuned(teacher: Path, data: Path, tmp_path: Path) -> None:
    students, steps = {}, {}
    for mode in ("prune", "prune_sft"):
        steps[mode] = Step(tmp_path / mode, ["initial_student", "metrics"], {"teacher": {"reference": "org/teacher"}})
        students[mode] = tmp_path / mode / "model"
        section = json.dumps({"mode": mode, "keep_first": 2, "keep_last": 1, "training": TRAINING})
        paths = {"teacher": teacher, "data": data, "student_out": students[mode]}
        student_init.main(student="", config=section, **paths, **steps[mode].arguments)
    metadata, figures = steps["prune_sft"].metadata("initial_student"), steps["prune_sft"].figures
    assert AutoModelForCausalLM.from_pretrained(students["prune_sft"]).config.num_hidden_layers == 3
    assert metadata["student_init"] == "prune_sft"
    assert metadata["base_student"] == "org/teacher, first 2 and last 1 layers"
    assert metadata["base_weights_sha256"] == weights_digest(students["prune"])  # what was fine-tuned
    assert metadata["weights_sha256"] == weights_digest(students["prune_sft"]) != metadata["base_weights_sha256"]
    assert metadata["data_fingerprint"] == PreparedData.load(data).fingerprint
    assert (figures["steps"], figures["layers"]) == (4, 3)
    assert figures["best_validation_loss"] < figures["first_validation_loss"]
    assert "cut from its teacher and fine-tuned" in (students["prune_sft"] / "README.md").read_text()
    assert not list((tmp_path / "checkpoints").rglob("checkpoint-*"))


def test_a_step_that_died_goes_on_from_its_checkpoint(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the model was being written, the step trains no more when it is started again."""
    outputs = []
    for attempt in range(2):
        step = Step(tmp_path / str(attempt), ["tuned_teacher", "metrics"])
        out = tmp_path / str(attempt) / "model"
        section = json.dumps({"training": TRAINING})
        arguments = {"teacher": teacher, "data": data, "teacher_out": out, "config": section, **step.arguments}
        with monkeypatch.context() as patched:
            if attempt == 0:

                def die(*_: object) -> None:
                    raise OSError("disk full")

                patched.setattr("skd_lib.steps.fitting.save_trained", die)
                with pytest.raises(OSError, match="disk full"):
                    teacher_sft.main(**arguments)
                (kept,) = (tmp_path / "checkpoints" / "teacher_sft").glob("*/*")
                assert {path.name for path in kept.iterdir()} >= {"checkpoint-4"}
                modified = (kept / "checkpoint-4" / "model.safetensors").stat().st_mtime_ns
                best = json.loads((kept / "checkpoint-4" / MARKER).read_text())["best"]
                outputs.append(load_file(kept / best / "model.safetensors"))
            else:
                assert (kept / "checkpoint-4" / "model.safetensors").stat().st_mtime_ns == modified
                teacher_sft.main(**arguments)
                assert step.figures["steps"] == 4
                outputs.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(outputs[1][name], tensor) for name, tensor in outputs[0].items())
    assert not kept.parent.exists()


def test_a_step_that_is_told_to_go_saves_and_goes_on(teacher: Path, data: Path, tmp_path: Path) -> None:
    """A real process, a real signal: its exit code says that it wants to be started again."""
    section = json.dumps({"training": {**TRAINING, "max_steps": 24, "eval_steps": 24}})
    outputs = []
    for name in ("stopped", "whole"):
        step = Step(tmp_path / name / "1", ["tuned_teacher", "metrics"])
        out = tmp_path / name / "1" / "model"
        arguments = {"teacher": teacher, "data": data, "teacher_out": out, "config": section, **step.arguments}
        if name == "stopped":
            options = [text for key, value in arguments.items() for text in (f"--{key.replace('_', '-')}", str(value))]
            command = [sys.executable, "-m", "skd_lib.steps.teacher_sft", *options]
            environment = {**os.environ, "SKD_EVENTS": "1"}
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                next(line for line in process.stdout if '"progress"' in line)
                for _ in range(2):
                    process.send_signal(signal.SIGTERM)
                told = process.stdout.read()
            assert process.returncode == Preempted.exit_code
            assert "stopped by SIGTERM after optimiser step" in told
            assert not out.exists()
            (kept,) = (tmp_path / name / "checkpoints" / "teacher_sft").iterdir()
            assert len(list(kept.glob("*/checkpoint-*/complete"))) == 1
        teacher_sft.main(**arguments)
        outputs.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(outputs[0][name], tensor) for name, tensor in outputs[1].items())


def test_what_is_wrong_is_said_before_anything_is_loaded(
    teacher: Path, data: Path, tmp_path: Path, save_tiny_model: Save
) -> None:
    step = Step(tmp_path / "1", ["x", "metrics"])
    paths = {"teacher": teacher, "data": data, "student_out": tmp_path / "out"}
    distilling = {**paths, "samples_out": tmp_path / "samples"}
    section = '{"mode": "prune", "keep_first": 1, "keep_last": 1}'
    with pytest.raises(SkdError, match="mode `prune` cuts the student from the teacher"):
        student_init.main(student="org/model", config=section, **paths, **step.arguments)
    with pytest.raises(SkdError, match="mode `prune_sft` cuts the student from the teacher"):
        student_init.main(student="org/model", config=section.replace("prune", "prune_sft"), **paths, **step.arguments)
    with pytest.raises(SkdError, match="mode `as_is` needs a student"):
        student_init.main(student="", **paths, **step.arguments)
    with pytest.raises(SkdError, match=r"--config, field `method`"):
        distill.main(student=teacher, config='{"method": "kd"}', **distilling, **step.arguments)
    with pytest.raises(SkdError, match="no such folder"):
        distill.main(student=tmp_path / "none", **distilling, **step.arguments)
    with pytest.raises(SkdError, match=r"checkpoints cannot be kept there(.|\n)*gs://"):
        distill.main(student=teacher, **distilling, **{**step.arguments, "checkpoint_root": "ftp://bucket/x"})

    other = save_tiny_model(tmp_path / "other", seed=5)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["f"] = vocabulary["f"], vocabulary["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SkdError, match="1 problem"):
        distill.main(student=other, **distilling, **step.arguments)


@pytest.mark.parametrize("method", ["supervised_kd", "seqkd"])
def test_a_teacher_that_was_asked_before_is_not_loaded(
    method: str, teacher: Path, data: Path, tmp_path: Path, save_tiny_model: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = save_tiny_model(tmp_path / "student", seed=5)
    losses = []
    for attempt, learning_rate in enumerate((5e-3, 1e-3)):
        step = Step(tmp_path / str(attempt), ["distilled_student", "samples", "metrics"])
        section = {
            "method": method,
            "teacher_signal": {"mode": "stored", "top_k": 8.0},
            "training": {**TRAINING, "learning_rate": learning_rate},
        }
        distill.main(
            student=student,
            teacher=teacher,
            data=data,
            student_out=tmp_path / str(attempt) / "model",
            samples_out=tmp_path / str(attempt) / "samples",
            config=json.dumps(section),
            **step.arguments,
        )
        # Another training on the same data finds what the teacher said.
        monkeypatch.setattr("skd_lib.steps.fitting.load_frozen", lambda _: pytest.fail("the teacher was loaded again"))
        assert step.metadata("distilled_student")["method"] == method
        assert str(step.metadata("distilled_student")["teacher_signal"]).startswith("stored")
        losses.append((step.figures["first_validation_loss"], step.figures["best_validation_loss"]))
    assert losses[0][0] == losses[1][0] > losses[0][1]
    assert len(list((tmp_path / "checkpoints" / "teacher_signal").iterdir())) == 1


def test_the_command_of_a_profile_with_several_gpus_trains_in_as_many_processes(
    teacher: Path, data: Path, tmp_path: Path, compile_once: Callable[..., Any]
) -> None:
    """What the compiled pipeline starts in the pod, with gloo in the place of NCCL."""
    profile = tmp_path / "two.yaml"
    needs = {"cpu": "1", "memory": "1Gi", "shared_memory": "1Gi", "gpus": 1}
    kinds = dict.fromkeys(("small", "data", "model"), needs)
    profile.write_text(json.dumps({"description": "two GPUs", **kinds, "steps": {"teacher_sft": {"gpus": 2}}}))
    spec = compile_once(profile=str(profile))[0]
    command = spec["deploymentSpec"]["executors"]["exec-teacher-sft"]["container"]["command"]
    assert command[0] == "python3"

    step, out, uri = Step(tmp_path / "run", ["tuned_teacher", "metrics"]), tmp_path / "run/model", tmp_path / "m.db"
    training = {**TRAINING, "max_steps": 2, "eval_steps": 2, "micro_batch_size": 1}
    arguments = {
        **step.arguments,
        "teacher": teacher,
        "data": data,
        "teacher_out": out,
        "tracking_uri": f"sqlite:///{uri}",
        "config": json.dumps({"training": training}),
    }
    options = [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", str(ROOT))])
    done = subprocess.run(
        [sys.executable, *command[1:], *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "KFP_RUN_ID": "run-1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert step.metadata("tuned_teacher")["weights_sha256"] == weights_digest(out) != weights_digest(teacher)
    client = MlflowClient(f"sqlite:///{uri}")
    (experiment,) = client.search_experiments(filter_string="name = 'skd'")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`kfp.task` = 'teacher_sft'")  # one of the two told
    assert run.info.status == "FINISHED"
    assert run.data.metrics["steps"] == 2
    assert done.stderr.count("estimated memory of") == 2  # each of the two has trained


@pytest.mark.parametrize("precision", ["8bit", "4bit"])
def test_quantised_teacher_trains_a_student(precision: str, data: Path, tmp_path: Path, save_tiny_model: Save) -> None:
    pytest.importorskip("bitsandbytes")
    training = Step(tmp_path / "run", ["distilled_student", "metrics", "samples"])
    distill.main(
        config=json.dumps({"sampling": {"top_k": 3}, "training": {**TRAINING, "teacher_precision": precision}}),
        student=save_tiny_model(tmp_path / "student", seed=1),
        teacher=save_tiny_model(tmp_path / "teacher", seed=2, layers=4, hidden=64),
        data=data,
        student_out=tmp_path / "run" / "model",
        samples_out=tmp_path / "run" / "samples",
        **training.arguments,
    )
    assert training.figures["best_validation_loss"] < training.figures["first_validation_loss"]
