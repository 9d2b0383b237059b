"""Checks of what the comparison with the registered champion needs at the end of this run, and of later ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from skd_lib import storage
from skd_lib.errors import SkdError
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.environment import impatient
from skd_lib.preflight.patience import bounded

if TYPE_CHECKING:
    from skd_lib.tracking.registry import Champion


def check_champion(checks: Checks, tracking_uri: str, model_name: str) -> None:
    """Whether the files of the registered champion can be read, if there is one; they are listed, not fetched.

    A registry that does not answer is not reported: steps wait for it. One that refuses would refuse them, too.
    """
    from skd_lib.tracking.champions import REMEDY
    from skd_lib.tracking.registry import Silent
    from skd_lib.tracking.registry import champion as registered

    try:
        with impatient():
            champion = registered(tracking_uri=tracking_uri, model_name=model_name)
    except Silent:
        return
    except SkdError as error:
        hint = (
            "give the account of the run's steps (in a cluster the Secret `skd-mlflow`) the right to read and register "
            f"the model `{model_name}`, or name another one in `registry.model_name`"
        )
        checks.add("champion", "error", error.what, where=error.where, hint=hint)
        return
    if champion is None:
        return
    try:
        bounded(partial(_look, champion), champion.weights_uri)
    except SkdError as error:
        what = f"the champion (version {champion.version}) cannot be compared with: {error.what}"
        hint = REMEDY if isinstance(error, storage.Missing) else f"{error.hint}; or {REMEDY}"
        where = champion.weights_uri or f"registered model `{model_name}`"
        checks.add("champion", "error", what, where=where, hint=hint)
    else:
        checks.add("champion", "ok", f"version {champion.version}: its files are there")


def check_readable(checks: Checks, uri: str, *, by_nodes: bool) -> None:
    """Whether what is written to the pipeline's root can be read there by this package; Kubeflow has its own means.

    Args:
        checks: Takes what is found.
        uri: Where an artifact of this run is written.
        by_nodes: Whether nodes of a TrainJob read it in this run: an error. Otherwise only later runs do: a warning.
    """
    if "://" not in uri:
        return
    try:
        bounded(partial(storage.file_sizes, uri), uri)
    except SkdError as error:
        who = "the nodes of a TrainJob" if by_nodes else "later runs, which compare with the registered student,"
        what = f"{who} cannot read this run's artifacts: {error.what}"
        checks.add("artifacts", "error" if by_nodes else "warning", what, where=uri, hint=error.hint)


def _look(champion: Champion) -> None:
    from skd_lib.models.files import check_model_folder

    uri = champion.weights_uri
    if not uri:
        raise storage.Missing("its version in the registry does not say where its weights are")
    if not storage.is_remote(uri):
        storage.check_kind(uri)
        if not Path(uri).is_dir():
            raise storage.Missing("there is no such folder")
        return check_model_folder(Path(uri))
    names = storage.file_sizes(uri)
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise storage.Missing("its config and weights are not there")
    return None
