"""`distill`, `evaluate` and `benchmark`, on tiny models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import skd_lib
from skd_lib import SkdError, benchmark, distill, evaluate
from skd_lib.models.files import load_tokenizer
from tests.conftest import SaveTinyModel, TinyModel

ROWS = [{"source": f"Add {n} and 1", "target": f"{n + 1}"} for n in range(40)]
TASK = {"max_new_tokens": 6, "metrics": ["chrf"], "date": "2026-01-31"}
QUICK = {"gamma": 2, "gammas": [2], "temperatures": [0], "batch_sizes": [1], "repeats": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "teacher": str(save_tiny_model(folder / "teacher", seed=2, hidden=64)),
        "student": str(save_tiny_model(folder / "student", seed=1)),
    }


@pytest.fixture
def config(models: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return {
        **models,
        "data": {
            "source": {"type": "files", "train": [str(tmp_path / "train.jsonl")]},
            "validation_examples": 4,
            "test_examples": 4,
        },
        "task": TASK,
        "teacher_sft": {"enabled": False},
        "distill": {"training": {"max_steps": 2, "batch_size": 2, "eval_steps": 1, "learning_rate": 1e-3}},
    }


@pytest.mark.slow
def test_a_mapping_is_distilled_and_a_second_call_takes_what_is_done(
    config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = distill(config, tmp_path / "out")
    assert done.student == tmp_path / "out/student"
    assert AutoModelForCausalLM.from_pretrained(done.student).num_parameters() > 0
    first, best = done.validation_loss
    assert 0 < best <= first
    assert done.figures["steps"] == 2
    assert done.course.training_steps == (1, 2)
    assert len((done.data / "test.jsonl").read_text().splitlines()) == 4

    written = (done.student / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, logger="skd_lib.interface"):
        assert distill(config, tmp_path / "out").figures == done.figures
    assert caplog.text.count("is there already") == 4
    assert (done.student / "model.safetensors").stat().st_mtime_ns == written

    caplog.clear()
    with caplog.at_level(logging.INFO, logger="skd_lib.interface"):
        other = distill(config, tmp_path / "out", overrides={"distill.method": "sft"})
    assert caplog.text.count("is there already") == 3  # all but the student
    assert "rejection_rate_first_tenth" in done.figures
    assert "rejection_rate_first_tenth" not in other.figures


@pytest.mark.parametrize(
    ("overrides", "step"),
    [
        ({"distill.method": "supervised_kd"}, "distill"),
        ({"teacher_sft": {"training": {"max_steps": 1, "batch_size": 2}}}, "teacher_sft"),
    ],
)
def test_prompts_without_answers_are_not_trained_on_as_if_they_had_some(
    config: dict[str, Any], tmp_path: Path, overrides: dict[str, Any], step: str
) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"prompt": row["source"]}) for row in ROWS))
    with pytest.raises(SkdError, match=rf"{step}: \d+ of \d+ examples of train_\w+ have no answer"):
        distill(config, tmp_path / "out", overrides=overrides)


def test_wrong_fields_are_named(config: dict[str, Any]) -> None:
    with pytest.raises(SkdError, match=r"distill, field `distill.sampling.gama`(.|\n)*did you mean"):
        distill(config, overrides={"distill.sampling.gama": 3})
    with pytest.raises(SkdError, match="several nodes need a cluster"):
        distill(config, overrides={"distill.multinode": {"nodes": 2}})


def test_a_models_answers_are_scored_with_intervals(models: dict[str, str]) -> None:
    found = evaluate(models["student"], ROWS[:6], TASK)
    score = found.scores.metrics["chrf"]
    assert score.low <= score.score <= score.high
    assert len(found.predictions) == 6
    loaded = AutoModelForCausalLM.from_pretrained(models["student"])
    same = [{"question": row["source"], "answer": row["target"]} for row in ROWS[:6]]
    assert evaluate(loaded, same, TASK).scores.metrics == found.scores.metrics


def test_conversations_are_evaluated(models: dict[str, str]) -> None:
    """Rows as chats are kept are answered as the same texts with the task's own prompt are."""
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["source"]},
                {"role": "assistant", "content": row["target"]},
            ]
        }
        for row in ROWS[:4]
    ]
    plain = evaluate(models["student"], ROWS[:4], TASK)
    assert evaluate(models["student"], chats, TASK).scores.metrics == plain.scores.metrics


def test_a_file_is_evaluated(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, ROWS[:3])))
    assert evaluate(models["student"], tmp_path / "test.jsonl", TASK).scores.examples == 3


