"""What holds of the workflows, beyond what actionlint and zizmor know."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".github/workflows"
WORKFLOWS: dict[str, Any] = {
    # YAML 1.1, which PyYAML reads, takes the key `on` for true.
    path.stem: yaml.safe_load(re.sub(r"^on:", '"on":', path.read_text(), flags=re.MULTILINE))
    for path in FOLDER.glob("*.yml")
}
RELEASE = WORKFLOWS["release"]["jobs"]


def steps(job: dict[str, Any]) -> list[dict[str, Any]]:
    return list(job.get("steps", []))


def test_actions_are_named_by_commit_and_everywhere_by_the_same():
    uses = [
        found
        for path in FOLDER.glob("*.yml")
        for found in re.findall(r"uses: ([\w-]+/[\w./-]+)@(.+)$", path.read_text(), re.MULTILINE)
    ]
    assert len(uses) > 20
    commits: dict[str, set[str]] = {}
    for action, version in uses:
        assert re.match(r"[0-9a-f]{40} # v\d+\.\d+\.\d+", version), f"{action}@{version}"
        commits.setdefault(action, set()).add(version[:40])
    assert {action for action, found in commits.items() if len(found) > 1} == set()


def test_the_tested_versions_of_python_are_those_that_the_package_names():
    matrix = WORKFLOWS["tests"]["jobs"]["check"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r"Python :: 3\.\d", line)]
    assert named == matrix
    assert project["requires-python"] == f">={matrix[0]}"


def test_what_publishes_to_pypi_can_do_nothing_else():
    job = RELEASE["pypi"]
    assert job["environment"]["name"] == "pypi"
    assert job["permissions"] == {"id-token": "write"}
    assert [step["uses"].partition("@")[0] for step in steps(job)] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]


def test_code_of_dependencies_runs_only_where_nothing_can_be_written():
    for name, job in RELEASE.items():
        if any("pip install" in step.get("run", "") for step in steps(job)):
            assert "write" not in job["permissions"].values(), name


def test_a_release_goes_in_the_order_that_digests_need():
    def before(job: str) -> set[str]:
        needs = RELEASE[job].get("needs", [])
        direct = {needs} if isinstance(needs, str) else set(needs)
        return direct.union(*map(before, direct))

    assert before("images") >= {"check", "tests"}
    assert before("pipeline") >= {"images", "pin"}
    assert before("build") >= {"pipeline"}
    assert before("pypi") >= {"build"}
    assert before("github") == RELEASE.keys() - {"github"}


@pytest.mark.parametrize("called", sorted({job["uses"] for job in RELEASE.values() if "uses" in job}))
def test_a_called_workflow_does_not_wait_for_its_caller(called: str):
    """A group of concurrency that both are in would cancel one of them."""
    workflow = WORKFLOWS[Path(called).stem]
    assert "workflow_call" in workflow["on"]
    group = workflow.get("concurrency", {}).get("group", "none")
    assert group.partition("${{")[0] or group == "none", "begin the group with a word of its own"
    assert group != WORKFLOWS["release"]["concurrency"]["group"]


def test_the_scripts_that_workflows_run_exist():
    text = "".join(path.read_text() for path in FOLDER.glob("*.yml"))
    scripts = set(re.findall(r"(?:python )?(images/tools/[\w.]+)", text))
    assert {"images/tools/pin.sh", "images/tools/release.py", "images/tools/image_tools.py"} <= scripts
    for script in scripts:
        assert (ROOT / script).is_file()
        assert script.endswith(".py") or os.access(ROOT / script, os.X_OK)
