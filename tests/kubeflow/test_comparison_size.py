"""The largest comparison that is let into a cluster is one that Argo keeps."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from skd_kfp.pipelines.compiling import compiled_path
from skd_kfp.pipelines.kubeflow.sizes import ARGUMENT, KEPT, Sizes, expected, measure, too_large
from skd_kfp.pipelines.kubeflow.submit import Package
from skd_lib.comparison.config import load_compare
from skd_lib.comparison.plan import MOST_TRIALS_ON_A_CLUSTER, plan, to_parameters

CONFIGS = Path(__file__).parents[2] / "pipelines/configs"


@functools.lru_cache
def sizes(path: Path) -> Sizes:
    """With the manifests of Kubeflow Pipelines 2.17.0, which keep each node twice."""
    compare, base = load_compare(path)
    planned = plan(compare, base, where=str(path))
    assert len(planned.trials) == MOST_TRIALS_ON_A_CLUSTER
    documents = Package.read(compiled_path("compare_methods")).documents
    return measure(documents, to_parameters(compare, base), expected(base, planned), wrapped=True)


def test_the_largest_comparison_is_kept(tmp_path: Path) -> None:
    """With drafts, and variants that differ in much: each is a text of its own in several places."""
    variants = {
        f"schedule-{number}-of-several": {
            "distill.sampling.top_k": {"start": number, "end": 1, "shape": "cosine"},
            "distill.training.learning_rate": number * 1e-5,
            "student_init.keep_first": number,
        }
        for number in range(1, MOST_TRIALS_ON_A_CLUSTER // 2 + 1)
    }
    fields = {"base": str(CONFIGS / "demo.yaml"), "variants": variants, "seeds": [0, 1], "drafts": True}
    file = tmp_path / "large.yaml"
    file.write_text(json.dumps({"name": "large", **fields}), encoding="utf-8")
    found = sizes(file)
    assert found.compressed < KEPT
    assert found.argument < ARGUMENT
    assert too_large(found) == []
