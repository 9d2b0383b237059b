from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from skd_lib.config import RunConfig
from skd_lib.config.fields import list_fields
from tests.conftest import ROOT, Done, Skd

DEMO = ROOT / "pipelines/configs/demo.yaml"


def start(*arguments: str) -> Done:
    """Start a process of its own."""
    env = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    return Done(done.returncode, done.stdout, done.stderr)


def test_version():
    done = start("-m", "skd_kfp.pipelines.cli", "--version")
    assert done.returncode == 0
    assert re.fullmatch(r"skd \d+\.\d+\.\d+\n", done.stdout)


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'mlflow', 'kfp', 'pandas', 'numpy'}"
    run = "import sys, skd_kfp.pipelines.cli\nsys.argv = ['skd', '--help']\ntry: skd_kfp.pipelines.cli.main()\n"
    done = start("-c", f"{run}finally: print(sorted({heavy} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")
    for command in ("run", "compile", "doctor", "config"):
        assert f" {command} " in done.stdout


def test_an_error_is_the_processes_exit_code():
    done = start("-m", "skd_kfp.pipelines.cli", "run", "missing.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: missing.yaml: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_prints_the_plan_and_does_nothing(skd: Skd, tmp_path: Path):
    done = skd("run", DEMO, "--dry-run", "--runs-dir", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert "distill" in done.stdout
    assert "python3 -m" not in done.stdout  # it is in --json
    assert "SmolLM2-135M-Instruct" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "shown"), [("run", ["run other", "sft, forward_kl"]), ("submit", ["other-20"])])
def test_a_field_is_set_without_editing_the_file(skd: Skd, command: str, shown: list[str]):
    done = skd(command, DEMO, "--set", "distill.method=sft", "--set", "name=other", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in shown), done.stdout


def test_wrong_field_is_named_before_anything_starts(skd: Skd, tmp_path: Path):
    values = yaml.safe_load(DEMO.read_text())
    values["distill"]["sampling"]["topk"] = values["distill"]["sampling"].pop("top_k")
    values["seed"] = -1
    config = tmp_path / "wrong.yaml"
    config.write_text(yaml.safe_dump(values))
    done = skd("run", config, "--runs-dir", tmp_path / "runs")
    assert done.returncode == 2
    assert f"{config}, field `distill.sampling.topk`: unknown field" in done.stderr
    assert "field `seed`" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["run", "compare"])
