"""A registered student is loaded by MLflow, from where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.models import Model
from transformers import AutoModelForCausalLM

from skd_lib import storage
from skd_lib.models.files import weights_digest
from skd_lib.storage import sha256
from skd_lib.tracking.mlmodel import write_beside
from skd_lib.tracking.registry import register
from skd_lib.tracking.runs import step_run
from tests.conftest import SaveTinyModel
from tests.support.gcs_emulator import emulated

from .conftest import EXPERIMENT
from .server import MlflowServer

Registered = Callable[[str, Path, str], None]
CHAMPION = "models:/skd-student@champion"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    server = MlflowServer(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def student(request: pytest.FixtureRequest, tmp_path: Path, save_tiny_model: SaveTinyModel) -> Path:
    """Another one for each test: the same weights are registered once."""
    return save_tiny_model(tmp_path / "student", seed=len(request.node.name))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Registered:
    return lambda tracking_uri, student, uri: _register(monkeypatch, tracking_uri, student, uri)


def _register(monkeypatch: pytest.MonkeyPatch, tracking_uri: str, student: Path, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    with step_run(step="register_model", tracking_uri=tracking_uri, experiment=EXPERIMENT) as run:
        assert write_beside(student, uri, "<s>Translate: a cat")
        register(
            tracking_uri=tracking_uri,
            model_name="skd-student",
            student_uri=uri,
            weights_sha256=weights_digest(student),
            run_id=run.parent.find,
            promote=True,
            figures={},
            tags={},
            example="<s>Translate: a cat",
        )


def answers_alike(student: Path, uri: str = CHAMPION) -> None:
    """The version answers a prompt as the student does, loaded either way."""
    pipeline: Any = mlflow.transformers.load_model(uri)
    prompt = "the cat"
    asked = pipeline.tokenizer(prompt, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(student)
    tokens = model.generate(**asked, max_new_tokens=4, do_sample=False)[0, asked["input_ids"].shape[1] :]
    answer = pipeline.tokenizer.decode(tokens, skip_special_tokens=True)
    (found,) = pipeline(prompt, max_new_tokens=4, do_sample=False, return_full_text=False)
    assert found["generated_text"] == answer
    function = mlflow.pyfunc.load_model(uri)
    assert function.predict(prompt, params={"max_new_tokens": 4}) == [answer.strip()]

    messages = [{"role": "user", "content": prompt}]  # rendered as docs/guides/tracking.md says
    rendered = pipeline.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    rendered = rendered.removeprefix(pipeline.tokenizer.bos_token or "")
    (found,) = pipeline(messages, max_new_tokens=4, do_sample=False, return_full_text=False)
    assert function.predict(rendered, params={"max_new_tokens": 4}) == [found["generated_text"].strip()]


def test_a_version_beside_its_weights(
    store: str, student: Path, registered: Registered, caplog: pytest.LogCaptureFixture
) -> None:
    before = {file.name: sha256(file) for file in student.iterdir()}
    registered(store, student, str(student))
    answers_alike(student)
    assert {name: sha256(student / name) for name in before} == before
    model = Model.load(CHAMPION)
    assert str(model.signature.inputs) == "[string (required)]"
    assert model.load_input_example(str(student)) == ["Translate: a cat"]
    pins = (student / "requirements.txt").read_text(encoding="utf-8").split()
    assert all("==" in pin and "+" not in pin for pin in pins)
    assert {pin.partition("==")[0] for pin in pins} == {"torch", "transformers", "accelerate", "mlflow"}
    assert not [record for record in caplog.records if record.name.startswith("skd_lib")]


@pytest.mark.slow
def test_a_version_in_a_bucket(running: MlflowServer, student: Path, registered: Registered, tmp_path: Path) -> None:
    with emulated("bucket"):
        storage.upload(student, "gs://bucket/student")
        registered(running.uri, student, "gs://bucket/student")
        assert not (student / "MLmodel").exists()
        answers_alike(student)
        fetched = storage.download("gs://bucket/student", tmp_path / "fetched")
        assert AutoModelForCausalLM.from_pretrained(fetched).num_parameters() > 0
    assert not list((running.folder / "files").rglob("*.safetensors"))


@pytest.mark.slow
def test_a_version_on_this_machine_behind_a_server(
    running: MlflowServer, student: Path, registered: Registered
) -> None:
    registered(running.uri, student, str(student))
    answers_alike(student)
    sent = {file.name for file in (running.folder / "files").rglob("*") if file.is_file()}
    assert {"MLmodel", "tokenizer.json", "weights.json"} <= sent
    assert "model.safetensors" not in sent


def test_what_cannot_be_described_is_said(tmp_path: Path, student: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    assert not write_beside(tmp_path / "empty", str(tmp_path / "empty"))
    assert "no config.json" in caplog.text
    for file in student.glob("tokenizer*"):
        file.unlink()
    assert not write_beside(student, str(student))
    assert "its config or tokenizer cannot be loaded" in caplog.text
    assert not (student / "MLmodel").exists()
