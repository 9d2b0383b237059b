"""Options that several steps have.

Where things are kept is no matter of a step's results, so on a cluster these come from the environment: as arguments
they would be part of Kubeflow's cache key, and another place would run everything again.
"""

from typing import Annotated

import typer

TRACKING_URI_VARIABLE = "SKD_TRACKING_URI"
EXPERIMENT_VARIABLE = "SKD_EXPERIMENT"
CHECKPOINT_ROOT_VARIABLE = "SKD_CHECKPOINT_ROOT"

TrackingUri = Annotated[
    str, typer.Option(envvar=TRACKING_URI_VARIABLE, help="MLflow tracking URI; empty: no tracking.")
]
Experiment = Annotated[
    str,
    typer.Option(envvar=EXPERIMENT_VARIABLE, help="MLflow experiment for a pipeline run that is in none yet."),
]
CheckpointRoot = Annotated[
    str,
    typer.Option(envvar=CHECKPOINT_ROOT_VARIABLE, help="Folder or URI of storage that outlives the pod; empty: none."),
]
