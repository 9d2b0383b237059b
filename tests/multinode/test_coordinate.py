"""The step that waits for a TrainJob, against a server that speaks Kubernetes' REST API."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client import ApiClient, Configuration

from skd_lib import storage
from skd_lib.config import MultinodeConfig
from skd_lib.errors import Preempted, SkdError, Transient
from skd_lib.multinode import coordinate
from skd_lib.multinode.cluster import Cluster
from skd_lib.multinode.coordinate import Work, train_on_nodes
from skd_lib.multinode.exchange import Exchange
from skd_lib.multinode.logs import LogFollower, Unseen, whole_lines
from skd_lib.multinode.node import step_command
from skd_lib.steps.kfp_call import Call, called, take_call
from skd_lib.steps.runtime import StepIO
from tests.multinode.fake_kubernetes import FakeKubernetes, running


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    with running() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path)))
        monkeypatch.setenv("KFP_RUN_ID", "run-1")
        monkeypatch.setenv("KFP_POD_NAME", "step-pod")
        monkeypatch.setattr(coordinate, "POLL_SECONDS", 0.05)
        yield server


class Step:
    """One attempt at a step, in a pod of its own."""

    def __init__(self, folder: Path, root: str) -> None:
        self.folder = folder
        self.call = Call(
            output_file=folder / "output.json",
            artifacts={name: f"memory://bucket/{name}" for name in ("model", "metrics")},
            inputs={name: f"memory://bucket/{name}" for name in ("student", "data")},
        )
        self.work = Work(
            step="distill",
            options={"checkpoint_root": root, "config": "{}"},
            inputs={"student": folder, "data": folder},
            outputs={"model_out": "model", "metrics_out": "metrics"},
        )

    def run(self, **settings: Any) -> dict[str, Any]:
        with called(self.call):
            io = StepIO({"model": self.folder / "model", "metrics": self.folder / "metrics.json"})
            train_on_nodes(self.work, MultinodeConfig(**{"nodes": 2, **settings}), io)
        written: dict[str, Any] = json.loads((self.folder / "output.json").read_text())
        return written


@pytest.fixture
def step(tmp_path: Path) -> Callable[[], Step]:
    attempts = iter(range(9))

    def make() -> Step:
        return Step(tmp_path / f"attempt-{next(attempts)}", f"memory://bucket/{tmp_path.name}")

    return make


def publish(job: dict[str, Any]) -> None:
    """What the first node does at its end."""
    (uri,) = job["spec"]["trainer"]["args"]
    request = Exchange(uri).request()
    inputs = {"student": "memory://bucket/student", "data": "memory://bucket/data"}
    assert request.inputs.items() >= inputs.items()
    with tempfile.TemporaryDirectory() as folder:
        words, call = take_call(step_command(request, Path(folder))[2:])
        assert words[-4:] == ["--model-out", f"{folder}/outputs/model", "--metrics-out", f"{folder}/outputs/metrics"]
        with called(call):
            io = StepIO({name: Path(folder) / "outputs" / name for name in ("model", "metrics")})
        (io.paths["model"]).mkdir()
        (io.paths["model"] / "weights").write_text("trained")
        io.paths["metrics"].write_text("{}")
        assert io.output_uri("model") == "memory://bucket/model"
        io.parameter("course", {"steps": [1, 2]})
        written = io.write()
        assert written is not None
        Exchange(uri).publish(io.paths, written)


EXCEEDED = "DeadlineExceeded"


def in_background(what: Callable[[], None]) -> None:
    threading.Thread(target=what, daemon=True).start()


def start(fake: FakeKubernetes, job: dict[str, Any], *lines: str) -> str:
    """A kubelet: start the nodes, and write a log."""
    name = job["metadata"]["name"]
    pod = fake.add_node(name, 0)
    fake.add_node(name, 1)
    fake.write(pod, *lines)
    time.sleep(0.2)
    return name


def work(fake: FakeKubernetes, job: dict[str, Any], *lines: str) -> None:
    """A kubelet: do all of it."""
    start(fake, job, *lines)
    publish(job)
    fake.end(job["metadata"]["name"])


def completes(fake: FakeKubernetes, *lines: str) -> None:
    fake.on_create = lambda job: in_background(lambda: work(fake, job, *lines))


@contextmanager
def lost_pod(at: str) -> Iterator[None]:
    """An attempt that ends without a word at a function of the module, as when its machine breaks."""

    def lost(*_: object) -> None:
        raise ConnectionAbortedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{coordinate.__name__}.{at}", lost)
        yield


def test_results_of_the_nodes_become_the_steps_own(
    kubernetes: FakeKubernetes, step: Callable[[], Step], capsys: pytest.CaptureFixture[str]
) -> None:
    completes(kubernetes, "epoch 1", "epoch 2")
    attempt = step()
    written = attempt.run()
    assert capsys.readouterr().out.splitlines() == ["epoch 1", "epoch 2"]
    assert (attempt.folder / "model" / "weights").read_text() == "trained"
    model = written["artifacts"]["model"]["artifacts"][0]
    assert model["uri"] == "memory://bucket/model"
    assert written["parameterValues"] == {"course": {"steps": [1, 2]}}
    assert kubernetes.jobs == {}  # nothing is left behind
    assert not Exchange(f"{attempt.work.options['checkpoint_root']}/multinode").is_complete()


def test_nodes_get_what_the_step_has_made(kubernetes: FakeKubernetes, step: Callable[[], Step]) -> None:
    attempt, found = step(), list[str]()

    def fetch(target: Path) -> None:
        target.mkdir()
        (target / "weights").write_text("whole")

    attempt.work = replace(attempt.work, made={"fetched": fetch})

    def node(job: dict[str, Any]) -> None:
        request = Exchange(job["spec"]["trainer"]["args"][0]).request()
        words = step_command(request, Path("/node"))
        assert words[words.index("--fetched") + 1] == "/node/inputs/fetched"
        found.append(storage.read_bytes(f"{request.inputs['fetched']}/weights").decode())
        in_background(lambda: kubernetes.end(start(kubernetes, job), "Failed"))

    kubernetes.on_create = node
    with pytest.raises(SkdError, match="the TrainJob has failed"):
        attempt.run()
    assert found == ["whole"]


@pytest.mark.parametrize("ended", [False, True])
def test_nothing_is_made_for_a_job_that_is_there_or_whose_result_is(
    kubernetes: FakeKubernetes, step: Callable[[], Step], ended: bool
) -> None:
    made: list[int] = []

    def attempt(number: int) -> Step:
        one = step()

        def fetch(target: Path) -> None:
            made.append(number)
            target.write_text("whole")

        one.work = replace(one.work, made={"fetched": fetch})
        return one

    if ended:
        completes(kubernetes)
    with lost_pod("_collect" if ended else "time.sleep"), pytest.raises(ConnectionAbortedError):
        attempt(1).run()
    if ended:
        kubernetes.jobs.clear()
    else:
        (job,) = kubernetes.jobs.values()
        in_background(lambda: work(kubernetes, job))
    attempt(2).run()
    assert made == [1]


def test_nothing_is_made_where_nodes_cannot_reach_it(step: Callable[[], Step], tmp_path: Path) -> None:
    local = Step(tmp_path / "local", str(tmp_path))
    local.work = replace(local.work, made={"fetched": lambda _: pytest.fail("made")})
    with pytest.raises(SkdError, match="checkpoint_root is at /"):
        local.run()


def test_a_cancel_ends_what_is_made_for_the_nodes(kubernetes: FakeKubernetes, step: Callable[[], Step]) -> None:
    attempt, kept = step(), list[Path]()

    def fetch(target: Path) -> None:
        target.write_text("half")
        kept.append(target)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        pytest.fail("went on")

    attempt.work = replace(attempt.work, made={"fetched": fetch})
    with pytest.raises(Preempted):
        attempt.run()
    assert kubernetes.jobs == {}
    assert any(request.startswith("DELETE") for request in kubernetes.requests)
    assert not any(request.startswith("POST") for request in kubernetes.requests)
    assert not kept[0].exists()


def test_a_retried_step_takes_up_the_job_that_is_there(kubernetes: FakeKubernetes, step: Callable[[], Step]) -> None:
    created: list[str] = []
    kubernetes.on_create = lambda job: created.append(job["metadata"]["name"])

    with lost_pod("time.sleep"), pytest.raises(ConnectionAbortedError):
        step().run()
    (name,) = created
    in_background(lambda: work(kubernetes, kubernetes.jobs[name]))
    step().run()
    assert created == [name]
    posts = [request for request in kubernetes.requests if request.startswith("POST")]
    assert len(posts) == 1


def test_a_result_is_taken_even_if_its_job_is_gone(kubernetes: FakeKubernetes, step: Callable[[], Step]) -> None:
    kubernetes.on_create = lambda job: in_background(lambda: [publish(job), kubernetes.end(job["metadata"]["name"])])
    with lost_pod("_collect"), pytest.raises(ConnectionAbortedError):
        step().run()
    kubernetes.jobs.clear()
    assert step().run()["parameterValues"]
    assert sum(request.startswith("POST") for request in kubernetes.requests) == 1


def test_a_failed_job_fails_the_step_and_a_retry_replaces_it(
    kubernetes: FakeKubernetes, step: Callable[[], Step], capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
        start(kubernetes, job, "loading")
        kubernetes.pods[f"{name}-node-0-1-x"]["status"]["containerStatuses"] = [{"name": "node", "state": ended}]
        kubernetes.end(name, "Failed", "a job has failed", "JobsFailed")

    kubernetes.on_create = lambda job: in_background(lambda: fails(job))
    with pytest.raises(SkdError) as caught:
        step().run()
    (name,) = kubernetes.jobs
    assert f"{name}: the TrainJob has failed: a job has failed (JobsFailed); {name}-node-0-1-x" in str(caught.value)
    assert "OOMKilled, exit code 137" in str(caught.value)
    assert capsys.readouterr().out == "loading\n"
    completes(kubernetes)
    step().run()
    assert [request.split()[0] for request in kubernetes.requests if "POST" in request or "DELETE" in request] == [
        "POST",
        "DELETE",
        "POST",
        "DELETE",
    ]


def test_a_retry_waits_for_the_earlier_jobs_pods(kubernetes: FakeKubernetes, step: Callable[[], Step]) -> None:
    """They have the host names of the new one's."""
    kubernetes.pod_seconds = 0.3
    names: list[list[str]] = []

    def fails(job: dict[str, Any]) -> None:
        names.append(list(kubernetes.pods_of(job["metadata"]["name"])))
        in_background(lambda: kubernetes.end(start(kubernetes, job), "Failed"))

    kubernetes.on_create = fails
    for _ in range(2):
        with pytest.raises(SkdError, match="the TrainJob has failed"):
            step().run()
    assert names == [[], []]
    assert kubernetes.ghosts == []
    # Deleted by the attempt before, whose pods are still there.
    (name,) = kubernetes.jobs
    kubernetes.jobs.clear()
    assert kubernetes.pods_of(name)
    in_background(lambda: [time.sleep(0.3), *map(kubernetes.pods.pop, kubernetes.pods_of(name))])
    completes(kubernetes)
    create, left = kubernetes.on_create, []
    kubernetes.on_create = lambda job: [left.extend(kubernetes.pods_of(name)), create(job)]
    step().run()
    assert left == []