@pytest.mark.parametrize(
    ("dataset", "task", "message"),
    [
        ([], TASK, "the dataset is empty"),
        (["text"], TASK, "a row is a str"),
        ([{"source": "x", "target": " "}], TASK, "row 1, field `target`: the text is empty"),
        ([{"frage": "x", "target": "y"}], TASK, "`skd_lib.evaluate`: rename them to `source`"),
        (ROWS, {"metrics": ["comet"]}, "COMET is the task's only metric"),
        (ROWS, "gsm9k", "gsm8k"),
        (ROWS, {"metric": ["chrf"]}, "evaluate, task, field `metric`"),
    ],
)
def test_what_cannot_be_evaluated(models: dict[str, str], dataset: Any, task: Any, message: str) -> None:
    with pytest.raises(SkdError, match=message):
        evaluate(models["student"], dataset, task)


def test_a_model_without_tokenizer_needs_one(tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SkdError, match="pass `tokenizer`"):
        evaluate(tiny_model(), ROWS[:2], TASK)
    assert evaluate(tiny_model(), ROWS[:2], TASK, tokenizer=tiny_tokenizer).scores.examples == 2


def test_a_loaded_model_keeps_its_mode(tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model().train()
    evaluate(model, ROWS[:1], TASK, tokenizer=tiny_tokenizer)
    assert all(module.training for module in model.modules())


@pytest.mark.slow
def test_a_draft_is_measured(models: dict[str, str], tmp_path: Path) -> None:
    prompts = [row["source"] for row in ROWS[:2]]
    found = benchmark(models["teacher"], models["student"], prompts, task=TASK, config=QUICK)
    assert found.speedup > 0
    assert found.vllm is not None
    assert models["student"] in found.vllm.command
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    teacher, student = (AutoModelForCausalLM.from_pretrained(models[name]) for name in ("teacher", "student"))
    again = benchmark(teacher, student, tmp_path / "prompts.txt", task=TASK, config=QUICK)
    assert again.acceptance_by_position == found.acceptance_by_position
    assert again.tokens_per_teacher_call == found.tokens_per_teacher_call
    own = benchmark(teacher, models["teacher"], prompts, task=TASK, config=QUICK)
    assert own.acceptance_by_position == [1, 1]


def test_drafts_that_do_not_fit_are_refused(
    models: dict[str, str], tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(SkdError, match=r"the draft's tokenizer(.|\n)*no row for \(vocab_size 200\)"):
        benchmark(models["teacher"], tiny_model(vocab_size=200), ["x"], tokenizer=tiny_tokenizer)
    with pytest.raises(SkdError, match=r"is beyond task\.max_new_tokens"):
        benchmark(models["teacher"], models["student"], ["x"], task=TASK, config={"gamma": 7})


def test_a_draft_with_padding_of_its_own_is_measured(tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    teacher, draft = (save_tiny_model(tmp_path / str(seed), seed=seed, vocab_size=384) for seed in (1, 2))
    tokenizer = load_tokenizer(draft)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(draft)
    loaded = [AutoModelForCausalLM.from_pretrained(folder) for folder in (teacher, draft)]
    for words in (load_tokenizer(teacher), tokenizer):
        assert benchmark(*loaded, ["a b"], task=TASK, config=QUICK, tokenizer=words).speedup > 0


def test_a_prompt_with_a_token_that_has_no_row_is_refused(tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<image>"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(SkdError, match=rf"prompt 1 has the token id {len(tokenizer) - 1}, and the model has"):
        benchmark(model, model, ["a b", "a <image>"], task=TASK, config=QUICK, tokenizer=tokenizer)


def test_the_functions_are_public() -> None:
    assert {"distill", "evaluate", "benchmark", "Distilled"} <= set(skd_lib.__all__)


def test_an_output_folder_with_something_else_in_it_is_left_alone(config: dict[str, Any], tmp_path: Path) -> None:
    mine = tmp_path / "data/mine.jsonl"
    mine.parent.mkdir()
    mine.write_text("{}")
    with pytest.raises(SkdError, match=r"data: this is there already and not made by `distill`"):
        distill(config, tmp_path)
    assert mine.read_text() == "{}"
    with pytest.raises(SkdError, match="no local folder"):
        distill(config, "gs://bucket/out")
    with pytest.raises(SkdError, match="cannot be written"):
        distill(config, mine)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda models: distill(None), "a NoneType is no configuration"),
        (lambda models: evaluate(models["student"], None, TASK), "a NoneType is no dataset"),
        (lambda models: evaluate(models["student"], [ROWS[0], "x"], TASK), "row 2: a row is a str"),
        (lambda models: evaluate(models["student"], [{"source": "x", "target": None}], TASK), "row 1, field `target`"),
        (lambda models: evaluate(models["student"], ROWS[:1], None), "task: a NoneType is no mapping"),
        (lambda models: evaluate(None, ROWS[:1], TASK), "a NoneType is no model"),
        (
            lambda models: benchmark(models["teacher"], models["student"], [1], task=TASK),
            "prompt 0: must",
        ),
    ],
)
def test_arguments_of_another_kind_are_named(models: dict[str, str], call: Any, message: str) -> None:
    with pytest.raises(SkdError, match=message):
        call(models)
