"""Steps `preflight` and `prepare_data`: their outputs, and the errors they report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from skd_lib._core import events
from skd_lib._core.ascii_json import ascii_json
from skd_lib.config import RunConfig, parse_section
from skd_lib.config.parameters import Form, to_parameters
from skd_lib.config.step import DEPENDS, StepConfig
from skd_lib.data.prepared import PreparedData
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.models.references import model_fingerprint
from skd_lib.steps import preflight, prepare_data
from skd_lib.steps.runtime import Switch
from tests.preflight.support import ROWS, executor_output


def test_preflight_hands_on_each_steps_config_and_prepare_data_uses_its_own(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"
    values |= {"evaluation": {"batch_size": 2, "comet": {"batch_size": 4}}}
    preflight.main(
        config=json.dumps(values),
        checkpoint_root=str(tmp_path / "checkpoints"),
        report_out=tmp_path / "preflight" / "report.md",
        tracking_uri=tracking,
    )
    assert "Preflight" in capsys.readouterr().out
    assert (tmp_path / "preflight" / "report.md").read_text(encoding="utf-8").startswith("# Preflight")
    parameters = executor_output(tmp_path / "preflight")["parameterValues"]
    seen = {name: model_fingerprint(values[name]) for name in ("teacher", "student")}
    prepared = {"data": values["data"], "fingerprint": json.loads(parameters["prepare_data"])["fingerprint"]}
    task, measured = values["task"], {"batch_size": 2}
    # Only what differs from the defaults; and of a single run nothing that a comparison needs.
    assert {name: value and json.loads(value) for name, value in parameters.items() if name != "trials"} == {
        "prepare_data": prepared,
        "teacher_sft": {"teacher": values["teacher"], "fingerprint": seen["teacher"], "task": task},
        "student_init": {"student": values["student"], "fingerprint": seen["student"], "task": task},
        "distill": {"task": task},
        "evaluate_teacher": {
            "teacher": values["teacher"],
            "fingerprint": seen["teacher"],
            "evaluation": measured,
            "task": task,
        },
        "evaluate": {"evaluation": measured, "task": task},
        "specdec_benchmark": {"task": task},
        "evaluate_champion": {"evaluation": measured, "task": task},
        "comet_score": {"evaluation": measured | {"comet": {"batch_size": 4}}, "task": task},
        "report": {"name": "tiny", "task": task},
        **dict.fromkeys(("compare_variant", "compare_table", "model_fingerprints", "plan", "problems"), ""),
    }
    assert parameters["trials"] == []
    # KFP's structured parameters cannot hold null.
    assert "null" not in json.dumps(parameters)

    def prepare() -> None:
        prepare_data.main(
            config=parameters["prepare_data"], data_out=tmp_path / "prepared" / "data", tracking_uri=tracking
        )

    prepare()
    assert "train_teacher: 32 examples" in capsys.readouterr().out
    assert PreparedData.load(tmp_path / "prepared" / "data").fingerprint
    output = executor_output(tmp_path / "prepared")
    (artifact,) = output["artifacts"]["data"]["artifacts"]
    assert artifact["name"] == "data"
    assert _datasets(tracking) == {"train_teacher", "train_student", "validation", "test"}

    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"source": "une ligne de plus", "target": "one more row"}) + "\n")
    with pytest.raises(SkdError, match="the data changed after preflight looked at it"):
        prepare()


def test_data_are_prepared_only_where_the_config_says_which(tmp_path: Path) -> None:
    with pytest.raises(SkdError, match="--config: section `data` is missing"):
        prepare_data.main(config='{"seed": 1}', data_out=tmp_path / "data")


def test_a_step_depends_on_fields_that_there_are() -> None:
    assert {field for fields in DEPENDS.values() for field in fields} == StepConfig.model_fields.keys()


@pytest.mark.slow
def test_a_failing_preflight_lists_everything_and_exits_with_2(values: dict[str, Any], tmp_path: Path) -> None:
    values["student"] = str(tmp_path / "missing" / "student" / "folder")
    values["data"]["source"]["columns"] = {"target": "answer"}
    command = [sys.executable, "-m", "skd_lib.steps.preflight", "--config", json.dumps(values)]
    command += ["--checkpoint-root", str(tmp_path / "checkpoints"), "--report-out", str(tmp_path / "report.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "5 problems found" in done.stderr  # the model, three rows, and that all have it
    assert values["student"] in done.stderr
    assert f"{tmp_path / 'rows.jsonl'}, row 1, field `answer`: the field is missing" in done.stderr
    assert "✗" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_warnings_reach_the_person_who_started_the_run(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(events.ENV, "1")
    values["task"]["metrics"] = ["chrf", "comet"]
    values["evaluation"] = {"comet": {"model": str(tmp_path / "none")}}
    preflight.main(
        config=json.dumps(values),
        checkpoint_root=str(tmp_path / "checkpoints"),
        report_out=tmp_path / "report.md",
        comet=Switch.false,
    )
    told = [event["message"] for line in capsys.readouterr().out.splitlines() if (event := events.parse(line))]
    # And COMET's model is not looked for where no step would load it.
    (of_comet,) = [message for message in told if "COMET" in message]
    assert of_comet.startswith("task.metrics: this pipeline has no step for COMET; hint")
    warned = (tmp_path / "report.md").read_text(encoding="utf-8").count("| ! |")
    assert len(told) == warned


def called(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "skd_lib.steps.preflight", "--report-out", str(tmp_path / "report.md"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_a_form_that_is_wrong_is_told_at_once_by_its_fields(tmp_path: Path) -> None:
    typed = '{"task": {"prompt": "$x$ {source}"}, "distil": {}}'
    options = [
        "--config",
        typed,
        "--model-teacher",
        "org/t",
        "--training-method",
        "magic",
        "--data-test",
        "gs://b/$(X)",
    ]
    done = called(tmp_path, *options, "--mlflow-experiment", " x", KFP_RUN_ID="run-1")
    assert done.returncode == 2
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    *_, problems = done.stderr.partition("7 problems found:\n")
    lines = problems.strip().splitlines()
    assert len(lines) == 7  # a line each, the last of the log
    for field in (
        "config, field `task.prompt`",
        "data_test",
        "mlflow_experiment",
        "model_student",
        "data_train",
        "training_method",
        "config, field `distil`",
    ):
        assert any(line.startswith(f"- {field}: ") for line in lines), field
        assert f"| form | {field}: " in report


@pytest.mark.parametrize(
    ("metrics", "level"), [(["chrf"], None), (["chrf", "comet"], "warning"), (["comet", "chrf"], "error")]
)
def test_a_pipeline_without_comet(metrics: list[str], level: str | None) -> None:
    """Where COMET is to decide, the run is refused before it starts."""
    config = '{"task": {"metrics": ' + json.dumps(metrics) + "}}"
    form = Form(config=config, data_train="x", model_teacher="t", model_student="s")
    run, plan = preflight.read(form, "", "run")
    found = preflight.without_comet(run, plan)
    assert [check.level for check in found] == ([level] if level else [])
    assert all("distillation_comet" in check.hint for check in found)
    run, plan = preflight.read(form, '{"methods": ["skd", "sft"]}', "run")
    assert [check.level for check in preflight.without_comet(run, plan)] == (["warning"] if level else [])


def test_on_a_cluster_the_report_is_seen_and_the_next_step_fails(tmp_path: Path) -> None:
    """KFP shows no artifact of a step that failed."""
    names = ("prepare_data", "trials", "report", "problems")
    told = (
        "--kfp-artifact",
        "findings=gs://b/findings",
        "--kfp-parameters",
        f"{','.join(names)}={tmp_path / 'out' / names[0]}",
    )
    done = called(tmp_path, "--model-teacher", "org/t", *told, KFP_RUN_ID="run-1", KFP_POD_NAME="pod")
    assert done.returncode == 0
    assert "model_student: no student is named" in done.stderr
    assert "| form | model_student: " in (tmp_path / "report.md").read_text(encoding="utf-8")
    given = {name: (tmp_path / "out" / name).read_text() for name in names}
    assert (given["trials"], given["prepare_data"], given["report"]) == ("[]", "", "")
    with pytest.raises(SkdErrors, match="preflight: data_train: there are no training data"):
        prepare_data.main(config=given["prepare_data"], data_out=tmp_path / "data", problems=given["problems"])


def test_texts_typed_by_hand_are_refused_in_a_cluster_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form(config='{"task": {"prompt": "$x$ {source}"}}', data_train="x", model_teacher="t", model_student="s")
    monkeypatch.delenv("KFP_RUN_ID", raising=False)
    assert preflight.read(form, "", "My run")[0].name == "my-run"
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    with pytest.raises(SkdError, match=r"field `task.prompt`: a text with `\$`") as error:
        preflight.read(form, "", "")
    assert "\\u0024" in str(error.value)
    sent = to_parameters(RunConfig.model_validate(parsed(form)))
    assert preflight.read(Form(**sent), "", "")[0].task.prompt == "$x$ {source}"


def test_later_runs_reuse_what_a_run_past_the_cache_made(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "run-2")

    root = str(tmp_path / "roots")

    def fresh(reuse: Switch, comparison: str = preflight.NO_COMPARISON, **changes: Any) -> str:
        preflight.main(
            config=ascii_json(values | changes),
            comparison=comparison,
            reuse=reuse,
            checkpoint_root=root,
            report_out=tmp_path / "preflight" / "report.md",
        )
        parameters = executor_output(tmp_path / "preflight")["parameterValues"]
        prepared, teachers = (json.loads(parameters[name]) for name in ("prepare_data", "teacher_sft"))
        assert prepared.get("fresh") == teachers.get("fresh")
        (tmp_path / "given").write_text(parameters["prepare_data"])
        return str(prepared.get("fresh", ""))

    def prepare() -> None:
        config = (tmp_path / "given").read_text()
        prepare_data.main(config=config, data_out=tmp_path / "prepared" / "data", checkpoint_root=root)

    with pytest.raises(SkdErrors):
        fresh(Switch.false, teacher="/nowhere")
    new = fresh(Switch.false)
    assert new.endswith(":run-2")
    assert fresh(Switch.true) == ""  # nothing was made yet
    fresh(Switch.false)
    prepare()
    assert fresh(Switch.true) == new
    prepare()
    assert fresh(Switch.true) == new
    assert fresh(Switch.true, seed=5) == ""  # other data
    assert fresh(Switch.true, "{}") == ""  # a comparison has a cache of its own


def test_models_whose_names_would_be_changed_are_refused_in_a_cluster_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_RUN_ID", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    form = Form(config='{"teacher": "/models/$(X)", "student": "/models/s"}', data_train="x")
    assert preflight.read(form, "", "")[0].teacher == "/models/$(X)"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(SkdError, match=r"model_teacher /models/\$\(X\): Kubeflow would change this name"):
        preflight.read(form, "", "")
    student = Form(config='{"student": "/models/{{x}}", "teacher": "t"}', data_train="x")
    with pytest.raises(SkdError, match="model_student"):
        preflight.read(student, "{}", "")


def parsed(form: Form) -> dict[str, Any]:
    source = {"type": "files", "train": [form.data_train]}
    return {"name": "x", "teacher": "t", "student": "s", "data": {"source": source}, **json.loads(form.config)}


def test_a_comparison_hands_on_its_trials(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    comparison = {"methods": ["sft", "skd"], "seeds": [0, 1], "drafts": False, "skip": {"sft-seed-1": "it failed"}}
    preflight.main(
        config=ascii_json({**values, "task": values["task"] | {"prompt": "$$x$$ {{x}} {source} \U0001f600"}}),
        comparison=json.dumps(comparison),
        run_name="My comparison",
        reuse=Switch.false,
        report_out=tmp_path / "preflight" / "report.md",
    )
    parameters = executor_output(tmp_path / "preflight")["parameterValues"]
    trials = [f"{trial['variant']}-{trial['seed']}" for trial in map(json.loads, parameters["trials"])]
    assert trials == ["sft-0", "skd-0", "skd-1"]
    plan = json.loads(parameters["plan"])
    assert (plan["reference"], plan["skipped"][0]["reason"]) == ("skd", "it failed")
    assert json.loads(parameters["model_fingerprints"]).keys() == {values["teacher"], values["student"]}
    (fresh,) = {json.loads(parameters[name])["fresh"] for name in ("prepare_data", "teacher_sft")}
    assert fresh.endswith(":run-1")
    of_trials = ("student_init", "distill", "evaluate", "specdec_benchmark")  # which compare_variant gives to each
    assert {parameters[name] for name in (*of_trials, "evaluate_champion", "comet_score", "report")} == {""}
    base = parse_section(StepConfig, parameters["compare_variant"], where="compare_variant")
    assert not base.drafts
    assert base.task.prompt == "$$x$$ {{x}} {source} \U0001f600"
    # Nothing that kubelet, Argo, KFP or its database read as their own.
    assert re.fullmatch("[ -~]*", json.dumps(parameters, ensure_ascii=False))
    assert not {text for text in ("$", "{{") if text in json.dumps(parameters)}


def test_columns_of_usual_names_are_handed_on(values: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"question": row["source"], "answer": row["target"]} for row in ROWS]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    preflight.main(config=json.dumps(values), report_out=tmp_path / "preflight" / "report.md")
    parameters = executor_output(tmp_path / "preflight")["parameterValues"]
    assert json.loads(parameters["prepare_data"])["data"]["source"]["columns"] == {
        "source": "question",
        "target": "answer",
    }
    report = (tmp_path / "preflight" / "report.md").read_text(encoding="utf-8")
    assert "| columns | input `question`, answer `answer`" in report


def _datasets(tracking_uri: str) -> set[str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri)
    experiment = client.get_experiment_by_name("skd")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return {used.dataset.name for run in runs for used in run.inputs.dataset_inputs}
