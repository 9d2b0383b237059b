"""Fails loudly when kfp changes what `skd_kfp.pipelines.local.kfp_patch` relies on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from docker.errors import APIError, NotFound
from kfp import components, local
from kfp.local import cache, docker_task_handler, subprocess_task_handler
from requests import Response

from skd_kfp.pipelines.local.containers import run_container
from skd_kfp.pipelines.local.kfp_patch import check_kfp
from skd_lib.errors import SkdError
from tests.pipelines.fakes import fake_pipeline
from tests.pipelines.test_local import journal, run  # noqa: F401 - a fixture

ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(["config", "data_train", "data_validation", "data_test", "model_teacher", "model_student"], "x"),
    **dict.fromkeys(["task", "training_method", "mlflow_experiment"], ""),
    "training_steps": 1,
}


def test_installed_kfp_is_one_we_know():
    check_kfp()


def test_another_shape_of_the_task_handler_is_refused(monkeypatch: pytest.MonkeyPatch):
    class Changed:
        def __init__(self, task: object) -> None: ...

    monkeypatch.setattr(subprocess_task_handler, "SubprocessTaskHandler", Changed)
    with pytest.raises(SkdError, match=r"another local runner[\s\S]*kfp>=2.17,<2.18"):
        check_kfp()


def test_kfps_classes_are_back_in_place_after_a_run(tmp_path: Path, journal: Path):  # noqa: F811
    before = (subprocess_task_handler.SubprocessTaskHandler, cache.LocalCache)
    run(tmp_path)
    assert (subprocess_task_handler.SubprocessTaskHandler, cache.LocalCache) == before


def test_kfp_still_refuses_container_components_by_itself(tmp_path: Path):
    """The day this fails, kfp runs them itself and `skd_kfp.pipelines.local.kfp_patch` can go."""
    pipeline = components.load_component_from_text(yaml.safe_dump_all(fake_pipeline(tmp_path)))
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path))
    with pytest.raises(RuntimeError, match="Container Component"), pytest.warns(RuntimeWarning, match="non-Python"):
        pipeline(**ARGUMENTS)


def test_kfp_still_takes_a_failed_container_that_is_gone_for_a_successful_one():
    """The day this fails, kfp's own Docker runner can be trusted, and `local.containers` has less to do."""
    assert (
        docker_task_handler.run_docker_container(client=Vanishing(), image="fake:1", command=["false"], volumes={}) == 0
    )


def test_container_that_is_gone_before_its_exit_code_is_known_has_failed(tmp_path: Path):
    outcome = run_container(Vanishing(), "fake:1", ["false"], log=tmp_path / "log", on_event=lambda event: None)
    assert outcome.code != 0
    assert "removed before" in outcome.explain()


def test_container_that_is_being_removed_has_failed(tmp_path: Path):
    """Docker 28 refuses the log of such a container by 409."""

    class Going(Vanishing):
        def logs(self, **_: Any) -> Iterator[bytes]:
            answer = Response()
            answer.status_code = 409
            raise APIError("can not get logs from container which is dead or marked for removal", response=answer)

    outcome = run_container(Going(), "fake:1", ["false"], log=tmp_path / "log", on_event=lambda event: None)
    assert (outcome.code, "removed before" in outcome.explain()) == (1, True)


def test_last_lines_of_a_container_are_kept_where_the_stream_ends_before_them(tmp_path: Path):
    class Hasty(Vanishing):
        def logs(self, *, follow: bool, **_: Any) -> Iterator[bytes]:
            yield from (b"first\nsec",) if follow else (b"first\n", b"second\n", b"error: the reason\n")

        def wait(self) -> dict[str, int]:
            return {"StatusCode": 1}

    log = tmp_path / "log"
    outcome = run_container(Hasty(), "fake:1", ["false"], log=log, on_event=lambda event: None)
    assert log.read_text() == "first\nsecond\nerror: the reason\n"
    assert "the reason" in outcome.explain()


class Vanishing:
    """An engine that has removed a container, whatever its exit code, by the time it is asked how it ended.

    A real one does so now and then only; `tests/images` has what a real one does every time.
    """

    def __init__(self) -> None:
        self.containers = self.images = self

    def list(self) -> list[Any]:
        return []

    def pull(self, image: str) -> None: ...

    def run(self, **_: Any) -> Vanishing:
        return self

    def create(self, image: str, command: list[str], **_: Any) -> Vanishing:
        return self

    def start(self) -> None: ...

    def logs(self, **_: Any) -> Iterator[bytes]:
        return iter([b"out of memory\n"])

    def wait(self) -> dict[str, int]:
        raise NotFound("no such container")

    def remove(self, **_: Any) -> None:
        raise NotFound("no such container")
