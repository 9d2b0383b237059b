"""The models of a pipeline run as logged models of MLflow 3: its page Models and a run's page show them side by side.

Their weights stay where they are, which the tag `model_uri` says. MLflow looks for metrics under one name for all
models, so they are logged on the run of the step that measured them, where no other figure has such a name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from skd_lib.tracking.locate import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

MADE = "student_after"
"""Role of the model that the pipeline run makes; the others are what it was made from, or is compared with."""
URI_TAG = "model_uri"
ROLE_TAG = "skd.role"
VERSIONS_TAG = "mlflow.modelVersions"
"""Tag by which MLflow's pages find the registered versions of a logged model: JSON."""
_EXTERNAL_TAG = "mlflow.model.isExternal"
_PAGE = 50


class ModelRecord(BaseModel):
    """A model of the run: its role, its place, what is known of its origin, and its figures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    uri: str = ""
    params: dict[str, str] = {}
    figures: dict[str, float] = {}


class LoggedModels(Record):
    """The models of a pipeline run; see `runs.RunLog.log_models`.

    `dataset` is the name and the digest of the data that the figures were measured on.
    """

    kind: Literal["models"] = "models"
    models: list[ModelRecord]
    dataset: tuple[str, str] | None = None

    def send(self, client: MlflowClient, parent: Any, step: Any) -> None:
        """Create the models that are missing, link them with the parent run, and log figures that differ."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput, Metric

        experiment_id = parent.run.info.experiment_id
        known = _known(client, experiment_id, parent.run_id)
        found = {record.role: known.get(record.role) or self._create(client, parent, record) for record in self.models}
        run = client.get_run(parent.run_id)
        linked = {used.model_id for used in run.inputs.model_inputs} if run.inputs else set()
        linked |= {made.model_id for made in run.outputs.model_outputs} if run.outputs else set()
        new = {role: model.model_id for role, model in found.items() if model.model_id not in linked}
        if inputs := [LoggedModelInput(model_id) for role, model_id in new.items() if role != MADE]:
            client.log_inputs(parent.run_id, models=inputs)
        if MADE in new:
            client.log_outputs(parent.run_id, [LoggedModelOutput(new[MADE], step=0)])
        name, digest = self.dataset or (None, None)
        metrics = []
        for record in self.models:
            model = found[record.role]
            there = {metric.key: metric.value for metric in model.metrics or ()}
            metrics += [
                Metric(key, value, self.at, 0, model_id=model.model_id, dataset_name=name, dataset_digest=digest)
                for key, value in record.figures.items()
                if there.get(key) != value
            ]
        if metrics:
            client.log_batch(step.run_id, metrics=metrics)

    def _create(self, client: MlflowClient, parent: Any, record: ModelRecord) -> LoggedModel:
        model = client.create_logged_model(
            parent.run.info.experiment_id,
            name=record.role,
            source_run_id=parent.run_id,
            tags={ROLE_TAG: record.role, URI_TAG: record.uri, _EXTERNAL_TAG: "true"},
            params=record.params,
            model_type=record.role.partition("_")[0],
        )
        return client.finalize_logged_model(model.model_id, "READY")


def model_made(client: MlflowClient, run_id: str) -> LoggedModel | None:
    """Return the logged model that a pipeline run made; None if its parent run `run_id` has none."""
    return _known(client, client.get_run(run_id).info.experiment_id, run_id).get(MADE)


def model_page(model: LoggedModel) -> str:
    """Return the address of a logged model's page below that of the server."""
    return f"#/experiments/{model.experiment_id}/models/{model.model_id}?workflowType=machine_learning"


def name_version(client: MlflowClient, model: LoggedModel, name: str, version: str) -> None:
    """Let a logged model name its registered version, as the page Models shows it.

    A server does so itself for versions that are created with a model's id, but refuses the id where a version points
    into a run, and keeps no id with a version.
    """
    known, this = json.loads(model.tags.get(VERSIONS_TAG) or "[]"), {"name": name, "version": version}
    if this not in known:
        client.set_logged_model_tags(model.model_id, {VERSIONS_TAG: json.dumps([*known, this])})


def _known(client: MlflowClient, experiment_id: str, run_id: str) -> Mapping[str, LoggedModel]:
    wanted = f"source_run_id = '{run_id}'"
    page = client.search_logged_models([experiment_id], filter_string=wanted, max_results=_PAGE)
    return {model.tags.get(ROLE_TAG, ""): model for model in page if str(model.status) == "READY"}
