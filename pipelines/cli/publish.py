"""`skd card` and `skd push`: a trained model for other people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skd_kfp.pipelines.cli.options import AsJson, RunsDir, say_json, short
from skd_lib._core.terminal import say
from skd_lib.errors import SkdError

Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL", help="Folder of a finished run, its name under RUNS_DIR, or folder of a model it trained."
    ),
]
Teacher = Annotated[str, typer.Option(help="Hub id or folder of the fine-tuned teacher, for the card's vLLM command.")]
Licence = Annotated[
    str, typer.Option("--license", metavar="ID", help="The model's licence as the hub names it, e.g. apache-2.0.")
]


def card(
    model: Model,
    output: Annotated[Path | None, typer.Option(help="File to write.", show_default="print it")] = None,
    reference: Annotated[
        str, typer.Option("--as", metavar="ID", help="Hub id or folder by which readers load it.")
    ] = "",
    teacher: Teacher = "",
    license_: Licence = "",
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Write the model card of a run's student: what it is, how to load it, its figures, data, lineage and settings.

    The card that training saves with the model has no figures, since they are measured later. This one has, and
    `skd push` uploads it. Examples: `skd card demo`, `skd card runs/demo/teacher --output README.md`.
    """
    from skd_lib.report.card import find_trained
    from skd_lib.storage import write_text_atomic

    text = find_trained(model, runs_dir).card(reference=reference, teacher=teacher, licence=license_)
    if output is None:
        say(text.rstrip("\n"))
        return
    write_text_atomic(output, text)
    say(short(output))


def push(
    model: Model,
    repository: Annotated[str, typer.Argument(metavar="HUB_ID", help="Repository of the hub: ORG/NAME or USER/NAME.")],
    public: Annotated[
        bool | None, typer.Option("--public/--private", help="Who sees it; one of the two is needed.")
    ] = None,
    teacher: Teacher = "",
    license_: Licence = "",
    message: Annotated[str, typer.Option("--message", "-m", help="Of the commit.", show_default="names the run")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and sizes; upload nothing.")] = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Upload a run's student to the Hugging Face hub, with its model card.

    Uploaded are weights (safetensors), configuration, tokenizer, licence and the card (`skd card` shows it; folders and
    buckets are left out of it), in one commit. Records of the training stay here. The token is that of HF_TOKEN or of
    `hf auth login`. A repository that exists gets a new commit, if it is as public or private as you say.

    Examples: `skd push demo me/my-student --private --dry-run`, `skd push runs/demo/teacher me/my-teacher --private`.
    """
    from rich.filesize import decimal

    from skd_lib.models.publishing import CARD, check_repository, files_to_publish, publish
    from skd_lib.report.card import find_trained

    if public is None:
        hint = "add --private (you and your organisation) or --public (everybody)"
        raise SkdError("it is not said who shall see the model", where="skd push", hint=hint)
    check_repository(repository)
    found = find_trained(model, runs_dir)
    files = files_to_publish(found.folder)
    text = found.card(reference=repository, teacher=teacher, licence=license_, for_others=True)
    sizes = {**{file.name: file.size for file in files}, CARD: len(text.encode())}
    url = ""
    if not dry_run:
        url = publish(files, repository, private=not public, card=text, message=message or f"Upload {found.title}")
    if as_json:
        say_json(
            {
                "repository": repository,
                "visibility": "public" if public else "private",
                "model": str(found.folder),
                "files": [{"name": name, "bytes": count} for name, count in sizes.items()],
                "bytes": sum(sizes.values()),
                "uploaded": not dry_run,
                "url": url,
            }
        )
        return
    for name, count in sizes.items():
        say(f"{decimal(count):>9}  {name}")
    where = f"{repository} ({'public' if public else 'private'})"
    say(f"{decimal(sum(sizes.values())):>9}  in all; {'would go' if dry_run else 'went'} to {where}")
    if url:
        say(url)