def test_pods_that_never_go_are_an_error_that_names_them(
    kubernetes: FakeKubernetes,
    step: Callable[[], Step],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One on a lost machine is Terminating until a person deletes it: nothing there says that it has ended."""
    monkeypatch.setattr(coordinate, "GONE_SECONDS", 1.0)
    monkeypatch.setattr(coordinate, "_REMIND_SECONDS", 0.5)
    monkeypatch.setattr(coordinate, "_GRACE_SECONDS", 0.2)
    kubernetes.on_create = lambda job: in_background(lambda: kubernetes.end(start(kubernetes, job), "Failed"))
    with pytest.raises(SkdError, match="the TrainJob has failed"):
        step().run()
    (name,) = kubernetes.jobs
    kubernetes.pod_seconds = 60
    pod = kubernetes.pods[f"{name}-node-0-1-x"]
    pod["spec"] |= {"nodeName": "lost-1", "terminationGracePeriodSeconds": 0.5}
    kubernetes.pods.pop(f"{name}-node-0-0-x")
    with caplog.at_level("INFO"), pytest.raises(Transient) as caught:
        step().run()
    assert caught.value.where == name
    assert caught.value.what.endswith(f"still there after 0 minutes: {name}-node-0-1-x on lost-1")
    assert f"kubectl delete pod --force -n team {name}-node-0-1-x`" in caught.value.hint
    words = [record.getMessage() for record in caplog.records if "are gone" in record.getMessage()]
    assert [word.partition(": ")[2] for word in words] == [f"{name}-node-0-1-x on lost-1"] * 3  # at 0, 0.5 and 1 s
    assert sum(request.startswith("POST") for request in kubernetes.requests) == 1
    kubernetes.pods.pop(f"{name}-node-0-1-x")
    completes(kubernetes)
    step().run()


def test_a_job_that_never_goes_is_an_error(
    kubernetes: FakeKubernetes, step: Callable[[], Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinate, "GONE_SECONDS", 0.2)
    with lost_pod("time.sleep"), pytest.raises(ConnectionAbortedError):
        step().run()
    (job,) = kubernetes.jobs.values()
    job["metadata"]["deletionTimestamp"] = job["metadata"]["creationTimestamp"]
    with pytest.raises(Transient, match=r"still being deleted(.|\n)*finalizers"):
        step().run()


def test_how_nodes_ended_is_told_after_their_pods_are_gone(
    kubernetes: FakeKubernetes, step: Callable[[], Step]
) -> None:
    """Trainer's own runtime: containers are started again; when the job fails, its controller deletes their pods."""

    def fails(job: dict[str, Any]) -> None:
        name = start(kubernetes, job)
        kubernetes.pods[f"{name}-node-0-1-x"]["status"]["containerStatuses"] = [
            {
                "name": "node",
                "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off restarting failed container"}},
                "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            }
        ]
        time.sleep(0.3)
        for pod in kubernetes.pods_of(name):
            del kubernetes.pods[pod]
        kubernetes.end(name, "Failed", "jobset failed due to one or more job failures", "FailedJobs")

    kubernetes.on_create = lambda job: in_background(lambda: fails(job))
    with pytest.raises(SkdError) as caught:
        step().run()
    assert caught.value.what.endswith(
        "(FailedJobs); before that: "
        f"{next(iter(kubernetes.jobs))}-node-0-1-x: CrashLoopBackOff: back-off restarting failed container, "
        "OOMKilled, exit code 137"
    )


