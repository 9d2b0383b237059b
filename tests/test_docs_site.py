"""The pages of the site that are made from the code, or must agree with it."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = DOCS / "tutorials/train-in-python.ipynb"
PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.1-8B": 8_030_261_248,
}
"""Weights of the models on the hub's pages."""
OF_COMPARISONS = {"compare_table", "compare_variant", "evaluate", "show"}


@pytest.fixture(scope="module")
def sizing() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "sizing.py"))


def test_the_tables_of_memory_are_up_to_date(sizing: dict[str, Any]) -> None:
    page = (DOCS / "guides/sizing.md").read_text(encoding="utf-8")
    assert sizing["written"](page) == page, "run python docs/sizing.py"
    assert page.count("Llama-3.1-70B") == 1 + 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["planning", "kubeflow-gpus"])
def test_the_tables_of_plans_are_those_of_their_commands(sizing: dict[str, Any], name: str) -> None:
    page = (DOCS / "guides" / f"{name}.md").read_text(encoding="utf-8")
    assert sizing["written"](page) == page, "run python docs/sizing.py"
    assert "written by docs/sizing.py" in page


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_models_of_the_tables_have_their_real_size(sizing: dict[str, Any], name: str) -> None:
    assert sizing["config_size"](sizing["MODELS"][name]).parameters == PUBLISHED[name]


@pytest.mark.parametrize("drawing", sorted(DOCS.glob("concepts/*.svg")), ids=lambda path: path.stem)
def test_drawings_are_described_for_those_who_do_not_see_them(drawing: Path) -> None:
    root = ElementTree.parse(drawing).getroot()  # noqa: S314 - our own file
    texts = {name: root.findtext(f"{{http://www.w3.org/2000/svg}}{name}") for name in ("title", "desc")}
    assert root.get("aria-labelledby") == "title desc"
    assert all(texts.values())


def test_the_drawing_and_the_table_of_the_steps_have_all_of_them() -> None:
    steps = {
        path.name
        for path in (DOCS.parent / "components").iterdir()
        if (path / "component.py").is_file() and path.name not in OF_COMPARISONS
    }
    page, drawing = (
        (DOCS / "concepts" / name).read_text(encoding="utf-8") for name in ("architecture.md", "pipeline.svg")
    )
    assert len(steps) > 10
    assert steps <= set(re.findall(r"`(\w+)`", page))
    assert steps <= set(re.findall(r">(\w+)</text>", drawing))


def test_the_messages_of_the_page_on_troubleshooting_are_those_of_the_code() -> None:
    page = (DOCS / "guides/troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \| ", page, flags=re.MULTILINE)
    quoted = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 40
    texts = sorted(_texts())
    missing = [message for message in quoted if not any(_says(text, message) for text in texts)]
    assert missing == []


def _says(text: str, message: str) -> bool:
    """Return whether the parts of a message that do not differ are in a text, in this order."""
    return (
        re.search(r".*".join(re.escape(part.strip()) for part in message.split("…")), text, flags=re.DOTALL) is not None
    )


def _texts() -> set[str]:
    """Return the texts of the product's code, with a star for what is filled in."""
    found = set()
    for folder in ("skd_lib", "pipelines"):
        for path in (DOCS.parent / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values]
                    found.add("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_the_notebooks_output_is_that_of_one_execution_without_errors() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.get("name") for cell in cells for output in cell.outputs} == {"stdout"}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    printed = [_prints(cell) for cell in notebook.cells]
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert [_prints(cell) for cell in notebook.cells] == printed


def _prints(cell: Any) -> bool:
    return any(output.get("name") == "stdout" for output in cell.get("outputs", []))
