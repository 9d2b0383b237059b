"""Plans of runs: what they are made from, what changes them, and the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from skd_kfp.pipelines.cli import app
from skd_lib.config import RunConfig
from skd_lib.errors import SkdError
from skd_lib.models.shapes import SHAPES
from skd_lib.planning.assumptions import Assumptions, assume
from skd_lib.planning.machines import load_machine
from skd_lib.planning.memory import config_size
from skd_lib.planning.plan import Plan, cost_driver, make_plan
from skd_lib.planning.sizes import model_size
from tests.conftest import SaveTinyModel

TEACHER, STUDENT = config_size(SHAPES["qwen2.5-7b"]()), config_size(SHAPES["qwen2.5-0.5b"]())
VALUES: dict[str, Any] = {
    "name": "planned",
    "teacher": "qwen2.5-7b",
    "student": "qwen2.5-0.5b",
    "data": {"source": {"type": "files", "train": ["train.jsonl"]}},
    "task": {"max_prompt_tokens": 512, "max_new_tokens": 256},
}
PARALLEL = {"training": {"batch_size": 64, "micro_batch_size": 1, "fsdp": True}}
VLLM = {"engine": "vllm", "sampling": {"adaptive_gamma": False}, "vllm": {"tensor_parallel": 2}}


def planned(profile: str = "h100x8", assumed: dict[str, Any] | None = None, **changes: Any) -> Plan:
    config = RunConfig.model_validate(VALUES | changes)
    return make_plan(config, load_machine(profile), Assumptions.model_validate(assumed or {}), TEACHER, STUDENT)


def seconds(plan: Plan, step: str = "distill") -> float:
    return next(each.seconds for each in plan.steps if each.name == step)


def memory(plan: Plan, step: str = "distill") -> float:
    found = next(each.memory for each in plan.steps if each.name == step)
    assert found is not None
    return found


def parts(plan: Plan) -> dict[str, float]:
    return {part.name: part.seconds for part in plan.parts}


def test_the_steps_of_a_plan_are_those_of_the_run() -> None:
    evaluations = ["evaluate teacher", "evaluate student before", "evaluate student"]
    rest = ["distill", *evaluations, "specdec_benchmark", "other steps"]
    assert [step.name for step in planned().steps] == ["teacher_sft", *rest]
    assert [step.name for step in planned(teacher_sft={"enabled": False}).steps] == rest
    assert "distill: a vLLM server" in [step.name for step in planned(distill=VLLM).steps]
    assert set(parts(planned())) == {"sampling", "loss", "optimiser", "validation"}
    assert set(parts(planned(distill=VLLM))) == {"weights", "signal", *parts(planned())}
    assert set(parts(planned(distill={"method": "on_policy"}))) == {"sampling", "teacher", *parts(planned())}
    assert set(parts(planned(distill={"method": "sft"}))) == {"loss", "optimiser", "validation"}
    stored = {"method": "supervised_kd", "teacher_signal": {"mode": "stored"}}
    assert set(parts(planned(distill=stored))) == {"loss", "optimiser", "validation"}
    assert planned().seconds == pytest.approx(sum(step.seconds for step in planned().steps))


def test_whole_machines_are_paid_for() -> None:
    plan = planned("h100x8")
    evaluation = next(step for step in plan.steps if step.name == "evaluate student")
    assert evaluation.devices == 1
    assert plan.cost(evaluation) == pytest.approx(evaluation.seconds / 3600 * 8 * plan.machine.price)
    assert load_machine("l4").paid(1) == 1
    assert load_machine("h100x16").paid(9) == 16
    assert load_machine("h100x2").paid(2) == 2
    cheap = load_machine("h100x8", price=0.5)
    assert (cheap.price, cheap.devices, cheap.name) == (0.5, 8, "h100x8")
    assert load_machine("h100").devices == 8
    with pytest.raises(SkdError, match=r"no profile 'h1000'"):
        load_machine("h1000")


def test_sharded_models_take_less_of_each_device() -> None:
    whole = planned(distill={"training": PARALLEL["training"] | {"fsdp": False}})
    sharded = planned(distill=PARALLEL)
    weight, buffers = STUDENT.parameters, 4 * STUDENT.parameters
    # Eight micro-batches are added up in whole gradients; of one, each process has its part, but weights are gathered.
    assert memory(whole) - memory(sharded) == pytest.approx(12 * weight * 7 / 8 + buffers, rel=1e-6)
    once = {"batch_size": 8, "micro_batch_size": 1}
    whole, at_once = (planned(distill={"training": once | {"fsdp": fsdp}}) for fsdp in (False, True))
    gathered = 2 * weight - 4 * weight / 8
    assert memory(whole) - memory(at_once) == pytest.approx(16 * weight * 7 / 8 + buffers - gathered, rel=1e-6)
    served = planned(distill=PARALLEL | VLLM)
    assert memory(sharded) - memory(served) > 2 * TEACHER.inside  # the teacher is in the server only
    server = memory(served, "distill: a vLLM server")
    assert 1.0 < server / ((TEACHER.parameters + STUDENT.parameters) * 2 / 2) < 1.2
    assert not planned("l4", teacher_sft={"enabled": False}).fits(planned("l4").steps[0])


changed = st.sampled_from(["prompt_tokens", "response_tokens", "longest_tokens", "test_rows", "layer_seconds"])
better = st.sampled_from(["acceptance", "draft_acceptance", "inference_share", "training_share", "bandwidth_share"])


@given(name=changed, other=better, factor=st.floats(1.01, 1.9), engine=st.sampled_from([{}, VLLM]))
def test_more_work_takes_longer_and_a_better_machine_less(name: str, other: str, factor: float, engine: Any) -> None:
    base = {"acceptance": 0.5, "draft_acceptance": 0.5, "longest_tokens": 600}
    start = planned(assumed=base, distill=PARALLEL | engine)
    usual = start.assumptions.model_dump()
    value = usual[name] * factor
    more = planned(assumed=base | {name: round(value) if "_rows" in name else value}, distill=PARALLEL | engine)
    assert more.seconds > start.seconds
    faster = planned(assumed=base | {other: usual[other] * factor}, distill=PARALLEL | engine)
    assert faster.seconds <= start.seconds  # where links are what it waits for, arithmetic does not help


@pytest.mark.parametrize("engine", [{}, VLLM])
def test_more_devices_are_not_slower(engine: dict[str, Any]) -> None:
    times = [seconds(planned(f"h100x{count}", distill=PARALLEL | engine)) for count in (4, 8)]
    assert times[1] < times[0]


def test_a_server_on_the_only_gpu_takes_of_its_memory() -> None:
    alone = {"vllm": {"tensor_parallel": 1, "max_rows": 8}, "training": {"batch_size": 8, "micro_batch_size": 1}}
    shared = planned("h100x1", distill=VLLM | alone)
    apart = planned("h100x2", distill=VLLM | alone)
    assert memory(shared) == pytest.approx(memory(apart) + memory(apart, "distill: a vLLM server"))
    assert "distill: a vLLM server" not in [step.name for step in shared.steps]


def test_rows_beyond_a_servers_wait_their_turn() -> None:
    def sampling(**vllm: Any) -> float:
        return parts(planned(distill=PARALLEL | VLLM | {"vllm": {"tensor_parallel": 2, **vllm}}))["sampling"]

    assert sampling(max_rows=16) > sampling(max_rows=32) > sampling(max_rows=64) == sampling(max_rows=128)


def test_padded_positions_are_computed() -> None:
    def loss(padding: float, micro: int) -> float:
        training = {"batch_size": 8, "micro_batch_size": micro}
        return parts(planned("l4", {"padding": padding}, distill={"training": training}))["loss"]

    assert loss(1.5, 1) == loss(1.0, 1) > 0
    assert 1.3 < loss(1.5, 4) / loss(1.0, 4) < 1.5
    one_row = RunConfig.model_validate(VALUES | {"distill": {"training": {"micro_batch_size": 1}}})
    assert assume(one_row, load_machine("l4"))[0].padding == 1


def test_a_step_starts_sooner_where_no_pod_is_made() -> None:
    run = RunConfig.model_validate(VALUES)
    cpu, gpu = (assume(run, load_machine(profile))[0].start_seconds for profile in ("cpu", "l4"))
    assert 0 < cpu < gpu
    assert assume(run, load_machine("cpu"), measured={"start_seconds": 7})[0].start_seconds == 7


def test_the_teachers_signal_comes_back_from_servers() -> None:
    def signal(**vllm: Any) -> float:
        return parts(planned(distill=PARALLEL | VLLM | {"vllm": {"tensor_parallel": 2, **vllm}}))["signal"]

    tokens = 64 * Assumptions().response_tokens
    assert signal() == pytest.approx(tokens * TEACHER.hidden * 2 * 4 / 3 / 1e9)
    assert signal(signal="top_k", top_k=64) == pytest.approx(tokens * 64 * 8 * 4 / 3 / 1e9)


@pytest.mark.parametrize("method", ["seqkd", "on_policy"])
def test_servers_draft_with_any_method(method: str) -> None:
    """Of the student alone all drafts stand, of the teacher alone none: acceptance changes nothing."""
    some, all_kept = (
        parts(planned(assumed={"acceptance": kept}, distill=PARALLEL | VLLM | {"method": method})) for kept in (0.3, 1)
    )
    assert some == all_kept
    assert "teacher" not in some  # it was asked while sampling
    skd = parts(planned(assumed={"acceptance": float(method == "on_policy")}, distill=PARALLEL | VLLM))
    assert some["sampling"] == skd["sampling"]


def test_what_most_is_paid_for_is_named_with_what_to_set() -> None:
    config = RunConfig.model_validate(VALUES | {"specdec": {"sweep": "all"}, "teacher_sft": {"enabled": False}})
    plan = planned(specdec={"sweep": "all"}, teacher_sft={"enabled": False}, assumed={"train_rows": 100})
    said = cost_driver(config, plan, TEACHER, STUDENT)
    assert re.match(r"\d+% of the cost is specdec_benchmark; `--set specdec.sweep=none`: the run takes ", said)
    cheaper = planned(specdec={"sweep": "none"}, teacher_sft={"enabled": False}, assumed={"train_rows": 100})
    assert f"${cheaper.total_cost:.2f}" in said
    distilled = planned(assumed={"train_rows": 10**6})
    assert "of the cost is distill, which is" in cost_driver(config, distilled, TEACHER, STUDENT)


def test_more_servers_sample_faster() -> None:
    urls = [f"http://server-{number}:8000" for number in range(2)]
    one, two = (
        planned(distill=PARALLEL | VLLM | {"vllm": {"tensor_parallel": 2, "urls": urls[:count]}}) for count in (1, 2)
    )
    assert parts(two)["sampling"] < parts(one)["sampling"]
    assert parts(two)["weights"] == 2 * parts(one)["weights"]


def test_a_model_is_known_by_its_files_its_name_or_its_weights(save_tiny_model: SaveTinyModel, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=3)
    size = model_size(str(folder), where="teacher")
    assert size.layers == 3
    (folder / "model.safetensors").unlink()
    assert model_size(str(folder), where="teacher") == size
    assert model_size(str(folder / "config.json"), where="teacher") == size
    assert model_size("Qwen/Qwen2.5-7B-Instruct", where="teacher") == TEACHER
    by_hand = model_size("72B", where="teacher")
    assert by_hand.parameters == 72e9
    assert 80 <= by_hand.layers <= 82
    with pytest.raises(SkdError) as caught:
        model_size(str(tmp_path / "nothing"), where="student")
    assert "--student" in caught.value.hint


@pytest.fixture
def run_file(save_tiny_model: SaveTinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"source": f"question {n} of many", "target": f"answer {n}"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher, student = (save_tiny_model(tmp_path / name, layers=n) for name, n in (("teacher", 4), ("student", 2)))
    values = VALUES | {"teacher": str(teacher), "student": str(student)}
    values["data"] = {"source": {"type": "files", "train": ["rows.jsonl"]}, "near_duplicate_threshold": 1.0}
    values["task"] = {"max_prompt_tokens": 96, "max_new_tokens": 16, "chat_template": False}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


SERVED = ("--set", "distill.engine=vllm", "--set", "distill.sampling.adaptive_gamma=false")


def invoke(*words: object) -> Any:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["plan", *map(str, words)])


def test_the_command_reads_the_data_and_shows_its_assumptions(run_file: Path) -> None:
    given = ("--assume", "acceptance=0.25", "--assume", "teacher_rows=10000")
    done = invoke(run_file, "--profile", "a100", *given, "--price", "2")
    assert done.exit_code == 0, done.output
    for said in ("distill", "specdec_benchmark", "$2 a device", "0.25", "10,000", "given", "data", "assumed"):
        assert said in done.output
    values = json.loads(invoke(run_file, "--profile", "a100", "--json").stdout)
    assert values["origins"]["train_rows"] == "data"
    assert 40 <= values["assumptions"]["train_rows"] < 60
    assert values["assumptions"]["prompt_tokens"] > 10
    assert {"distill", "other steps"} <= {step["name"] for step in values["steps"]}
    assert values["cost"] == pytest.approx(sum(step["cost"] for step in values["steps"]))


def test_a_plan_needs_neither_weights_nor_data(run_file: Path) -> None:
    (run_file.parent / "rows.jsonl").unlink()
    words = ("--teacher", "70B", "--student", "llama-3.1-8b", "--profile", "h100x64", "--json")
    done = CliRunner().invoke(app, ["plan", str(run_file), *words])
    assert "the data are not counted" in done.stderr
    values = json.loads(done.stdout)
    assert values["origins"]["prompt_tokens"] == "assumed"
    assert values["assumptions"]["prompt_tokens"] == 48
    assert any(not step["fits"] for step in values["steps"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--assume", "acceptance"), "no NAME=VALUE"),
        (("--assume", "acceptance=2"), "acceptance"),
        (("--assume", "train_rows=0"), "train_rows"),
        (("--assume", "send_gbytes=inf"), "send_gbytes"),
        (("--assume", "response_tokens=8", "--assume", "longest_tokens=7"), "less than response_tokens 8"),
        (("--assume", "prompt_tokens=97"), "more than the run's task.max_prompt_tokens, 96"),
        (("--assume", "longest_tokens=17"), "more than the run's task.max_new_tokens, 16"),
        (("--profile", "l4", "--assume", "inference_share=1.5"), "more than the l4's peak"),
        (("--profile", "l4x4", *SERVED, "--assume", "servers=4"), "leaves none of l4x4"),
        (("--profile", "l4", *SERVED, "--set", "distill.vllm.tensor_parallel=2"), "leaves none of l4"),
        (("--assume", "speed=2"), "speed"),
        (("--profile", "b300"), "there is no profile"),
        (("--calibration", "none.json"), "no file that"),
    ],
)
def test_mistakes_are_named(run_file: Path, words: tuple[str, ...], said: str) -> None:
    failed = invoke(run_file, *words)
    assert failed.exception is not None
    assert said in str(failed.exception)


def test_lengths_of_other_settings_are_cut_to_the_runs_limits() -> None:
    config, machine = RunConfig.model_validate(VALUES), load_machine("l4")
    found, origins = assume(config, machine, measured={"response_tokens": 300.0, "longest_tokens": 400.0})
    assert (found.response_tokens, found.longest_tokens, found.prompt_tokens) == (256, 256, 256)
    assert (origins["longest_tokens"], origins["prompt_tokens"]) == ("measured", "assumed")


@pytest.mark.slow
def test_what_was_measured_is_what_later_plans_assume(run_file: Path) -> None:
    done = invoke(run_file, "--measure", "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    names = {"inference_share", "training_share", "bandwidth_share", "layer_seconds", "acceptance", "prompt_tokens"}
    assert {values["origins"][name] for name in names} == {"measured"}
    again = json.loads(invoke(run_file, "--json").stdout)
    assert again == values
    changed = json.loads(invoke(run_file, "--json", "--set", "name=another").stdout)
    assert changed["origins"]["training_share"] == "measured"
    assert changed["origins"]["acceptance"] == "assumed"  # of another pair
    words = ["plan", str(run_file), "--profile", "l4", "--calibration", "runs/plan-cpu.json"]
    with pytest.raises(SkdError, match="measured on cpu, and the plan is for l4"):
        CliRunner().invoke(app, words, catch_exceptions=False)
