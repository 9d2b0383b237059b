"""What is asked of a server and what becomes of it, without vLLM."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from skd_kfp.pipelines.cli import app
from skd_lib.errors import SkdError, Transient
from skd_lib.models.files import weights_sample
from skd_lib.vllm import client
from skd_lib.vllm.client import Engine, EngineGone
from skd_lib.vllm.fleet import TRIES, Fleet, Wanted
from skd_lib.vllm.serve import cause
from tests.conftest import SaveTinyModel
from tests.support import http


class Stand:
    """A server whose answers wait for `go`, and whose health is as it is set."""

    def __init__(self) -> None:
        self.go, self.health, self.looks = threading.Event(), 200, 0
        self.results: dict[str, Any] = {}
        stand = self

        class Handler(http.Handler):
            def do_GET(self) -> None:
                stand.looks += 1
                if stand.looks == 3 and stand.health == 200:
                    stand.go.set()
                self.send_response(stand.health)
                self.end_headers()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                stand.go.wait(20)
                method = json.loads(body)["method"]
                self.send_response(200)
                self.end_headers()
                answer = {"results": [stand.results.get(method, method)]}
                self.wfile.write(json.dumps(answer).encode())

        self._server = http.Server(Handler).__enter__()
        self.url = self._server.url

    def close(self) -> None:
        self.go.set()
        self._server.__exit__()


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    monkeypatch.setattr(client, "LOOK_SECONDS", 0.05)
    made = Stand()
    yield made
    made.close()


def test_a_request_may_take_any_time_while_the_server_is_there(stand: Stand) -> None:
    assert Engine(stand.url, wait_s=0.01).rpc("slow") == "slow"
    assert stand.looks >= 3


@pytest.mark.parametrize("ended", [False, True])
def test_a_server_that_hangs_is_given_up(stand: Stand, ended: bool) -> None:
    """As vLLM does that waits for its open requests, with an engine that has ended; or its pod is known to be gone."""

    def check() -> None:
        if ended:
            raise SkdError("its pod is gone")

    stand.health = 503
    with pytest.raises(SkdError if ended else EngineGone, match="gone" if ended else "no more"):
        Engine(stand.url, alive=check).rpc("hangs")


def test_a_server_with_another_teacher_is_refused_by_its_name(stand: Stand) -> None:
    stand.go.set()
    stand.results = {
        "skd_claim": {"state": "yours", "session": ""},
        "skd_install": {"runner": "runner_v1", "teacher": "theirs", "folder": "/models/other"},
    }
    wanted = Wanted({}, "1", length=8, gamma=4, longest=8, teacher="ours", bytes=0, write=lambda _: None)
    with pytest.raises(SkdError, match=r"/models/other, has other weights(.|\n)*teacher of this run"):
        Fleet("session", 0, None).spread([Engine(stand.url)], wanted, lambda *_: None, [1], [1])


@pytest.mark.parametrize("when", ["while it worked on one batch", "while they were set up"])
def test_servers_that_are_lost_again_and_again_may_come_back_later(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    stand.go.set()
    stand.results = {"skd_claim": {"state": "ready"}}
    asked: list[str] = []

    def lost(*words: Any) -> None:
        asked.append(str(words[0]))
        raise EngineGone("connection reset")

    engine = Engine(stand.url)
    if when == "while they were set up":
        monkeypatch.setattr(engine, "rpc", lost)
    wanted = Wanted({}, None, length=8, gamma=4, longest=8, teacher="ours", bytes=0, write=lambda _: None)
    with pytest.raises(Transient, match=rf"lost {TRIES} times {when}"):
        Fleet("session", 0, None).spread([engine], wanted, lost, [1], [1])
    assert len(asked) == TRIES


def test_models_of_equal_shapes_are_told_apart_and_shards_are_not(tmp_path: Path) -> None:
    trained = {"a": np.arange(2000, dtype=np.float32), "b": np.zeros((0, 3), np.float32), "c": np.ones(3, np.float32)}
    other = {**trained, "a": trained["a"][::-1].copy()}

    def sample(name: str, *shards: dict[str, Any]) -> str:
        folder = tmp_path / name
        folder.mkdir()
        index = {}
        for number, shard in enumerate(shards):
            file = f"model-{number}.safetensors" if shards[1:] else "model.safetensors"
            save_file(shard, folder / file)
            index |= dict.fromkeys(shard, file)
        if shards[1:]:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return weights_sample(folder)

    first, *rest = ({name: tensor} for name, tensor in trained.items())
    assert sample("one", trained) == sample("shards", first, rest[0] | rest[1]) == sample("again", trained)
    assert len({sample("other", other), sample("less", first), sample("first", trained)}) == 3


def test_a_server_starts_only_with_room_for_its_drafts_in_both_models(
    tmp_path: Path, save_tiny_model: SaveTinyModel
) -> None:
    teacher = save_tiny_model(tmp_path / "teacher")
    student = save_tiny_model(tmp_path / "student", max_position_embeddings=100)
    words = ["engine", "start", str(teacher), str(student), "--max-len", "91", "--gamma", "4"]
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, SkdError)
    assert (error.where, error.hint) == ("--max-len 91", "--max-len 90")


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (
            "(APIServer pid=7) WARNING 11-30 [utils.py:255] can cause `OSError: [Errno 24] Too many open files`\n"
            '(Worker pid=9) ERROR 11-30 08:24:48 [multiproc_executor.py:953]   File "llama.py", line 5\n'
            "(Worker pid=9) ERROR 11-30 08:24:48 [executor.py:953] torch.OutOfMemoryError: 2 GiB is too much\n"
            "(EngineCore pid=8) ERROR 11-30 08:24:54 [core.py:1510] Exception: WorkerProc initialization failed\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n",
            "OutOfMemoryError: 2 GiB is too much",
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, max_model_len (100006) is too large. [type=value_error, input_value=ArgsKwargs(...)]\n",
            "ValidationError: 1 validation error for ModelConfig Value error, max_model_len (100006) is too large.",
        ),
        ("2026-01-01T00:00:00Z ValueError: no memory\n", "ValueError: no memory"),
        ("vllm serve: error: unrecognized arguments: --x\n", ""),
    ],
)
def test_the_first_error_is_the_cause(log: str, found: str) -> None:
    assert cause(log) == found


def test_servers_that_do_not_answer_may_answer_later() -> None:
    with pytest.raises(Transient, match=r"no vLLM server answers after 0 minutes"):
        client.wait_for_one([Engine("http://127.0.0.1:9", wait_s=0)])
