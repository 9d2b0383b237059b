"""Make the pages of the site that are not files of docs/: the README, the reference, ..."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
COPIED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
}
"""Files of the root, and the pages they become."""
API = """# Python

All names of `skd_lib`; [the guide](../guides/python.md) shows them in use.

"""
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    import skd_lib

    pages = {page: (ROOT / file).read_text(encoding="utf-8") for file, page in COPIED.items()}
    pages["reference/python.md"] = API + "\n".join(f"::: skd_lib.{name}\n" for name in skd_lib.__all__)
    pages["reference/command-line.md"] = _command_line()
    pages["reference/configuration.md"] = _configuration()
    for notebook in (ROOT / "docs").rglob("*.ipynb"):
        page = notebook.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        pages[page] = _notebook(json.loads(notebook.read_text(encoding="utf-8")), notebook.relative_to(ROOT).as_posix())
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links lead to pages of the site; what is no page is named instead."""
    here = page.file.src_uri
    source = next((file for file, copy in COPIED.items() if copy == here), f"docs/{here}")
    depth = "../" * here.count("/")

    def replaced(match: re.Match[str]) -> str:
        sign, label, path, anchor = match.groups()
        target = (ROOT / source).parent.joinpath(path).resolve()
        if not target.is_relative_to(ROOT):
            return match[0]
        name = target.relative_to(ROOT).as_posix()
        at = COPIED.get(name) or (name.removeprefix("docs/").replace(".ipynb", ".md") if _is_page(name) else None)
        return label if at is None else f"{sign}[{label}]({depth}{at}{anchor or ''})"

    return LINK.sub(replaced, markdown)


def _is_page(name: str) -> bool:
    return name.startswith("docs/") and name.endswith((".md", ".ipynb", ".png", ".svg"))


def _notebook(notebook: dict[str, Any], path: str) -> str:
    """Return an executed notebook as a page: its texts, its code, and what the code printed."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            printed = output.get("text") or output.get("data", {}).get("text/plain", [])
            parts.append("```{ .text .output }\n" + "".join(printed).rstrip() + "\n```")
    parts.insert(1, f"*This page is a notebook, `{path}`, with the output of its execution.*")
    return "\n\n".join(parts) + "\n"


def _command_line() -> str:
    command = [sys.executable, "-m", "typer", "skd_kfp.pipelines.cli", "utils", "docs", "--name", "skd"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return text.replace("# `skd`", "# Command line", 1)


def _configuration() -> str:
    from skd_lib.config import RunConfig
    from skd_lib.config.fields import list_fields

    rows = [
        "# Configuration\n",
        "Every field of a run's YAML file, as `skd config` lists them; `skd config schema` is for editors.\n",
        "| field | type and default | meaning |\n| --- | --- | --- |",
    ]
    for field in list_fields(RunConfig):
        cells = (f"`{field.path}`", f"{field.type}{field.default}", field.description)
        rows.append(
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for cell in cells) + " |"
        )
    return "\n".join(rows) + "\n"
