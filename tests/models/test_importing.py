from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.models import importing
from skd_lib.models.files import load_tokenizer, weights_digest
from skd_lib.models.importing import import_folder, import_model, same_model
from skd_lib.models.loading import load_model
from skd_lib.models.records import RECORD, read_record
from skd_lib.models.references import model_fingerprint, resolve_model
from tests.conftest import SaveTinyModel


@pytest.fixture
def source(tmp_path: Path, save_tiny_model: SaveTinyModel) -> Path:
    folder = save_tiny_model(tmp_path / "source")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "README.md").write_text("# upstream card")
    GenerationConfig(do_sample=True, top_k=50, temperature=0.3, eos_token_id=[2, 3]).save_pretrained(folder)
    return folder


def imported(source: Path, out: Path, fingerprint: str = "") -> None:
    """Fetch and keep a model, as step `teacher_sft` does."""
    fingerprint = fingerprint or model_fingerprint(str(source))
    import_model(str(source), resolve_model(str(source), fingerprint=fingerprint), out, fingerprint=fingerprint)


def test_a_whole_model_is_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model"
    imported(source, out)
    assert not (out / "pytorch_model.bin").exists()
    assert not (out / "modeling.py").exists()
    assert (out / "README.md").read_text() == "# upstream card"
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 3]
    assert not {"top_k", "temperature", "do_sample"} & set(generation)
    load_tokenizer(out)
    model = load_model(out, device="cpu")

    assert read_record(out).lineage == {
        "weights_sha256": weights_digest(source),
        "reference": str(source),
        "fingerprint": model_fingerprint(str(source)),
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "vocab_size": 320,
        "context_length": 512,
    }


def test_a_folder_that_changes_is_not_imported_as_another(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = model_fingerprint(str(source))
    imported(source, tmp_path / "good", seen)

    def import_and_change(*arguments: Any, **options: Any) -> None:
        import_folder(*arguments, **options)
        (source / "generation_config.json").write_text("{}")

    monkeypatch.setattr(importing, "import_folder", import_and_change)
    for _ in range(2):  # changed while it was copied, and before
        with pytest.raises(SkdError, match="changed after preflight looked at it"):
            imported(source, tmp_path / "bad", seen)
        assert not (tmp_path / "bad" / RECORD).exists()


def test_users_folder_is_copied_and_caches_are_linked(source: Path, tmp_path: Path) -> None:
    weights = "model.safetensors"
    imported(source, tmp_path / "out" / "model")
    assert not (tmp_path / "out" / "model" / weights).samefile(source / weights)
    import_folder(source, tmp_path / "linked", link=True)
    assert (tmp_path / "linked" / weights).samefile(source / weights)


def test_links_in_the_hubs_cache_become_files(source: Path, tmp_path: Path) -> None:
    blob = (source / "model.safetensors").rename(tmp_path / "blob")
    (source / "model.safetensors").symlink_to(blob)
    import_folder(source, tmp_path / "out", link=True)
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == blob.read_bytes()


def test_borrowed_weights_are_uploaded_as_files(source: Path, tmp_path: Path) -> None:
    import_folder(source, tmp_path / "out", link=False, borrow=True)
    assert (tmp_path / "out" / "model.safetensors").samefile(source / "model.safetensors")
    storage.upload(tmp_path / "out", f"memory://bucket/{tmp_path.name}")
    stored = storage.read_bytes(f"memory://bucket/{tmp_path.name}/model.safetensors")
    assert stored == (source / "model.safetensors").read_bytes()


def test_without_hard_links_it_copies(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_paths: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    import_folder(source, tmp_path / "out", link=True)
    assert weights_digest(tmp_path / "out") == weights_digest(source)


def test_code_is_taken_along_only_when_asked_for(source: Path, tmp_path: Path) -> None:
    import_folder(source, tmp_path / "out", link=True, code=True)
    assert (tmp_path / "out" / "modeling.py").is_file()


def test_an_imported_model_is_the_same_model(source: Path, tmp_path: Path) -> None:
    import_folder(source, tmp_path / "out", link=True)
    assert same_model(source, tmp_path / "out")


@pytest.mark.parametrize(
    "file", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja", "generation_config.json"]
)
def test_a_model_that_differs_in_one_file_is_another(source: Path, tmp_path: Path, file: str) -> None:
    import_folder(source, tmp_path / "out", link=False)
    other = tmp_path / "out" / file
    if file == "generation_config.json":
        other.write_text(other.read_text().replace("3", "4"))
    elif file == "model.safetensors":
        content = other.read_bytes()
        other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        other.write_text((other.read_text() if other.exists() else "") + " ")
    assert not same_model(source, tmp_path / "out")


@pytest.mark.slow
def test_a_model_that_is_not_there_is_refused_by_the_step(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    command = [sys.executable, "-m", "skd_lib.steps.teacher_sft"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "wheel://" in shown
    options = {
        "data": tmp_path / "data",
        "config": json.dumps({"teacher": str(tmp_path / "none")}),
        "teacher-out": tmp_path / "out",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    failed = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "no such folder" in failed.stderr
    assert "Traceback" not in failed.stderr