def test_trainers_own_deadline_has_its_own_hint(kubernetes: FakeKubernetes, step: Callable[[], Step]) -> None:
    """Trainer 2.2: `activeDeadlineSeconds`. It deletes the pods, and leaves the job."""
    kubernetes.on_create = lambda job: in_background(
        lambda: kubernetes.end(start(kubernetes, job), "Failed", "TrainJob exceeded its active deadline", EXCEEDED)
    )
    with pytest.raises(SkdError, match=r"exceeded its active deadline") as caught:
        step().run(timeout_hours=2)
    assert caught.value.hint.startswith("raise multinode.timeout_hours; ")


def test_what_ails_a_node_is_told() -> None:
    pod = {
        "metadata": {"name": "n"},
        "status": {
            "conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/5 nodes"},
                {"type": "Ready", "status": "False", "reason": "ContainersNotReady"},
                {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"},
            ],
            "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}],
        },
    }
    assert coordinate.trouble_of(pod) == "n: Unschedulable: 0/5 nodes, TerminationByKubelet, ImagePullBackOff"
    failed = {
        "metadata": {"name": "n"},
        "status": {"containerStatuses": [{"state": {"terminated": {"exitCode": 137}}}]},
    }
    assert coordinate.trouble_of(failed) == "n: ended, exit code 137"
    log = "loading\nerror: earlier\nerror: 2 problems found:\n- a\n- b\n  hint: correct them\nE1129 torch: failed\n"
    refused = {"terminated": {"exitCode": 2, "reason": "Error", "message": log}}
    failed["status"]["containerStatuses"][0] = {"state": refused}  # type: ignore[index]
    assert coordinate.trouble_of(failed) == "n: Error, exit code 2: error: 2 problems found: - a - b"
    assert coordinate.trouble_of({"metadata": {"name": "n"}, "status": {"phase": "Running"}}) == ""


