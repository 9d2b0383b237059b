"""KFP component `prepare_data`: turn the data source into train, validation and test sets."""

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def prepare_data(
    data_config: str,
    data_fingerprint: str,
    seed: int,
    fresh: str,
    problems: str,
    data: dsl.Output[dsl.Dataset],
    fingerprint: dsl.OutputPath(str),
) -> dsl.ContainerSpec:
    """Turn the data source into train, validation and test sets.

    Removes exact and near duplicates across splits and writes a manifest with row counts, digests and a fingerprint.

    Args:
        data_config: Where examples come from and how they are split (section `data`).
        data_fingerprint: Fingerprint of the source, from preflight: part of the cache key.
        seed: Seed of the splits.
        fresh: Part of the cache key and of nothing else: another text has the step done again.
        problems: What preflight found wrong; the step fails with it.

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
            "fresh": fresh,
            "problems": problems,
            "data_out": data.path,
        },
        {"data": data, "fingerprint": fingerprint},
    )
