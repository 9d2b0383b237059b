"""A model of Kubeflow Pipelines' backend, for tests: its driver, cache, last states and retries, and Argo's nodes.

Each rule names its source and whether it was seen in a real backend (2.17.0 and 2.16.1, with Argo 4.0.8) or read there.
Node statuses and their sizes are modelled by `skd_kfp.pipelines.kubeflow.sizes`, which is part of the product.
"""

from tests.kubeflow.backend.driver import DriverError
from tests.kubeflow.backend.records import Records
from tests.kubeflow.backend.run import Call, Made, Run, StepFailed, StepKilled
from tests.kubeflow.backend.versions import NEXT, V2_15, V2_16, V2_17, VERSIONS, Version

__all__ = [
    "NEXT", "V2_15", "V2_16", "V2_17", "VERSIONS",
    "Call", "DriverError", "Made", "Records", "Run", "StepFailed", "StepKilled", "Version",
]  # fmt: skip
