"""Options that several steps have.

Where things are kept is no matter of a step's results, so on a cluster these come from the environment: as arguments
they would be part of Kubeflow's cache key, and another place would run everything again.
"""

from typing import Annotated

import typer

TrackingUri = Annotated[str, typer.Option(envvar="SKD_TRACKING_URI", help="MLflow tracking URI; empty: no tracking.")]
Experiment = Annotated[str, typer.Option(envvar="SKD_EXPERIMENT", help="MLflow experiment.")]
