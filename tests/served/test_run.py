"""Runs with a teacher on a server: what is refused before anything runs, what preflight says, and the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import skd_lib
from skd_lib.config import RunConfig, parse_section
from skd_lib.config.models import ServedTeacher
from skd_lib.config.parameters import from_parameters, to_parameters
from skd_lib.config.step import StepConfig, step_config
from skd_lib.errors import SkdError
from skd_lib.models.files import served_in
from skd_lib.models.loading import load_model
from skd_lib.models.references import parse_reference, resolve_model
from skd_lib.preflight import Check
from tests.conftest import SaveTinyModel, Skd
from tests.preflight.support import ROWS, check
from tests.support.completions_server import MODEL, CompletionsServer

URL = "http://gpu.example:8000/v1"
STORED = {"method": "supervised_kd", "teacher_signal": {"mode": "stored", "top_k": 16}}


@pytest.fixture
def values(tmp_path: Path, save_tiny_model: SaveTinyModel) -> dict[str, Any]:
    """A run whose teacher is at `URL`."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return {
        "name": "served",
        "teacher": {"url": URL, "model": MODEL},
        "student": str(save_tiny_model(tmp_path / "student", seed=1)),
        "data": {"source": {"type": "files", "train": [str(data)]}},
        "task": {"prompt": "{source}\n", "max_prompt_tokens": 64, "max_new_tokens": 24, "metrics": ["chrf"]},
        "teacher_sft": {"enabled": False},
        "distill": {**STORED, "training": {"max_steps": 3, "batch_size": 4}},
    }


def read(values: dict[str, Any], **changes: Any) -> RunConfig:
    return parse_section(RunConfig, {**values, **changes}, where="run.yaml")


@pytest.mark.parametrize(
    ("teacher", "reference"),
    [
        ({"url": f"{URL}/", "model": "org/m"}, f"{URL}#org/m"),
        ({"url": URL, "model": "org/m", "key_env": "MY_KEY"}, f"{URL}?key_env=MY_KEY#org/m"),
        (f"{URL}#org/m", f"{URL}#org/m"),
        (f"{URL}?key_env=MY_KEY#org/m", f"{URL}?key_env=MY_KEY#org/m"),
    ],
)
def test_forms_of_a_teacher(values: dict[str, Any], teacher: Any, reference: str) -> None:
    config = read(values, teacher=teacher)
    assert config.teacher == reference == str(parse_reference(config.teacher))
    assert from_parameters(**to_parameters(config)) == config  # Kubeflow's form
    given = parse_section(StepConfig, step_config("teacher_sft", config), where="step")
    assert (given.teacher, given.student) == (reference, config.student)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"url": URL}, "model: Field required"),
        ({"url": "gpu:8000", "model": "m"}, "url: must begin with http:// or https://"),
        ({"url": "http://me:secret@gpu/v1", "model": "m"}, "put a key into SKD_TEACHER_API_KEY"),
        ({"url": f"{URL}?key=sk-1", "model": "m"}, "the API's base alone"),
        ({"url": URL, "model": "m", "key": "sk-1"}, "key: Extra inputs are not permitted"),
        (URL, "model: must not be blank"),
    ],
)
def test_mistakes_in_a_teacher(values: dict[str, Any], teacher: Any, message: str) -> None:
    with pytest.raises(SkdError, match=f"field `teacher`: .*{message}"):
        read(values, teacher=teacher)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_sft": {}}, "cannot be fine-tuned here, set `teacher_sft.enabled: false`"),
        ({"teacher_sft": {}, "distill": {"method": "skd"}}, "method `skd` asks .*; it cannot be fine-tuned"),
        ({"distill": {"method": "skd"}}, "method `skd` asks the teacher about what the student writes"),
        ({"distill": {"method": "on_policy"}}, "`distill.engine: vllm` serves them"),
        ({"distill": {"method": "seqkd"}}, "set `distill.teacher_signal.mode: stored`"),
        ({"distill": {**STORED, "temperature": 2.0}}, "set `distill.temperature: 1`"),
        ({"registry": {"gate": "draft"}}, "set `registry.gate: score`"),
        (
            {"student": None, "student_init": {"mode": "prune", "keep_first": 1, "keep_last": 1}},
            "`student_init.mode: prune` cuts the student from it",
        ),
    ],
)
def test_what_needs_weights_is_refused(values: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SkdError, match=f"a server gives its answers, not its weights: .*{message}"):
        read(values, **changes)


