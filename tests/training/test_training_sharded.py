"""A student and a teacher sharded over two processes train as whole ones on one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from skd_lib.errors import Preempted, SkdError
from skd_lib.models.records import read_record
from tests.conftest import SaveTinyModel
from tests.training.nursery import Nursery
from tests.training.tiny_task import newest, run


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stopped_at"), [("skd", 1), ("supervised_kd", None)])
def test_two_processes_with_shards_equal_one(
    method: str, stopped_at: int | None, nursery: Nursery, models: dict[str, Any], tmp_path: Path
) -> None:
    """Sampled and ground-truth responses, gradient accumulation and checkpointing, a stop by SIGTERM and the export."""
    training = {"method": method, "dropout": 0, "micro_batch_size": 1, "max_steps": 2, "eval_steps": 2}
    training["checkpoint_minutes"] = 1e-9
    figures, weights = {}, {}
    for name, processes in (("sharded", 2), ("whole", 1)):
        files = {"figures": f"{tmp_path / name}.json", "weights": f"{tmp_path / name}.safetensors"}
        options = {**models, **files, "checkpoints": str(tmp_path / name), "held": str(tmp_path / f"{name}.txt")}
        options["training"] = {**training, "fsdp": processes > 1, "gradient_checkpointing": processes > 1}
        if stopped_at and processes > 1:
            stop = {"sigterm_at_step": stopped_at}
            assert nursery.run({**options, **stop}, processes) == [Preempted.exit_code] * processes
        assert nursery.run(options, processes) == [0] * processes
        figures[name] = [entry for entry in json.loads(Path(files["figures"]).read_text()) if "loss" in entry]
        weights[name] = load_file(files["weights"])
        share = float((tmp_path / f"{name}.txt").read_text())
        assert share == (1 if processes == 1 else pytest.approx(0.5, abs=0.02))
    for actual, expected in zip(figures["sharded"], figures["whole"][-len(figures["sharded"]) :], strict=True):
        for figure in expected.keys() - {"epoch"}:
            if not figure.startswith("seconds_"):
                assert actual[figure] == pytest.approx(expected[figure], rel=1e-3), figure
    for name, tensor in weights["whole"].items():
        torch.testing.assert_close(weights["sharded"][name], tensor, rtol=1e-3, atol=1e-4)
    sharded, whole = (load_file(newest(tmp_path / name) / "model.safetensors") for name in figures)
    assert set(sharded) == set(whole)


@pytest.mark.slow
def test_the_same_by_skd_trainer(nursery: Nursery, save_tiny_model: SaveTinyModel, tmp_path: Path) -> None:
    """Sampling, validation, checkpoints, going on from one, the best one, and the export."""
    folders = {
        name: str(save_tiny_model(tmp_path / name, seed=seed)) for seed, name in enumerate(("student", "teacher"))
    }
    shared = {"use_cpu": True, "report_to": "none", "learning_rate": 1e-2, "max_new_tokens": 6, "save_steps": 2}
    shared |= {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "lr_scheduler_type": "constant",
    }
    shared |= {"adaptive_gamma": False, "disable_tqdm": True}
    found = {}
    for name, processes in (("sharded", 2), ("whole", 1)):
        output = str(tmp_path / name)
        args = {**shared, "per_device_train_batch_size": 2 // processes, "fsdp": processes > 1}
        options = {**folders, "output": output, "losses": f"{output}.json"}
        first = {**options, "args": {**args, "max_steps": 2}}
        then = {**options, "args": {**args, "max_steps": 4}, "resume": True}
        assert nursery.run(first, processes) == [0] * processes, nursery.log.read_text()
        assert nursery.run(then, processes) == [0] * processes, nursery.log.read_text()
        losses = json.loads(Path(f"{output}.json").read_text())
        found[name] = (losses["eval_loss"], losses["held"], load_file(tmp_path / name / "model.safetensors"))
    assert found["sharded"][0] == pytest.approx(found["whole"][0], rel=1e-3)
    assert found["sharded"][1] == pytest.approx(found["whole"][1] / 2, rel=0.02)
    for name, tensor in found["whole"][2].items():
        torch.testing.assert_close(found["sharded"][2][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_whole_distillation_by_two_processes(
    nursery: Nursery, save_tiny_model: SaveTinyModel, tmp_path: Path
) -> None:
    rows = [json.dumps({"source": f"Add {n} and 1", "target": str(n + 1)}) for n in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    training = {"max_steps": 2, "batch_size": 2}
    config = {
        "teacher": str(save_tiny_model(tmp_path / "teacher", seed=2)),
        "student": str(save_tiny_model(tmp_path / "student", seed=1)),
        "data": {
            "source": {"type": "files", "train": [str(tmp_path / "train.jsonl")]},
            "validation_examples": 4,
            "test_examples": 4,
        },
        "task": {"max_new_tokens": 6, "date": "2026-01-31"},
        "teacher_sft": {"training": training},
        "distill": {"sampling": {"adaptive_gamma": False}, "training": training},
    }
    losses = {}
    for processes in (1, 2):
        output = tmp_path / f"by-{processes}"
        sharded = {**config["distill"], "training": {**training, "fsdp": processes > 1}}
        options = {"config": {**config, "distill": sharded}, "output": str(output)}
        assert nursery.run(options, processes) == [0] * processes, nursery.log.read_text()
        losses[processes] = read_record(output / "student").figures["best_validation_loss"]
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)


def test_what_cannot_be_sharded_is_an_error(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_model(vocab_size=64)
    with pytest.raises(SkdError, match=r"training.fsdp: sharding needs at least two processes(.|\n)*torchrun"):
        run(student, None, tmp_path, method="sft", fsdp=True)
    with pytest.raises(ValueError, match="leave it off with `lora`"):
        run(student, None, tmp_path, method="sft", fsdp=True, lora={})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SkdError, match=r"accelerate config, use_fsdp(.|\n)*training.fsdp: true"):
        run(student, None, tmp_path, method="sft")
