"""The training steps as the pipeline runs them: files in, a model with its lineage out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from skd_lib.config import DataConfig
from skd_lib.data.prepared import PreparedData, prepare
from skd_lib.errors import Preempted, SkdError
from skd_lib.models.files import weights_digest
from skd_lib.models.importing import import_model
from skd_lib.models.records import RECORD, Record, read_record, write_record
from skd_lib.models.references import model_fingerprint
from skd_lib.multinode.coordinate import Work
from skd_lib.steps import distill, student_init, teacher_sft
from skd_lib.steps.kfp_call import Call, called
from skd_lib.steps.runtime import run_step
from skd_lib.training.checkpoints import MARKER
from tests.support.logged import undocumented

ROOT = Path(__file__).parents[2]
TRAINING = {"learning_rate": 5e-3, "max_steps": 4, "batch_size": 4, "micro_batch_size": 2, "eval_steps": 2}
TASK = {"prompt": "translate: {source}", "max_prompt_tokens": 128, "max_new_tokens": 12}


class Save(Protocol):
    def __call__(self, folder: Path, arch: str = "llama", seed: int = 0, **options: Any) -> Path: ...


class Step:
    """One step's arguments, and the record that it leaves in its model's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.arguments: dict[str, Any] = {
            "tracking_uri": "",
            "experiment": "skd",
            "checkpoint_root": str(folder.parent / "checkpoints"),
        }

    @property
    def record(self) -> Record:
        return read_record(self.model)

    @property
    def lineage(self) -> dict[str, Any]:
        return dict(self.record.lineage)

    @property
    def figures(self) -> Mapping[str, float]:
        return self.record.figures


def config(**fields: Any) -> str:
    """A step's `config`: its own fields, and the task and the seed of all of these tests."""
    return json.dumps({"task": TASK, "seed": 3, **fields})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"source": f"le fichier {n} du compte {n * 7}", "target": f"the file {n}"} for n in range(60)]
    rows += [rows[0], {"source": "une longue ligne " * 200, "target": "a long row"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "source": {"type": "files", "train": [str(folder / "rows.jsonl")]},
        "near_duplicate_threshold": 1,
        "student_examples": 20,
    }
    prepare(DataConfig.model_validate(settings), folder / "prepared", seed=0)
    return folder / "prepared"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Save) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "teacher", seed=2, layers=4)


