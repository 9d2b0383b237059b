"""Step `prepare_data`: read the source, split it, drop duplicates across splits, write the splits and a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skd_lib.config import DataConfig, parse_json, parse_section
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.steps.options import Experiment, TrackingUri
from skd_lib.steps.runtime import FRESH_HELP, StepIO, run_step


def main(
    data_config: Annotated[str, typer.Option(help="The section `data` of the run's configuration, as JSON.")],
    data_out: Annotated[
        Path,
        typer.Option(
            help="Folder for train_teacher.jsonl, train_student.jsonl, validation.jsonl, test.jsonl, "
            "held_out/NAME.jsonl and manifest.json."
        ),
    ],
    data_fingerprint: Annotated[
        str, typer.Option(help="Fingerprint of the source as preflight found it; empty: not compared.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the splits.")] = 0,
    fresh: Annotated[str, typer.Option(help=FRESH_HELP)] = "",  # noqa: ARG001 - Kubeflow reads it
    problems: Annotated[
        str, typer.Option(help="What preflight found wrong on a cluster, as a JSON list; empty: nothing.")
    ] = "",
    tracking_uri: TrackingUri = "",
    experiment: Experiment = "skd",
) -> None:
    """Turn a source of examples into train, validation and test splits for teacher and student."""
    from skd_lib.data.manifest import data_fingerprint as fingerprint_now
    from skd_lib.data.prepared import prepare
    from skd_lib.tracking.runs import step_run

    io = StepIO({"data": data_out})
    if problems:
        lines = parse_json(problems, where="--problems")
        raise SkdErrors([SkdError(f"preflight: {line}", hint="its report says more") for line in lines])
    config = parse_section(DataConfig, data_config, where="--data-config")
    with step_run(
        step="prepare_data",
        tracking_uri=tracking_uri,
        experiment=experiment,
        params={"data": config.model_dump(mode="json"), "seed": seed},
    ) as run:
        if data_fingerprint and data_fingerprint != fingerprint_now(config):
            # The fingerprint is this step's cache key: other data must never be kept under it.
            raise SkdError(
                "the data changed after preflight looked at it", where="data.source", hint="start the run again"
            )
        data = prepare(config, data_out, seed=seed)
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
    io.parameter("fingerprint", data.fingerprint)
    io.write()


if __name__ == "__main__":
    run_step(main)
