"""The models that `SKDTrainer` takes and refuses: those that the pipeline does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedTokenizerFast

from skd_lib.errors import SkdError
from skd_lib.models.files import load_tokenizer
from skd_lib.models.vocabulary import eos_ids
from skd_lib.training.skd_config import SKDConfig
from skd_lib.training.skd_trainer import SKDTrainer
from tests.conftest import SaveTinyModel, TinyModel
from tests.support.vocabularies import with_tokens

ROWS = [{"prompt": f"Add {n} and 1: ", "completion": f"{n + 1}"} for n in range(4)]

Make = Callable[..., SKDTrainer]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(student: Any, teacher: Any, rows: Any = ROWS, engine: str = "transformers", **options: Any) -> SKDTrainer:
        settings: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 1}
        settings |= {"max_new_tokens": 4, "per_device_train_batch_size": 2, "save_strategy": "no"}
        args = SKDConfig(output_dir=str(tmp_path / "out"), engine=engine, **settings)
        student, teacher = (str(each) if isinstance(each, Path) else each for each in (student, teacher))
        return SKDTrainer(student, teacher, args, train_dataset=rows, **options)

    return make


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets", [["lm_head"], ["q_proj", "lm_head"], ["embed_tokens"], r".*\.(q_proj|embed_tokens)"]
)
def test_what_embedding_and_head_share_gets_no_adapter(
    make: Make, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, targets: Any
) -> None:
    adapters = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    options = {"processing_class": tiny_tokenizer, "peft_config": adapters}
    with pytest.raises(SkdError, match="are one tensor") as caught:
        make(tiny_model(), tiny_model(seed=2), **options)
    assert caught.value.where == "SKDTrainer, peft_config"
    make(tiny_model(tie_word_embeddings=False), tiny_model(seed=2), **options)


@pytest.mark.parametrize("targets", ["all-linear", None, ["q_proj"]])
def test_other_layers_of_a_tied_model_get_adapters(
    make: Make, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, targets: Any
) -> None:
    adapters = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    make(tiny_model(), tiny_model(seed=2), processing_class=tiny_tokenizer, peft_config=adapters).train()


# --- vocabularies -----------------------------------------------------------------------------------------------------


PAIRS: dict[str, tuple[int, int, list[str], str | None, str]] = {
    "added padding, both padded": (384, 384, [], "[PAD]", "320 is '[PAD]' for the tokenizer in use, unused for the te"),
    "added padding, teacher not padded": (320, 321, [], "[PAD]", ""),
    "padding beyond the rows": (320, 320, [], "[PAD]", "1 ids that its model has no row for"),
    "a surplus id of the student": (384, 320, ["<image>"], None, "1 ids that its model has no row for"),
    "a surplus id of both": (320, 320, ["<image>"], None, "1 ids that its model has no row for"),
}
"""Rows of teacher and student, tokens added to both tokenizers, the student's own padding, and what is warned of."""