def test_from_teacher_to_distilled_student(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's chain: fine-tune the teacher, cut the student from it, distil; each step hands its lineage on."""
    fingerprint = PreparedData.load(data).fingerprint
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    bucket = "gs://bucket/out"
    tuning = Step(tmp_path / "1")
    section = config(teacher=str(teacher), teacher_sft={"training": TRAINING})
    teacher_sft.main(data=data, teacher_out=tuning.model, config=section, **tuning.arguments)
    lineage = tuning.lineage
    assert lineage["reference"] == str(teacher)
    assert lineage["fingerprint"] == model_fingerprint(str(teacher))
    assert lineage["base_weights_sha256"] == weights_digest(teacher) != lineage["weights_sha256"]
    assert lineage["weights_sha256"] == weights_digest(tuning.model)
    assert lineage["data_fingerprint"] == fingerprint
    assert tuning.figures["best_validation_loss"] < tuning.figures["first_validation_loss"]

    cutting = Step(tmp_path / "2")
    section = config(student_init={"mode": "prune", "keep_first": 2.0, "keep_last": 1.0})  # as KFP passes integers
    paths: dict[str, Any] = {"teacher": tuning.model, "data": data, "student_out": cutting.model}
    student_init.main(config=section, **paths, **cutting.arguments)
    cut = cutting.lineage
    assert cut["base_student"] == f"{teacher}, first 2 and last 1 layers"
    assert cut["student_init"] == "prune"
    assert cut["teacher_weights_sha256"] == lineage["weights_sha256"]
    assert cut["teacher_fingerprint"] == lineage["fingerprint"]
    assert cut["weights_sha256"] == weights_digest(cutting.model)
    assert AutoModelForCausalLM.from_pretrained(cutting.model).config.num_hidden_layers == 3

    training = Step(tmp_path / "3")
    training.arguments["tracking_uri"] = uri
    section = config(distill={"sampling": {"top_k": 3}, "training": {**TRAINING, "dropout": 0.1}})
    paths = {"student": cutting.model, "teacher": tuning.model, "data": data, "student_out": training.model}
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    monkeypatch.setenv("SKD_IMAGE", "registry/skd@sha256:1")
    with called(Call(tmp_path / "output.json", artifacts={"distilled_student": f"{bucket}/distilled_student"})):
        distill.main(config=section, **paths, **training.arguments)
    written = json.loads((tmp_path / "output.json").read_text())
    entry = {"name": "distilled_student", "uri": f"{bucket}/distilled_student", "metadata": {}}
    assert written == {"artifacts": {"distilled_student": {"artifacts": [entry]}}, "parameterValues": {}}
    final = training.lineage
    assert final["weights_sha256"] == weights_digest(training.model) != cut["weights_sha256"]
    assert final["initial_weights_sha256"] == cut["weights_sha256"]
    assert (final["teacher"], final["base_student"]) == (str(teacher), cut["base_student"])
    assert (final["method"], final["divergence"], final["top_k"]) == ("skd", "forward_kl", 3)
    assert lineage["precision"] == final["precision"] == "fp32"
    assert (final["pipeline_run_id"], final["image"]) == ("run-1", "registry/skd@sha256:1")
    assert "torch " in final["software"]
    assert {"rejection_rate_first_tenth", "rejection_rate_last_tenth", "seconds_rollout"} <= set(training.figures)
    # Of the whole process, which is more than the tiny model's share of it.
    assert 0 < training.figures["estimated_memory_gib"] < training.figures["peak_memory_gib"] < 64
    course = training.record.course
    assert (course.steps, course.validation_steps) == ((1, 2, 3, 4), (0, 2, 4))
    assert len(course.rejection_rate) == 4
    assert course.validation_loss[0] == pytest.approx(training.figures["first_validation_loss"], rel=1e-4)
    assert course.training_steps == (1, 2, 3, 4)
    # What had been spent before each validation; the last one is after all steps.
    for spent, total in (
        (course.validation_tokens, "response_tokens"),
        (course.validation_student_tokens, "student_tokens"),
        (course.validation_teacher_tokens, "teacher_tokens"),
    ):
        assert spent[0] == 0 < spent[1] < spent[2] == training.figures[total]
    assert 0 == course.validation_seconds[0] < course.validation_seconds[1] < course.validation_seconds[2]
    assert len(course.validation_half) == 3
    assert all(half > 0 for half in course.validation_half)
    assert all(0 < length <= 12 for length in course.response_length)
    assert set(course.seconds) == {"rollout", "loss", "optimiser", "validation", "checkpoint"}
    assert course.peak_bytes["process"] > 10**8
    assert {sequence.step for sequence in training.record.samples()} == {1, 2, 4}
    assert final["losses"] == {
        "train": {"rows": 50, "lost": {"repeated": 1}},
        "validation": {"rows": 6, "lost": {}},
        "test": {"rows": 6, "lost": {}},
        "train_teacher": {"rows": 49, "lost": {"with prompts over max_prompt_tokens": 1}},
        "train_student": {"rows": 20, "lost": {"with prompts over max_prompt_tokens": 1}},
    }

    # Any tool can load it, and its card says where it came from.
    model = AutoModelForCausalLM.from_pretrained(training.model)
    assert model.config.attention_dropout == 0
    assert model.config.use_cache
    assert AutoTokenizer.from_pretrained(training.model).chat_template
    card = (training.model / "README.md").read_text()
    assert all(text in card for text in (str(teacher), fingerprint, "skd", "top_k", "| precision | fp32 |"))
    assert not list((tmp_path / "checkpoints").rglob("checkpoint-*"))
    _check_tracked(uri, final)


def _check_tracked(uri: str, lineage: Mapping[str, Any]) -> None:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("skd")
    assert experiment is not None
    for step in client.search_runs([experiment.experiment_id]):
        assert undocumented(step.data.metrics) == set()
    (run,) = client.search_runs([experiment.experiment_id], "tags.`kfp.task` = 'distill'")
    assert run.data.tags["weights_sha256"] == lineage["weights_sha256"]
    assert run.data.tags["mlflow.parentRunId"] == lineage["mlflow_run_id"]
    assert run.data.tags["precision"] == "fp32"
    assert run.data.params["skd/distill.sampling.top_k"] == "3"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "validation/loss")] == [0, 2, 4]
    assert {dataset.dataset.name for dataset in run.inputs.dataset_inputs} == {"train_student", "validation"}


