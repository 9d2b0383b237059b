"""Fails loudly when kfp changes what `pipelines.kfp_local` relies on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import components, local
from kfp.local import cache, subprocess_task_handler

from pipelines.kfp_local import check_kfp
from skd_lib.errors import SkdError
from tests.pipelines.fakes import fake_pipeline
from tests.pipelines.test_local import journal, run  # noqa: F401 - a fixture

ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(["run_name", "teacher", "student", "method", "divergence"], "x"),
    **dict.fromkeys(["tracking_uri", "experiment", "checkpoint_root"], ""),
    **dict.fromkeys(["top_k", "gamma", "max_steps", "seed"], 1),
    "learning_rate": 0.1,
    "config": {},
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
    """The day this fails, kfp runs them itself and `pipelines.kfp_local` can go."""
    pipeline = components.load_component_from_text(yaml.safe_dump_all(fake_pipeline(tmp_path)))
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path))
    with pytest.raises(RuntimeError, match="Container Component"), pytest.warns(RuntimeWarning, match="non-Python"):
        pipeline(**ARGUMENTS)
