from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from skd_kfp.pipelines.kubeflow.api import KubeflowPipelines
from skd_kfp.pipelines.kubeflow.auth import anonymous
from skd_lib.config import RunConfig, load_config
from tests.kubeflow.fake_kfp import FakeKfp, running

DEMO = Path(__file__).parents[2] / "pipelines/configs/demo.yaml"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        *("KF_PIPELINES_ENDPOINT", "SKD_KFP_TOKEN", "SKD_KFP_COOKIE", "SKD_CLAIMS"),
        *("SKD_TRACKING_URI", "SKD_EXPERIMENT", "SKD_PIPELINE_ROOT"),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def kfp() -> Iterator[FakeKfp]:
    with running(FakeKfp()) as fake:
        yield fake


@pytest.fixture
def api(kfp: FakeKfp) -> KubeflowPipelines:
    return KubeflowPipelines(kfp.host, anonymous, backoff=0.01)


@pytest.fixture(scope="session")
def demo() -> RunConfig:
    return load_config(DEMO)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A config that reads its data from wherever it is triggered."""
    values = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    values["data"] = {"source": {"type": "files", "train": ["{source}/train.jsonl"]}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