def test_the_api_may_be_away_for_a_while(
    kubernetes: FakeKubernetes, step: Callable[[], Step], caplog: pytest.LogCaptureFixture
) -> None:
    def kubelet(job: dict[str, Any]) -> None:
        kubernetes.away_until = time.monotonic() + 1.2
        in_background(lambda: work(kubernetes, job))

    kubernetes.on_create = kubelet
    with caplog.at_level("INFO"):
        step().run()
    assert "Kubernetes does not answer" in caplog.text
    assert "Kubernetes answers again" in caplog.text


def test_an_api_that_stays_away_is_an_error_that_says_so(kubernetes: FakeKubernetes) -> None:
    cluster = Cluster.connect()
    cluster.patience = 1.0
    kubernetes.away_until = time.monotonic() + 60
    with pytest.raises(SkdError, match=r"has not answered for 1 s: 503(.|\n)*goes on without it"):
        cluster.job("x")
    with socket.socket() as taken:  # bound, without a listener
        taken.bind(("127.0.0.1", 0))
        settings = Configuration(host=f"http://127.0.0.1:{taken.getsockname()[1]}")
        settings.retries = 0
        gone = Cluster("team", ApiClient(settings), patience=1.0)
        with pytest.raises(SkdError, match=r"has not answered for 1 s(.|\n)*refused"):
            gone.job("x")


