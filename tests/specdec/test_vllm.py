"""The command for vLLM, as a shell reads it, and the conditions."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from skd_lib.specdec.vllm import ARCHITECTURES, Served, export, serve_command
from tests.conftest import SaveTinyModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "teacher": save_tiny_model(root / 'it\'s the "teacher" $HOME'),
        "draft": save_tiny_model(root / "draft `x`", layers=1),
        "padded": save_tiny_model(root / "padded", layers=1, vocab_size=384),
        "short": save_tiny_model(root / "short", layers=1, max_position_embeddings=256),
    }


def served(folder: Path) -> Served:
    return Served.from_reference(str(folder), folder)


def test_a_shell_reads_the_command_as_it_is_meant(folders: dict[str, Path]) -> None:
    pair = export(served(folders["teacher"]), served(folders["draft"]), gamma=4)
    assert pair.reasons == []
    words = shlex.split(pair.command)
    assert words[:4] == ["vllm", "serve", str(folders["teacher"]), "--speculative-config"]
    assert json.loads(words[4]) == {
        "method": "draft_model",
        "model": str(folders["draft"]),
        "num_speculative_tokens": 4,
    }
    assert len(words) == 5


def test_hub_models_keep_their_ids_and_revisions(folders: dict[str, Path]) -> None:
    teacher = Served.from_reference("org/teacher@v1.0", folders["teacher"])
    draft = Served.from_reference("org/draft@abc", folders["draft"])
    words = shlex.split(serve_command(teacher, draft, 5))
    assert words[:5] == ["vllm", "serve", "org/teacher", "--revision", "v1.0"]
    assert json.loads(words[6])["model"] == "org/draft"
    assert json.loads(words[6])["revision"] == "abc"
    plain = shlex.split(serve_command(Served(folders["teacher"], "gs://b/t"), served(folders["draft"]), 5))
    assert plain[2] == "gs://b/t"


def test_a_draft_with_a_shorter_context_limits_the_server(folders: dict[str, Path]) -> None:
    teacher, short = served(folders["teacher"]), served(folders["short"])
    assert "--max-model-len 256 " in serve_command(teacher, short, 5)
    assert "--max-model-len" not in serve_command(short, teacher, 5)


def test_vocabularies_of_different_size_are_refused(folders: dict[str, Path]) -> None:
    pair = export(served(folders["teacher"]), served(folders["padded"]), gamma=4)
    assert "vocab_size is 320 for the teacher and 384 for the draft" in pair.reasons[0]
    assert "resize_token_embeddings(384)" in pair.reasons[0]


def test_other_tokens_are_refused(folders: dict[str, Path], tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    other = save_tiny_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    pair = export(served(folders["teacher"]), served(other), gamma=4)
    assert pair.reasons == ["the tokenizers differ in 1 tokens, the first is '<new>' (id 320)"]


def test_unknown_architectures_are_named(
    folders: dict[str, Path], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    other = save_tiny_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["HomemadeForCausalLM"]}))
    pair = export(served(folders["teacher"]), served(other), gamma=4)
    assert pair.reasons[0].startswith("the draft's architecture HomemadeForCausalLM is not among those")


def test_a_draft_with_two_kinds_of_attention_needs_the_newer_model_runner(
    folders: dict[str, Path], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    mixed = save_tiny_model(tmp_path / "mixed", layers=2)
    config = json.loads((mixed / "config.json").read_text())
    kinds = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
    for layers, reasons in ((["sliding_attention", "full_attention"], 1), (["full_attention"] * 2, 0)):
        (mixed / "config.json").write_text(json.dumps({**config, **kinds, "layer_types": layers}))
        pair = export(served(folders["teacher"]), served(mixed), gamma=4)
        assert len(pair.reasons) == reasons
        assert all("VLLM_USE_V2_MODEL_RUNNER" in reason for reason in pair.reasons)


@pytest.mark.parametrize("part", ["Eagle-runs", "eagle3", "x-dflash", "dSpark"])
def test_names_that_vllm_misreads_are_refused(folders: dict[str, Path], part: str) -> None:
    draft = Served(folders["draft"], f"/models/{part}/student")
    (reason,) = export(served(folders["teacher"]), draft, gamma=4).reasons
    assert "symbolic link" in reason
    assert export(served(folders["teacher"]), Served(folders["draft"], "/models/eagle/s"), gamma=4).reasons == []


def test_code_that_comes_with_a_model_is_asked_for(
    folders: dict[str, Path], tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    own = save_tiny_model(tmp_path / "own", layers=1)
    tokenizer = json.loads((own / "tokenizer_config.json").read_text())
    own_code = {"auto_map": {"AutoTokenizer": ["tokens.Own", None]}}
    (own / "tokenizer_config.json").write_text(json.dumps(tokenizer | own_code))
    assert "--trust-remote-code" in shlex.split(serve_command(served(folders["teacher"]), served(own), 4))
    assert "--trust-remote-code" not in serve_command(served(folders["teacher"]), served(folders["draft"]), 4)


def test_architectures_are_real() -> None:
    import transformers

    assert {name for name in ARCHITECTURES if not hasattr(transformers, name)} == set()
