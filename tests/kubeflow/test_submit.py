"""Submitting: against a server that speaks the real REST schema, with everything that goes wrong on the way to one."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from skd_kfp.components.images import TRAIN
from skd_kfp.pipelines.cli import app
from skd_kfp.pipelines.compiling import compiled_path
from skd_kfp.pipelines.kubeflow.api import KubeflowPipelines, Unsettled
from skd_kfp.pipelines.kubeflow.auth import Auth, anonymous, find_credentials
from skd_kfp.pipelines.kubeflow.checks import with_seconds
from skd_kfp.pipelines.kubeflow.submit import Package, Submission, Target
from skd_lib import __version__
from skd_lib.config import RunConfig, load_config
from skd_lib.errors import SkdError, SkdErrors
from tests.kubeflow import small
from tests.kubeflow.conftest import DEMO
from tests.kubeflow.fake_kfp import ROOT, FakeKfp, Fault, running
from tests.support import http

RUNS = f"{ROOT}/runs"


@pytest.fixture
def package() -> Package:
    return small.package()


@pytest.fixture
def submission(demo: RunConfig, package: Package) -> Submission:
    return Submission.plan(demo, package, Target(), name="a-run")


@pytest.fixture
def skd_plan(demo: RunConfig, package: Package) -> Callable[..., Submission]:
    def plan(config: RunConfig = demo, package: Package = package) -> Submission:
        return Submission.plan(config, package, Target(), name="a-run")

    return plan


def skd(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def submit(kfp: FakeKfp, *arguments: str | Path) -> Any:
    return skd("submit", DEMO, "--host", kfp.host, "--pipeline", small.package().path, *arguments)


def test_a_run_is_made_with_its_pipeline_and_parameters(kfp: FakeKfp, demo: RunConfig, package: Package):
    done = submit(
        kfp, "--experiment", "e", "--mlflow-experiment", "m", "--settings", "team-settings", "--no-reuse",
        "--pipeline-root", "gs://b/root", "--service-account", "runner", "--ui-host", "https://ui/pipeline/",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (run,) = kfp.runs
    assert re.fullmatch(rf"{demo.name}-\d{{8}}-\d{{6}}", run["display_name"])
    assert f"https://ui/pipeline/#/runs/details/{run['run_id']}\n" in done.output
    assert run["service_account"] == "runner"
    assert run["runtime_config"]["pipeline_root"] == "gs://b/root"
    parameters = run["runtime_config"]["parameters"]
    assert (parameters["mlflow_experiment"], parameters["settings"], parameters["reuse"]) == (
        "m",
        "team-settings",
        False,
    )
    assert kfp.experiments[0]["display_name"] == "e"
    (version,) = kfp.versions
    assert version["pipeline_spec"]["pipeline_spec"] == package.documents[0]
    assert version["description"] == f"sha256:{package.digest}"
    # Caching is the pipeline's own business: a setting at submission would override all its steps.
    assert "pipeline_spec" not in run


def test_every_image_is_told(skd_plan: Callable[..., Submission], tmp_path: Path, package: Package):
    other = tmp_path / "other.yaml"
    text = package.path.read_text(encoding="utf-8")
    other.write_text(text.replace(f"image: {small.IMAGE}", "image: r/other:1", 1), encoding="utf-8")
    told = skd_plan(package=Package.read(other)).describe()["images"].split(", ")
    assert sorted(told) == [small.IMAGE, "r/other:1 (no digest: is it in your registry? see `skd compile --image`)"]


@pytest.mark.skipif("@" in TRAIN, reason="this is a release")
def test_a_tree_that_is_no_release_says_how_to_come_to_an_image(skd_plan: Callable[..., Submission]):
    told = skd_plan(package=Package.read()).describe()["images"]
    assert told.startswith(f"{TRAIN} (no digest, since this is no release: build and push an image, then `skd")


def test_comet_needs_a_step_where_it_decides(skd_plan: Callable[..., Submission], demo: RunConfig):
    def asking(*metrics: str) -> RunConfig:
        return demo.model_copy(update={"task": demo.task.model_copy(update={"metrics": list(metrics)})})

    with pytest.raises(SkdErrors, match=r"task\.metrics: COMET is to decide, and this pipeline has no step for it"):
        skd_plan(asking("comet", "chrf"))
    assert "skd compile --pipeline distillation_comet" in skd_plan(asking("chrf", "comet")).notices["COMET"]
    assert "COMET" not in skd_plan(asking("chrf")).notices


def test_a_description_fits_and_its_word_is_in_it(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission):
    run = submission.prepare(api, "skd trigger gs://bücket/" + "x" * 300)
    assert len(run.description) <= 255
    assert re.search(r"submission [0-9a-f]{32};", run.description)
    assert run.description.isascii()


def test_the_same_pipeline_is_uploaded_once(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission):
    for _ in range(2):
        submission.start(api, submission.prepare(api))
    assert len(kfp.runs) == 2
    assert len(kfp.versions) == len(kfp.pipelines) == len(kfp.experiments) == 1


def test_a_versions_name_says_what_it_is(tmp_path: Path, package: Package):
    text = package.path.read_text(encoding="utf-8")
    same, other = tmp_path / "same.yaml", tmp_path / "other.yaml"
    same.write_text("# other comment\n" + re.sub(r"sdkVersion: .*", "sdkVersion: kfp-9", text), encoding="utf-8")
    other.write_text(text.replace("skd_lib.steps.finish", "skd_lib.steps.finale"), encoding="utf-8")
    assert Package.read(same).version == package.version == f"{__version__}-tiny-{package.digest[:12]}"
    assert Package.read(other).version != package.version
    without = text.replace(" Profile tiny.", "")
    other.write_text(without, encoding="utf-8")
    assert re.fullmatch(rf"{re.escape(__version__)}-[0-9a-f]{{12}}", Package.read(other).version)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.17.0", ""),
        ("2.15.0", ""),
        ("2.18.0-rc.1", "note: the server is Kubeflow Pipelines 2.18.0, newer than 2.17.0, the newest that was tried"),
        ("unknown", "note: the server does not say its version: 2.15.0 or newer is needed"),
    ],
)
def test_the_servers_version_is_looked_at(kfp: FakeKfp, version: str, said: str):
    kfp.version = version
    done = submit(kfp)
    assert done.exit_code == 0, done.output
    assert said in done.output
    assert said or "note:" not in done.output


def test_a_server_that_is_too_old_gets_nothing(kfp: FakeKfp):
    kfp.version = "2.14.4"
    done = submit(kfp)
    assert "the server is Kubeflow Pipelines 2.14.4: 2.15.0 or newer is needed" in str(done.exception)
    assert not [method for method, _, _ in kfp.requests if method != "GET"]


def test_twenty_at_a_time_share_one_pipeline(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission):
    in_parallel(20, lambda: submission.start(api, submission.prepare(api)))
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
    away = KubeflowPipelines("http://127.0.0.1:9", anonymous, backoff=0.001)
    with pytest.raises(SkdError, match="cannot be reached"):
        away.find_experiment("none")


def test_nobody_there_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("skd_kfp.pipelines.kubeflow.api.KNOCKS", (0.0, 0.01))
    done = skd("submit", DEMO, "--host", "http://127.0.0.1:9", "--pipeline", small.package().path)
    assert "asking       http://127.0.0.1:9" in done.output
    assert str(done.exception).startswith("http://127.0.0.1:9: cannot be reached: Connection refused")


ODD = (b"{}", b"[1, 2]", b"null", b'{"experiments": 5}', b'{"experiments": [null]}', b'{"experiments": [{}]}', b"{{{")
ODD += (b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"experiments": [{"experiment_id": "1", "created_at": "x"}]}')


@pytest.mark.parametrize("answer", ODD)
def test_an_odd_answer_is_a_sentence(answer: bytes):
    class Handler(http.Handler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

    with http.Server(Handler) as server:
        api = KubeflowPipelines(server.url, anonymous, backoff=0.001)
        with pytest.raises(SkdError, match="the answer is not one of Kubeflow Pipelines") as caught:
            api.experiment("e")
        with pytest.raises(SkdError, match="the answer is not one of Kubeflow Pipelines"):
            api.run("a-run")
    assert caught.value.where == api.host
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("after", [False, True], ids=["request lost", "answer lost"])
@pytest.mark.parametrize("status", [504, 0])
@pytest.mark.parametrize("path", ["experiments", "pipelines", "pipelines/upload_version"])
def test_what_has_a_name_of_its_own_is_created_once(
    kfp: FakeKfp, api: KubeflowPipelines, submission: Submission, path: str, status: int, after: bool
):
    kfp.faults = [Fault("POST", f"{ROOT}/{path}", status, after)]
    run = submission.start(api, submission.prepare(api))
    assert not kfp.faults
    assert [made["run_id"] for made in kfp.runs] == [run.run_id]
    assert len(kfp.versions) == len(kfp.pipelines) == len(kfp.experiments) == 1


@pytest.mark.parametrize("status", [500, 503, 504, 0])
def test_a_run_whose_answer_was_lost_is_found(
    kfp: FakeKfp, api: KubeflowPipelines, submission: Submission, status: int
):
    submission.start(api, submission.prepare(api))  # one of the same name, which is not ours
    kfp.faults = [Fault("POST", RUNS, status, after=True)]
    run = submission.start(api, submission.prepare(api))
    assert kfp.runs[1]["run_id"] == run.run_id
    assert kfp.asked("POST", RUNS) == 2


@pytest.mark.parametrize("status", [500, 502, 503, 504, 599, 0])
def test_the_request_for_a_run_is_never_repeated(
    kfp: FakeKfp, api: KubeflowPipelines, submission: Submission, status: int
):
    """The server makes the Workflow before its own record: each repetition would start one more that no list shows."""
    kfp.faults = [Fault("POST", RUNS, status, orphan=True)] * 4
    with pytest.raises(Unsettled) as caught:
        submission.start(api, submission.prepare(api))
    assert kfp.workflows == ["a-run"]
    assert not kfp.runs
    assert "a run may have started that Kubeflow's page does not show: before you submit again, look for 'a-run'" in (
        caught.value.hint
    )
    assert "kubectl get workflows -n kubeflow -l pipeline/runid" in caught.value.hint


def test_a_schedule_is_never_asked_for_twice(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission):
    kfp.faults = [Fault("POST", f"{ROOT}/recurringruns", 500, orphan=True)] * 4
    with pytest.raises(Unsettled, match="kubectl get scheduledworkflows"):
        submission.schedule(api, "0 3 * * *")
    assert kfp.workflows == ["a-run"]


def test_a_request_that_was_not_taken_is_repeated(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission):
    kfp.faults = [Fault("POST", RUNS, 429)] * 2
    submission.start(api, submission.prepare(api))
    assert kfp.workflows == ["a-run"]
    run = submission.prepare(api)
    asked = kfp.asked("POST", RUNS)
    with pytest.raises(SkdError, match="too late"):
        api.create_run(run, before=0.0)
    assert kfp.asked("POST", RUNS) == asked


def test_a_refusal_is_none(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission):
    kfp.faults = [Fault("POST", RUNS, 400)]
    with pytest.raises(SkdError, match=r"refuses the request \(HTTP 400\)") as caught:
        submission.start(api, submission.prepare(api))
    assert not isinstance(caught.value, Unsettled)


def test_what_the_server_changes_is_said(kfp: FakeKfp):
    kfp.changes = {"settings": "another"}
    done = submit(kfp)
    assert f"run {kfp.runs[0]['run_id']} has started, but the server changed its parameters settings:" in done.output
    done = submit(kfp, "--recurring", "0 3 * * *")
    assert "was made, but the server changed its parameters settings" in str(done.exception)


TEXT = (
    "$$x^2$$ $(HOME) {{x}} {{= 1 + 1 }} {{pod.name}} {{workflow.status}} {{$}} {{$.inputs.parameters['config']}} "
    "[[CurrentTime]] \"d\" 's' \\ back \n ünï 日本 \U0001f600 %s"
)


def test_texts_arrive_as_they_were_written(kfp: FakeKfp, tmp_path: Path):
    values = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    values["task"]["system_prompt"] = TEXT
    file = tmp_path / "texts.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = skd("submit", file, "--host", kfp.host, "--pipeline", small.package().path)
    assert done.exit_code == 0, (done.output, done.exception)
    config = kfp.runs[0]["runtime_config"]["parameters"]["config"]
    assert json.loads(config)["task"]["system_prompt"] == TEXT


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exp+plus", "exp%20x", "exp 50% off", "quote\"s 'n' \\", "Übung 日本", "a&b=c#d"])
def test_an_experiment_is_found_whatever_its_name(kfp: FakeKfp, name: str):
    for _ in range(2):
        done = submit(kfp, "--experiment", name)
        assert done.exit_code == 0, (done.output, done.exception)
    assert [experiment["display_name"] for experiment in kfp.experiments] == [name]


def test_a_name_that_the_database_takes_for_another_is_said(kfp: FakeKfp):
    submit(kfp, "--experiment", "exp+plus")
    done = submit(kfp, "--experiment", "Exp+PLUS")
    assert "note: the server takes the experiment 'exp+plus' for 'Exp+PLUS': it is used" in done.output
    assert len({run["experiment_id"] for run in kfp.runs}) == 1


def test_what_was_renamed_on_the_page_is_found(kfp: FakeKfp):
    submit(kfp)
    kfp.pipelines[0]["display_name"] = "My pipeline"
    kfp.versions[0]["display_name"] = "the good one"
    done = submit(kfp)
    assert done.exit_code == 0, (done.output, done.exception)
    assert len(kfp.versions) == len(kfp.pipelines) == 1


def test_a_run_is_known_by_its_exact_name(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission):
    run = submission.prepare(api)
    api.create_run(run)
    run.display_name = "A-Run"
    api.create_run(run)
    assert [found.display_name for found in api.runs_named("a-run", run.experiment_id)] == ["a-run"]


def test_all_pages_are_read(kfp: FakeKfp, api: KubeflowPipelines, submission: Submission):
    kfp.page_size = 2
    run = submission.prepare(api)
    made = []
    for number in range(5):
        run.description = str(number)
        made.append(api.create_run(run).run_id)
    assert [found.run_id for found in api.runs_named("a-run", run.experiment_id)] == made


def test_a_profile_is_named_in_a_multi_user_installation(submission: Submission):
    with running(FakeKfp(multi_user=True)) as kfp:
        api = KubeflowPipelines(kfp.host, anonymous, namespace="team")
        submission.start(api, submission.prepare(api))
        assert kfp.experiments[0]["namespace"] == kfp.pipelines[0]["namespace"] == "team"
        with pytest.raises(SkdError, match=r"HTTP 400\): a namespace is required"):
            KubeflowPipelines(kfp.host, anonymous).find_experiment("skd")


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

    credentials = find_credentials(Auth.AUTO, kfp.host)

    def rotating(renew: bool) -> dict[str, str]:
        if renew:
            file.write_text("new", encoding="utf-8")
        return credentials(renew)

    api = KubeflowPipelines(kfp.host, rotating)
    api.experiment("e")
    statuses = [headers["Authorization"] for _, _, headers in kfp.requests[asked:]]
    assert statuses == ["Bearer old", "Bearer new", "Bearer new"]


def test_a_refused_token_is_said_and_not_shown(kfp: FakeKfp, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setenv("SKD_KFP_TOKEN", "s3cret")
    kfp.tokens = {"another"}
    with caplog.at_level(logging.DEBUG):
        done = submit(kfp, "--auth", "id-token")
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
    page = KubeflowPipelines(f"{kfp.host}/dex/auth?", anonymous)
    with pytest.raises(SkdError, match="the answer is a web page"):
        page.find_experiment("none")


def test_credentials_are_looked_for_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    host = "https://kubeflow.example.com"
    assert find_credentials(Auth.AUTO, host)(False) == {}
    monkeypatch.setenv("SKD_KFP_COOKIE", "name=value")
    assert find_credentials(Auth.AUTO, host)(False) == {"Cookie": "name=value"}
    monkeypatch.setenv("SKD_KFP_TOKEN_FILE", str(tmp_path / "id-token"))
    (tmp_path / "id-token").write_text("id", encoding="utf-8")
    assert find_credentials(Auth.AUTO, host)(False) == {"Authorization": "Bearer id"}
    (tmp_path / "no-token").write_text("sa", encoding="utf-8")
    assert find_credentials(Auth.AUTO, host)(False) == {"Authorization": "Bearer sa"}
    assert find_credentials(Auth.NONE, host)(False) == {}


def test_an_id_token_is_made_for_the_audience_and_renewed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A real service account's key, and a token endpoint that counts."""
    from tests.kubeflow.google import Issuer

    with Issuer() as issuer:
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(issuer.write_key(tmp_path / "key.json")))
        credentials = find_credentials(Auth.AUTO, "https://iap.example.com", audience="client.apps")
        first = credentials(False)
        assert credentials(False) == first
        assert issuer.claims(first["Authorization"].removeprefix("Bearer "))["aud"] == "client.apps"
        assert credentials(True) != first
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
        find_credentials(auth, host)(False)


