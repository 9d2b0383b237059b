"""Submitting comparisons, and runs that need more than one machine."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from skd_kfp.pipelines.cli import app
from skd_kfp.pipelines.kubeflow.submit import Package, Submission, Target
from skd_lib.comparison.config import load_compare
from skd_lib.comparison.plan import MOST_TRIALS_ON_A_CLUSTER, from_parameters, plan, to_parameters
from skd_lib.config import RunConfig
from skd_lib.errors import SkdError, SkdErrors
from tests.kubeflow import small
from tests.kubeflow.conftest import DEMO
from tests.kubeflow.fake_kfp import FakeKfp

EXAMPLE = DEMO.parent / "compare-demo.yaml"
MULTINODE = {"nodes": 2, "resources": {"cpu": "2"}}


@functools.lru_cache
def package() -> Package:
    """A small pipeline with the parameters of a comparison."""
    parameters = {*to_parameters(*load_compare(EXAMPLE)), "mlflow_experiment", "settings", "reuse"}
    path = Path(tempfile.mkdtemp()) / "small.yaml"
    path.write_text(yaml.safe_dump_all(small.make(sorted(parameters), loop=True)), encoding="utf-8")
    return Package.read(path)


def skd(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def comparison(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps({"name": "c", "base": str(DEMO), **fields}), encoding="utf-8")
    return path


def test_a_comparison_is_started_by_its_file(kfp: FakeKfp):
    done = skd("submit", EXAMPLE, "--host", kfp.host, "--pipeline", package().path, "--set", "seed=7", "--no-reuse")
    assert done.exit_code == 0, done.output
    (run,) = kfp.runs
    assert run["display_name"].startswith("compare-demo-2")
    given = run["runtime_config"]["parameters"]
    assert given["reuse"] is False
    assert "runs         10, see `skd compare FILE --dry-run`\n" in done.output
    fields = {name: value for name, value in given.items() if name not in ("mlflow_experiment", "settings", "reuse")}
    planned = from_parameters(**fields)
    assert planned.trials == plan(*load_compare(EXAMPLE), where="").trials
    assert (planned.base.name, planned.base.seed) == ("compare-demo", 7)
    assert planned.base.distill.training.max_steps == 20


def test_a_comparison_may_be_recurring_and_dry(kfp: FakeKfp):
    arguments = ("submit", EXAMPLE, "--host", kfp.host, "--pipeline", package().path, "--recurring", "0 3 * * 1")
    done = skd(*arguments, "--dry-run")
    assert done.exit_code == 0, done.output
    assert (
        "schedule     0 0 3 * * 1 (second, minute, hour, day of the month, month, day of the week; UTC)" in done.output
    )
    assert not kfp.requests
    assert skd(*arguments).exit_code == 0
    assert [each["display_name"] for each in kfp.recurring_runs] == ["compare-demo"]


def test_a_file_of_the_other_kind_is_named_in_one_sentence(tmp_path: Path):
    own = "the file is that of a run, and this pipeline is for a comparison"
    assert own in str(skd("submit", DEMO, "--pipeline", package().path).exception)
    own = "the file is that of a comparison, and this pipeline is for a run"
    assert own in str(skd("submit", EXAMPLE, "--pipeline", small.package().path).exception)
    for command in (["run"], ["trigger", "gs://b/data", "--config"]):
        error = skd(*command, EXAMPLE).exception
        assert str(error).startswith(
            f"{EXAMPLE}: this is the file of a comparison, not of a run\n  hint: `skd compare`"
        )
    error = skd("compare", DEMO).exception
    assert str(error).startswith(f"{DEMO}: this is the file of a run, not of a comparison\n  hint: `skd run`")
    with pytest.raises(SkdError, match="this is a comparison, not a run"):
        from_parameters("{}", config=str(EXAMPLE))
    with pytest.raises(SkdError, match="this is a run, not a comparison"):
        from_parameters(str(DEMO))


def test_a_comparison_that_is_too_large_for_a_cluster_is_refused(
    kfp: FakeKfp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fits = comparison(tmp_path / "fits.yaml", seeds=list(range(MOST_TRIALS_ON_A_CLUSTER)))
    large = comparison(tmp_path / "large.yaml", seeds=list(range(MOST_TRIALS_ON_A_CLUSTER + 1)))
    arguments = ("--host", kfp.host, "--pipeline", package().path)
    assert skd("submit", fits, *arguments, "--dry-run").exit_code == 0
    error = str(skd("submit", large, *arguments).exception)
    what = f"{MOST_TRIALS_ON_A_CLUSTER + 1} runs; in a cluster a comparison has at most {MOST_TRIALS_ON_A_CLUSTER}"
    assert f"c: {what}\n  hint: make several comparisons of it" in error
    assert not kfp.requests
    form = to_parameters(*load_compare(large))
    assert len(from_parameters(**form).trials) == MOST_TRIALS_ON_A_CLUSTER + 1
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert from_parameters(**form)  # in a notebook
    monkeypatch.setenv("KFP_POD_NAME", "preflight-1")
    with pytest.raises(SkdError, match=what):
        from_parameters(**form)
    assert from_parameters(**to_parameters(*load_compare(fits)))


def test_what_a_variant_or_a_held_out_set_needs_has_to_be_in_reach(demo: RunConfig, tmp_path: Path):
    inits = {"near": {"student": "./student"}, "far": {"student": "org/student"}}
    held_out = [{"name": "h", "source": {"type": "files", "files": ["held.jsonl"]}}]
    path = comparison(tmp_path / "c.yaml", student_inits=inits, overrides={"data.held_out": held_out})
    planned = plan(*load_compare(path), where="c.yaml")
    with pytest.raises(SkdErrors) as error:
        Submission.plan(planned.base, package(), Target(), comparison=planned)
    assert [each.brief for each in error.value.errors] == [
        "data.held_out (h): held.jsonl: the cluster cannot read a file of this machine",
        "student: ./student: the cluster cannot read a folder of this machine",
    ]


def test_nodes_need_a_pipeline_root_that_they_can_read(demo: RunConfig):
    def planned(root: str) -> Submission:
        distill = demo.distill.model_copy(update={"multinode": multinode})
        target = Target(pipeline_root=root)
        return Submission.plan(demo.model_copy(update={"distill": distill}), small.package(), target)

    multinode = RunConfig.model_validate(
        {**demo.model_dump(exclude={"distill"}), "distill": {"multinode": MULTINODE}}
    ).distill.multinode
    for root in ("ftp://host/artifacts", "/mnt/artifacts"):
        with pytest.raises(SkdErrors, match=r"--pipeline-root .*: `multinode` cannot work there"):
            planned(root)
    assert "--pipeline-root gs://" in planned("").describe()["multinode"]
    assert "multinode" not in planned("gs://b/root").describe()
    assert "multinode" not in Submission.plan(demo, small.package(), Target()).describe()
