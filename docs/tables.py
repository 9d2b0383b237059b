"""Write the tables of methods, rules and divergences into docs/reference/methods.md, from their registries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import typer

from skd_lib.distillation.divergences import DIVERGENCES
from skd_lib.distillation.methods import METHODS
from skd_lib.sampling.acceptance import RULES

PAGE = Path(__file__).parent / "reference/methods.md"
BLOCK = re.compile(r"(<!-- table of (\w+), written by docs/tables.py -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def tables() -> dict[str, str]:
    """Return the Markdown table of each registry."""
    return {
        "methods": _table(
            ["method", "response", "loss", "source", "cost of a step besides the student's forward and backward"],
            (
                [name, each.response, "divergence" if each.uses_divergence else "cross-entropy", each.source, each.cost]
                for name, each in METHODS.items()
            ),
        ),
        "rules": _table(
            ["rule", "drafted token t stands if", "else", "source"],
            ([name, each.accepts, each.replaces, each.source] for name, each in RULES.items()),
        ),
        "divergences": _table(
            ["name", "formula", "settings", "source"],
            (
                [name, each.formula, ", ".join(f"`{setting}`" for setting in each.settings), each.source]
                for name, each in DIVERGENCES.items()
            ),
        ),
    }


def written(page: str) -> str:
    """Return the page with its tables as they are now."""
    now = tables()
    return BLOCK.sub(lambda block: f"{block[1]}\n{now[block[2]]}\n{block[3]}", page)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *([f"`{name}`", *map(_cell, cells)] for name, *cells in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    text = text.replace("||", "‖").replace("|", "\\|")
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text)


def main() -> None:
    """Write the tables of methods, acceptance rules and divergences into docs/reference/methods.md."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