# --- recurring runs, plans and errors -----------------------------------------------------------------------------


def test_a_recurring_run_is_made_once(kfp: FakeKfp, demo: RunConfig):
    for _ in range(2):
        done = submit(kfp, "--recurring", "30 3 * * 1")
        assert done.exit_code == 0, done.output
    (made,) = kfp.recurring_runs
    assert f"{kfp.host}/#/recurringrun/details/{made['recurring_run_id']}\n" in done.output
    assert made["display_name"] == demo.name
    assert made["trigger"] == {"cron_schedule": {"cron": "0 30 3 * * 1"}}
    assert (made["mode"], made["max_concurrency"], made["no_catchup"]) == ("ENABLE", "1", True)
    assert "note:" not in done.output
    done = submit(kfp, "--recurring", "0 4 * * *")
    assert "differs in its schedule" in str(done.exception)
    done = submit(kfp, "--recurring", "30 3 * * 1", "--mlflow-experiment", "m")
    assert "differs in its parameters mlflow_experiment" in str(done.exception)
    made["mode"] = "DISABLE"
    done = submit(kfp, "--recurring", "30 3 * * 1")
    assert "differs in being switched off" in str(done.exception)
    assert len(kfp.recurring_runs) == 1
    assert not kfp.runs


def test_a_version_that_may_lose_a_schedules_parameters_is_named(kfp: FakeKfp):
    kfp.version = "2.17.1"
    done = submit(kfp, "--recurring", "30 3 * * 1")
    assert "note: Kubeflow Pipelines 2.17.1 may start the runs of a schedule without their parameters" in done.output


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


