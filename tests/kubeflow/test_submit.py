"""Submitting: against a server that speaks the real REST schema, with everything that goes wrong on the way to one."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from pipelines.compiling import compiled_path
from pipelines.graph import read_steps
from pipelines.progress import PlainDisplay
from pipelines.submitting.api import KubeflowPipelines, Unsettled
from pipelines.submitting.credentials import Anonymous, Auth, Secret, find_credentials
from pipelines.submitting.follow import follow
from pipelines.submitting.submit import Package, Place, Submission, with_seconds
from skd_lib.cli import app
from skd_lib.config import RunConfig
from skd_lib.errors import SkdError, SkdErrors
from tests.kubeflow.conftest import DEMO
from tests.kubeflow.fake_kfp import ROOT, FakeKfp, Fault, running, task

RUNS = f"{ROOT}/runs"
PACKAGE = Package.read()


@pytest.fixture
def submission(demo: RunConfig) -> Submission:
    return Submission.plan(demo, PACKAGE, Place(), name="a-run")


def skd(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_run_is_made_with_its_pipeline_and_parameters(kfp: FakeKfp, demo: RunConfig):
    done = skd(
        "submit", DEMO, "--host", kfp.host, "--tracking-uri", "http://mlflow:5000", "--experiment", "e",
        "--pipeline-root", "gs://b/root", "--service-account", "runner", "--ui-host", "https://ui/pipeline/",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (run,) = kfp.runs
    assert re.fullmatch(rf"{demo.name}-\d{{8}}-\d{{6}}", run["display_name"])
    assert f"https://ui/pipeline/#/runs/details/{run['run_id']}\n" in done.output
    assert run["service_account"] == "runner"
    assert run["runtime_config"]["pipeline_root"] == "gs://b/root"
    assert run["runtime_config"]["parameters"]["tracking_uri"] == "http://mlflow:5000"
    assert run["runtime_config"]["parameters"]["teacher"] == demo.teacher
    assert kfp.experiments[0]["display_name"] == "e"
    (version,) = kfp.versions
    assert version["pipeline_spec"]["pipeline_spec"] == PACKAGE.documents[0]
    assert version["description"] == f"sha256:{PACKAGE.digest}"
    # Caching is the pipeline's own business: a setting at submission would override all its steps.
    assert "pipeline_spec" not in run


def test_the_same_pipeline_is_uploaded_once(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission):
    for _ in range(2):
        api.create_run(submission.prepare(api))
    assert len(kfp.runs) == 2
    assert len(kfp.versions) == len(kfp.pipelines) == len(kfp.experiments) == 1


def test_a_versions_name_follows_its_content_alone(tmp_path: Path):
    text = compiled_path().read_text(encoding="utf-8")
    same, other = tmp_path / "same.yaml", tmp_path / "other.yaml"
    same.write_text("# other comment\n" + re.sub(r"sdkVersion: .*", "sdkVersion: kfp-9", text), encoding="utf-8")
    other.write_text(text.replace("skd_lib.steps.gate", "skd_lib.steps.grate"), encoding="utf-8")
    assert Package.read(same).version == PACKAGE.version == f"skd-distillation-{PACKAGE.digest[:12]}"
    assert Package.read(other).version != PACKAGE.version


def test_twenty_at_a_time_share_one_pipeline(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission):
    in_parallel(20, lambda: api.create_run(submission.prepare(api)))
    assert len(kfp.versions) == len(kfp.pipelines) == len(kfp.experiments) == 1
    assert len({run["run_id"] for run in kfp.runs}) == 20


@pytest.mark.parametrize("status", [503, 429, 0])
def test_reading_is_repeated(kfp: FakeKfp, api: KubeflowPipelines, status: int):
    kfp.faults = [Fault("GET", f"{ROOT}/experiments", status)] * 3
    assert api.find_experiment("none") is None
    assert kfp.asked("GET", f"{ROOT}/experiments") == 4


def test_a_server_that_stays_away_is_named(kfp: FakeKfp, api: KubeflowPipelines):
    kfp.faults = [Fault("GET", f"{ROOT}/experiments", 503)] * 20
    with pytest.raises(SkdError, match=r"the server fails \(HTTP 503\): upstream error") as caught:
        api.find_experiment("none")
    assert caught.value.where == kfp.host
    away = KubeflowPipelines("http://127.0.0.1:9", Anonymous(), backoff=0.001)
    with pytest.raises(SkdError, match="cannot be reached"):
        away.find_experiment("none")


def test_nobody_there_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.submitting.api.KNOCKS", (0.0, 0.01))
    done = skd("submit", DEMO, "--host", "http://127.0.0.1:9")
    assert "asking       http://127.0.0.1:9" in done.output
    assert str(done.exception).startswith("http://127.0.0.1:9: cannot be reached: Connection refused")


ODD = (b"{}", b"[1, 2]", b"null", b'{"experiments": 5}', b'{"experiments": [null]}', b'{"experiments": [{}]}', b"{{{")
ODD += (b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"experiments": [{"experiment_id": "1", "created_at": "x"}]}')


@pytest.mark.parametrize("answer", ODD)
def test_an_odd_answer_is_a_sentence(answer: bytes):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            del args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        api = KubeflowPipelines(f"http://127.0.0.1:{server.server_port}", Anonymous(), backoff=0.001)
        with pytest.raises(SkdError, match="the answer is not one of Kubeflow Pipelines") as caught:
            api.experiment("e")
        with pytest.raises(SkdError, match="the answer is not one of Kubeflow Pipelines"):
            api.run("a-run")
        server.shutdown()
    assert caught.value.where == api.host
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("after", [False, True], ids=["request lost", "answer lost"])
@pytest.mark.parametrize("status", [504, 0])
@pytest.mark.parametrize("path", ["experiments", "pipelines", "pipelines/upload_version", "runs"])
def test_what_is_created_is_created_once(
    kfp: FakeKfp, api: KubeflowPipelines, submission: Submission, path: str, status: int, after: bool
):
    kfp.faults = [Fault("POST", f"{ROOT}/{path}", status, after)]
    run = api.create_run(submission.prepare(api))
    assert not kfp.faults
    assert [made["run_id"] for made in kfp.runs] == [run.run_id]
    assert len(kfp.versions) == len(kfp.pipelines) == len(kfp.experiments) == 1


def test_a_run_of_the_same_name_is_not_taken_for_ours(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission):
    api.create_run(submission.prepare(api))
    kfp.faults = [Fault("POST", RUNS, 503)]
    api.create_run(submission.prepare(api))
    assert len(kfp.runs) == 2


def test_it_is_said_when_a_run_may_have_been_made(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission):
    run = submission.prepare(api)
    kfp.faults = [Fault("POST", RUNS, 504)] * 9
    with pytest.raises(Unsettled, match="look in Kubeflow whether it was done after all"):
        api.create_run(run)
    assert not kfp.runs
    asked = kfp.asked("POST", RUNS)
    with pytest.raises(SkdError, match="too late"):
        api.create_run(run, before=0.0)
    assert kfp.asked("POST", RUNS) == asked


def test_all_pages_are_read(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission):
    kfp.page_size = 2
    run = submission.prepare(api)
    made = [api.create_run(run).run_id for _ in range(5)]
    assert [found.run_id for found in api.runs_named("a-run", run.experiment_id)] == made


def test_a_profile_is_named_in_a_multi_user_installation(submission: Submission):
    with running(FakeKfp(multi_user=True)) as kfp:
        api = KubeflowPipelines(kfp.host, Anonymous(), namespace="team")
        api.create_run(submission.prepare(api))
        assert kfp.experiments[0]["namespace"] == kfp.pipelines[0]["namespace"] == "team"
        with pytest.raises(SkdError, match=r"HTTP 400\): a namespace is required"):
            KubeflowPipelines(kfp.host, Anonymous()).find_experiment("skd")


# --- credentials --------------------------------------------------------------------------------------------------


def test_a_token_that_expires_is_read_again(kfp: FakeKfp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "token"
    file.write_text("old\n", encoding="utf-8")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(file))
    kfp.tokens = {"old"}
    api = KubeflowPipelines(kfp.host, find_credentials(Auth.AUTO, kfp.host))
    assert api.find_experiment("none") is None
    kfp.tokens = {"new"}
    asked = len(kfp.requests)

    class Rotating(Secret):
        def headers(self, *, renew: bool = False) -> dict[str, str]:
            if renew:
                file.write_text("new", encoding="utf-8")
            return super().headers(renew=renew)

    api = KubeflowPipelines(kfp.host, Rotating(lambda: file.read_text(encoding="utf-8").strip()))
    api.experiment("e")
    statuses = [headers["Authorization"] for _, _, headers in kfp.requests[asked:]]
    assert statuses == ["Bearer old", "Bearer new", "Bearer new"]


def test_a_refused_token_is_said_and_not_shown(kfp: FakeKfp, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setenv("SKD_KFP_TOKEN", "s3cret")
    kfp.tokens = {"another"}
    with caplog.at_level(logging.DEBUG):
        done = skd("submit", DEMO, "--host", kfp.host, "--auth", "id-token")
    assert isinstance(done.exception, SkdError)
    assert "does not accept our credentials: token expired" in str(done.exception)
    assert "renew the token" in done.exception.hint
    assert len(kfp.requests) == 2
    assert "s3cret" not in caplog.text + done.output + str(done.exception)


def test_a_session_that_has_ended_is_not_an_empty_list(kfp: FakeKfp, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SKD_KFP_COOKIE", "authservice_session=abc")
    kfp.cookies = {"authservice_session=abc"}
    api = KubeflowPipelines(kfp.host, find_credentials(Auth.AUTO, kfp.host))
    assert api.find_experiment("none") is None
    kfp.cookies = {"authservice_session=new"}
    with pytest.raises(SkdError, match="does not accept our credentials: redirected to a login page"):
        api.find_experiment("none")
    # Some proxies answer with the page itself.
    page = KubeflowPipelines(f"{kfp.host}/dex/auth?", Anonymous())
    with pytest.raises(SkdError, match="the answer is a web page"):
        page.find_experiment("none")


def test_credentials_are_looked_for_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    host = "https://kubeflow.example.com"
    assert find_credentials(Auth.AUTO, host).headers() == {}
    monkeypatch.setenv("SKD_KFP_COOKIE", "name=value")
    assert find_credentials(Auth.AUTO, host).headers() == {"Cookie": "name=value"}
    monkeypatch.setenv("SKD_KFP_TOKEN_FILE", str(tmp_path / "id-token"))
    (tmp_path / "id-token").write_text("id", encoding="utf-8")
    assert find_credentials(Auth.AUTO, host).headers() == {"Authorization": "Bearer id"}
    (tmp_path / "no-token").write_text("sa", encoding="utf-8")
    assert find_credentials(Auth.AUTO, host).headers() == {"Authorization": "Bearer sa"}
    assert find_credentials(Auth.NONE, host).headers() == {}


def test_an_id_token_is_made_for_the_audience_and_renewed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A real service account's key, and a token endpoint that counts."""
    from tests.kubeflow.google import Issuer

    with Issuer() as issuer:
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(issuer.write_key(tmp_path / "key.json")))
        credentials = find_credentials(Auth.AUTO, "https://iap.example.com", audience="client.apps")
        first = credentials.headers()
        assert credentials.headers() == first
        assert issuer.claims(first["Authorization"].removeprefix("Bearer "))["aud"] == "client.apps"
        assert credentials.headers(renew=True) != first
        assert issuer.issued == 2


