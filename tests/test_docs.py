"""What the documentation tells people to write is what the program takes."""

from __future__ import annotations

import inspect
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from skd_lib.comparison.config import CompareConfig, load_compare
from skd_lib.comparison.plan import MOST_TRIALS_ON_A_CLUSTER, plan
from skd_lib.config import DistillConfig, InterleavedConfig, parse_section
from skd_lib.distillation.divergences import DIVERGENCES
from skd_lib.distillation.methods import METHODS
from skd_lib.sampling.acceptance import RULES
from skd_lib.sampling.reference import interleave

DOCS = Path(__file__).parents[1] / "docs"
METHODS_PAGE = (DOCS / "reference/methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", METHODS_PAGE, flags=re.DOTALL))
def test_every_example_is_valid(block: str) -> None:
    parse_section(DistillConfig, yaml.safe_load(block)["distill"], where="docs/reference/methods.md")


def test_the_algorithm_is_the_one_that_the_engine_is_tested_against() -> None:
    page = (DOCS / "concepts/how-skd-works.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    source = inspect.getsource(interleave)
    body = source[source.index("    tokens, sources") :]
    assert block == textwrap.dedent(body)
    assert len(block.splitlines()) <= 30


def test_example_of_a_comparison_is_valid(tmp_path: Path) -> None:
    page = (DOCS / "guides/compare.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    demo = DOCS.parent / "pipelines/configs/demo.yaml"
    (tmp_path / "compare.yaml").write_text(block.replace("base: demo.yaml", f"base: {demo}"), encoding="utf-8")
    trials = plan(*load_compare(tmp_path / "compare.yaml"), where="docs/guides/compare.md").trials
    assert len({trial.variant for trial in trials}) == (3 + 1 + 1 + 1) * 2
    assert len(trials) <= MOST_TRIALS_ON_A_CLUSTER
    assert f"{MOST_TRIALS_ON_A_CLUSTER} runs" in page
    assert set(re.findall(r"^\| `(\w+)", page, flags=re.MULTILINE)) == set(CompareConfig.model_fields)


def test_the_tables_of_methods_rules_and_divergences_are_up_to_date() -> None:
    assert runpy.run_path(str(DOCS / "tables.py"))["written"](METHODS_PAGE) == METHODS_PAGE, "run python docs/tables.py"
    rows = set(re.findall(r"^\| `(\w+)", METHODS_PAGE, flags=re.MULTILINE))
    assert rows >= {*METHODS, *DIVERGENCES, *RULES}


def test_every_setting_has_its_place() -> None:
    for section in (DistillConfig, InterleavedConfig):
        for field in section.model_fields.keys() - {"training"}:
            assert re.search(rf"\b{field}\b", METHODS_PAGE), field


def test_links_between_the_pages_lead_somewhere() -> None:
    root = DOCS.parent
    pages = [*root.glob("*.md"), *DOCS.rglob("*.md"), *root.glob("components/*/README.md"), *root.glob("images/*.md")]
    assert len(pages) > 20
    broken = [
        f"{page.relative_to(root)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)\s]+)\)", _text(page))
        if "://" not in link and not _leads_somewhere(page, *link.partition("#")[::2])
    ]
    assert broken == []


SCRIPTS = re.compile(r"python ((?:docs|images)/[\w/]+\.py)((?: (?!-)[a-z]+)?)\b")
COMMANDS = {
    found
    for page in [*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md"), *DOCS.parent.glob("images/*.md")]
    for found in SCRIPTS.findall(page.read_text(encoding="utf-8"))
}


@pytest.mark.slow
@pytest.mark.parametrize(("script", "command"), sorted(COMMANDS))
def test_the_scripts_that_pages_name_run_by_their_path(script: str, command: str) -> None:
    arguments = [sys.executable, script, *command.split(), "--help"]
    done = subprocess.run(arguments, cwd=DOCS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _text(page: Path) -> str:
    """A page without its examples, where brackets mean other things."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def _leads_somewhere(page: Path, path: str, heading: str) -> bool:
    target = page.parent / path if path else page
    return target.exists() and (not heading or heading in _anchors(target))


def _anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", _text(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
