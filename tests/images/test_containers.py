"""The images really built, their steps really run in them: as a restricted pod runs them, and the whole pipeline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from docker import DockerClient
from docker.types import Mount

from skd_kfp.pipelines.local.containers import OWNER, run_container
from skd_lib import __version__
from tests.conftest import SaveTinyModel
from tests.images.conftest import ROOT, Build

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]
IMPORTS = {
    "train": "import skd_lib.steps.distill, skd_lib.steps.evaluate, skd_lib.training.run, mlflow",
    "comet": "import skd_lib.steps.comet_score, comet, mlflow",
    "pipeline": "import kfp, kfp.kubernetes, skd_kfp.pipelines.kubeflow.submit, skd_kfp.pipelines.kubeflow.trigger",
}
WITHOUT = {"train": ("kfp",), "comet": ("kfp", "mlflow"), "pipeline": ("torch", "transformers")}
RESTRICTED: dict[str, Any] = {
    "read_only": True,
    "network_mode": "none",
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "tmpfs": {"/tmp": "mode=1777"},  # noqa: S108
}


@pytest.fixture(params=IMPORTS)
def image(request: pytest.FixtureRequest, build: Build) -> tuple[str, str]:
    """Name and tag of each image in turn."""
    return request.param, build(request.param)


def in_image(engine: DockerClient, tag: str, *command: str, **arguments: Any) -> str:
    """Return what the command prints to its standard output in a restricted container.

    The output is read when the container has ended: a stream that follows it may end before its last lines have come
    (seen with Docker 28), and docker-py's `run(remove=True)` removes the container before it has read all of them.
    """
    container = engine.containers.create(tag, list(command), **{**RESTRICTED, **arguments})
    try:
        container.start()
        assert container.wait()["StatusCode"] == 0, container.logs().decode()
        output: str = container.logs(stderr=False).decode()
    finally:
        container.remove(force=True)
    return output


def test_image_is_what_a_restricted_pod_needs(engine: DockerClient, image: tuple[str, str]):
    name, tag = image
    config = engine.images.get(tag).attrs["Config"]
    assert config["User"] == "10001"
    assert not config.get("Entrypoint")
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert (labels["title"], labels["version"], labels["revision"]) == (f"skd-{name}", __version__, "abc123")
    absent = [f"importlib.util.find_spec({package!r})" for package in WITHOUT[name]]
    code = f"{IMPORTS[name]}; import importlib.util, os; print(os.getuid(), {', '.join(absent)})"
    for user in (None, "20002:20002"):  # OpenShift gives a user of its own
        said = in_image(engine, tag, "python3", "-c", code, user=user).split()
        assert said == [user.partition(":")[0] if user else "10001", *("None" for _ in absent)]


def test_sbom_lists_what_is_installed(engine: DockerClient, image: tuple[str, str]):
    _, tag = image
    bom = json.loads(in_image(engine, tag, "cat", "/opt/skd/sbom.cdx.json"))
    assert bom["bomFormat"] == "CycloneDX"
    code = "import importlib.metadata as m, json; print(json.dumps([[d.name, d.version] for d in m.distributions()]))"
    installed = json.loads(in_image(engine, tag, "python3", "-I", "-c", code))
    assert {tuple(pair) for pair in installed} == {(part["name"], part["version"]) for part in bom["components"]}


def test_starting_runs_needs_nothing_but_its_image(engine: DockerClient, build: Build):
    tag = build("pipeline")
    for command in ("submit", "trigger", "compile"):
        assert f"skd {command}" in in_image(engine, tag, "skd", command, "--help", environment={"COLUMNS": "200"})
    compiled = in_image(engine, tag, "sh", "-c", "skd compile --output /tmp/pipeline.yaml && cat /tmp/pipeline.yaml")
    assert "skd-distillation" in compiled


@pytest.fixture
def quick(engine: DockerClient, base_image: str, tmp_path: Path) -> Iterator[Any]:
    """Runs a shell line as a step is run in a container."""
    events: list[dict[str, Any]] = []

    def run(line: str, **arguments: Any) -> Any:
        settings = {**RESTRICTED, "labels": {OWNER: str(tmp_path)}, **arguments}
        log, command = tmp_path / "log", ["sh", "-c", line]
        return run_container(engine, base_image, command, log=log, on_event=events.append, **settings), log, events

    yield run
    owned = {"label": f"{OWNER}={tmp_path}"}
    end = time.monotonic() + 60
    while left := engine.containers.list(all=True, ignore_removed=True, filters=owned):  # its removal may take a while
        assert time.monotonic() < end, left
        time.sleep(0.1)


@pytest.mark.parametrize("code", [0, 1, 3, 75, 255])
def test_exit_code_of_a_container_however_short_is_its_steps(quick: Any, code: int):
    assert quick(f"exit {code}")[0].code == code


def test_events_of_a_container_are_told_and_its_text_is_logged(quick: Any):
    line = """echo '::skd {"event": "error", "message": "no space"}'; echo héllo >&2; exit 2"""
    outcome, log, events = quick(line)
    assert (outcome.code, outcome.explain(), outcome.tail) == (2, "no space", ("héllo",))
    assert [event["event"] for event in events] == ["error"]
    assert log.read_text(encoding="utf-8") == "héllo\n"


@pytest.mark.parametrize(
    ("meanwhile", "says"),
    [("kill", "ended by SIGKILL"), ("remove", "ended by SIGKILL|was removed before it was known how it ended")],
)
def test_container_that_somebody_kills_or_removes_has_failed(
    engine: DockerClient, quick: Any, tmp_path: Path, meanwhile: str, says: str
):
    def intrude() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for container in engine.containers.list(ignore_removed=True, filters={"label": f"{OWNER}={tmp_path}"}):
                container.kill() if meanwhile == "kill" else container.remove(force=True)
                return
            time.sleep(0.1)

    other = threading.Thread(target=intrude)
    other.start()
    outcome = quick("sleep 120")[0]
    other.join()
    assert outcome.code != 0
    assert re.search(says, outcome.explain())


def test_restricted_container_writes_to_tmp_and_its_volumes_alone(quick: Any, tmp_path: Path):
    folder = tmp_path / "volume"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    mounts = [Mount(str(folder), str(folder), type="bind")]
    line = f"touch /tmp/a {folder}/b && ! touch /opt/c && ! touch /etc/d"
    assert quick(line, mounts=mounts, user="10001")[0].code == 0
    assert [path.name for path in folder.iterdir()] == ["b"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: SaveTinyModel) -> Path:
    """A folder with data, a model and a run's configuration, all of it local."""
    folder = tmp_path_factory.mktemp("containers")
    save_tiny_model(folder / "teacher", layers=3)
    words = ["cat", "dog", "file", "word", "day", "night", "hand", "road"]
    rows = [{"source": f"{a} {b} {c}", "target": f"{c} {b} {a}"} for a in words for b in words for c in words[:2]]
    for split, part in {"train": rows[:96], "validation": rows[96:112], "test": rows[112:]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    training = {"batch_size": 8, "max_steps": 4, "eval_steps": 2}
    config = {
        "name": "contained",
        "teacher": str(folder / "teacher"),
        "data": {
            "source": {
                "type": "files",
                **{split: [str(folder / f"{split}.jsonl")] for split in ("train", "validation", "test")},
            },
            "near_duplicate_threshold": 1.0,
        },
        "task": {"stop": ["\n"], "max_prompt_tokens": 64, "max_new_tokens": 8},
        "teacher_sft": {"training": training},
        "student_init": {"mode": "prune", "keep_first": 1, "keep_last": 1},
        "distill": {"training": training},
        "evaluation": {"bootstrap_samples": 100},
        "specdec": {"examples": 2, "gamma": 2, "gammas": [2], "sweep": "best", "repeats": 1},
        "registry": {"model_name": "contained-student"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def skd_run(folder: Path, config: str, tag: str) -> subprocess.CompletedProcess[str]:
    command = [
        "-m",
        "skd_kfp.pipelines.cli",
        "run",
        folder / config,
        "--docker",
        "--image",
        tag,
        "--runs-dir",
        folder / "runs",
    ]
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "SKD_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hub")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(workplace: Path, build: Build) -> str:
    """What the whole pipeline printed when it ran in containers, without network."""
    done = skd_run(workplace, "config.yaml", build("train"))
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_whole_pipeline_runs_in_containers_without_network(engine: DockerClient, workplace: Path, finished: str):
    run = workplace / "runs" / "contained"
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["models"]) == ["teacher_base", "teacher", "student_before", "student_after"]
    assert (run / "student" / "model.safetensors").is_file()
    assert (workplace / "runs" / "mlflow.db").is_file()
    assert engine.containers.list(all=True, filters={"label": f"{OWNER}={run.resolve()}"}) == []


def test_second_run_takes_finished_steps_from_the_cache(workplace: Path, finished: str, build: Build):
    done = skd_run(workplace, "config.yaml", build("train"))
    assert done.returncode == 0, done.stdout
    assert "distill: unchanged, reused" in done.stdout
    assert "distill: unchanged, reused" not in finished


def test_failing_container_fails_the_run(workplace: Path, build: Build):
    config = yaml.safe_load((workplace / "config.yaml").read_text())
    broken = workplace / "broken.jsonl"
    broken.write_text('{"source": "no target"}\n')
    config["name"] = "broken"
    config["data"]["source"]["train"] = [str(broken)]
    (workplace / "broken.yaml").write_text(yaml.safe_dump(config))
    done = skd_run(workplace, "broken.yaml", build("train"))
    assert done.returncode == 1, done.stdout
    assert "step preflight" in done.stdout
    assert "broken.jsonl" in done.stdout
