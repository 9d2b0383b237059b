"""The page in a real browser: at both widths, in both themes, by keyboard, without JavaScript, under attack."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from skd_lib.models.records import SampledSequence
from skd_lib.report.page import render_page
from skd_lib.report.summary import Summary, build_summary
from skd_lib.results import Course
from tests.report.conftest import STEPS
from tests.support.browser import DARK, LIGHT, browse, probe, served

PROBE = """<!DOCTYPE html><title>probe</title><body><pre id="result"></pre>
<iframe id="phone" src="page.html" width="375" height="800"></iframe>
<iframe id="desk" src="page.html" width="1200" height="800"></iframe>
<iframe id="plain" src="page.html" width="375" height="800" sandbox="allow-same-origin"></iframe>
<iframe id="empty" src="empty.html" width="375" height="800"></iframe>
<script>
const look = (id) => {
  const inside = document.getElementById(id).contentWindow, page = inside.document, root = page.documentElement;
  const steps = () => [...page.querySelectorAll("details.step")].filter((step) => !step.hidden && step.open);
  const before = steps().length;
  const found = { overflow: root.scrollWidth - root.clientWidth, open: before,
    requests: inside.performance.getEntriesByType("resource").map((entry) => entry.name),
    browser: page.querySelector(".browser") && !page.querySelector(".browser").hidden };
  const token = steps().length && steps()[0].querySelector(".t[tabindex]");
  if (token) {
    const tip = token.querySelector(".tip");
    found.hidden = inside.getComputedStyle(tip).display;
    token.focus();
    const box = tip.getBoundingClientRect();
    found.shown = inside.getComputedStyle(tip).display;
    found.inside = box.left >= 0 && box.right <= inside.innerWidth && box.height > 0;
    found.outline = inside.getComputedStyle(token).outlineStyle;
    found.underline = inside.getComputedStyle(token).borderBottomStyle;
  }
  if (found.browser) {
    page.querySelectorAll(".browser button")[1].click();
    found.later = page.querySelector(".now").textContent;
    found.still_open = steps().length;
    const range = page.querySelector("input[type=range]");
    range.value = range.max;
    range.dispatchEvent(new inside.Event("input"));
    found.last = page.querySelector(".now").textContent;
  }
  return found;
};
window.addEventListener("load", () => {
  const result = Object.fromEntries(["phone", "desk", "plain", "empty"].map((id) => [id, look(id)]));
  result.owned = window.owned === 1;
  document.getElementById("result").textContent = JSON.stringify(result);
});
</script>"""


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, summary: Summary, samples: list[SampledSequence]
) -> Iterator[tuple[str, Path, list[str]]]:
    """A server of the pages: its address, its folder and the paths that it was asked for."""
    folder = tmp_path_factory.mktemp("site")
    page = render_page(summary, samples)
    (folder / "page.html").write_text(page, encoding="utf-8")
    empty = build_summary(task_metric="chrf", scores={}, specdec={}, course=Course())
    (folder / "empty.html").write_text(render_page(empty), encoding="utf-8")
    attack = (
        '<script>parent.owned = 1</script><img src="stolen.png" onerror="parent.owned = 1"><main style="color:red">'
    )
    (folder / "attacked.html").write_text(re.sub("<main[^>]*>", attack, page), encoding="utf-8")
    (folder / "probe.html").write_text(PROBE, encoding="utf-8")
    (folder / "attack.html").write_text(PROBE.replace("page.html", "attacked.html"), encoding="utf-8")
    with served(folder) as (address, asked):
        yield address, folder, asked


def test_the_page_in_a_browser(site: tuple[str, Path, list[str]]) -> None:
    result, console = probe(site[1], f"{site[0]}/probe.html")
    assert [line for line in console if "sandboxed" not in line] == []
    assert set(site[2]) <= {"/probe.html", "/page.html", "/empty.html", "/favicon.ico"}
    for frame in ("phone", "desk", "plain", "empty"):
        assert result[frame]["overflow"] <= 0, frame
        assert result[frame]["requests"] == [], frame
    for frame in ("phone", "desk"):
        found = result[frame]
        assert found["browser"]
        assert (found["open"], found["still_open"]) == (1, 1)
        assert found["later"].startswith(f"Step {STEPS[1]}: ")
        assert found["last"].startswith(f"Step {STEPS[-1]}: ")
    # Without JavaScript every step is there to be opened, the first and the last are, and the details still work.
    assert not result["plain"]["browser"]
    assert result["plain"]["open"] == 2
    for frame in ("phone", "desk", "plain"):
        found = result[frame]
        assert (found["hidden"], found["shown"], found["inside"]) == ("none", "block", True)
        assert (found["outline"], found["underline"]) == ("solid", "solid")
    assert not result["owned"]


def test_what_gets_into_the_page_all_the_same_neither_runs_nor_loads(site: tuple[str, Path, list[str]]) -> None:
    result, console = probe(site[1], f"{site[0]}/attack.html")
    assert not result["owned"]
    assert "/stolen.png" not in site[2]
    assert any("Content Security Policy" in line for line in console)


@pytest.mark.parametrize(("scheme", "dark"), [(DARK, True), (LIGHT, False)])
def test_light_and_dark(site: tuple[str, Path, list[str]], scheme: str, dark: bool) -> None:
    image = site[1] / f"{dark}.png"
    browse(site[1], scheme, "--window-size=800,600", f"--screenshot={image}", f"{site[0]}/page.html")
    with Image.open(image) as picture:
        grey = picture.convert("L")
        assert (grey.getpixel((2, 300)) < 60) == dark  # the paper
        lightest, darkest = grey.getextrema()[1], grey.getextrema()[0]
        assert lightest - darkest > 180  # and ink on it
