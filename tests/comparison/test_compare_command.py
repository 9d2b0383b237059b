from __future__ import annotations

import json
from pathlib import Path

from skd_lib.comparison.config import load_compare
from skd_lib.comparison.plan import to_parameters
from tests.conftest import ROOT, Skd

EXAMPLE = ROOT / "pipelines/configs/compare-demo.yaml"


def test_dry_run_lists_the_variants_and_does_nothing(skd: Skd, tmp_path: Path):
    done = skd("compare", EXAMPLE, "--dry-run", "--runs-dir", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    for shown in (
        "skd-top_k-5",
        "top_k 25",
        "on_policy",
        "supervised_kd",
        "prune",
        "10: compare_variant, student_init, distill, evaluate-student_after, specdec_benchmark (measures nothing: `",
        ", show-trial of each",
        "preflight, prepare_data, show-data, teacher_sft, evaluate_teacher, compare_table, finish",
    ):
        assert shown in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_is_what_the_pipeline_takes(skd: Skd):
    done = skd("compare", EXAMPLE, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == to_parameters(*load_compare(EXAMPLE))
    assert "add --dry-run" in skd("compare", EXAMPLE, "--json").stderr
    changed = skd("compare", EXAMPLE, "--dry-run", "--json", "--set", "distill.training.max_steps=7")
    assert json.loads(changed.stdout) == to_parameters(*load_compare(EXAMPLE, {"distill.training.max_steps": 7}))
    assert changed.stdout != done.stdout


def test_wrong_variant_is_named_before_anything_starts(skd: Skd, tmp_path: Path):
    path = tmp_path / "wrong.yaml"
    path.write_text(f"name: wrong\nbase: {ROOT}/pipelines/configs/demo.yaml\nvariants: {{a: {{distill.betta: 1}}}}\n")
    done = skd("compare", path, "--runs-dir", tmp_path / "runs")
    assert done.returncode == 2
    assert f"{path}, variant a, field `distill.betta`: unknown field" in done.stderr
    assert "did you mean `beta`?" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_fails_on_data_and_models_that_are_not_there(skd: Skd, tmp_path: Path):
    base = tmp_path / "base.yaml"
    base.write_text(
        "name: base\nteacher: ./no-teacher\nstudent: org/student\nstudent_init: {mode: as_is}\n"
        f"data: {{source: {{type: files, train: [{tmp_path}/no-data.jsonl]}}}}\n"
    )
    path = tmp_path / "compare.yaml"
    path.write_text(f"name: compare\nbase: {base}\nmethods: [sft]\nvariants: {{a: {{student: ./no-student}}}}\n")
    for options in ((), ("--json",)):
        done = skd("compare", path, "--dry-run", *options)
        assert done.returncode == 2
        for missing in ("no-data.jsonl", "no-teacher", "no-student"):
            assert missing in done.stderr
