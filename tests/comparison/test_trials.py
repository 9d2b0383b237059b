from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from skd_lib.comparison import plan as plans
from skd_lib.comparison.config import load_compare
from skd_lib.comparison.plan import Plan, from_parameters, to_parameters
from skd_lib.comparison.trials import Trial
from skd_lib.config import RunConfig
from skd_lib.config.parameters import short
from skd_lib.errors import SkdError

BASE: dict[str, Any] = {
    "name": "base",
    "teacher": "teacher",
    "student": "student",
    "data": {"source": {"type": "files", "train": ["x.jsonl"]}},
}


def written(folder: Path, **values: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({"name": "comparison", "base": "base.yaml", **values}, sort_keys=False))
    return path


def plan(folder: Path, **values: Any) -> Plan:
    """The comparison as a file has it, which is what its parameters say too."""
    compare, base = load_compare(written(folder, **values))
    made = plans.plan(compare, base, where="compare.yaml")
    again = from_parameters(**to_parameters(compare, base))
    assert (again.base, again.trials, again.skipped, again.reference) == (
        made.base,
        made.trials,
        made.skipped,
        made.reference,
    )
    return made


def runs(made: Plan) -> list[tuple[str, int]]:
    return [(trial.variant, trial.seed) for trial in made.trials]


def configs(made: Plan) -> dict[str, RunConfig]:
    """The configuration of each run, through JSON with floats only, as Kubeflow hands numbers on."""
    base = RunConfig.model_validate(BASE)
    trials = json.loads(json.dumps([short(trial) for trial in made.trials]), parse_int=float)
    return {trial.label: trial.config(base) for trial in map(Trial.model_validate, trials)}


def test_every_method_with_every_value_and_seed(tmp_path: Path):
    made = plan(
        tmp_path,
        methods=["on_policy", "skd"],
        grid={"distill.sampling.top_k": [1, 25], "distill.training.learning_rate": [1e-4, 1e-5]},
        seeds=[0, 3],
    )
    # Without an acceptance rule there is no K: once for each learning rate.
    variants = ["on_policy-learning_rate-0.0001", "on_policy-learning_rate-1e-05"]
    variants += [f"skd-top_k-{k}-learning_rate-{rate}" for k in (1, 25) for rate in ("0.0001", "1e-05")]
    assert runs(made) == [(variant, seed) for variant in variants for seed in (0, 3)]
    one = configs(made)["skd-top_k-1-learning_rate-1e-05-seed-3"]
    assert (one.seed, one.distill.method, one.distill.sampling.top_k) == (3, "skd", 1)
    assert one.distill.training.learning_rate == 1e-5
    assert one.data == RunConfig.model_validate(BASE).data


def test_student_inits_cross_with_all_variants(tmp_path: Path):
    made = plan(
        tmp_path,
        methods=["sft", "skd"],
        student_inits={
            "cut": {"mode": "prune", "keep_first": 1, "keep_last": 1},
            "tuned": {"mode": "sft", "training": {"max_steps": 3}},
            "other": {"student": "another"},
        },
        variants={"fast": {"distill.training.max_steps": 2}},
    )
    assert [name for name, _ in runs(made)] == [
        f"{variant}-{init}" for variant in ("sft", "skd", "fast") for init in ("cut", "tuned", "other")
    ]
    found = configs(made)
    assert found["skd-cut-seed-0"].student is None  # cut from the teacher, whatever the base's student is
    assert found["skd-tuned-seed-0"].student == "student"
    assert found["skd-tuned-seed-0"].student_init.training.max_steps == 3
    assert found["fast-other-seed-0"].student == "another"


def test_schedules_and_sections_are_values_too(tmp_path: Path):
    schedule = {"start": 25, "end": 1, "shape": "cosine"}
    made = plan(tmp_path, grid={"distill.sampling.top_k": [schedule, 5]})
    assert runs(made) == [("skd-top_k-25-1-cosine", 0), ("skd-top_k-5", 0)]
    falling = configs(made)["skd-top_k-25-1-cosine-seed-0"].distill.sampling.top_k
    assert str(falling) == "25 to 1, cosine"


@pytest.mark.parametrize(
    ("values", "reference"),
    [
        ({"methods": ["sft", "skd"]}, "skd"),
        ({"methods": ["sft", "on_policy"]}, "sft"),
        ({"methods": ["sft", "skd"], "reference": "sft"}, "sft"),
        ({"variants": {"mine": {}}}, "mine"),
        ({}, "skd"),
    ],
)
def test_reference(tmp_path: Path, values: dict[str, Any], reference: str):
    assert plan(tmp_path, **values).reference == reference