@pytest.mark.parametrize(
    ("auth", "host", "message"),
    [
        (Auth.ID_TOKEN, "https://h", "SKD_KFP_TOKEN: there are no credentials"),
        (Auth.COOKIE, "https://h", "SKD_KFP_COOKIE: there are no credentials"),
        (Auth.COOKIE, "http://kubeflow.example.com", "would go unencrypted"),
        (Auth.IN_CLUSTER, "http://ml-pipeline.kubeflow:8888", "cannot read the credentials"),
    ],
)
def test_missing_credentials_are_told(auth: Auth, host: str, message: str):
    with pytest.raises(SkdError, match=message):
        find_credentials(auth, host).headers()


# --- following ----------------------------------------------------------------------------------------------------


def test_a_run_is_followed_to_its_end(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission, capsys: Any):
    kfp.course = [
        {"state": "PENDING"},
        {"state": "RUNNING", "run_details": {"task_details": [task("root-driver", "SUCCEEDED")]}},
        {"state": "RUNNING", "run_details": {"task_details": [task("preflight", "RUNNING")]}},
        {
            "state": "SUCCEEDED",
            "run_details": {
                "task_details": [
                    task("preflight", "SUCCEEDED"),
                    task("prepare-data", "SKIPPED"),
                    task("evaluate-2", "SUCCEEDED", 125),
                ]
            },
        },
    ]
    run = api.create_run(submission.prepare(api))
    steps = read_steps(PACKAGE.documents[0])
    kfp.faults = [Fault("GET", f"{RUNS}/.*", 502)]
    assert follow(api, run.run_id, steps, PlainDisplay(Console(), 3), poll=0.01).state == "SUCCEEDED"
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] preflight ...",
        "[1/3] preflight: done in 1 min 00 s",
        "[2/3] prepare_data: unchanged, reused (took 1 min 00 s)",
        "[3/3] evaluate-teacher ...",
        "[3/3] evaluate-teacher: done in 2 min 05 s",
    ]


