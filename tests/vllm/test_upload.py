"""Files sent to a server, by the client to the guard over real HTTP; vLLM itself is not needed for that."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn

from skd_lib.errors import SkdError
from skd_lib.vllm import pod
from skd_lib.vllm.client import Engine
from skd_lib.vllm.guard import TOKEN_VARIABLE, Guard
from skd_lib.vllm.serve import Served, free_port
from skd_lib.vllm.upload import PREFIX, answer

ASKED: list[str] = []


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """What stands behind the guard."""
    if scope["type"] == "http":
        ASKED.append(scope["path"])
        await answer(send, 200, {"results": [{"seen": True}]})


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(TOKEN_VARIABLE, "t0ken")
    ASKED.clear()
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(Guard(app, tmp_path / "files"), port=port, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    Engine(f"http://127.0.0.1:{port}").wait()
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_weights_are_sent_where_no_disk_is_shared_and_not_where_one_is(url: str, tmp_path: Path) -> None:
    weights = tmp_path / "exchange"
    weights.mkdir()
    content = bytes(range(256)) * 20_000  # several chunks
    (weights / "model.safetensors").write_bytes(content)
    Engine(url).load_student(weights, "1")
    assert not (tmp_path / "files").exists()
    Engine(url, shared=False).load_student(weights, "2")
    (sent,) = (path for path in (tmp_path / "files").rglob("*") if path.is_file())
    assert sent.name == "model.safetensors"
    assert sent.read_bytes() == content
    assert ASKED.count("/update_weights") == 2


def test_only_who_has_the_token_sends_and_only_into_the_folder(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    engine = Engine(url)
    for name in ("../stolen", "a/../../stolen", "/etc/stolen", ""):
        request = requests.Request("PUT", f"{url}{PREFIX}", data=b"x").prepare()
        request.url = f"{url}{PREFIX}{name}"  # `requests` would shorten it
        request.headers["Authorization"] = "Bearer t0ken"
        assert requests.Session().send(request).status_code == 400, name
    monkeypatch.setenv(TOKEN_VARIABLE, "another")
    stranger = Engine(url)
    monkeypatch.setenv(TOKEN_VARIABLE, "t0ken")
    with pytest.raises(SkdError, match=f"answers 401(.|\n)*{TOKEN_VARIABLE}"):
        stranger.send(file, "a")
    assert not list(tmp_path.rglob("*stolen*"))
    assert not (tmp_path / "files").exists()
    assert Path(engine.send(file, "a/b")) == tmp_path / "files" / "a"
    assert (tmp_path / "files/a/b").read_text() == "x"


def test_what_cannot_be_written_leaves_nothing(url: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(5_000_000))
    engine = Engine(url)
    engine.send(file, "folder/b")
    with pytest.raises(SkdError, match=r"507(.|\n)*folder cannot be written(.|\n)*make room"):
        engine.send(file, "folder")
    assert [path.name for path in (tmp_path / "files").rglob("*")] == ["folder", "b"]


def test_a_line_after_the_token_a_proxy_and_many_rows(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "t0ken\n")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    engine = Engine(url)
    with ThreadPoolExecutor(40) as pool:
        assert len(list(pool.map(lambda _: engine.rpc("skd_sees", "a"), range(80)))) == 80
    assert "pool is full" not in caplog.text


@pytest.mark.slow
def test_a_pod_starts_vllm_although_a_connection_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Served] = []

    @contextmanager
    def started(served: Served, *_: Any, **__: Any) -> Iterator[None]:
        begun.append(served)
        yield

    monkeypatch.setenv(TOKEN_VARIABLE, "t0ken")
    monkeypatch.setattr(pod, "started", started)
    monkeypatch.setattr(pod, "until_ended", lambda _: 0)
    port = free_port()
    thread = threading.Thread(target=pod.main, args=(tmp_path, port), daemon=True)
    thread.start()
    engine = Engine(f"http://127.0.0.1:{port}")
    wait_for(lambda: listens(port))
    with socket.create_connection(("127.0.0.1", port)) as unfinished:
        unfinished.sendall(
            b"PUT /skd/files/a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t0ken\r\nContent-Length: 9\r\n\r\nab"
        )
        wait_for(lambda: (tmp_path / "a.partial").exists())
        models = tmp_path / "teacher", tmp_path / "student"
        assert not engine.answers()
        engine.post(pod.START, pod.settings_of(Served(*models, 4, max_model_len=50)))
        thread.join(20)
    assert [(served.teacher, served.gamma) for served in begun] == [(models[0], 4)]


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
