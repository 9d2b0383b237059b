"""Traces as text: what each token adds, whatever bytes it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from skd_lib.errors import SkdError
from skd_lib.models.records import SampledSequence, as_text, read_samples, to_jsonl
from skd_lib.sampling.samples import STUDENT, TEACHER
from skd_lib.training.traces import Replacement, Trace


def trace(tokenizer: PreTrainedTokenizerFast, response: str, replaced: dict[int, str] | None = None) -> Trace:
    """Of a response whose tokens at some positions replaced the first token of a text."""
    ids = tokenizer.encode(response, add_special_tokens=False)
    replacements = [
        Replacement(position, tokenizer.encode(text, add_special_tokens=False)[0], 30, 0.001, 0, 0.9)
        for position, text in (replaced or {}).items()
    ]
    writers = [TEACHER if position in (replaced or {}) else STUDENT for position in range(len(ids))]
    prompt_ids = tokenizer.encode("The file", add_special_tokens=True)
    return Trace(step=5, row=1, prompt_ids=prompt_ids, token_ids=ids, writers=writers, replacements=replacements)


@pytest.mark.parametrize(
    "response", [" has been saved.<|im_end|>", "é", "naïve 👩‍💻 অসমীয়া\n漢字", " the  quick\tfox", "0" * 40]
)
def test_the_tokens_texts_make_the_response(tiny_tokenizer: PreTrainedTokenizerFast, response: str) -> None:
    sequence = as_text(trace(tiny_tokenizer, response), tiny_tokenizer)
    assert "".join(token.text for token in sequence.tokens) == response
    assert sequence.prompt == "<s>The file"
    assert (sequence.step, sequence.row) == (5, 1)


def test_a_character_of_several_tokens_belongs_to_the_last(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sequence = as_text(trace(tiny_tokenizer, "a👩b"), tiny_tokenizer)
    assert [token.text for token in sequence.tokens] == ["a", "", "", "", "👩", "b"]


def test_bytes_that_are_no_text_are_shown_where_they_stand(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    half = tiny_tokenizer.encode("👩", add_special_tokens=False)[:1]
    broken = Trace(1, 0, [1], half * 40, [STUDENT] * 40, [])
    texts = [token.text for token in as_text(broken, tiny_tokenizer).tokens]
    assert "".join(texts) == "\ufffd" * 40
    assert max(map(len, texts)) <= 4


def test_a_proposal_is_what_it_would_have_added(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    replaced = trace(tiny_tokenizer, " the dog", {0: " fox", 1: "é"})
    first, second, *rest = as_text(replaced, tiny_tokenizer).tokens
    assert first.proposal is not None
    assert second.proposal is not None
    assert (first.by, second.by) == ("teacher", "teacher")
    assert first.proposal.text == tiny_tokenizer.decode(replaced.replacements[0].proposal)
    assert first.proposal.model_dump(exclude={"text"}) == {
        "rank": 30,
        "probability": 0.001,
        "own_rank": 0,
        "own_probability": 0.9,
    }
    assert all(token.by == "student" and token.proposal is None for token in rest)


def test_files_are_read_as_they_were_written(tmp_path: Path, samples: list[SampledSequence]) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(to_jsonl(samples), encoding="utf-8")  # a lone surrogate is in it, which has no UTF-8
    assert read_samples(path) == samples
    path.write_text("", encoding="utf-8")
    assert read_samples(path) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 1', "line 1: not JSON"),
        (
            '{"step": 1, "row": 0, "prompt": "", "tokens": [{"text": "a", "by": "nobody"}]}',
            "line 1, field `tokens.0.by`",
        ),
        ("[]", "line 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(SkdError, match="samples") as caught:
        read_samples(path)
    assert message in str(caught.value)
    with pytest.raises(SkdError, match="cannot read the training sequences"):
        read_samples(tmp_path / "nowhere")
