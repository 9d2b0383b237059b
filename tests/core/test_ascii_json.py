from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_lib._core.ascii_json import ascii_json, changed_fields, is_plain, may_be_changed

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["$$x^2$$", "$(HOME)", "{{= 1 + 1 }}", "{{$}}", "{{x}}", '"\\"{', "\\u0024", "\U0001f600", "\x7f", "\n\t\0", "}}{{"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=12,
)


@given(VALUES, st.booleans())
def test_json_arrives_unchanged_and_holds_nothing_that_others_read(value: object, compact: bool):
    text = ascii_json({"value": value}, compact=compact)
    assert json.loads(text) == {"value": value}
    assert re.fullmatch("[ -~]*", text)
    assert "$" not in text
    assert "{{" not in text  # without which `}}` means nothing to KFP and Argo
    assert not changed_fields(text)


@pytest.mark.parametrize("text", ["gs://bucket/x y.jsonl", "org/model@main", "", "data/*.jsonl"])
def test_plain_texts_need_no_json(text: str):
    assert is_plain(text)
    assert not may_be_changed(text)


@pytest.mark.parametrize("text", ["a$b", "{source}", "é", "a\nb", "\x7f"])
def test_other_texts_do(text: str):
    assert not is_plain(text)


def test_what_may_have_been_changed_is_named():
    typed = '{"task": {"prompt": "$x$ {source}", "stop": ["a", "{{b"]}, "name": "\\u0024 \\u007b{", "}}k": {"a": {}}}'
    assert changed_fields(typed) == ["task.prompt", "task.stop.1", "...k"]
    assert not changed_fields('{"task": {"prompt": "Français: {source}", "x": {"y": {}}}}')
    with pytest.raises(ValueError, match="Expecting"):
        changed_fields('{"prompt": "{"inputs": 1}"}')
