"""Tasks by name: each is one YAML file with fields of the configuration's section `task`, here or anywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skd_lib import storage
from skd_lib._core.documents import parse_yaml
from skd_lib.errors import SkdError

FOLDER = Path(__file__).parent
ENDINGS = (".yaml", ".yml")


def known_tasks() -> tuple[str, ...]:
    """Names of the tasks that come with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def read_task(name: str) -> dict[str, Any]:
    """Return the fields of a task, `name` among them.

    `name` is one of `known_tasks`, or a YAML file: a path, from where the command runs, or a gs:// URI.
    """
    if name.endswith(ENDINGS):
        where, title = name, name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    elif name in known_tasks():
        where, title = str(FOLDER / f"{name}.yaml"), name
    else:
        hint = f"known tasks: {', '.join(known_tasks())}; a task of your own is the path of a .yaml file"
        raise SkdError(f"unknown task {name!r}", hint=hint)
    try:
        text = storage.read_bytes(where).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SkdError(f"not UTF-8 text: {error}", where=where) from error
    values = parse_yaml(text, where=where)
    if not isinstance(values, dict):
        hint = "see docs/guides/tasks.md for an example"
        raise SkdError("a task must be a mapping of fields", where=where, hint=hint)
    return {**values, "name": title}
