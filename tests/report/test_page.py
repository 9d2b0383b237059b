"""The page as text: everything is on it, and nothing of what models wrote means anything."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_lib._core.terminal import clipped, visible
from skd_lib.models.records import SampledSequence
from skd_lib.report.figure import TABLE_ROWS
from skd_lib.report.page import render_page
from skd_lib.report.summary import Summary, build_summary
from skd_lib.report.viewer import STEPS_SHOWN, TOKENS_SHOWN, step_views
from skd_lib.report.views import model_name
from skd_lib.results import Course, PairedTest, Scores

EMPTY = build_summary(task_metric="chrf", scores={}, specdec={}, course=Course())


class Reader(HTMLParser):
    """Collects elements with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_everything_that_was_measured_is_on_the_page(summary: Summary, samples: list[SampledSequence]) -> None:
    text = Reader(render_page(summary, samples)).text
    for shown in (
        "75% of the teacher's chrF kept teacher: 40.0 closed 67% of the gap",
        "30.0 chrF of the student 95%: 28.0 to 32.0 before: 10.0",
        "60% of its drafts accepted by the teacher before: 40%",
        "1.60 tokens per teacher call before: 1.40",
        "As a draft it saves the teacher 38% of its calls.",
        "Held out: news",
        "Held out: lost BLEU is missing. the file is gone",
        "Other pairs",
        "teacher against student before",
        "Speed-up by draft length: temperature 0.5, batch 8",
        "teacher alone 10.2 20 30 10.2 20 30",
        "with the student after 10.2 20 30",
        "tokenizers differ",
        "COMET is missing. no network",
        "student after against student before chrF +20.0 +15.0 to +25.0 < 0.002 64",
        "Acceptance by position",
        "teacher only tokens per second 12.5 12.5",
        "Validation 3.000 → 1.600, lowest 1.500 at step 20",
        "Drafts that the teacher replaced: 29.",
        "3.6k response tokens were trained on; for these 12k positions went through the student and 9k through the",
        "Validation loss against time",
        "time of training (minutes)",
        "30 1.55 1.6 1.44 1.76",  # the loss chart's last row: step, training, validation and its interval
        "Step 1: 24% of the tokens by the teacher",
        "student proposed dog",
        "rank 32 with the teacher, probability 0.04%",
        "rank 1, probability 93%",
        "45 tokens, 11 by the teacher",
        "rollout 30 s · 75% 1.50 GB",
        "Most memory of the process: 2.00 GB",
        "data fingerprint " + "9f" * 32,
    ):
        assert shown in text


def test_what_was_not_measured_is_said_to_be_missing() -> None:
    text = Reader(render_page(EMPTY)).text
    assert "No model was evaluated in this run." in text
    assert "The student was not measured as a draft model." in text
    assert "No sequences were recorded" in text
    assert "nan" not in text.lower()


def test_text_of_models_is_no_markup(summary: Summary, samples: list[SampledSequence]) -> None:
    page = render_page(summary, samples)
    elements = Reader(page).elements
    assert len([tag for tag, _ in elements if tag == "script"]) == 1
    assert not [tag for tag, _ in elements if tag in ("img", "iframe", "object", "embed", "link", "base", "form")]
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on") or name == "style"]
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f]", page)
    assert "⟨U+202E⟩right to left␛[31m␀\ufffd" in page
    page.encode("utf-8")


def test_the_policy_admits_this_style_and_this_script_alone(summary: Summary) -> None:
    page = render_page(summary)
    (policy,) = [a["content"] for tag, a in Reader(page).elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        ("google/gemma-7b-it@main", "google/gemma-7b-it@main"),
        ("gs://bucket/models/teacher/", "teacher"),
        ("/home/me/models/teacher.gguf", "teacher.gguf"),
        ("models/teacher", "models/teacher"),
        ("wheel://llm==0.1/llm/Small.gguf?sha256=" + "0" * 64, "Small.gguf"),
        ("gs://bucket/teacher, first 12 and last 10 layers", "teacher, first 12 and last 10 layers"),
    ],
)
def test_a_headline_names_a_model_shortly(reference: str, shown: str) -> None:
    assert model_name(reference) == shown


