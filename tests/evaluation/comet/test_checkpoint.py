"""COMET checkpoints as folders: what is found, what is laid out for the worker, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from skd_lib.errors import SkdError
from skd_lib.evaluation.comet.checkpoint import check_reference, open_checkpoint

HPARAMS = {"class_identifier": "regression_metric", "pretrained_model": "own-encoder", "dropout": 0.1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    (model / "checkpoints").mkdir(parents=True)
    (model / "checkpoints" / "model.ckpt").write_bytes(b"weights")
    (model / "own-encoder").mkdir()
    (model / "hparams.yaml").write_text(yaml.safe_dump(HPARAMS), encoding="utf-8")
    return model


def test_staged_with_its_encoder_and_otherwise_as_it_is(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    (tmp_path / "stage").mkdir()
    staged = checkpoint.stage(tmp_path / "stage")
    assert staged.read_bytes() == b"weights"
    settings = yaml.safe_load((staged.parents[1] / "hparams.yaml").read_text(encoding="utf-8"))
    assert settings == {**HPARAMS, "pretrained_model": str(folder / "own-encoder")}


def test_the_subfolder_encoder_goes_before_what_the_settings_name(folder: Path) -> None:
    (folder / "encoder").mkdir()
    assert open_checkpoint(str(folder)).encoder == folder / "encoder"


def test_an_encoder_that_cannot_be_fetched_is_named_with_the_way_out(folder: Path) -> None:
    (folder / "own-encoder").rmdir()
    with pytest.raises(SkdError, match=r"encoder own-encoder is needed: cannot reach[\s\S]*subfolder `encoder`"):
        open_checkpoint(str(folder))


def test_no_network_and_not_in_the_cache() -> None:
    with pytest.raises(SkdError, match=r"^Unbabel/wmt22-comet-da: cannot reach the Hugging Face hub"):
        open_checkpoint("Unbabel/wmt22-comet-da")
    with pytest.raises(SkdError, match="cannot reach the Hugging Face hub"):
        check_reference("Unbabel/wmt22-comet-da")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("!!python/object/apply:os.system ['touch poisoned']", "not a YAML file of plain values"),
        ("learning_rate: 1", "not the settings of a COMET model"),
        ("- a", "not the settings of a COMET model"),
    ],
)
def test_settings_are_plain_values_of_a_comet_model(folder: Path, text: str, complaint: str) -> None:
    (folder / "hparams.yaml").write_text(text, encoding="utf-8")
    for look in (open_checkpoint, check_reference):
        with pytest.raises(SkdError, match=complaint):
            look(str(folder))
    assert not Path("poisoned").exists()


def test_folders_that_are_no_models(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SkdError, match="cannot read: No such file"):
        check_reference(str(tmp_path))
    (folder / "checkpoints" / "second.ckpt").touch()
    with pytest.raises(SkdError, match=r"has one checkpoints/NAME.ckpt; found model.ckpt, second.ckpt"):
        open_checkpoint(str(folder))
    with pytest.raises(SkdError, match="no such folder, and not a hub id"):
        open_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(SkdError, match="not a reference to a COMET model"):
        open_checkpoint(str(tmp_path / "model.gguf"))
