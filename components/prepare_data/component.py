"""KFP component `prepare_data`: turn the data source into train, validation and test sets."""

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def prepare_data(
    data_config: str,
    data_fingerprint: str,
    seed: int,
    data: dsl.Output[dsl.Dataset],
    fingerprint: dsl.OutputPath(str),
    tracking_uri: str = "",
    experiment: str = "skd",
) -> dsl.ContainerSpec:
    """Turn the data source into train, validation and test sets.

    Removes exact and near duplicates across splits and writes a manifest with row counts, digests and a fingerprint.

    Args:
        data_config: Where examples come from and how they are split (section `data`).
        data_fingerprint: Fingerprint of the source, from preflight: part of the cache key.
        seed: Seed of the splits.
        tracking_uri: MLflow tracking server; empty turns tracking off.
        experiment: MLflow experiment.

    Returns:
        data: Folder with the splits as JSONL and `manifest.json`.
        fingerprint: Fingerprint of the prepared data.
    """
    return run_step(
        "prepare_data",
        TRAIN,
        {
            "data_config": data_config,
            "data_fingerprint": data_fingerprint,
            "seed": seed,
            "tracking_uri": tracking_uri,
            "experiment": experiment,
            "data_out": data.path,
        },
    )
