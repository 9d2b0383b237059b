"""Both pages for everybody: contrast, names, order, keyboard, print, and 400 pixels, looked at in a real browser."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skd_lib.comparison.page import render_page as render_comparison
from skd_lib.models.records import SampledSequence
from skd_lib.report.page import render_page
from skd_lib.report.summary import Summary
from tests.comparison.compared import compared
from tests.support.browser import DARK, LIGHT, browse, probe, served

PAGES = ("report", "comparison")
PROBE = """<!DOCTYPE html><title>probe</title><body><pre id="result"></pre>
<iframe id="report" src="report.html" width="400" height="900" sandbox="allow-same-origin"></iframe>
<iframe id="comparison" src="comparison.html" width="400" height="900" sandbox="allow-same-origin"></iframe>
<script>
const channels = (color) => (color.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const linear = (part) => (part /= 255) <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
const look = (id) => {
  const inside = document.getElementById(id).contentWindow, page = inside.document, root = page.documentElement;
  const style = (element) => inside.getComputedStyle(element);
  const paper = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = channels(style(at).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  page.querySelectorAll("details").forEach((details) => { details.open = true; });
  const faint = [], marks = new Set();
  for (const element of page.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (own && element.checkVisibility() && !["SCRIPT", "TITLE", "title"].includes(element.tagName)) {
      const ink = channels(element instanceof inside.SVGElement ? style(element).fill : style(element).color);
      if (contrast(ink, paper(element)) < 4.5) faint.push(element.className.baseVal ?? element.outerHTML.slice(0, 80));
    }
    if (!element.matches("figure .dot:not(.hollow)")) continue;
    marks.add(contrast(channels(style(element).fill), paper(element)));
  }
  const named = (element) => ["aria-labelledby", "aria-describedby"].every((attribute) =>
    page.getElementById(element.getAttribute(attribute))?.textContent.trim());
  const background = () => style(page.body).backgroundColor;
  const auto = background();
  const choose = (name) => page.getElementById(`theme-${name}`).click();
  const themes = ["light", "dark"].map((name) => (choose(name), background()));
  choose("auto");
  const first = page.querySelector("a, input, button, summary, [tabindex='0']");
  first.focus();
  return {
    overflow: root.scrollWidth - root.clientWidth,
    faint, weakest: Math.min(...marks),
    unnamed: [...page.querySelectorAll("svg[role=img]")].filter((svg) => !named(svg)).length,
    unspoken: page.querySelectorAll("svg:not([role=img], [aria-hidden=true])").length,
    charts: page.querySelectorAll("figure svg").length,
    headings: [...page.querySelectorAll("h1, h2, h3, h4")].map((heading) => Number(heading.tagName[1])),
    ids: [...page.querySelectorAll("[id]")].map((element) => element.id),
    landmarks: ["header", "nav", "main", "footer"].map((name) => page.querySelectorAll(name).length),
    headers: [...page.querySelectorAll("table")].filter((table) => !table.querySelector("th[scope=row]")).length,
    scrolling: [...page.querySelectorAll(".wide")].filter((box) => box.tabIndex !== 0 || !box.ariaLabel).length,
    auto, themes,
    first: first.textContent, shown: first.getBoundingClientRect().left >= 0,
    target: page.querySelector(first.getAttribute("href"))?.tagName,
    downloads: [...page.querySelectorAll("a[download]")].map((link) => link.download),
  };
};
window.addEventListener("load", () => {
  const found = Object.fromEntries(["report", "comparison"].map((id) => [id, look(id)]));
  document.getElementById("result").textContent = JSON.stringify(found);
});
</script>"""


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, summary: Summary, samples: list[SampledSequence]
) -> Iterator[tuple[str, Path]]:
    """The address and the folder of both pages."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "report.html").write_text(render_page(summary, samples), encoding="utf-8")
    (folder / "comparison.html").write_text(render_comparison(compared(variants=9)), encoding="utf-8")
    (folder / "probe.html").write_text(PROBE, encoding="utf-8")
    with served(folder) as (address, _):
        yield address, folder


@pytest.fixture(scope="module", params=[LIGHT, DARK], ids=["light", "dark"])
def looked(request: pytest.FixtureRequest, site: tuple[str, Path]) -> tuple[bool, dict[str, Any]]:
    """Whether the reader prefers dark, and what both pages, whose scripts do not run, look like."""
    found, _ = probe(site[1], f"{site[0]}/probe.html", request.param)
    return request.param == DARK, found


@pytest.mark.parametrize("page", PAGES)
def test_text_and_marks_stand_out(looked: tuple[bool, dict[str, Any]], page: str) -> None:
    found = looked[1][page]
    assert found["faint"] == []  # WCAG 1.4.3: 4.5 for text
    assert found["weakest"] >= 3  # WCAG 1.4.11: 3 for graphics


@pytest.mark.parametrize("page", PAGES)
def test_the_theme_is_the_readers_until_another_is_chosen(looked: tuple[bool, dict[str, Any]], page: str) -> None:
    dark, found = looked[0], looked[1][page]
    light_paper, dark_paper = found["themes"]
    assert light_paper != dark_paper
    assert found["auto"] == (dark_paper if dark else light_paper)


@pytest.mark.parametrize("page", PAGES)
def test_everything_has_a_name_and_a_place(looked: tuple[bool, dict[str, Any]], page: str) -> None:
    found = looked[1][page]
    assert found["overflow"] <= 0
    assert (found["unnamed"], found["unspoken"], found["headers"], found["scrolling"]) == (0, 0, 0, 0)
    assert len(set(found["ids"])) == len(found["ids"])
    assert found["landmarks"] == [1, 1, 1, 1]
    levels = found["headings"]
    assert levels[0] == 1 == levels.count(1)
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    # The first thing that the tab key reaches leads past the navigation.
    assert (found["first"], found["shown"], found["target"]) == ("Skip to the results", True, "MAIN")
    assert found["charts"] == len(found["downloads"]) == {"report": 8, "comparison": 7}[page]
    assert len(set(found["downloads"])) == len(found["downloads"])


@pytest.mark.slow
def test_paper_has_the_charts_in_light_colours(site: tuple[str, Path]) -> None:
    file = site[1] / "report.pdf"
    browse(site[1], DARK, f"--print-to-pdf={file}", f"{site[0]}/report.html")
    pages = len(re.findall(rb"/Type /Page\b", file.read_bytes()))
    assert 2 <= pages <= 12