def test_links_lead_into_the_page_or_to_mlflow(summary: Summary) -> None:
    elements = Reader(render_page(summary)).elements
    links = [attributes["href"] for tag, attributes in elements if tag == "a"]
    ids = {attributes["id"] for _, attributes in elements if "id" in attributes}
    outside = [link for link in links if link and not link.startswith(("#", "data:text/csv;"))]
    assert outside == [summary.mlflow_url, summary.mlflow_table_url]
    assert {link[1:] for link in links if link and link.startswith("#")} <= ids
    wrong = summary.model_copy(update=dict.fromkeys(("mlflow_url", "mlflow_table_url"), "javascript:alert(1)"))
    assert not [a for _, a in Reader(render_page(wrong)).elements if (a.get("href") or "").startswith("java")]


def test_a_long_run_makes_a_page_of_moderate_size(summary: Summary) -> None:
    steps = tuple(range(1, 20_001))
    noise = tuple((step * 7919 % 1000) / 1000 for step in steps)
    course = Course(
        steps=steps,
        rejection_rate=noise,
        tokens_per_teacher_call=noise,
        training_steps=steps,
        training_loss=noise,
        response_length=noise,
        validation_steps=steps[::25],
        validation_loss=noise[::25],
    )
    proposal = {"text": " dog", "rank": 31, "probability": 0.0004, "own_rank": 0, "own_probability": 0.93}
    tokens = [
        {"text": " word", "by": "teacher", "proposal": proposal}
        if place % 10 == 0
        else {"text": " word", "by": "student"}
        for place in range(2000)
    ]
    one = SampledSequence.model_validate({"step": 1, "row": 0, "prompt": "word " * 1000, "tokens": tokens})
    samples = [one.model_copy(update={"step": step, "row": row}) for step in range(1, 61) for row in range(3)]
    start = time.process_time()
    page = render_page(summary.model_copy(update={"course": course}), samples)
    assert time.process_time() - start < 5
    assert len(page.encode()) < 1_300_000
    assert max(len(points.split()) for points in re.findall(r'<polyline [^>]*points="([^"]+)"', page)) <= 500
    assert f"{TABLE_ROWS} of 800 rows, evenly spread; all are in" in page  # 400 of training steps, 400 of validations
    views = step_views(samples)
    assert len(views) == STEPS_SHOWN
    assert (views[0].step, views[-1].step) == (1, 60)
    assert views[0].sequences[0].left_out == 2000 - TOKENS_SHOWN
    assert views[0].sequences[0].by_teacher == 200
    assert "the last 1760 are not shown" in page


@given(st.text(st.characters()))
def test_visible_text_has_an_encoding_and_turns_nothing(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", shown)
    assert visible(shown) == shown


def test_visible_leaves_what_people_write() -> None:
    kept = "অসমীয়া\u200cক 👩\u200d👩 naïve\tשלום\nمرحبا"  # noqa: RUF001
    assert visible(kept) == kept


def test_clipped_text_says_so() -> None:
    assert clipped("abc", 3) == "abc"
    assert clipped("a" * 1003, 3) == "aaa… (+1,000 characters)"


def test_few_examples_are_said_where_intervals_and_tests_stand() -> None:
    few = {"score": 30, "low": 20, "high": 40, "caution": "3 examples are too few"}
    more = {"news": {"chrf": {**few, "caution": "5 examples are too few"}, "examples": 5}}
    summary = build_summary(
        task_metric="chrf",
        scores={"student_after": Scores.model_validate({"chrf": few, "examples": 3, "held_out": more})},
        specdec={},
        course=Course(),
        comparisons=[
            PairedTest(a="student_after", b="student_before", metric="chrf", difference=20, low=20, high=20, n=3)
        ],
    )
    text = Reader(render_page(summary, [])).text
    assert "95%: 20.0 to 40.0†" in text
    assert text.count("40.0†") == 3  # at the top and in both tables
    assert "† 3 examples are too few. † 5 examples are too few." in text.replace(
        "Paired tests are withheld (under 20 examples): there chance alone makes small p-values far too often. ", ""
    )
    assert "student after against student before chrF +20.0 withheld (under 20 examples) 3" in text