def test_what_needs_no_weights_is_not(values: dict[str, Any]) -> None:
    for distill in (
        {"method": "sft"},
        {"method": "seqkd", "teacher_signal": {"mode": "stored"}, "temperature": 2.0},
        {**STORED, "divergence": "jsd"},
    ):
        assert read(values, distill=distill).distill.method == distill["method"]


def test_commands_that_need_weights_say_so(skd: Skd, tmp_path: Path) -> None:
    with pytest.raises(SkdError, match="gives its answers, not its weights"):
        resolve_model(f"{URL}#m")
    (tmp_path / "served.json").write_text(ServedTeacher(url=URL, model="m").model_dump_json())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SkdError, match="gives its answers, not its weights"):
        load_model(tmp_path)
    (tmp_path / "prompts.txt").write_text("Add 1 and 2.\n")
    for words in (("generate", f"{URL}#m", "Hello"), ("specdec", f"{URL}#m", f"{URL}#m", "--no-chat")):
        options = ("--prompts", str(tmp_path / "prompts.txt")) if words[0] == "specdec" else ()
        assert "gives its answers, not its weights" in skd(*words, *options).stderr


def found(values: dict[str, Any], tmp_path: Path, server: CompletionsServer) -> list[Check]:
    config = {**values, "teacher": {"url": server.url, "model": MODEL}}
    return [each for each in check(config, tmp_path).checks if each.name == "teacher"]


def test_preflight_asks_the_server(values: dict[str, Any], tmp_path: Path, server: CompletionsServer) -> None:
    fine, note = found(values, tmp_path, server)
    assert (fine.level, fine.what) == (
        "ok",
        f"{server.url}#{MODEL}: context 256, tokens as ids, log-probabilities of 16 tokens",
    )
    assert (note.level, note.what) == (
        "warning",
        "a server gives no weights: the student is not measured as this teacher's draft",
    )
    server.max_logprobs = 10
    (refused,) = found(values, tmp_path, server)
    assert refused.level == "error"
    assert "`--max-logprobs 20`" in refused.hint
    server.max_logprobs, server.context = 20, 88
    short, *_ = found(values, tmp_path, server)
    assert (short.level, short.hint) == (
        "error",
        "lower them to 87 together, or start the server with a longer context (--max-model-len)",
    )
    server.ids, server.context = False, 256
    (blind,) = found(values, tmp_path, server)
    assert (blind.level, blind.hint) == (
        "error",
        "serve the teacher with vLLM, or use method `seqkd` and metrics other than perplexity",
    )
    values |= {
        "distill": {"method": "seqkd", "teacher_signal": {"mode": "stored"}},
        "task": {**values["task"], "metrics": ["chrf", "perplexity"]},
    }
    assert [each.level for each in found(values, tmp_path, server)] == ["warning", "ok", "warning"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["supervised_kd", "seqkd"])
def test_a_training_is_that_beside_the_teacher(
    values: dict[str, Any],
    tmp_path: Path,
    server: CompletionsServer,
    model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    method: str,
) -> None:
    model.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    values["distill"] |= {"method": method, "sampling": {"teacher": {"temperature": 0.0}}}
    losses = []
    for teacher in ({"url": server.url, "model": MODEL}, str(tmp_path / "teacher")):
        out = tmp_path / ("there" if isinstance(teacher, dict) else "here")
        result = skd_lib.distill({**values, "teacher": teacher}, out)
        losses.append(result.validation_loss)
        assert (served_in(result.teacher) is None) == isinstance(teacher, str)
        assert not list(out.rglob("*-asked"))  # what was kept for a killed run is removed at the end
        assert ("served_prompt_tokens" in result.figures) == isinstance(teacher, dict)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert result.validation_loss[1] < result.validation_loss[0]
