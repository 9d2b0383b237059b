"""KFP component `prepare_data`: turn the data source into train, validation and test sets."""

from kfp import dsl

from skd_kfp.components.command import run_step
from skd_kfp.components.images import TRAIN


@dsl.container_component
def prepare_data(
    config: str,
    problems: str,
    data: dsl.Output[dsl.Dataset],
) -> dsl.ContainerSpec:
    """Turn the data source into train, validation and test sets.

    Removes exact and near duplicates across splits and writes a manifest with row counts, digests and a fingerprint.

    Args:
        config: The run's settings that this step depends on, as JSON: `data`, `seed`, `fingerprint`, `fresh`.
        problems: What preflight found wrong; the step fails with it.

    Returns:
        data: Folder with the splits as JSONL and `manifest.json`.
    """
    return run_step(
        "prepare_data",
        TRAIN,
        {"config": config, "problems": problems, "data_out": data.path},
        {"data": data},
    )