def test_overrides_hold_for_all_runs_and_may_unset(tmp_path: Path):
    overrides = {"data.student_examples": 7, "student": None, "student_init.mode": "prune"}
    overrides |= {"student_init.keep_first": 1, "student_init.keep_last": 2}
    made = plan(tmp_path, overrides=overrides)
    assert made.base.data.student_examples == 7
    assert made.base.student is None
    assert made.base.name == "comparison"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"variants": {"mine": {"distill.sampling.topk": 1}}},
            r"variant mine, field `distill.sampling.topk`: unknown field[\s\S]*did you mean `top_k`",
        ),
        ({"grid": {"distill.sampling.topk": [1]}}, r"field `grid`, field `distill.sampling.topk`: unknown field"),
        ({"grid": {"distill.beta": []}}, r"field `grid.distill.beta`: at least 1 item wanted, got \[\]"),
        ({"variants": {"mine": {"distill.method.x": 1}}}, "field `distill.method.x`: `distill.method` has no fields"),
        (
            {"variants": {"mine": {"task.prompt": "{source}!"}}},
            r"field `task.prompt`: the runs .* share [\s\S]*overrides",
        ),
        ({"variants": {"mine": {"seed": 1}}}, r"field `seed`[\s\S]*list seeds under `seeds`"),
        (
            {"variants": {"mine": {"distill.beta": None}}},
            r"variant mine, field `distill.beta`: an override must not be null",
        ),
        ({"variants": {"my run": {}}}, r"field `variant`: String should match pattern"),
        ({"variants": {"skd": {}}, "methods": ["skd"]}, "two variants are called `skd`"),
        (
            {"overrides": {"distill.sampling.topk": 1}},
            "field `overrides`, field `distill.sampling.topk`: unknown field",
        ),
        ({"seeds": [1, 1]}, "values must be unique"),
        ({"seeds": [-1]}, r"field `seeds.0`: Input should be greater than or equal to 0, got -1"),
        ({"methods": ["skdd"]}, "field `methods"),
        ({"reference": "other"}, r"field `reference`: there is no variant `other`[\s\S]*one of skd"),
        ({"student_inits": {"cut": {"mode": "prune"}}}, "needs both keep_first and keep_last"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, values: dict[str, Any], message: str):
    with pytest.raises(SkdError) as error:
        plan(tmp_path, **values)
    assert re.search(message, str(error.value)), str(error.value)


def test_runs_are_counted_before_any_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = list(range(1, 301))
    grid = {"distill.sampling.top_k": values, "distill.sampling.gamma": values[:299]}
    counted = r"89,700 combinations \(300 values of .*top_k x 299 values of .*gamma\); the limit is 5,000, and 500 runs"
    with monkeypatch.context() as patched:
        patched.delattr("skd_lib.comparison.trials.reads_setting")
        with pytest.raises(SkdError, match=f"compare.yaml, field `grid`: {counted}"):
            plan(tmp_path, grid=grid, variants={"mine": {}})
    with pytest.raises(SkdError, match=r"600 runs \(2 variants x 300 seeds\); the limit is 500"):
        plan(tmp_path, methods=["sft", "skd"], seeds=values)
    # Where a method does not read a setting, its values make no runs.
    assert len(runs(plan(tmp_path, methods=["sft", "skd"], grid={"distill.sampling.top_k": values}))) == 301


def test_all_that_is_wrong_comes_at_once(tmp_path: Path):
    with pytest.raises(SkdError) as error:
        plan(tmp_path, variants={"a": {"distill.beta": 2}, "b": {"distill.betta": 0.5}})
    assert "variant a, field `distill.beta`" in str(error.value)
    assert "variant b, field `distill.betta`" in str(error.value)


def test_trials_that_are_skipped_stand_in_the_table(tmp_path: Path):
    made = plan(tmp_path, methods=["sft", "skd"], seeds=[0, 1], skip={"skd-seed-1": "step distill failed: $ {{x}}"})
    assert runs(made) == [("sft", 0), ("sft", 1), ("skd", 0)]
    table = made.table()
    assert table["reference"] == "skd"
    assert table["trials"][0] == {"variant": "sft", "seed": 0, "overrides": {"distill.method": "sft"}}
    (skipped,) = table["skipped"]
    assert skipped["reason"] == "step distill failed: $ {{x}}"
    with pytest.raises(SkdError, match=r"field `skip`: there is no trial `skd-seed-2`"):
        plan(tmp_path, methods=["sft", "skd"], skip={"skd-seed-2": ""})
    with pytest.raises(SkdError, match="no trial is left"):
        plan(tmp_path, skip={"skd-seed-0": "x"})


def test_the_form_says_what_the_file_says_in_short(tmp_path: Path):
    form = to_parameters(*load_compare(written(tmp_path, methods=["sft", "skd"], overrides={"distill.method": "sft"})))
    assert "training_method" not in form
    assert form["model_teacher"] == "teacher"
    assert json.loads(form["config"]) == {"name": "comparison", "distill": {"method": "sft"}}
    assert json.loads(form["comparison"]) == {"name": "comparison", "methods": ["sft", "skd"]}


FILLED = {"data_train": "x.jsonl", "model_teacher": "t", "model_student": "s"}


def test_a_form_needs_no_more_than_data_and_models():
    made = from_parameters(run_name="My comparison", **FILLED)
    assert (made.compare.name, made.base.name, runs(made)) == ("my-comparison", "my-comparison", [("skd", 0)])
    typed = from_parameters('{"methods": ["sft", "skd"], "overrides": {"distill.beta": 0.25}}', **FILLED)
    assert typed.base.distill.beta == 0.25
    assert len(typed.trials) == 2


def test_a_form_may_name_the_files(tmp_path: Path):
    path = written(tmp_path, methods=["sft", "skd"], overrides={"student": "other"})
    made = from_parameters(str(path))
    assert (made.base.teacher, made.base.student, len(made.trials)) == ("teacher", "other", 2)
    given = from_parameters(str(path), config='{"seed": 4}', **FILLED)
    assert (given.base.teacher, given.base.student, given.base.seed) == ("t", "s", 4)


def test_all_that_is_wrong_with_a_form_is_told_at_once():
    with pytest.raises(SkdError) as error:
        from_parameters('{"methods": ["skdd"]}', model_teacher="t", config='{"sed": 1}')
    for message in ("comparison, field `methods", "config, field `sed`", "model_student: ", "data_train: "):
        assert message in str(error.value)