@pytest.mark.parametrize("state", ["FAILED", "CANCELED"])
def test_waiting_returns_the_runs_result(kfp: FakeKfp, state: str):
    details = task("distill", state, error={"message": "exit code 2"}, child_tasks=[{"pod_name": "skd-1"}])
    kfp.course = [{"state": state, "error": {"message": "why"}, "run_details": {"task_details": [details]}}]
    done = skd("submit", DEMO, "--host", kfp.host, "--wait")
    assert done.exit_code == 1
    assert f"error: the run ended as {state}: why\n- distill (pod skd-1): exit code 2\n" in done.output
    kfp.course = [{"state": "SUCCEEDED"}]
    done = skd("submit", DEMO, "--host", kfp.host, "--wait")
    assert done.exit_code == 0
    assert "the run succeeded" in done.output


# --- recurring runs, plans and errors -----------------------------------------------------------------------------


def test_a_recurring_run_is_made_once(kfp: FakeKfp, demo: RunConfig):
    for _ in range(2):
        done = skd("submit", DEMO, "--host", kfp.host, "--recurring", "30 3 * * 1")
        assert done.exit_code == 0, done.output
    (made,) = kfp.recurring_runs
    assert f"{kfp.host}/#/recurringrun/details/{made['recurring_run_id']}\n" in done.output
    assert made["display_name"] == demo.name
    assert made["trigger"] == {"cron_schedule": {"cron": "0 30 3 * * 1"}}
    assert (made["mode"], made["max_concurrency"], made["no_catchup"]) == ("ENABLE", "1", True)
    done = skd("submit", DEMO, "--host", kfp.host, "--recurring", "0 4 * * *")
    assert "differs in its schedule" in str(done.exception)
    assert len(kfp.recurring_runs) == 1
    assert not kfp.runs