@pytest.mark.parametrize("case", PAIRS)
def test_ids_that_no_text_makes_are_a_warning_and_train(
    case: str, make: Make, tmp_path: Path, save_tiny_model: SaveTinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    teacher_rows, student_rows, tokens, pad, warning = PAIRS[case]
    teacher = with_tokens(save_tiny_model(tmp_path / "teacher", vocab_size=teacher_rows), *tokens)
    student = with_tokens(save_tiny_model(tmp_path / "student", seed=1, vocab_size=student_rows), *tokens, pad=pad)
    trainer = make(student, teacher)
    assert warning in caplog.text
    assert bool(caplog.records) == bool(warning)
    assert trainer.train().training_loss > 0
    if min(teacher_rows, student_rows) == 320:  # a row that spells it out
        with pytest.raises(SkdError, match=r"train_dataset, row 2: an example has the token id 320, and the model has"):
            make(student, teacher, [ROWS[0], {"prompt": f"x{pad or tokens[0]}", "completion": "y"}]).train()


def test_a_token_that_text_makes_is_refused(make: Make, tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    teacher, student = (save_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("teacher", "student")))
    file = student / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(
        text.replace('"a":', '"swap":').replace('"b":', '"a":').replace('"swap":', '"b":'), encoding="utf-8"
    )
    with pytest.raises(
        SkdError, match=r"differ in 2 of 320 ids(.|\n)*for the tokenizer in use(.|\n)*the teacher's own"
    ):
        make(student, teacher)
    with pytest.raises(SkdError, match="the teacher's tokenizer has 20 ids that its model has no row for"):
        make(save_tiny_model(tmp_path / "other"), save_tiny_model(tmp_path / "small", vocab_size=300))


@pytest.mark.parametrize("ends", [False, True])
def test_a_tokenizer_in_use_that_is_no_models_own_is_held_to_the_rows(
    make: Make, tmp_path: Path, save_tiny_model: SaveTinyModel, caplog: pytest.LogCaptureFixture, ends: bool
) -> None:
    teacher, student = (save_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("teacher", "student")))
    tokenizer = load_tokenizer(student)
    tokenizer.add_special_tokens({"eos_token" if ends else "pad_token": "<|fin|>"})
    what = "the tokenizer in use has 1 ids that its model has no row for"
    if ends:
        with pytest.raises(SkdError, match=what):
            make(student, teacher, processing_class=tokenizer)
    else:
        make(student, teacher, processing_class=tokenizer)
        assert what in caplog.text


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [False, True])
def test_responses_end_where_the_teachers_do(
    make: Make, tmp_path: Path, save_tiny_model: SaveTinyModel, tiny_model: TinyModel, loaded: bool
) -> None:
    student, teacher = save_tiny_model(tmp_path / "student"), save_tiny_model(tmp_path / "teacher", seed=1)
    ends = GenerationConfig(eos_token_id=[2, 3, 350])  # the last one has no row
    ends.save_pretrained(teacher)
    model = tiny_model(seed=1)
    model.generation_config = ends
    trainer = make(student, model if loaded else teacher)
    assert trainer.eos_ids == (2, 3)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert eos_ids(tmp_path / "saved", load_tokenizer(student)) == (2, 3)


def test_servers_are_told_the_same_ends_and_started_for_models_that_fit(
    make: Make, tmp_path: Path, save_tiny_model: SaveTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    def start(*_: Any, **ids: Any) -> Any:
        told.update(ids)
        raise SkdError("no server here")

    monkeypatch.setattr("skd_lib.training.skd_engine.start_engine", start)
    student = with_tokens(save_tiny_model(tmp_path / "student", vocab_size=384), pad="[PAD]")
    teacher = save_tiny_model(tmp_path / "teacher", seed=1)
    GenerationConfig(eos_token_id=[2, 3]).save_pretrained(teacher)
    with pytest.raises(SkdError, match="no server here"):
        make(student, teacher, engine="vllm")
    assert told == {"eos_ids": (2, 3), "pad_id": 2}  # the teacher has no row for the student's own padding
    told.clear()
    with pytest.raises(SkdError, match="are one tensor"):
        make(student, teacher, engine="vllm", peft_config=peft.LoraConfig(r=2, target_modules=["lm_head"]))
    small = save_tiny_model(tmp_path / "small", vocab_size=300)
    with pytest.raises(SkdError, match=r"the teacher's tokenizer(.|\n)*no row for"):
        make(student, small, engine="vllm")
    assert told == {}


def test_responses_end_where_the_chat_template_ends_them(
    make: Make, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    models = tiny_model(seed=1), tiny_model(seed=2)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|im_start|>' }}{% endfor %}"
    )
    assert make(*models, processing_class=tokenizer).eos_ids == (2, 3)
    for template in (None, "{{ raise_exception('no') }}"):
        tokenizer.chat_template = template
        assert make(*models, processing_class=tokenizer).eos_ids == (2,)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_would_be_partly_random_is_refused(
    role: str, make: Make, tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    folders = {name: save_tiny_model(tmp_path / name) for name in ("student", "teacher")}
    file = folders[role] / "model.safetensors"
    whole = load_file(file)
    broken = {
        "missing from the files": {name: each for name, each in whole.items() if "layers.1." not in name},
        "of another shape": {name: each[:300].clone() if "embed" in name else each for name, each in whole.items()},
    }
    for message, weights in broken.items():
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(SkdError, match=message) as caught:
            make(*folders.values())
        assert caught.value.where == str(folders[role])
