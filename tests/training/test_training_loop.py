"""The loop: what each method learns, logs and leaves behind, and that dividing a step changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from skd_lib.distillation.methods import METHODS
from skd_lib.errors import SkdError
from skd_lib.models.modes import attention_dropout
from tests.conftest import CpuFlags
from tests.training.nursery import Nursery
from tests.training.tiny_task import FirstGradients, run, saved


@pytest.fixture
def student(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(seed=1, vocab_size=64)


@pytest.fixture
def teacher(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(seed=2, vocab_size=72, hidden=48)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


LONG = ("skd", "on_policy", "seqkd")
"""One of each kind of response that is sampled; the others differ in the mixture and the loss alone."""


@pytest.mark.parametrize("method", METHODS)
def test_each_method_lowers_its_loss_and_logs_its_course(
    method: str, student: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    last = 16 if method in LONG else 2
    teacher_before, use_cache = weights(teacher), student.config.use_cache
    result = run(
        student,
        teacher,
        tmp_path / "checkpoints",
        method=method,
        on_metrics=lambda step, figures: logged.append((step, figures)),
        # What a random teacher samples is noise; what it finds likeliest can be learnt.
        distill={"sampling": {"teacher": {"temperature": 0.0}}} if method == "seqkd" else None,
        max_steps=last,
        eval_steps=max(1, last // 4),
        micro_batch_size=2,
    )
    assert result.steps == last
    if method == "seqkd":  # and it says nothing about the validation examples' answers
        losses = [entry["loss"] for entry in result.history if "loss" in entry]
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    else:
        assert result.best_validation_loss < (0.8 if method in LONG else 1) * result.first_validation_loss

    steps = [(step, figures) for step, figures in logged if "loss" in figures]
    validations = [(step, figures["validation_loss"]) for step, figures in logged if "validation_loss" in figures]
    assert [step for step, _ in steps] == list(range(1, last + 1))
    assert [step for step, _ in validations] == list(range(0, last + 1, max(1, last // 4)))
    assert (result.best_step, result.best_validation_loss) == min(validations[1:], key=lambda pair: pair[1])
    assert result.first_validation_loss == validations[0][1]

    always = {"loss", "learning_rate", "grad_norm", "student_entropy", "skipped_steps"}
    always |= {"response_tokens", "student_tokens", "teacher_tokens"}
    always |= {"seconds_rollout", "seconds_loss", "seconds_optimiser"}
    facts = METHODS[method]  # type: ignore[index]
    of_teacher = {"teacher_entropy"} if facts.uses_divergence else set()
    of_tests = {"rejection_rate", "acceptance_rate", "tokens_per_teacher_call", "replacements_per_sequence"}
    for step, figures in steps:
        sampled = facts.student_writes or facts.teacher_writes
        if method == "two_stage":
            sampled = step > last / 2
        expected = always | of_teacher | ({"truncated_fraction", "response_length_mean"} if sampled else set())
        expected |= of_tests if facts.student_writes and facts.teacher_writes else set()
        assert set(figures) - {"seconds_checkpoint"} == expected
    assert (result.course("rejection_rate") is not None) == (method in ("skd", "skd_mixed"))
    assert set(result.seconds) == {f"seconds_{p}" for p in ("rollout", "loss", "optimiser", "validation", "checkpoint")}

    # What comes back is the best checkpoint, in eval mode, as configured before; the teacher is as it was.
    kept = load_file(saved(tmp_path / "checkpoints", result.best_step) / "model.safetensors")
    assert all(torch.equal(student.state_dict()[name], tensor) for name, tensor in kept.items())
    assert not student.training
    assert student.config.use_cache == use_cache
    assert all(torch.equal(tensor, teacher_before[name]) for name, tensor in weights(teacher).items())
    assert {path.name for path in (tmp_path / "checkpoints").glob("*/checkpoint-*")} == {
        f"checkpoint-{step}" for step in {result.best_step, last}
    }


def test_validation_counts_tokens_not_rows_or_batches(
    student: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    results = [
        run(tiny_model(seed=1, vocab_size=64), teacher, tmp_path / str(rows), micro_batch_size=rows, max_steps=1)
        for rows in (1, 2, 4)
    ]
    losses = [result.first_validation_loss for result in results]
    assert max(losses) - min(losses) < 1e-5
    # The standard error is over examples, however they are batched.
    errors = [result.history[0]["validation_loss_error"] for result in results]
    assert errors[0] > 0
    assert errors == pytest.approx([errors[0]] * 3, rel=1e-3)


@pytest.mark.parametrize("method", ["sft", "skd_mixed"])
def test_gradient_accumulation_equals_one_big_batch(
    method: str, teacher: PreTrainedModel, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    first_gradients, losses = [], []
    for rows in (4, 2, 1):
        first = FirstGradients()
        result = run(
            tiny_model(seed=1, vocab_size=64),
            teacher,
            tmp_path / str(rows),
            method=method,
            callbacks=[first],
            micro_batch_size=rows,
            max_steps=2,
            dropout=0,
            distill={"divergence": "skew_kl", "replaced_weight": 0.5, "selective": {}},
        )
        first_gradients.append(first.gradients)
        losses.append([entry["loss"] for entry in result.history if "loss" in entry])
    for other in (1, 2):
        assert losses[other] == pytest.approx(losses[0], rel=1e-4)
        for name, expected in first_gradients[0].items():
            torch.testing.assert_close(first_gradients[other][name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_bf16_is_for_computing_only(
    teacher: PreTrainedModel, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], cpu_flags: CpuFlags
) -> None:
    """In bf16 are sampling, states and logits; weights and gradients stay fp32. `auto` is what the CPU has."""
    gradients, losses = [], []
    for precision, flags in (("auto", ["avx512_bf16"]), ("auto", ["avx512_bf16", "amx_bf16"]), ("bf16", [])):
        cpu_flags(*flags)
        folder, bf16 = tmp_path / f"{precision}-{len(flags)}", bool(gradients)
        student, first = tiny_model(seed=1, vocab_size=64), FirstGradients()
        guide, options = teacher.bfloat16() if bf16 else teacher, {"max_steps": 1, "precision": precision}
        # Ground truth, so that all see the same tokens.
        result = run(student, guide, folder, method="supervised_kd", callbacks=[first], dropout=0, **options)
        gradients.append(first.gradients)
        assert result.precision == ("bf16" if bf16 else "fp32")
        losses.append(run(student, guide, folder / "skd", callbacks=[first], **options).first_validation_loss)
        assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert losses[1] == losses[2] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    for name, expected in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        assert torch.equal(gradients[1][name], gradients[2][name])
        assert torch.cosine_similarity(gradients[1][name].flatten(), expected.flatten(), dim=0) > 0.99, name


def test_a_student_trained_in_bf16_computes_in_fp32_afterwards(student: PreTrainedModel, tmp_path: Path) -> None:
    """As the model that is loaded from its files."""
    trained = run(student, None, tmp_path / "checkpoints", method="sft", precision="bf16", max_steps=1).student
    trained.save_pretrained(tmp_path / "saved")
    tokens = torch.arange(3, 20).unsqueeze(0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(trained(tokens).logits, loaded(tokens).logits)


def test_a_launchers_precision_is_not_the_trainings(
    student: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` sets the variable from a file in the user's home."""
    dtypes: set[torch.dtype] = set()
    student.get_decoder().layers[0].self_attn.q_proj.register_forward_hook(
        lambda _module, _inputs, output: dtypes.add(output.dtype)
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run(student, None, tmp_path, method="sft", max_steps=1).precision == "fp32"
    assert dtypes == {torch.float32}


@pytest.mark.slow
def test_two_processes_equal_one(
    nursery: Nursery, student: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    options = {
        "student": str(tmp_path / "student"),
        "teacher": str(tmp_path / "teacher"),
        "checkpoints": str(tmp_path / "two"),
        "gradients": str(tmp_path / "gradients.safetensors"),
        "figures": str(tmp_path / "figures.json"),
        "training": {"method": "skd_mixed", "dropout": 0, "micro_batch_size": 1, "max_steps": 2},
    }
    assert nursery.run(options, processes=2) == [0, 0]

    first = FirstGradients()
    result = run(student, teacher, tmp_path / "one", method="skd_mixed", callbacks=[first], dropout=0, max_steps=2)
    for name, gradient in load_file(tmp_path / "gradients.safetensors").items():
        torch.testing.assert_close(gradient, first.gradients[name], rtol=1e-3, atol=1e-6)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == len(result.history)
    for actual, expected in zip(figures, result.history, strict=True):
        for name in expected.keys() - {"epoch", "eval_loss", "validation_loss_error"}:
            if not name.startswith("seconds_"):
                assert actual[name] == pytest.approx(expected[name], rel=1e-3), name


def test_dropout_is_on_in_the_loss_and_not_saved(
    student: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    def first_loss(dropout: float, folder: str) -> float:
        result = run(tiny_model(seed=1, vocab_size=64), teacher, tmp_path / folder, max_steps=1, dropout=dropout)
        losses: list[float] = [entry["loss"] for entry in result.history if "loss" in entry]
        return losses[0]

    without = first_loss(0, "a")
    assert first_loss(0.5, "b") != pytest.approx(without, rel=1e-3)
    assert first_loss(0, "c") == without
    config = json.loads((saved(tmp_path / "b", 1) / "config.json").read_text())
    assert config["attention_dropout"] == 0
    with attention_dropout(student, 0.3):
        assert {m.attention_dropout for m in student.modules() if hasattr(m, "attention_dropout")} == {0.3}
    assert {m.attention_dropout for m in student.modules() if hasattr(m, "attention_dropout")} == {0.0}
    with pytest.raises(SkdError, match="no attention dropout"), attention_dropout(torch.nn.Linear(1, 1), 0.3):
        pass


def test_gradient_checkpointing_changes_no_gradient_and_keeps_the_cache(
    teacher: PreTrainedModel, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    gradients, sampled_widths = [], []
    for on in (False, True):
        student, first = tiny_model(seed=1, vocab_size=64), FirstGradients()
        widths: list[int] = []

        def note(_module: Any, inputs: tuple[torch.Tensor, ...], widths: list[int] = widths) -> None:
            if not torch.is_grad_enabled():
                widths.append(inputs[0].shape[1])

        student.get_decoder().layers[0].register_forward_pre_hook(note)
        run(student, teacher, tmp_path / str(on), callbacks=[first], gradient_checkpointing=on, max_steps=1)
        gradients.append(first.gradients)
        sampled_widths.append(widths)
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)
    # With the cache a drafted token costs the forward pass of one token.
    assert sampled_widths[1] == sampled_widths[0]
    assert sampled_widths[1].count(1) > 10


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_broken_step_changes_nothing_but_the_count(
    processes: int, nursery: Nursery, models: dict[str, Any], tmp_path: Path
) -> None:
    """One micro-batch of one process has a loss that is not a number: all processes leave the step out."""
    options = {
        **models,
        "checkpoints": str(tmp_path / "checkpoints"),
        "figures": str(tmp_path / "figures.json"),
        "broken_step": 3,
        "training": {"max_steps": 5, "eval_steps": 1, "micro_batch_size": 1, "keep_checkpoints": 9, "warmup_ratio": 0},
    }
    assert nursery.run(options, processes) == [0] * processes
    figures = [entry for entry in json.loads((tmp_path / "figures.json").read_text()) if "loss" in entry]
    assert [entry["skipped_steps"] for entry in figures] == [0, 0, 1, 1, 1]
    assert [math.isfinite(entry["loss"]) for entry in figures] == [True, True, False, True, True]
    states = [load_file(saved(tmp_path / "checkpoints", n) / "model.safetensors") for n in (2, 3, 4)]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert any(not torch.equal(states[0][name], tensor) for name, tensor in states[2].items())
    assert "optimiser step 3 is skipped: the loss is nan" in nursery.log.read_text()


def test_too_many_broken_steps_stop_the_training(
    student: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    message = r"tiny: 3 optimiser steps in a row were skipped, up to step 3: the norm of (.|\n)*learning_rate"
    settings = {"eval_steps": 6, "max_skipped_steps": 3}
    student.get_output_embeddings().weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(SkdError, match=message):
        run(student, teacher, tmp_path, method="sft", **settings)
    with torch.no_grad():
        student.get_output_embeddings().weight.fill_(torch.nan)
    message = r"tiny: the validation loss is nan after optimiser step 0(.|\n)*the model's files"
    with pytest.raises(SkdError, match=message):
        run(student, teacher, tmp_path / "broken", method="sft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 4, "micro_batch_size": 3}, "micro_batch_size 3 does not divide the 4 sequences"),
        ({"method": "supervised_kd", "teacher": None}, "method `supervised_kd` needs a teacher"),
    ],
)
def test_what_cannot_be_trained_is_an_error(
    options: dict[str, Any], message: str, student: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(SkdError, match=message):
        run(student, options.pop("teacher", teacher), tmp_path, **options)
