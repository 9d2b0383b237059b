"""COMET itself, in its own environment, with a tiny model that it made, saved and loads.

`make test-comet`; the environment is made by the first run, which takes minutes.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from skd_lib.evaluation.comet.environment import comet_python
from tests.evaluation.comet.answers import ANSWERS, EXAMPLES
from tests.evaluation.comet.test_comet_score_step import ASKED, logged, run, store

pytestmark = [pytest.mark.comet, pytest.mark.timeout(3600)]  # making the environment is part of the first test

MAKE = Path(__file__).with_name("make_checkpoint.py")
# What a person would type who has nothing but COMET; one translation at a time.
BY_HAND = """
import json, sys
from comet import load_from_checkpoint
model = load_from_checkpoint(sys.argv[1], reload_hparams=True)
rows = json.load(open(sys.argv[2]))
print("SCORES", json.dumps([model.predict([row], gpus=0, progress_bar=False).scores[0] for row in rows]))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    return comet_python()


@pytest.fixture(scope="module")
def model(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(python, tmp_path_factory.mktemp("comet") / "tiny")


def made(python: Path, folder: Path, *options: str) -> Path:
    subprocess.run([python, "-I", MAKE, folder, *options], check=True, capture_output=True)
    return folder


def step(folder: Path, model: Path, tracking_uri: str = "", **settings: Any) -> dict[str, Any]:
    evaluation = {"comet": {"model": str(model), "batch_size": 2, **settings}, "bootstrap_samples": 100}
    return run(folder, tracking_uri, task=ASKED, evaluation=evaluation)


def test_scores_are_comets_own(python: Path, model: Path, tmp_path: Path) -> None:
    scores = step(tmp_path, model, store(tmp_path))
    assert scores["missing"] == ""
    _, rows = logged(tmp_path)
    assert [(row["role"], row["id"]) for row in rows] == [(role, e[0]) for role in ANSWERS for e in EXAMPLES]

    texts = [
        {"src": source, "mt": answer.replace("\ud800", "?"), "ref": target}
        for answers in ANSWERS.values()
        for (_, source, target), answer in zip(EXAMPLES, answers, strict=True)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(texts))
    settings = (model / "hparams.yaml").read_text()
    (model / "hparams.yaml").write_text(settings.replace("no/such-encoder", str(model / "encoder")))
    checkpoint = model / "checkpoints" / "model.ckpt"
    by_hand = subprocess.run(
        [python, "-I", "-c", BY_HAND, checkpoint, tmp_path / "rows.json"], check=True, capture_output=True, text=True
    )
    (model / "hparams.yaml").write_text(settings)
    wanted = [100 * value for value in json.loads(by_hand.stdout.split("SCORES")[1])]
    assert [row["comet"] for row in rows] == pytest.approx(wanted, abs=1e-3)
    assert len(set(wanted)) == 10  # of the 12 two are the teacher's and the student's alike

    for index, role in enumerate(ANSWERS):
        found = scores["models"][role]
        assert found["score"] == pytest.approx(sum(wanted[3 * index : 3 * index + 3]) / 3, abs=1e-3)
        assert found["low"] <= found["score"] <= found["high"]
        assert found["signature"].endswith("|version:2.2.7")
        assert str(model) in found["signature"]
    test = scores["comparisons"]["student_after-student_before"]
    gain = scores["models"]["student_after"]["score"] - scores["models"]["student_before"]["score"]
    assert test["difference"] == pytest.approx(gain)
    assert 0 < test["p_value"] <= 1


def test_a_pickle_with_code_is_loaded_only_by_choice(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(python, tmp_path / "poison", "poison")
    monkeypatch.chdir(tmp_path)
    refused = step(tmp_path, model)
    assert refused["models"] == {}
    assert "could run any code" in refused["missing"]
    assert "trust_pickle" in refused["missing"]
    assert not Path("poisoned").exists()
    assert len(step(tmp_path, model, trust_pickle=True)["models"]) == 4
    assert Path("poisoned").exists()  # or the refusal above would prove nothing


def test_a_checkpoint_that_is_none(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    (broken / "checkpoints").mkdir(parents=True)
    (broken / "checkpoints" / "model.ckpt").write_bytes(b"no checkpoint")
    (broken / "hparams.yaml").write_bytes((model / "hparams.yaml").read_bytes())
    (broken / "encoder").symlink_to(model / "encoder")
    scores = step(tmp_path, broken)
    assert scores["models"] == {}
    assert scores["missing"].startswith(str(broken))