def test_missing_rights_name_the_role(kubernetes: FakeKubernetes, step: Callable[[], Step]) -> None:
    kubernetes.refused["POST"] = [403]
    with pytest.raises(SkdError, match=r"create trainjob(.|\n)*forbidden(.|\n)*pipelines/deploy/multinode"):
        step().run()
    kubernetes.refused["GET"] = [401]
    with pytest.raises(SkdError, match="not allowed"):
        step().run()


@pytest.mark.parametrize(
    "message",
    [
        'trainjobs "x" is forbidden: exceeded quota: gpus',
        'namespaces "team" is forbidden: unable to create new content because it is being terminated',
        'admission webhook "policy" denied the request: user "a" cannot have that many',
    ],
)
def test_other_refusals_are_not_missing_rights(
    kubernetes: FakeKubernetes, step: Callable[[], Step], message: str
) -> None:
    kubernetes.refused["POST"], kubernetes.messages = [403], {403: message}
    with pytest.raises(SkdError) as caught:
        step().run()
    assert caught.value.what == f"Kubernetes refuses: {message}"
    assert "role" not in caught.value.hint


def test_a_runtime_that_is_not_there_is_told(kubernetes: FakeKubernetes, step: Callable[[], Step]) -> None:
    kubernetes.runtimes.clear()
    with pytest.raises(SkdError) as caught:
        step().run()
    assert 'TrainingRuntime.trainer.kubeflow.org "skd-torch" not found' in caught.value.what
    assert "kubectl apply -n NAMESPACE -k pipelines/deploy/multinode" in caught.value.hint
    assert "not allowed" not in str(caught.value)


@pytest.mark.parametrize(("status", "message"), [(404, "has no TrainJobs"), (400, "trainer_version")])
def test_a_cluster_without_this_trainer_is_told(
    kubernetes: FakeKubernetes, step: Callable[[], Step], status: int, message: str
) -> None:
    kubernetes.refused["POST"] = [status]
    with pytest.raises(SkdError, match=message):
        step().run()


def test_two_attempts_at_once_share_a_job(kubernetes: FakeKubernetes, step: Callable[[], Step]) -> None:
    """Another one makes the job between this one's look and its request; so does an answer that got lost."""
    create = kubernetes.create

    def created_by_both(job: dict[str, Any]) -> bool:
        assert create(json.loads(json.dumps(job)))
        return create(job)

    kubernetes.create = created_by_both  # type: ignore[method-assign]
    completes(kubernetes)
    step().run()


def test_a_job_that_takes_too_long_is_deleted(kubernetes: FakeKubernetes, step: Callable[[], Step]) -> None:
    kubernetes.on_create = lambda job: job["metadata"].update(creationTimestamp="2026-01-01T00:00:00Z")
    with pytest.raises(SkdError, match=r"longer than 1\.5 hours"):
        step().run(timeout_hours=1.5)
    assert kubernetes.jobs == {}


