"""Checkpoints: seen only when complete, in a folder and in object storage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from skd_lib import storage
from skd_lib.config import DataConfig
from skd_lib.data.prepared import prepare
from skd_lib.errors import Preempted, SkdError
from skd_lib.steps import distill, teacher_sft
from skd_lib.training.attempts import ALIVE
from skd_lib.training.checkpoints import MARKER, Attempt, Checkpoints, checkpoint_key
from tests.conftest import SaveTinyModel
from tests.support.gcs_emulator import emulated
from tests.training.nursery import Nursery
from tests.training.tiny_task import run


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with emulated("checkpoints"):
        yield "gs://checkpoints"


def stored(uri: str) -> set[str]:
    return {name.partition("/")[0] for name in storage.file_sizes(uri)} - {ALIVE}


def checkpoint(folder: Path, step: int, best: int, *, marked: bool = True, text: bytes = bytes(100)) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(text)
    if marked:
        manifest = {"best": f"checkpoint-{best}", "files": {"weights": 100}}
        (path / MARKER).write_text(json.dumps(manifest))
    return path


def taken_over(folder: Path, mirror: str = "") -> list[str]:
    """The steps whose checkpoints a new attempt begins with, the one that it goes on from last."""
    with Checkpoints(folder, mirror).attempt() as attempt:
        newest = attempt.take_over()
        held = sorted(attempt.folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        assert newest == (held[-1] if held else None)
        assert all((path / "weights").read_bytes() for path in held)
        return [path.name[11:] for path in held]


def test_the_newest_usable_checkpoint_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert taken_over(tmp_path / "none") == []
    work = tmp_path / "work"
    good = checkpoint(work / "first", 5, best=5)
    checkpoint(work / "first", 10, best=10, marked=False)
    (checkpoint(work / "second", 20, best=20) / "weights").write_bytes(bytes(50))
    (checkpoint(work / "first", 30, best=5) / MARKER).write_text("")
    checkpoint(work / "second", 100, best=20)
    with Checkpoints(work).attempt() as attempt:
        copy = attempt.take_over()
    assert copy == attempt.folder / good.name
    told = {record.getMessage().removeprefix(f"the checkpoint {work}/") for record in caplog.records}
    assert told >= {
        "first/checkpoint-10 is left out: it was not written to its end",
        "second/checkpoint-20 is left out: its file weights is missing or was cut off",
        f"first/checkpoint-30 is left out: its file {MARKER} is damaged",
        "second/checkpoint-100 is left out: checkpoint-20, the best checkpoint by then, is missing or damaged",
    }


def test_a_copy_holds_the_best_one_and_takes_no_room(tmp_path: Path) -> None:
    best, newest = checkpoint(tmp_path / "first", 5, best=5), checkpoint(tmp_path / "first", 10, best=5)
    checkpoint(tmp_path / "first", 7, best=5)
    inodes = [(path / "weights").stat().st_ino for path in (best, newest)]
    with Checkpoints(tmp_path).attempt() as attempt:
        attempt.take_over()
        assert {path.name for path in tmp_path.iterdir()} == {attempt.name}  # the first attempt has ended
        copies = [attempt.folder / path.name / "weights" for path in (best, newest)]
        assert [copy.stat().st_ino for copy in copies] == inodes


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    with Checkpoints(tmp_path).attempt() as attempt:
        for step, best in ((5, 5), (10, 5), (15, 5), (20, 5)):
            checkpoint(attempt.folder, step, best, marked=False)
            attempt.commit(step, best, keep=2)
        assert stored(str(attempt.folder)) == {"checkpoint-5", "checkpoint-15", "checkpoint-20"}


def test_the_same_work_finds_its_checkpoints_and_other_work_does_not() -> None:
    def key(step: str = "distill", *, seed: int = 0, lr: float = 0.1) -> str:
        return checkpoint_key(step, seed=seed, config={"learning_rate": lr, "steps": 3})

    assert key() == checkpoint_key("distill", config={"steps": 3, "learning_rate": 0.1}, seed=0)
    assert key().startswith("distill/")
    assert len({key(), key("teacher_sft"), key(seed=1), key(lr=0.2)}) == 4


TRAINING = {"max_steps": 2, "batch_size": 2, "eval_steps": 2}
TASK = {"prompt": "translate: {source}", "max_prompt_tokens": 128, "max_new_tokens": 12, "metrics": ["chrf"]}


class Stop(Exception):
    """Instead of training."""


@pytest.fixture
def place(tmp_path: Path, save_tiny_model: SaveTinyModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Where `teacher_sft` keeps its checkpoints, with something changed in the model's files or in the settings."""
    places: list[str] = []

    def stop(*, checkpoints: Checkpoints, **_: Any) -> None:
        places.append(checkpoints.folder.name)
        raise Stop

    monkeypatch.setattr("skd_lib.training.run.train", stop)
    rows = [{"source": f"le fichier {n} du compte {n * 7}", "target": f"the file {n}"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "files", "train": [str(tmp_path / "rows.jsonl")]}
    config = {"source": source, "near_duplicate_threshold": 1}
    prepare(DataConfig.model_validate(config), tmp_path / "data", seed=0)
    original = save_tiny_model(tmp_path / "original", layers=1)

    def where(
        change: Callable[[Path], object] = lambda _: None, *, seed: int = 0, training: Any = None, **task: Any
    ) -> str:
        teacher = tmp_path / f"teacher-{len(places)}"
        shutil.copytree(original, teacher)
        change(teacher)
        with pytest.raises(Stop):
            teacher_sft.main(
                data=tmp_path / "data",
                checkpoint_root=str(tmp_path / "checkpoints"),
                teacher_out=tmp_path / "out" / "model",
                config=json.dumps(
                    {
                        "teacher": str(teacher),
                        "teacher_sft": {"training": TRAINING | (training or {})},
                        "task": TASK | task,
                        "seed": seed,
                    }
                ),
            )
        return places[-1]

    return where


def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def test_checkpoints_belong_to_all_that_the_training_reads(place: Callable[..., str]) -> None:
    day = edit("chat_template.jinja", "{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%d %B %Y') }}")
    others = [
        place(),
        place(edit("chat_template.jinja", "{{ bos_token }}", "{{ bos_token }}!")),
        place(edit("tokenizer.json", '"normalizer": null', '"normalizer": {"type": "Prepend", "prepend": "x"}')),
        place(edit("config.json", '"attention_dropout": 0.0', '"attention_dropout": 0.5')),
        place(lambda folder: (folder / "modeling_own.py").write_text("")),
        place(lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')),
        place(day, date="2024-01-31"),
        place(day, date="2024-02-01"),
        place(prompt="say: {source}"),
        place(max_new_tokens=6),
        place(seed=1),
        place(training={"learning_rate": 0.5}),
        place(training={"lora": {"rank": 2}}),
    ]
    assert len(set(others)) == len(others)
    # What changes no step of the training: the work goes on.
    assert place(metrics=["bleu"], stop=["\n"], answer="boxed") == others[0]
    assert place(lambda folder: (folder / "README.md").write_text("new")) == others[0]
    assert place(day, date="2024-01-31") == others[6]
    assert place(training={"checkpoint_minutes": 1, "keep_checkpoints": 3}) == others[0]


def test_what_a_stored_teacher_said_belongs_to_its_config(
    place: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    def stop(folder: Path, *_: object, **__: object) -> None:
        folders.append(folder)
        raise Stop

    monkeypatch.setattr("skd_lib.training.stored_teacher.store_signals", stop)
    student, teacher = tmp_path / "original", tmp_path / "teacher"
    shutil.copytree(student, teacher)
    for change in (lambda _: None, edit("config.json", '"rms_norm_eps": ', '"rms_norm_eps": 1')):
        change(teacher)
        with pytest.raises(Stop):
            distill.main(
                student=student,
                teacher=teacher,
                data=tmp_path / "data",
                checkpoint_root=str(tmp_path / "checkpoints"),
                student_out=tmp_path / "out" / "model",
                config=json.dumps(
                    {"distill": {"teacher_signal": {"mode": "stored"}, "method": "supervised_kd"}, "task": TASK}
                ),
            )
    assert len(set(folders)) == 2


def test_the_bucket_holds_what_the_folder_holds(bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work, mirror = Checkpoints(tmp_path / "folder", f"{bucket}/{tmp_path.name}"), f"{bucket}/{tmp_path.name}"
    with work.attempt() as attempt:
        checkpoint(attempt.folder, 5, best=5, marked=False)
        lost = Attempt(Checkpoints(work.folder, "gs://no-such-bucket/x"), attempt.name)
        assert lost.commit(5, 5, keep=1) == str(attempt.folder / "checkpoint-5")
        assert f"checkpoint-5 is in {attempt.folder} only: " in caplog.text
        for step in (10, 15):
            checkpoint(attempt.folder, step, best=5, marked=False)
            assert attempt.commit(step, 5, keep=1) == f"{attempt.mirror}/checkpoint-{step}"
            # The best one, whose own upload had failed, went with the next.
            assert stored(attempt.mirror) == {"checkpoint-5", f"checkpoint-{step}"} == stored(str(attempt.folder))

        other = tmp_path / "other"
        checkpoint(other / "first", 7, best=7)  # older than what is in the bucket
        assert taken_over(other, mirror) == ["5", "15"]
        assert stored(attempt.mirror) == {"checkpoint-5", "checkpoint-15"}
        checkpoint(other / "second", 20, best=20)
        assert taken_over(other, mirror) == ["20"]

    work.remove()
    assert not work.folder.exists()
    assert not storage.exists(attempt.mirror)
    nowhere = Checkpoints(tmp_path / "nowhere", "gs://no-such-bucket/x")
    with pytest.raises(SkdError, match="no such bucket"), nowhere.attempt():
        pass


def test_another_machine_goes_on_from_the_bucket(
    bucket: str, models: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = f"{bucket}/{tmp_path.name}"

    def trained(folder: str, steps: list[int]) -> dict[str, torch.Tensor]:
        student, teacher = (AutoModelForCausalLM.from_pretrained(models[name]) for name in ("student", "teacher"))
        run(
            student,
            teacher,
            tmp_path / folder,
            mirror=mirror,
            on_metrics=lambda step, figures: steps.append(step) if "loss" in figures else None,
            max_steps=4,
            eval_steps=1,
            keep_checkpoints=2,
        )
        weights: dict[str, torch.Tensor] = student.state_dict()
        return weights

    whole = trained("whole", [])
    # The upload of the last checkpoint was cut off, and the machine is gone with its disk.
    (first,) = stored(mirror)
    last = f"{mirror}/{first}/checkpoint-4"
    storage.delete(f"{last}/{MARKER}")
    shutil.rmtree(tmp_path / "whole")
    steps: list[int] = []
    resumed = trained("elsewhere", steps)
    assert steps == [4]
    assert f"the checkpoint {last} is left out: it was not written to its end" in caplog.text
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    (second,) = stored(mirror)  # the first attempt has ended, and is of no more use
    assert second != first
    assert storage.exists(f"{mirror}/{second}/checkpoint-4/{MARKER}")


@pytest.mark.slow
def test_machines_that_share_no_disk_go_on_together(
    bucket: str, nursery: Nursery, models: dict[str, Any], tmp_path: Path
) -> None:
    """Each with its own dropout: the main one's checkpoint holds the random numbers of both."""
    mirror = f"{bucket}/{tmp_path.name}"
    emulator = {"STORAGE_EMULATOR_HOST": os.environ["STORAGE_EMULATOR_HOST"]}

    def trained(name: str, **options: Any) -> list[int]:
        training = {"max_steps": 4, "eval_steps": 2, "dropout": 0.3}
        machines = [
            {**models, "training": training, "checkpoints": str(tmp_path / f"{name}-{rank}"), **options}
            for rank in range(2)
        ]
        return nursery.run_on_machines(*machines, **emulator)

    assert trained("lost", mirror=mirror, sigterm_at_step=3) == [Preempted.exit_code] * 2
    assert not list((tmp_path / "lost-1").glob("*/checkpoint-*"))
    # The main machine is the same pod again, which has a newer checkpoint than the others can have.
    (attempt,) = stored(mirror)
    storage.delete(f"{mirror}/{attempt}/checkpoint-3")
    weights = [str(tmp_path / f"{name}.safetensors") for name in ("resumed", "whole")]
    assert trained("lost", mirror=mirror, weights=weights[0], figures=str(tmp_path / "figures.json")) == [0, 0]
    assert json.loads((tmp_path / "figures.json").read_text())[0]["step"] == 3
    assert trained("whole", weights=weights[1]) == [0, 0]
    resumed, whole = map(load_file, weights)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
