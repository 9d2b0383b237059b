"""Step `prepare_data`: read the source, split it, drop duplicates across splits, write the splits and a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skd_lib.config import parse_json, parse_section
from skd_lib.config.step import STEP_HELP, StepConfig
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.steps.runtime import CheckpointRoot, Experiment, StepIO, TrackingUri, run_step


def main(
    config: Annotated[str, typer.Option(help=f"{STEP_HELP}: `data`, `seed`, `fingerprint`, `fresh`.")],
    data_out: Annotated[
        Path,
        typer.Option(
            help="Folder for train_teacher.jsonl, train_student.jsonl, validation.jsonl, test.jsonl, "
            "held_out/NAME.jsonl and manifest.json."
        ),
    ],
    problems: Annotated[
        str, typer.Option(help="What preflight found wrong on a cluster, as a JSON list; empty: nothing.")
    ] = "",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
    checkpoint_root: CheckpointRoot = "",
) -> None:
    """Turn a source of examples into train, validation and test splits for teacher and student."""
    from skd_lib.data.prepared import data_fingerprint, prepare
    from skd_lib.preflight.reuse import keep
    from skd_lib.tracking.runs import step_run

    io = StepIO({"data": data_out})
    if problems:
        lines = parse_json(problems, where="--problems")
        raise SkdErrors([SkdError(f"preflight: {line}", hint="its report says more") for line in lines])
    own = parse_section(StepConfig, config, where="--config")
    if own.data is None:
        raise SkdError("section `data` is missing", where="--config", hint="name the data's source")
    with step_run(
        step="prepare_data",
        tracking_uri=tracking_uri,
        experiment=experiment,
        params={"data": own.data.model_dump(mode="json"), "seed": own.seed},
    ) as run:
        if own.fingerprint and own.fingerprint != data_fingerprint(own.data):
            # The fingerprint is this step's cache key: other data must never be kept under it.
            raise SkdError(
                "the data changed after preflight looked at it", where="data.source", hint="start the run again"
            )
        data = prepare(own.data, data_out, seed=own.seed)
        rows, dropped = data.manifest["rows"], data.manifest["dropped"]
        source = io.output_uri("data")
        for name, count in rows.items():
            context = next((use for use in ("train", "validation") if name.startswith(use)), "test")
            digest = data.manifest["sha256"][f"{name}.jsonl"]
            run.log_dataset(name, digest, f"{source}/{name}.jsonl", context, rows=count)
        run.log_metrics({f"rows_{name}": float(count) for name, count in rows.items()})
        run.log_artifact(data_out / "manifest.json")
        run.set_tags({"data_fingerprint": data.fingerprint})
    for name, count in rows.items():
        print(f"{name}: {count} examples")
    for reason, count in dropped.items():
        print(f"dropped, {reason}: {count}")
    for name, reason in data.missing.items():
        print(f"held-out set {name} is missing: {reason}")
    io.write()
    keep(checkpoint_root, own.fresh)


if __name__ == "__main__":
    run_step(main)