def test_a_job_that_somebody_deletes_fails_the_step(kubernetes: FakeKubernetes, step: Callable[[], Step]) -> None:
    def kubelet(job: dict[str, Any]) -> None:
        in_background(lambda: [time.sleep(0.2), kubernetes.delete(job["metadata"]["name"])])

    kubernetes.on_create = kubelet
    with pytest.raises(SkdError, match="the TrainJob has been deleted"):
        step().run()
    for follower in [thread for thread in threading.enumerate() if isinstance(thread, LogFollower)]:
        follower.join(30)
        assert not follower.is_alive(), "the log is still followed after the step has failed"


def test_places_that_nodes_cannot_reach_are_refused(step: Callable[[], Step], tmp_path: Path) -> None:
    attempt = step()
    with pytest.raises(SkdError, match=r"input student is at /(.|\n)*--pipeline-root"):
        train_on_nodes(attempt.work, MultinodeConfig(nodes=2), StepIO({}))
    local = Step(tmp_path / "local", str(tmp_path))
    with pytest.raises(SkdError, match="checkpoint_root is at /"):
        local.run()


def test_without_a_cluster_it_says_so(step: Callable[[], Step], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    with pytest.raises(SkdError, match=r"needs a Kubernetes cluster(.|\n)*skd submit"):
        step().run()
    monkeypatch.delenv("KFP_RUN_ID")
    with pytest.raises(SkdError, match="KFP_RUN_ID"):
        step().run()


def test_a_log_that_is_cut_off_goes_on_without_repetition(
    kubernetes: FakeKubernetes, step: Callable[[], Step], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"line {number}" for number in range(20)]
    # Cut within the first line, after some, and in the middle of one.
    kubernetes.cut_logs = [10, 3 * 38, 200]
    completes(kubernetes, *lines[:10], *lines[10:])
    step().run()
    assert capsys.readouterr().out.splitlines() == lines
    assert len(kubernetes.sinces) >= 4
    assert kubernetes.sinces[0] is None
    assert kubernetes.sinces[-1] in (60, 61, 62, 63, 64)


def test_a_node_that_was_replaced_is_followed_too(
    kubernetes: FakeKubernetes, step: Callable[[], Step], capsys: pytest.CaptureFixture[str]
) -> None:
    def kubelet(job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        first = kubernetes.add_node(name, 0)
        kubernetes.write(first, "a", "b")
        time.sleep(0.3)
        kubernetes.pods[first]["status"]["phase"] = "Failed"
        time.sleep(0.1)
        kubernetes.write(kubernetes.add_node(name, 0, suffix="y"), "c")
        time.sleep(0.3)
        publish(job)
        kubernetes.end(name)

    kubernetes.on_create = lambda job: in_background(lambda: kubelet(job))
    step().run()
    assert capsys.readouterr().out.splitlines() == ["a", "b", "c"]


def test_lines_of_one_moment_are_told_apart() -> None:
    unseen = Unseen()
    log = [
        "2026-01-01T00:00:01Z a",
        "2026-01-01T00:00:01.5Z b",
        "2026-01-01T00:00:01.5Z b",
        "2026-01-01T00:00:01.50000001Z c",
    ]
    seen = []
    for length in range(len(log) + 1):
        unseen.restart()
        seen += [line for each in log[:length] if (line := unseen.new(each)) is not None]
    assert seen == ["a", "b", "b", "c"]
    assert unseen.new("2026-01-01T00:00:02+01:00 ") == ""


def test_characters_may_be_cut_anywhere() -> None:
    text = "é\nzwei\n\nüü\nrest".encode()
    assert list(whole_lines(text[i : i + 1] for i in range(len(text)))) == ["é", "zwei", "", "üü", "rest"]


def test_of_several_processes_in_the_steps_pod_one_asks(
    kubernetes: FakeKubernetes, step: Callable[[], Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    attempt = step()
    train_on_nodes(attempt.work, MultinodeConfig(nodes=2), StepIO({}))
    assert kubernetes.jobs == {}
    assert not (attempt.folder / "output.json").exists()
