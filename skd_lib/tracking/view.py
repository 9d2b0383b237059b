"""The runs table of an experiment, with the columns and charts of the headline figures.

MLflow's page keeps such a view in a tag of the experiment (`mlflow.sharedViewState.KEY`, JSON), which its address names
(`viewStateShareKey=KEY`). Fields are those of its file `ExperimentPageUIState.tsx`; it ignores those it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from skd_lib._core.uris import how_to_look, is_sqlite
from skd_lib.errors import SkdError
from skd_lib.tracking.client import TAG_LENGTH, connect, find_experiment, server_address, untaken
from skd_lib.tracking.locate import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

VIEW = "skd"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
_FIRST = ("attributes.`Created`", "params.`skd/method`")
_LAST = ("attributes.`Models`", "attributes.`Dataset`")
_METRIC = "metrics.`{}`"
_LETTER, _MARGIN = 7, 34
"""Width of a column's title, in pixels."""
_LOCAL_SERVER = "http://127.0.0.1:5000"
"""Address at which `mlflow ui` serves, unless another one is asked for."""
_MOST = 24
"""Metrics in one view: those of the last runs, where there are more."""


class View(Record):
    """Metrics that the runs table is to show; see `runs.RunLog.show_metrics`."""

    kind: Literal["view"] = "view"
    metrics: list[str]

    def send(self, client: MlflowClient, target: Any) -> None:
        """Add them to the view of the run's experiment, which is made if there is none."""
        experiment_id = target.run.info.experiment_id
        present = client.get_experiment(experiment_id).tags.get(VIEW_TAG, "")
        shown_now = _metrics_of(present)
        metrics = list(dict.fromkeys([*self.metrics, *shown_now]))[:_MOST]
        if set(metrics) == set(shown_now):
            return
        while len(text := json.dumps(view_state(metrics), separators=(",", ":"))) > TAG_LENGTH:
            metrics.pop()
        client.set_experiment_tag(experiment_id, VIEW_TAG, text)


def view_state(metrics: Sequence[str]) -> dict[str, Any]:
    """Return the state of the page: columns, and a bar chart for each metric, in a section for each name before `/`.

    The page adds charts of the runs' other metrics, and sections of them at the end.
    """
    sections = dict.fromkeys(_section(metric) for metric in metrics)
    charts = [
        {
            "type": "BAR",
            "uuid": f"skd-{metric}",
            "metricKey": metric,
            "metricSectionId": _section(metric),
            "runsCountToCompare": 10,
            "deleted": False,
            "isGenerated": True,
        }
        for metric in metrics
    ]
    columns = {_METRIC.format(metric): _MARGIN + _LETTER * len(metric) for metric in metrics}
    order = [*_FIRST, *columns, *_LAST]
    return {
        "selectedColumns": order[1:],
        "columnOrder": order,
        "columnWidths": columns,
        "compareRunCharts": charts,
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": False, "deleted": False, "isGenerated": True}
            for name in sections
        ],
        "isAccordionReordered": True,  # else the page sorts the sections by name
    }


def where_to_look(tracking_uri: str, experiment: str) -> dict[str, str]:
    """Return how to open an experiment's runs table, by what it is: its address, after a command where there is none.

    Where the store does not answer, the address is the server's.
    """
    command = {"MLflow": how_to_look(tracking_uri)}
    troubles: tuple[type[Exception], ...] = (SkdError, *untaken())
    try:
        found = find_experiment(connect(tracking_uri), experiment)
    except troubles:
        return command
    if found is None:
        return command
    if is_sqlite(tracking_uri):
        return {**command, "its page": f"{_LOCAL_SERVER}/{_runs_page(found.experiment_id)}"}
    return {"MLflow": runs_url(tracking_uri, found.experiment_id) or command["MLflow"]}


def runs_url(tracking_uri: str, experiment_id: str) -> str:
    """Return the address of the experiment's runs table, without credentials; empty where the store is no server."""
    server = server_address(tracking_uri)
    return f"{server}/{_runs_page(experiment_id)}" if server else ""


def _runs_page(experiment_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"


def _metrics_of(text: str) -> list[str]:
    try:
        columns = json.loads(text or "{}").get("selectedColumns", [])
    except (ValueError, AttributeError):  # another program's, or a person's
        return []
    return [name.removeprefix("metrics.`").removesuffix("`") for name in columns if name.startswith("metrics.`")]


def _section(metric: str) -> str:
    return metric.rpartition("/")[0] or "quality"