def test_a_schedule_has_five_fields_or_six():
    assert with_seconds("0 3 * * *") == "0 0 3 * * *"
    assert with_seconds("5 0 3 * * *") == "5 0 3 * * *"
    assert with_seconds("*/15 0-6,22 1,15 jan-MAR mon-5") == "0 */15 0-6,22 1,15 jan-MAR mon-5"
    for cron, message in {
        "@daily": "not 1",
        "99 99 99 99 99": "`99` is no minute",
        "60 * * * *": "`60` is no minute",
        "0 24 * * *": "`24` is no hour",
        "0 0 0 * *": "`0` is no day of the month",
        "0 0 * 13 *": "`13` is no month",
        "0 0 * * 7": "`7` is no day of the week",
        "*/0 * * * *": r"`\*/0` is no minute",
        "5-1 * * * *": "`5-1` is no minute",
        "1-2-3 * * * *": "is no minute",
        "x * * * *": "`x` is no minute",
        "1, * * * *": "`1,` is no minute",
        "² * * * *": "`²` is no minute",
        "61 0 3 * * *": "`61` is no second",
    }.items():
        with pytest.raises(SkdError, match=message):
            with_seconds(cron)


def test_a_dry_run_asks_nobody(kfp: FakeKfp):
    done = skd("submit", DEMO, "--host", kfp.host, "--dry-run")
    assert done.exit_code == 0
    assert f"skd-distillation, version {PACKAGE.version}" in done.output
    assert not kfp.requests


