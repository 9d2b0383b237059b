"""Tokens of conversations: prompt and response together are the template's own text, in pipeline and trainer."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from skd_lib.config import TaskConfig
from skd_lib.data.chat import chat_layout
from skd_lib.data.conversations import read_conversation
from skd_lib.data.examples import Example, by_turn, conversation_example, make_example
from skd_lib.data.formats import each_turn, tokenize_row
from skd_lib.data.tokenize import answer_end_id, decode_answer, encode, encode_prompt
from skd_lib.errors import SkdError
from skd_lib.training.turn_rows import by_turn as rows_by_turn
from tests.data.test_chat import byte_level

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}<call>{{ call.function.name }}({{ call.function.arguments | tojson }})</call>"
    "{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3's: the last answer begins with an empty part of thinking, earlier ones do not."""
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TASK = TaskConfig(max_new_tokens=500)


@cache
def templated() -> PreTrainedTokenizerFast:
    return byte_level(TEMPLATE, eos="<|im_end|>")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return templated()


def messages(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def example(talk: list[dict[str, Any]], tools: Any = None) -> Example:
    return conversation_example(read_conversation(talk, tools))


def texts_of(tokenizer: PreTrainedTokenizerFast, each: Example, task: TaskConfig = TASK) -> tuple[str, str]:
    encoded = encode(tokenizer, task, each, answer_end_id(tokenizer, task))
    return tokenizer.decode(encoded.prompt_ids), tokenizer.decode(encoded.response_ids)


def test_each_turn_is_asked_after_its_own_history(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = by_turn(example([{"role": "system", "content": "Be brief."}, *messages("a", "b", "c", "d")]))
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert texts_of(tokenizer, first) == (f"{start}<think></think>", "b<|im_end|>")
    more = "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think></think>"
    assert texts_of(tokenizer, second) == (f"{start}b<|im_end|>\n{more}", "d<|im_end|>")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<|"), min_size=1), min_size=2, max_size=6))
def test_prompt_and_response_are_the_whole_text(texts: list[str]) -> None:
    if not all(text.strip() for text in texts):
        return
    tokenizer = templated()
    talk = messages(*texts[: len(texts) // 2 * 2])
    prompt, response = texts_of(tokenizer, example(talk))
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    assert f"{prompt}{response}\n" == whole


def test_the_tasks_system_prompt_is_for_conversations_without_one(tokenizer: PreTrainedTokenizerFast) -> None:
    task = TASK.model_copy(update={"system_prompt": "Be kind.", "prompt": "Solve: {source}"})
    prompt, _ = texts_of(tokenizer, example(messages("a", "b")), task)
    assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na<|im_end|>")
    own = [{"role": "system", "content": "Be brief."}, *messages("a", "b")]
    prompt, _ = texts_of(tokenizer, example(own), task)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>")


def test_tools_and_calls_are_what_the_template_writes(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [
        *messages("1 + 1?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        *messages("x", "It is 2.")[1:],
    ]
    called, answered = by_turn(example(talk, TOOLS))
    prompt, response = texts_of(tokenizer, called)
    assert prompt.startswith("<|im_start|>tools\n")
    assert '"add"' in prompt
    assert response == '<call>add({"a": 1})</call><|im_end|>'
    prompt, response = texts_of(tokenizer, answered)
    assert '<call>add({"a": 1})</call><|im_end|>\n<|im_start|>tool\n2<|im_end|>' in prompt
    assert response == "It is 2.<|im_end|>"
    layout = chat_layout(tokenizer, TASK)
    for each in (called, answered):
        assert layout.departure(TASK, each.question, each.target) == ""


def test_calls_that_a_template_leaves_out_are_seen() -> None:
    deaf = byte_level(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        eos="<|im_end|>",
    )
    layout = chat_layout(deaf, TASK)
    called = example([*messages("a"), {"role": "assistant", "content": "", "tool_calls": [CALL]}])
    assert layout.departure(TASK, called.question, called.target) == "answer"
    with_tools = example(messages("a", "b"), TOOLS)
    assert layout.departure(TASK, with_tools.question, with_tools.target) == "tools"


def test_a_prompt_alone_has_no_response(tokenizer: PreTrainedTokenizerFast) -> None:
    for each in (make_example("a", ""), example(messages("a"))):
        assert texts_of(tokenizer, each) == (
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think></think>",
            "",
        )


def test_without_a_chat_template_messages_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = TASK.model_copy(update={"chat_template": False})
    with pytest.raises(SkdError, match="only a chat template can write") as caught:
        encode_prompt(tokenizer, plain, example(messages("a", "b")).question)
    assert caught.value.where == "task.chat_template"


def test_the_trainers_rows_are_the_pipelines_examples(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = messages("a", "b", "c", "d")
    end = answer_end_id(tokenizer, TASK)
    turns = list(each_turn([{"messages": talk, "id": 1}, {"prompt": "x", "completion": "y"}]))
    assert len(turns) == 3
    for row, each in zip(turns, by_turn(example(talk)), strict=False):
        ours = encode(tokenizer, TASK, each, end)
        theirs = tokenize_row(tokenizer, row, [end])
        assert (theirs.prompt_ids, theirs.response_ids) == (ours.prompt_ids, ours.response_ids)
        assert decode_answer(tokenizer, TASK, theirs.response_ids) == each.target
    last = tokenize_row(tokenizer, {"messages": talk}, [end])
    assert last == tokenize_row(tokenizer, turns[1], [end])


def test_datasets_are_divided_into_turns_once() -> None:
    rows = [{"talk": messages("a", "b", "c", "d")}, {"talk": messages("e", "f")}]

    def form(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": row["talk"]}

    divided = rows_by_turn({"one": rows, "two": iter(rows)}, form, "eval_dataset")
    assert [len(row["messages"]) for row in divided["one"]] == [2, 4, 2]
    assert [len(row["messages"]) for row in divided["two"]] == [2, 4, 2]
    again = rows_by_turn(divided, form, "eval_dataset")
    assert again["one"] is divided["one"]
    assert rows_by_turn(None, form, "train_dataset") is None
    with pytest.raises(SkdError) as caught:
        rows_by_turn([{"messages": messages("a", "b", "c")}], None, "train_dataset")
    assert caught.value.where == "train_dataset, row 1, field `messages`, message 3"


def test_what_a_template_changes_in_a_trainers_row_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    silent = byte_level(TEMPLATE.replace("m.tool_calls", "[]"))
    silent.name_or_path = "silent"
    row = {"messages": [*messages("add"), {"role": "assistant", "tool_calls": [CALL]}], "tools": TOOLS}
    for _ in range(2):
        tokenize_row(silent, row, [silent.eos_token_id])
    assert caplog.text.count("silent: the chat template changes or leaves out the answer of some rows") == 1


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set thought = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1] | trim"
    " if '</think>' in m.content else '') %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3's: thinking in a field, or in the text, stands where else an empty part of thinking is."""
DROPPING = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
"""As DeepSeek-R1's."""
EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\nhm\n</think>\n\n"


@cache
def thinking() -> PreTrainedTokenizerFast:
    return byte_level(THINKING, eos="<|im_end|>")


@pytest.mark.parametrize(
    ("answer", "opening", "response"),
    [
        ({"content": "42"}, EMPTY, "42"),
        ({"content": "42", "reasoning_content": "hm"}, "", f"{THOUGHT}42"),
        ({"content": f"{THOUGHT}42"}, "", f"{THOUGHT}42"),
        ({"content": "hm</think>42"}, "", f"{THOUGHT}42"),
        ({"content": f"{EMPTY}42"}, EMPTY, "42"),
        ({"content": "!"}, EMPTY, "!"),
    ],
)
def test_thinking_is_trained_and_scored_after_one_prompt(answer: dict[str, str], opening: str, response: str) -> None:
    tokenizer = thinking()
    talk = [*messages("6 * 7?"), {"role": "assistant", **answer}]
    taught = example(talk)
    prompt = f"<|im_start|>user\n6 * 7?<|im_end|>\n<|im_start|>assistant\n{opening}"
    assert texts_of(tokenizer, taught) == (prompt, f"{response}<|im_end|>")
    assert f"{prompt}{response}<|im_end|>\n" == tokenizer.apply_chat_template(talk, tokenize=False)
    assert tokenizer.decode(encode_prompt(tokenizer, TASK, taught.question)) == prompt
    assert chat_layout(tokenizer, TASK).departure(TASK, taught.question, taught.target) == ""
    if "reasoning_content" not in answer:
        text = make_example("6 * 7?", answer["content"])
        assert texts_of(tokenizer, text) == (prompt, f"{response}<|im_end|>")
        assert tokenizer.decode(encode_prompt(tokenizer, TASK, text.question, text.target)) == prompt


def test_thinking_that_a_template_drops_is_trained_on_as_it_is() -> None:
    tokenizer = byte_level(DROPPING)
    for answer in ("42", f"{THOUGHT}42", f"{EMPTY}42"):
        assert texts_of(tokenizer, make_example("7?", answer)) == ("<|user|>7?<|assistant|>", f"{answer}</s>")


def test_thinking_in_a_field_that_a_template_does_not_write_is_noticed() -> None:
    talk = [*messages("a"), {"role": "assistant", "content": "42", "reasoning_content": "hm"}]
    asked = example(talk)
    assert chat_layout(byte_level(DROPPING), TASK).departure(TASK, asked.question, "42") == "thinking"


def test_of_an_answer_with_thinking_the_text_after_it_is_scored() -> None:
    tokenizer = thinking()
    asked = example([*messages("6 * 7?"), {"role": "assistant", "content": "42", "reasoning_content": "hm"}]).question
    ids = tokenizer("<think>\nIs it </think>?\n</think>\n\nIt is 42.<|im_end|>", add_special_tokens=False)["input_ids"]
    assert decode_answer(tokenizer, TASK, ids, asked) == "It is 42."
    assert decode_answer(tokenizer, TASK, ids, example(messages("a", "b")).question).startswith("<think>\nIs it")


def test_a_call_that_ends_by_a_token_of_its_own_gets_no_second_end() -> None:
    tokenizer = byte_level(
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{% if m.tool_calls %}add<|response|>\n{% else %}<|return|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        eos="<|return|>",
    )
    called = example([*messages("a"), {"role": "assistant", "content": "", "tool_calls": [CALL]}])
    end, call = answer_end_id(tokenizer, TASK), tokenizer.convert_tokens_to_ids("<|response|>")
    assert tokenizer.decode(encode(tokenizer, TASK, called, end, [end, call]).response_ids).endswith("add<|response|>")
    assert encode(tokenizer, TASK, called, end).response_ids[-1] == end
    row = {"messages": [*messages("a"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
    assert tokenize_row(tokenizer, row, [end, call]).response_ids[-1] == call
