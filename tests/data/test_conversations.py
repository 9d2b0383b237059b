"""Conversations as people have them: one form whatever they were written in, and what is broken is named."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from skd_lib.config import Columns, DataConfig, FilesSource, HeldOutConfig, HubSource
from skd_lib.data import sources
from skd_lib.data.conversations import Conversation, read_conversation
from skd_lib.data.examples import Example, by_turn, conversation_example
from skd_lib.data.prepared import PreparedData, data_fingerprint, prepare
from skd_lib.data.splits import make_splits
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.evaluation.evaluate import check_answers

SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TALK = [SYSTEM, user("1 + 1?"), assistant("2"), user("And 2 + 2?"), assistant("4")]


def load(path: Path, *rows: Any, **columns: Any) -> list[Example]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return sources.load(FilesSource(train=[str(path)], columns=Columns(**columns))).train


def messages(example: Example) -> list[dict[str, Any]]:
    assert example.conversation is not None
    return list(example.conversation.messages)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "prompt": "1 + 1?", "prompt_id": "7"},
        {"messages": json.dumps(TALK)},
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in TALK]},
        {"messages": [m | {"role": m["role"].replace("system", "developer"), "name": None} for m in TALK]},
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
                for m in TALK
            ]
        },
    ],
    ids=["openai", "json-text", "parts", "developer", "sharegpt"],
)
def test_one_conversation_comes_out_of_every_form(tmp_path: Path, row: dict[str, Any]) -> None:
    (example,) = load(tmp_path / "a.jsonl", row)
    assert messages(example) == TALK
    assert example.target == "4"
    assert example.source == "system: Be brief.\nuser: 1 + 1?\nassistant: 2\nuser: And 2 + 2?"
    assert example.origin == f"{tmp_path / 'a.jsonl'}, row 1"


def test_prompt_and_completion_may_be_messages(tmp_path: Path) -> None:
    (example,) = load(tmp_path / "a.jsonl", {"prompt": TALK[:4], "completion": TALK[4:]})
    assert messages(example) == [*TALK[:2], TALK[2] | {"weight": 0}, *TALK[3:]]
    # Answers in the prompt are no part of the completion: they are not trained on.
    assert by_turn(example) == [example]


def test_prompts_alone_are_read(tmp_path: Path) -> None:
    for prompt in ("1 + 1?", [user("1 + 1?")]):
        (example,) = load(tmp_path / "a.jsonl", {"prompt": prompt, "id": 3})
        assert (example.source, example.target) == ("1 + 1?", "")
    (example,) = load(tmp_path / "a.jsonl", {"messages": TALK[:2]})
    assert (example.source, example.target) == ("1 + 1?", "")
    (example,) = load(tmp_path / "a.jsonl", {"question": "1 + 1?"}, source="question", target=None)
    assert (example.source, example.target) == ("1 + 1?", "")


def test_tools_and_calls_are_kept(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
    row = {
        "messages": [
            user("1 + 1?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
            assistant("It is 2."),
        ],
        "tools": [tool],
    }
    expected = call | {"function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
            (example,) = sources.load(FilesSource(train=[str(path)])).train
        else:
            (example,) = load(path, row)
        assert example.conversation is not None
        assert example.conversation.tools == (tool,)
        first, last = by_turn(example)
        assert messages(first) == [user("1 + 1?"), assistant("", tool_calls=[expected])]
        assert first.target == '{"name": "add", "arguments": {"a": 1, "b": null}}'
        assert messages(last)[:-1] == [*messages(first), {"role": "tool", "tool_call_id": "1", "content": "2"}]


def test_weights_choose_the_answers_that_are_trained_on(tmp_path: Path) -> None:
    talk = [
        user("a"),
        assistant("b", weight=0),
        user("c"),
        assistant("d", weight=1),
        user("e"),
        assistant("f", weight=0),
    ]
    (example,) = load(tmp_path / "a.jsonl", {"messages": talk})
    assert example.target == "d"
    assert [turn.target for turn in by_turn(example)] == ["d"]


def test_a_completion_of_weight_nought_is_not_trained_on(tmp_path: Path) -> None:
    said = [assistant("2"), user("And?"), assistant("3", weight=0)]
    (row,) = load(tmp_path / "rows.jsonl", {"prompt": [user("1 + 1?")], "completion": said})
    assert row.target == "2"
    with pytest.raises(SkdError, match=r"field `completion`(.|\n)*nothing to train on"):
        load(tmp_path / "rows.jsonl", {"prompt": [user("1 + 1?")], "completion": said[-1:]})


@given(st.lists(st.integers(0, 1), min_size=1, max_size=6))
def test_each_turn_is_an_answer_with_all_before_it(weights: list[int]) -> None:
    talk = [m for n, w in enumerate(weights) for m in (user(f"q{n}"), assistant(f"a{n}", weight=w))]
    if not any(weights):
        return
    example = conversation_example(read_conversation(talk))
    turns = by_turn(example)
    assert [turn.target for turn in turns] == [f"a{n}" for n, w in enumerate(weights) if w]
    for turn in turns:
        assert messages(turn) == messages(example)[: len(messages(turn))]
    assert turns[-1].target == example.target
    assert len({turn.id for turn in turns}) == len(turns)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "field `messages`: there are no messages"),
        ({"messages": "hello"}, "field `messages`: must be a list of messages, got str"),
        ({"messages": [user("a"), assistant(" ")]}, "message 2: the assistant's text is empty"),
        ({"messages": [user("a"), assistant("b"), user("c")]}, "message 3: the last message is the user's"),
        ({"messages": [assistant("b")]}, "message 1: there is no message before the assistant's"),
        ({"messages": [user("a"), {"role": "bot", "content": "b"}]}, "message 2: unknown role 'bot'"),
        ({"messages": [user("a"), {"content": "b"}]}, "message 2: there is no `role`"),
        ({"messages": [user("a"), "b"]}, "message 2: must be an object, got str"),
        ({"messages": [user("a"), assistant("b", weight=0)]}, "every assistant message has `weight: 0`"),
        ({"messages": [{"role": "user", "content": 3}, assistant("b")]}, "message 1: `content` must be text, got int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, assistant("b")]},
            "message 1: `content` has a part of the type 'image_url'; only text is read",
        ),
        ({"messages": [user("a"), assistant("", tool_calls=[{"id": 1}])]}, "message 2: a call in `tool_calls`"),
        ({"messages": [user("a\ud800"), assistant("b")]}, "message 1: an invalid character"),
        ({"messages": [user("a"), assistant("b")], "tools": ["add"]}, "field `tools`: must be a list of objects"),
        ({"prompt": [user("a")], "completion": "b"}, "field `completion`: the prompt is a list of messages"),
        ({"prompt": [user("a")], "completion": None}, "field `completion`: the field is empty"),
        (
            {"prompt": [user("a")], "completion": [user("b")]},
            "field `completion`, message 1: the last message is the user",
        ),
        ({"prompt": [user("a"), assistant("b")]}, "field `prompt`, message 2: the prompt ends with the assistant's"),
        ({"prompt": "a", "completion": " "}, "field `completion`: the text is empty"),
        ({"prompt": "a", "completion": [assistant("b")]}, "field `completion`: must be text"),
    ],
)
def test_a_broken_row_is_named_with_row_and_field(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(SkdErrors) as caught:
        load(path, row)
    (error,) = caught.value.errors
    assert error.where.startswith(f"{path}, row 1, field `")
    assert message in str(error)
    assert error.hint


@pytest.mark.parametrize(
    ("first", "second", "wrong"),
    [
        ({"messages": TALK}, {"messages": TALK[:2]}, "messages without an answer"),
        ({"prompt": "a", "completion": "b"}, {"prompt": TALK[:2], "completion": TALK[2:3]}, "messages with an answer"),
        ({"prompt": TALK[:2], "completion": TALK[2:3]}, {"prompt": "a", "completion": "b"}, "text with an answer"),
    ],
)
def test_mixed_formats_are_refused(tmp_path: Path, first: Any, second: Any, wrong: str) -> None:
    with pytest.raises(SkdErrors, match=f"row 2.*mixed formats: this row has {wrong}"):
        load(tmp_path / "a.jsonl", first, second)


def test_columns_of_conversations_can_be_named(tmp_path: Path) -> None:
    (example,) = load(tmp_path / "a.jsonl", {"talk": TALK, "functions": []}, messages="talk", tools="functions")
    assert messages(example) == TALK
    with pytest.raises(ValidationError, match="messages takes the place of source and target: leave out source"):
        Columns(messages="talk", source="q")


def test_formats_of_hub_datasets_are_found_too(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split in ("train", "test"):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([{"messages": TALK, "id": 1}]), folder / f"{split}.parquet"
        )
    source = HubSource(type="hub", dataset=str(folder))
    assert sources.find_columns(source) == Columns(messages="messages")
    assert messages(sources.load(source).train[0]) == TALK


def test_prompts_alone_cannot_be_scored(tmp_path: Path) -> None:
    check_answers(load(tmp_path / "a.jsonl", {"messages": TALK}), where="a")
    with pytest.raises(SkdError, match="the examples have no answers"):
        check_answers(load(tmp_path / "a.jsonl", {"prompt": "x"}), where=str(tmp_path / "a.jsonl"))


def test_a_held_out_set_may_have_another_format(tmp_path: Path) -> None:
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps({"messages": TALK}), encoding="utf-8")
    held_out = HeldOutConfig.model_validate({"name": "talks", "source": {"type": "files", "files": [str(path)]}})
    data = DataConfig(source=FilesSource(train=[str(path)]))
    assert messages(sources.load_held_out(held_out, data)[0]) == TALK


def talks(count: int) -> list[dict[str, Any]]:
    words = (f"{letter}{letter}{letter}" for letter in "abcdefghijklmnopqrst")
    return [
        {
            "messages": [
                user(f"tell me about the {word}, please: {word * 9}"),
                assistant(f"the {word} is {word * 5}"),
                user("and more?"),
                assistant(f"the {word} has {word[::-1] * 5}"),
            ]
        }
        for word in islice(words, count)
    ]


def test_all_turns_of_a_conversation_are_in_one_split(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [*talks(20), talks(1)[0]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(source=FilesSource(train=[str(path)]), validation_fraction=0.2, test_fraction=0.2)
    whole = make_splits(sources.load(config.source), config, seed=0)
    assert whole.losses["train"].reasons["repeated"] == 1
    data = prepare(config, tmp_path / "prepared", seed=0)
    assert [len(data.train_student), len(data.validation), len(data.test)] == [24, 8, 4]

    def first_words(examples: list[Example]) -> set[str]:
        return {messages(example)[0]["content"] for example in examples}

    groups = [first_words(rows) for rows in (data.train_student, data.validation, data.test)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20
    # Tests ask for the last answer.
    assert all(" has " in example.target for example in data.test)
    assert PreparedData.load(tmp_path / "prepared").train_student == data.train_student
    last = prepare(config.model_copy(update={"assistant_turns": "last"}), tmp_path / "last", seed=0)
    assert len(last.train_student) == 12
    assert last.fingerprint != data.fingerprint


def test_a_system_message_makes_another_conversation(tmp_path: Path) -> None:
    pair = [user("a"), assistant("b")]
    path = tmp_path / "a.jsonl"
    rows = [{"messages": [{"role": "system", "content": text}, *pair]} for text in ("x", "y", "y")]
    examples = load(path, *rows)
    assert len({example.id for example in examples}) == 2
    config = DataConfig(source=FilesSource(train=[str(path)]))
    with pytest.raises(Exception, match="1 of 3 repeat another"):
        make_splits(sources.load(config.source), config, seed=0)


def test_texts_keep_the_fingerprints_that_they_had_before_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"source": "a", "target": "b"}\n', encoding="utf-8")
    config = DataConfig(source=FilesSource(train=[str(path)]))
    assert data_fingerprint(config) == "dcc9ef8df29cc952fcecb371d016e52ee41eb20bf1795ccdb55e9c22903ffd50"
    (example,) = sources.load(config.source).train
    assert example.id == "3554d2b8a1e34099"


def test_a_conversation_survives_being_written(tmp_path: Path) -> None:
    talk = Conversation(tuple(TALK), ({"name": "add"},))
    assert Conversation.from_dict(json.loads(json.dumps(talk.to_dict()))) == talk