def test_what_could_not_work_is_told_before(demo: RunConfig, config_file: Path, tmp_path: Path):
    values = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    values["data"]["source"]["train"] = ["data/train.jsonl", "/mnt/train.jsonl", "gs://b/train.jsonl"]
    config = RunConfig.model_validate(values)
    with pytest.raises(SkdErrors, match=r"1 problem found:\n- data/train.jsonl: the cluster cannot read"):
        Submission.plan(config, PACKAGE, Place())
    documents = yaml.safe_load(yaml.safe_dump(PACKAGE.documents))
    del documents[0]["root"]["inputDefinitions"]["parameters"]["gamma"]
    with pytest.raises(SkdErrors, match="the pipeline has no parameter `gamma`"):
        Submission.plan(demo, Package(tmp_path / "old.yaml", documents, "0"), Place())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--host: no URL of Kubeflow Pipelines"),
        (["--host", "kubeflow.example.com"], "kubeflow.example.com: not a URL"),
        (["--host", "http://"], "http://: not a URL"),
        (["--host", "http://h:99999"], "http://h:99999: not a URL"),
        (["--host", "http://h:x"], "http://h:x: not a URL"),
        (["--name", " "], "--name: must not be blank"),
        (["--experiment", "a\nb"], "--experiment: must be one line"),
        (["--host", "http://h", "--wait", "--recurring", "0 3 * * *"], "a recurring run has no end"),
        (["--pipeline", str(DEMO)], "not a compiled pipeline"),
        (["--pipeline", "missing.yaml"], "there is no compiled pipeline"),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], message: str):
    done = skd("submit", DEMO, *arguments)
    assert isinstance(done.exception, SkdError)
    assert message in str(done.exception)


def test_every_step_is_known_by_its_tasks_name():
    """The API tells of tasks by their keys in the pipeline; those are the components' by which we know the steps."""
    spec = PACKAGE.documents[0]
    dags = [spec["root"], *(component for component in spec["components"].values() if "dag" in component)]
    keys = {
        key
        for dag in dags
        for key, each in dag["dag"]["tasks"].items()
        if "executorLabel" in spec["components"][each["componentRef"]["name"]]
    }
    assert {step.component for step in read_steps(spec)} == keys


def in_parallel(count: int, do: Callable[[], Any]) -> list[Any]:
    """Do it `count` times at once; the results, in any order."""
    start, results, threads = threading.Barrier(count), [], []

    def work() -> None:
        start.wait()
        results.append(do())

    for _ in range(count):
        threads.append(threading.Thread(target=work))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(results) == count
    return results