def test_a_model_with_a_record_is_a_model_like_any_other(teacher: Path, tmp_path: Path) -> None:
    """The record changes neither the digest of the weights, nor is it taken over into another run."""
    model = tmp_path / "model"
    import_model(str(teacher), teacher, model, fingerprint="")
    write_record(model, lineage={"method": "skd"}, samples="{}\n")
    assert weights_digest(model) == weights_digest(teacher)
    import_model(str(model), model, tmp_path / "again", fingerprint="")
    assert read_record(tmp_path / "again").lineage["reference"] == str(model)
    assert "method" not in read_record(tmp_path / "again").lineage
    assert {path.name for path in (tmp_path / "again" / RECORD).iterdir()} >= {"lineage.json"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_a_teacher_that_is_not_to_be_tuned_is_passed_on(teacher: Path, data: Path, tmp_path: Path) -> None:
    step = Step(tmp_path / "1")
    section = config(teacher=str(teacher), teacher_sft={"enabled": False})
    teacher_sft.main(data=data, teacher_out=step.model, config=section, **step.arguments)
    assert step.lineage["weights_sha256"] == weights_digest(step.model) == weights_digest(teacher)
    assert step.lineage["fingerprint"] == model_fingerprint(str(teacher))
    assert step.figures == {"steps": 0}


def test_nodes_train_the_teacher_that_the_step_has_fetched(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is mounted in the step's pod is in none of theirs."""
    mounted, fetched = tmp_path / "mounted", tmp_path / "node" / "fetched"
    shutil.copytree(teacher, mounted)
    fingerprint = model_fingerprint(str(mounted))
    asked: list[Work] = []

    def take(work: Work, *_: object) -> None:
        work.made["fetched"](tmp_path / "made")
        assert (tmp_path / "made" / "model.safetensors").samefile(mounted / "model.safetensors")
        shutil.copytree(tmp_path / "made", fetched)  # as an upload does, with what links point to
        asked.append(work)

    monkeypatch.setattr("skd_lib.multinode.coordinate.train_on_nodes", take)
    waiting, node = Step(tmp_path / "pod"), Step(tmp_path / "node")
    section = {"training": TRAINING | {"max_steps": 1}, "multinode": {"nodes": 2}}
    settings = config(teacher=str(mounted), fingerprint=fingerprint, teacher_sft=section)
    teacher_sft.main(data=data, config=settings, teacher_out=waiting.model, **waiting.arguments)
    shutil.rmtree(mounted)
    (work,) = asked
    teacher_sft.main(data=data, teacher_out=node.model, fetched=fetched, **work.options)
    assert (node.lineage["reference"], node.lineage["fingerprint"]) == (str(mounted), fingerprint)
    assert node.lineage["base_weights_sha256"] == weights_digest(teacher)
    assert node.figures["steps"] == 1


def test_a_teacher_that_is_not_finite_is_refused_before_it_is_trained(
    data: Path, tmp_path: Path, save_tiny_model: Save
) -> None:
    broken = save_tiny_model(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    step = Step(tmp_path / "1")
    with pytest.raises(SkdError, match="not finite"):
        teacher_sft.main(data=data, config=config(teacher=str(broken)), teacher_out=step.model, **step.arguments)
    assert not (tmp_path / "checkpoints").exists()


def test_places_come_from_the_environment(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As arguments they would be part of Kubeflow's cache key."""
    monkeypatch.setenv("SKD_CHECKPOINT_ROOT", "ftp://bucket/x")
    words = ["--config", config(teacher=str(teacher)), "--data", str(data)]
    words += ["--teacher-out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["teacher_sft", *words])
    with pytest.raises(SystemExit) as caught:
        run_step(teacher_sft.main)
    assert caught.value.code == SkdError.exit_code
    assert "checkpoint_root ftp://bucket/x: checkpoints cannot be kept there" in capfd.readouterr().err


@pytest.mark.parametrize("mode", ["as_is", "sft"])
def test_a_student_of_its_own(mode: str, teacher: Path, data: Path, tmp_path: Path, save_tiny_model: Save) -> None:
    own = save_tiny_model(tmp_path / "own", seed=5, vocab_size=384)  # padded further than the teacher's
    step = Step(tmp_path / "1")
    out = step.model
    section = config(student=str(own), student_init={"mode": mode, "training": TRAINING})
    student_init.main(teacher=teacher, data=data, student_out=out, config=section, **step.arguments)
    metadata = step.lineage
    assert metadata["base_student"] == str(own)
    assert metadata["weights_sha256"] == weights_digest(out)
    assert (weights_digest(out) == weights_digest(own)) == (mode == "as_is")
    assert step.figures["steps"] == (0 if mode == "as_is" else 4)


def test_a_student_that_is_cut_and_fine_tuned(teacher: Path, data: Path, tmp_path: Path) -> None:
    students, steps = {}, {}
    named = tmp_path / "teacher"
    shutil.copytree(teacher, named)
    write_record(named, lineage={"reference": "org/teacher"})
    for mode in ("prune", "prune_sft"):
        steps[mode] = Step(tmp_path / mode)
        students[mode] = tmp_path / mode / "model"
        section = config(student_init={"mode": mode, "keep_first": 2, "keep_last": 1, "training": TRAINING})
        paths: dict[str, Any] = {"teacher": named, "data": data, "student_out": students[mode]}
        student_init.main(config=section, **paths, **steps[mode].arguments)
    metadata, figures = steps["prune_sft"].lineage, steps["prune_sft"].figures
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
        step = Step(tmp_path / str(attempt))
        out = tmp_path / str(attempt) / "model"
        section = config(teacher=str(teacher), teacher_sft={"training": TRAINING})
        arguments = {"data": data, "teacher_out": out, "config": section, **step.arguments}
        with monkeypatch.context() as patched:
            if attempt == 0:

                def die(*_: object) -> None:
                    raise OSError("disk full")

                patched.setattr("skd_lib.steps.training_run.save_trained", die)
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


@pytest.mark.slow
def test_a_step_that_is_told_to_go_saves_and_goes_on(teacher: Path, data: Path, tmp_path: Path) -> None:
    """A real process, a real signal: its exit code says that it wants to be started again."""
    training = {**TRAINING, "max_steps": 72, "eval_steps": 72}  # a second and a half
    section = config(teacher=str(teacher), teacher_sft={"training": training})
    outputs = []
    for name in ("stopped", "whole"):
        step = Step(tmp_path / name / "1")
        out = tmp_path / name / "1" / "model"
        arguments = {"data": data, "teacher_out": out, "config": section, **step.arguments}
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
    step = Step(tmp_path / "1")
    paths: dict[str, Any] = {"teacher": teacher, "data": data, "student_out": tmp_path / "out"}
    for mode in ("prune", "prune_sft"):
        section = config(student="org/model", student_init={"mode": mode, "keep_first": 1, "keep_last": 1})
        with pytest.raises(SkdError, match=f"field `student`: mode `{mode}` cuts the student from the teacher"):
            student_init.main(config=section, **paths, **step.arguments)
    with pytest.raises(SkdError, match="field `student`: mode `as_is` needs a student"):
        student_init.main(**paths, **step.arguments)
    with pytest.raises(SkdError, match="field `teacher`: no teacher is named"):
        teacher_sft.main(data=data, config=config(), teacher_out=tmp_path / "out", **step.arguments)
    with pytest.raises(SkdError, match=r"--config, field `distill.method`"):
        distill.main(student=teacher, config='{"distill": {"method": "kd"}}', **paths, **step.arguments)
    with pytest.raises(SkdError, match="the input `student` is gone from storage"):
        distill.main(student=tmp_path / "none", **paths, **step.arguments)
    with pytest.raises(SkdError, match=r"checkpoints cannot be kept there(.|\n)*gs://"):
        distill.main(student=teacher, **paths, **{**step.arguments, "checkpoint_root": "ftp://bucket/x"})

    other = save_tiny_model(tmp_path / "other", seed=5)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["f"] = vocabulary["f"], vocabulary["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SkdError, match="1 problem"):
        distill.main(student=other, **paths, **step.arguments)


@pytest.mark.slow
def test_prompts_alone_distil(teacher: Path, tmp_path: Path, save_tiny_model: Save) -> None:
    """The validation loss is then on answers of the teacher."""
    rows = [{"prompt": f"le fichier {n} du compte {n * 7}"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "files", "train": [str(tmp_path / "rows.jsonl")]}
    settings = {"source": source, "near_duplicate_threshold": 1}
    prepare(DataConfig.model_validate(settings), tmp_path / "prepared", seed=0)
    step = Step(tmp_path / "run")
    distill.main(
        student=save_tiny_model(tmp_path / "student", seed=1),
        teacher=teacher,
        data=tmp_path / "prepared",
        student_out=step.model,
        config=config(distill={"training": {**TRAINING, "max_steps": 2}}),
        **step.arguments,
    )
    assert step.figures["first_validation_loss"] > 0
    assert step.record.samples()


@pytest.mark.parametrize("method", ["supervised_kd", "seqkd"])
def test_a_teacher_that_was_asked_before_is_not_loaded(
    method: str, teacher: Path, data: Path, tmp_path: Path, save_tiny_model: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = save_tiny_model(tmp_path / "student", seed=5)
    losses = []
    for attempt, learning_rate in enumerate((5e-3, 1e-3)):
        step = Step(tmp_path / str(attempt))
        section = {
            "method": method,
            "teacher_signal": {"mode": "stored", "top_k": 8.0},
            "training": {**TRAINING, "learning_rate": learning_rate},
        }
        distill.main(
            student=student,
            teacher=teacher,
            data=data,
            student_out=step.model,
            config=config(distill=section),
            **step.arguments,
        )
        # Another training on the same data finds what the teacher said.
        monkeypatch.setattr(
            "skd_lib.steps.trained_model.load_frozen", lambda _: pytest.fail("the teacher was loaded again")
        )
        assert step.lineage["method"] == method
        assert str(step.lineage["teacher_signal"]).startswith("stored")
        losses.append((step.figures["first_validation_loss"], step.figures["best_validation_loss"]))
    assert losses[0][0] == losses[1][0] > losses[0][1]
    assert len(list((tmp_path / "checkpoints" / "teacher_signal").iterdir())) == 1


@pytest.mark.slow
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

    step, uri = Step(tmp_path / "run"), tmp_path / "m.db"
    out = step.model
    training = {**TRAINING, "max_steps": 2, "eval_steps": 2, "micro_batch_size": 1}
    arguments = {
        **step.arguments,
        "data": data,
        "teacher_out": out,
        "tracking_uri": f"sqlite:///{uri}",
        "config": config(teacher=str(teacher), teacher_sft={"training": training}),
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
    assert step.lineage["weights_sha256"] == weights_digest(out) != weights_digest(teacher)
    client = MlflowClient(f"sqlite:///{uri}")
    (experiment,) = client.search_experiments(filter_string="name = 'skd'")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`kfp.task` = 'teacher_sft'")  # one of the two told
    assert run.info.status == "FINISHED"
    assert run.data.metrics["final/steps"] == 2
    assert done.stderr.count("estimated memory of") == 2  # each of the two has trained


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["8bit", "4bit"])
def test_quantised_teacher_trains_a_student(precision: str, data: Path, tmp_path: Path, save_tiny_model: Save) -> None:
    pytest.importorskip("bitsandbytes")
    training = Step(tmp_path / "run")
    distill.main(
        config=config(distill={"sampling": {"top_k": 3}, "training": {**TRAINING, "teacher_precision": precision}}),
        student=save_tiny_model(tmp_path / "student", seed=1),
        teacher=save_tiny_model(tmp_path / "teacher", seed=2, layers=4, hidden=64),
        data=data,
        student_out=training.model,
        **training.arguments,
    )
    assert training.figures["best_validation_loss"] < training.figures["first_validation_loss"]