def test_missing_data_are_named_before_anything_starts(skd: Skd, tmp_path: Path, command: str):
    base = {
        "name": "a",
        "teacher": "org/teacher",
        "student": "org/student",
        "data": {"source": {"type": "files", "train": ["no.jsonl"]}},
    }
    config = base if command == "run" else {"name": "b", "base": "base.yaml", "methods": ["sft", "skd"]}
    for name, values in (("base.yaml", base), ("config.yaml", config)):
        (tmp_path / name).write_text(yaml.safe_dump(values))
    done = skd(command, tmp_path / "config.yaml", "--runs-dir", tmp_path / "runs")
    assert done.returncode == 2
    assert "no.jsonl" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_several_nodes_are_refused_on_one_machine(skd: Skd, tmp_path: Path):
    values = yaml.safe_load(DEMO.read_text())
    values["distill"]["multinode"] = {"nodes": 2}
    config = tmp_path / "nodes.yaml"
    config.write_text(yaml.safe_dump(values))
    done = skd("run", config, "--dry-run")
    assert done.returncode == 2
    assert f"{config}, field `distill.multinode`: several nodes need a cluster with Kubeflow Trainer" in done.stderr
    assert "skd submit" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.yaml"], "missing.yaml: cannot be read: No such file"),
        (["run", str(DEMO), "--set", "seed"], "--set seed: not FIELD=VALUE"),
        (["run", str(DEMO), "--runs-dir", str(DEMO)], "cannot write the run's folder"),
        (["compile", "--image", "r/skd:1"], "hint: name another file with --output"),
        (["compile", "--comet-image", "r/comet:1"], "hint: name another file with --output"),
        (["compile", "--comet-image", "r/c:1", "--output", "x.yaml"], "hint: give --pipeline distillation_comet"),
        (["compile", "--check", "--image", "r/skd:1"], "--image: it has no effect: the committed pipelines name"),
        (["compile", "--image", "", "--output", "mine.yaml"], "--image: no image is named"),
        (["run", str(DEMO), "--image", "r/skd:1", "--dry-run"], "--image: it has no effect: without --docker"),
        (["run", str(DEMO), "--docker", "--comet-image", "c:1"], "--comet-image: it has no effect: the run's"),
        (["compile", "--profile", "a100"], "hint: name another file with --output"),
        (["compile", "--check", "--profile", "cpu"], "the file is compiled for profile l4, and not for cpu"),
        (["compile", "--profile", "v100", "--output", "mine.yaml"], "there is no profile 'v100'"),
        (["compile", "--release", "--output", "mine.yaml"], "is not named by its digest"),
        (["compile", "--check", "--output", "missing.yaml"], "the compiled pipeline is missing"),
    ],
)
def test_errors_say_what_to_do(skd: Skd, arguments: list[str], message: str):
    done = skd(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_compile_check_passes_on_the_committed_file(skd: Skd):
    done = skd("compile", "--check")
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stdout


def test_compile_with_an_image_of_ones_own(skd: Skd, tmp_path: Path):
    done = skd("compile", "--image", "r/skd:1", "--output", tmp_path / "mine.yaml")
    assert done.returncode == 0, done.stderr
    assert "image: r/skd:1" in (tmp_path / "mine.yaml").read_text()
    assert "its images: r/skd:1\n" in done.stdout


def test_config_lists_every_field(skd: Skd):
    done = skd("config")
    listed = {line.split(":")[0] for line in done.stdout.splitlines() if line and not line.startswith(" ")}
    assert {"name", "distill.sampling.top_k", "data.source.columns.source", "data.source.train[].sha256"} <= listed
    assert "distill.sampling.top_k: int or {start, end, shape} = 25" in done.stdout
    assert "task.stop: list of str = []" in done.stdout
    assert re.search(r'distill.method: sft \| seqkd \| .* \| skd_mixed = "skd"', done.stdout)
    assert 'distill.sampling.min_prob: float or {start, end, shape} = {"start": 0.5, "end": 0.25, ' in done.stdout
    assert "seed: int = 0" in done.stdout
    assert (
        "each split is a list of files,\n    folders and globs (`data/*.jsonl`), local or gs:// URIs.\n" in done.stdout
    )
    assert all(
        field.path.split(".")[0] in RunConfig.model_fields or "(" in field.path for field in list_fields(RunConfig)
    )


@pytest.mark.parametrize(
    ("section", "first", "others"),
    [
        ("distill", "distill: section", "distill."),
        ("distill.sampling", "distill.sampling: section", "distill.sampling."),
        ("data.source.columns", "data.source.columns: section", "data.source.columns."),
        ("seed", "seed: int = 0", "seed"),
    ],
)
def test_config_lists_one_section(skd: Skd, section: str, first: str, others: str):
    done = skd("config", section)
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert lines[0] == first
    assert all(line.startswith(others) for line in lines[1:])
    assert ("top_k" in done.stdout) == section.startswith("distill")


@pytest.mark.parametrize(
    ("section", "hint"),
    [
        ("distil", "did you mean `distill`?"),
        ("gamma", "did you mean `distill.sampling.gamma`?"),
        ("nothing", "a section of name, teacher,"),
    ],
)
def test_config_of_an_unknown_section_says_what_is_meant(skd: Skd, section: str, hint: str):
    done = skd("config", section)
    assert done.returncode == 2
    assert f"no section or field `{section}`\n  hint: {hint}" in done.stderr


def test_config_schema_is_json_schema(skd: Skd):
    schema = json.loads(skd("config", "schema").stdout)
    assert schema["title"] == "RunConfig"
    assert "DistillConfig" in schema["$defs"]
    # An editor shows each field's meaning, and offers a number or a schedule.
    top_k = schema["$defs"]["InterleavedConfig"]["properties"]["top_k"]
    assert "teacher's K most likely" in top_k["description"]
    assert {kind.get("type", "schedule") for kind in top_k["oneOf"]} == {"integer", "schedule"}


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines/configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_configuration_is_valid(skd: Skd, path: Path):
    done = skd("compare" if path.stem.startswith("compare-") else "run", path, "--dry-run")
    if path.stem == "draft":  # its log is the user's own
        assert done.stderr.startswith("error: requests.jsonl: cannot read")
    else:
        assert done.returncode == 0, done.stderr


def test_a_part_of_a_file_is_not_taken_for_all_of_it(skd: Skd, tmp_path: Path):
    """A dry run reads 5,000 rows, of which `data.redact` may leave any number."""
    file = tmp_path / "rows.jsonl"
    sources = ["drop"] * 4_999 + [f"a {index}" for index in range(1_001)]
    file.write_text("\n".join(json.dumps({"source": source, "target": "b"}) for source in sources))
    source = {"type": "files", "train": [str(file)]}
    data = {"source": source, "redact": [{"pattern": "drop", "replacement": ""}]}
    values = {"name": "a", "teacher": "org/teacher", "student": "org/student", "data": data}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    done = skd("run", tmp_path / "config.yaml", "--dry-run", "--runs-dir", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert "splits" not in done.stdout