def test_a_dry_run_asks_nobody(kfp: FakeKfp, package: Package, monkeypatch: pytest.MonkeyPatch):
    done = submit(kfp, "--dry-run")
    assert done.exit_code == 0
    assert f"skd-small, version {package.version}" in done.output
    assert "artifacts    Kubeflow's default, its own small volume" in done.output
    assert "give --pipeline-root" in done.output
    monkeypatch.setenv("SKD_PIPELINE_ROOT", "gs://b/root")
    assert "artifacts    gs://b/root\n" in submit(kfp, "--dry-run").output
    assert "cache        not used: every step runs\n" in submit(kfp, "--dry-run", "--no-reuse").output
    assert not kfp.requests


def test_mlflows_address_is_shown_where_a_server_is_given(kfp: FakeKfp, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = ("--tracking-uri", "http://bob:secret@127.0.0.1:9")  # its address all the same, after the run's
    assert submit(kfp, *away).output.splitlines()[-1] == "http://127.0.0.1:9"
    assert json.loads(submit(kfp, *away, "--json").stdout)["runs_table"] == "http://127.0.0.1:9"
    assert "/#/runs/details/" in submit(kfp, "--tracking-uri", "sqlite:///there-is-none.db").output.splitlines()[-1]
    assert not Path("there-is-none.db").exists()


def test_what_could_not_work_is_told_before(
    demo: RunConfig, config_file: Path, tmp_path: Path, package: Package, monkeypatch: pytest.MonkeyPatch
):
    values = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    values["data"]["source"]["train"] = ["data/train.jsonl", "/mnt/train.jsonl", "gs://b/train.jsonl"]
    config = RunConfig.model_validate(values)
    with pytest.raises(SkdErrors, match=r"1 problem found:\n- data.source: data/train.jsonl: the cluster cannot read"):
        Submission.plan(config, package, Target())
    values["data"]["source"]["train"] = ["{source}/train.jsonl"]
    with pytest.raises(SkdErrors, match=r"hint: `\{source\}` is for `skd trigger`"):
        Submission.plan(RunConfig.model_validate(values), package, Target())
    values["teacher"], values["data"]["source"]["train"] = "./teacher", ["gs://b/train.jsonl"]
    with pytest.raises(SkdErrors, match=r"- teacher: \./teacher: the cluster cannot read a folder of this machine"):
        Submission.plan(RunConfig.model_validate(values), package, Target())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    values["teacher"] = "teacher"
    with pytest.raises(SkdErrors, match=r"- teacher: teacher: the cluster cannot read a folder of this machine"):
        Submission.plan(RunConfig.model_validate(values), package, Target())
    with pytest.raises(SkdError, match="the file is that of a run, and this pipeline is for a comparison"):
        Submission.plan(demo, Package.read(compiled_path("compare_methods")), Target())
    documents = yaml.safe_load(yaml.safe_dump(package.documents))
    del documents[0]["root"]["inputDefinitions"]["parameters"]["reuse"]
    with pytest.raises(SkdError, match="the pipeline has no parameter `reuse`"):
        Submission.plan(demo, Package(tmp_path / "old.yaml", documents, "0"), Target())
    with pytest.raises(SkdErrors, match=r"--pipeline-root s3://.*: it holds a password"):
        Submission.plan(demo, package, Target(pipeline_root="s3://user:s3cret@b/root"))


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
        (["--name", "run {{pod.name}}"], "--name run {{pod.name}}: Kubeflow cannot keep it"),
        (["--experiment", "\U0001f600"], "Kubeflow cannot keep it: it holds an emoji"),
        (["--settings", "My settings"], "--settings: 'My settings' is no name for the ConfigMap"),
        (["--settings", "team.settings"], "--settings: 'team.settings' is no name for the ConfigMap"),
        (["--settings", "scratch"], "--settings: 'scratch' is no name for the ConfigMap"),
        (["--host", "http://h", "--wait", "--recurring", "0 3 * * *"], "a recurring run has no end"),
        (["--pipeline", str(DEMO)], "not a compiled pipeline"),
        (["--pipeline", "missing.yaml"], "there is no compiled pipeline"),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], message: str):
    done = skd("submit", DEMO, "--pipeline", small.package().path, *arguments)
    assert isinstance(done.exception, SkdError)
    assert message in str(done.exception)


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


def test_settings_too_long_for_an_argument_are_refused() -> None:
    """Before the server is asked for anything; otherwise the step's command cannot start."""
    config = load_config(Path(DEMO))
    task = config.task.model_copy(update={"prompt": "Translate: {source} " + "at once " * 9_000})
    with pytest.raises(SkdError, match="an argument of"):
        Submission.plan(config.model_copy(update={"task": task}), Package.read(), Target())
