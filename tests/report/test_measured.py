"""What travels from the report to `register_model`: short, and exact where it decides."""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import pytest

from skd_lib.config import MetricName, RegistryConfig, parse_section
from skd_lib.report.measured import Measured, longest, measured
from skd_lib.report.summary import build_summary
from skd_lib.results import Comet, Course, Scores, Specdec, rounded
from skd_lib.tracking.gate import Rival

EXACT = 100 / 3
SIGNATURE = "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.5.1"
METRICS = get_args(MetricName)


def score(value: float, signature: str = SIGNATURE) -> dict[str, Any]:
    return {"score": value, "low": value - 1, "high": value + 1, "signature": signature}


def student(value: float = EXACT) -> Scores:
    return Scores.model_validate({name: score(value) for name in METRICS if name != "comet"} | {"examples": 500})


def draft() -> Specdec:
    return Specdec(acceptance_rate=EXACT / 100, tokens_per_teacher_call=EXACT / 10, speedup=EXACT / 20)


@pytest.mark.parametrize("count", range(1, len(METRICS) + 1))
def test_the_longest_parameter(count: int) -> None:
    names = METRICS[:count]
    scores = Scores.model_validate({name: score(EXACT) for name in names if name != "comet"} | {"examples": 500})
    comet = Comet.model_validate({"models": {"student_after": score(EXACT)} if "comet" in names else {}})
    rival = Rival(version="123", figures=dict.fromkeys(names, EXACT), speedup=EXACT, undrafted="why not? " * 1000)
    registry = RegistryConfig(model_name="m" * 60, min_improvement=0.123456789, max_slowdown=0.123456789)
    length = len(measured(names[0], scores, draft(), rival, comet, registry, EXACT).to_parameter())
    assert 0.6 * longest(count) < length < longest(count)


def test_the_parameter_is_short_and_holds_exact_figures() -> None:
    comet = Comet.model_validate({"models": {"student_after": score(EXACT), "champion": score(EXACT + 1)}})
    rival = Rival(
        version="123",
        figures=dict.fromkeys([name for name in METRICS if name != "comet"], EXACT),
        speedup=EXACT / 20,
        challenger_speedup=EXACT / 21,
        tokens_per_call=EXACT / 20,
        challenger_tokens_per_call=EXACT / 21,
        gain_low=-0.12345,
        gain_high=0.12345,
        undrafted="why not? " * 1000,
    )
    registry = RegistryConfig(model_name="m" * 60, min_improvement=0.123456789, max_slowdown=0.123456789)
    found = measured("comet", student(), draft(), rival, comet, registry)
    parameter = found.to_parameter()
    assert len(parameter) < longest(len(METRICS)) < 2100
    read = parse_section(Measured, parameter, where="test")
    assert read == found
    assert read.student == dict.fromkeys(METRICS, EXACT)
    assert read.champion.figures["comet"] == EXACT + 1
    assert read.registry == registry
    assert read.signatures["bleu"] == SIGNATURE


def test_tokens_per_call_go_on_to_the_gate_that_reads_them() -> None:
    rival = Rival(version="123", tokens_per_call=2.5, challenger_tokens_per_call=2.6)
    for gate, shown in (("draft", 2.6), ("score", None)):
        registry = RegistryConfig.model_validate({"gate": gate})
        found = measured("chrf", student(), draft(), rival, Comet(), registry)
        assert found.champion.challenger_tokens_per_call == shown


def test_how_a_draft_was_measured_goes_on_to_its_version() -> None:
    with_setting = draft().model_copy(update={"gamma": 5, "temperature": 0.0})
    for each, said in ((with_setting, "transformers, 5 tokens drafted, temperature 0"), (draft(), ""), (None, "")):
        found = measured("chrf", student(), each, Rival(), Comet(), RegistryConfig())
        assert found.drafted == said


def test_what_is_at_its_default_is_left_out() -> None:
    found = measured("chrf", Scores(metrics={}), None, Rival(), Comet(missing="no " * 1000), RegistryConfig())
    parameter = found.to_parameter()
    assert json.loads(parameter).keys() == {"task_metric", "comet_missing"}
    assert len(parameter) < 250


def test_it_arrives_as_it_was_written_and_without_nan() -> None:
    """An error about a vocabulary quotes its tokens."""
    text = "token 5 is '{{=1}}' and not '$(HOME)' or '\N{SEEDLING}'"
    scores = Scores.model_validate({"chrf": score(math.nan), "bleu": score(1.0)})
    registry = RegistryConfig(model_name="$$")
    parameter = measured("chrf", scores, None, Rival(undrafted=text), Comet(), registry).to_parameter()
    assert parameter.isascii()
    assert "$" not in parameter
    assert "{{" not in parameter
    read = parse_section(Measured, parameter, where="test")
    assert (read.champion.undrafted, read.registry.model_name, read.student) == (text, "$$", {"bleu": 1.0})


def test_headline_figures_are_few_rounded_and_finite() -> None:
    scores = {
        "teacher": student(40),
        "student_before": student(20),
        "student_after": Scores.model_validate({"chrf": score(EXACT), "bleu": score(math.nan)}),
    }
    summary = build_summary(task_metric="chrf", scores=scores, specdec={"after": draft()}, course=Course())
    assert summary.figures() == {
        "chrf": 33.333,
        "chrf_before": 20,
        "chrf_teacher": 40,
        "quality_kept": 0.83333,
        "gap_closed": 0.66667,
        "acceptance_rate": 0.33333,
        "tokens_per_teacher_call": 3.3333,
        "speedup": 1.6667,
    }
    assert summary.headline()["student_after/chrf"] == EXACT


@pytest.mark.parametrize(("value", "shown"), [(123456.7, 123460), (0.00012345678, 0.00012346), (0, 0), (2, 2)])
def test_rounding(value: float, shown: float) -> None:
    assert rounded(value) == shown
