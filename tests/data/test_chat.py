"""Chat templates as models have them: what is taught is what the template itself writes, or it is refused by name."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from skd_lib.config import RunConfig, TaskConfig
from skd_lib.data.chat import chat_layout, check_rendering, depends_on_date
from skd_lib.data.examples import make_example
from skd_lib.data.tokenize import answer_end_id, decode_answer, encode, encode_prompt
from skd_lib.errors import SkdError
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.templates import check_template
from tests.conftest import CHAT_TEMPLATE, CORPUS

TASK = TaskConfig(prompt="{source}", max_new_tokens=99)
SYSTEM = TASK.model_copy(update={"system_prompt": "be brief"})
EOS = "</s>"
SPECIALS = [
    *("<pad>", "<s>", EOS, "<|im_start|>", "<|im_end|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>"),
    *("<|end|>", "<|turn|>", "<|response|>", "<|/response|>", "<|endoftext|>", "<|assistant|>", "<|user|>"),
]
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def byte_level(template: Any, eos: str = EOS, plain: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; `plain` are tokens of their own that are not marked as special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [*CORPUS, "Bot: Answer, Answer"],
        trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIALS, initial_alphabet=alphabet),
    )
    return finished(tokenizer, template, eos, plain)


def sentencepiece(template: Any, eos: str = EOS, plain: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a blank before any text, as Llama 2's does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIALS, initial_alphabet=list(string.printable))
    tokenizer.train_from_iterator(CORPUS, trainer)
    return finished(tokenizer, template, eos, plain)


def finished(tokenizer: Tokenizer, template: Any, eos: str, plain: tuple[str, ...]) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        additional_special_tokens=[token for token in SPECIALS if token not in plain],
        clean_up_tokenization_spaces=False,
    )
    if plain:
        wrapped.add_tokens(list(plain))
    wrapped.chat_template = template
    return wrapped


def turns(user: str, assistant: str, generation: str, end: str = "") -> str:
    """A template of two kinds of turns; @ stands for their texts."""
    user = user.replace("@", "{{ m['content'] }}")
    assistant = assistant.replace("@", "{{ m['content'] }}")
    return (
        f"{{% for m in messages %}}{{% if m['role'] == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{generation}{{% else %}}{end}{{% endif %}}"
    )


@pytest.mark.parametrize(
    ("template", "eos", "prompt", "response"),
    [
        pytest.param(
            turns(
                "<|start|>user<|message|>@<|end|>",
                "<|start|>assistant<|channel|>final<|message|>@<|return|>",
                "<|start|>assistant",
            ),
            "<|return|>",
            "<|start|>user<|message|>7 boats?<|end|><|start|>assistant<|channel|>final<|message|>",
            "It is 42.<|return|>",
            id="harmony",
        ),
        *(
            pytest.param(
                turns(
                    "<|turn|>@<|end|>",
                    "<|turn|><|assistant|><|response|>@<|/response|><|end|>",
                    "<|turn|><|assistant|>",
                ),
                eos,
                "<|turn|>7 boats?<|end|><|turn|><|assistant|><|response|>",
                "It is 42.<|/response|><|end|>",
                id=f"cohere, eos {eos}",
            )
            for eos in ("<|end|>", EOS)
        ),
        pytest.param(
            turns(
                "<|im_start|>user\n@<|im_end|>\n",
                "<|im_start|>assistant\n<think>\n\n</think>\n\n@<|im_end|>\n",
                "<|im_start|>assistant\n",
            ),
            "<|im_end|>",
            "<|im_start|>user\n7 boats?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "It is 42.<|im_end|>",
            id="qwen3",
        ),
        pytest.param(
            turns("<|user|>@", "<|assistant|>@</s>", "<|assistant|><think>\n"),
            EOS,
            "<|user|>7 boats?<|assistant|>",
            "It is 42.</s>",
            id="deepseek-r1",
        ),
        pytest.param(
            turns("[INST] @ [/INST]", " @ </s>", ""),
            EOS,
            "[INST] 7 boats? [/INST]",
            " It is 42. </s>",
            id="llama-2",
        ),
        pytest.param(
            turns("USER: @ ", "ASSISTANT: @</s>", "ASSISTANT:"),
            EOS,
            "USER: 7 boats? ASSISTANT:",
            " It is 42.</s>",
            id="vicuna",
        ),
        pytest.param(
            turns("### Instruction:\n@\n\n", "### Response:\n@\n\n", "### Response:\n"),
            EOS,
            "### Instruction:\n7 boats?\n\n### Response:\n",
            "It is 42.</s>",
            id="alpaca, the end is no token",
        ),
        pytest.param(
            turns("User: @\n", "Bot: @", "Bot:"), EOS, "User: 7 boats?\nBot:", " It is 42.</s>", id="no end at all"
        ),
        pytest.param(
            turns("User: @\n", "Bot: @ [END]\n", "Bot:"),
            EOS,
            "User: 7 boats?\nBot:",
            " It is 42. [END]</s>",
            id="the end is text",
        ),
        pytest.param(
            turns("<|user|>\n@<|end|>\n", "<|assistant|>\n@<|end|>\n", "<|assistant|>\n", "<|endoftext|>"),
            "<|endoftext|>",
            "<|user|>\n7 boats?<|end|>\n<|assistant|>\n",
            "It is 42.<|end|>",
            id="phi-3, an end of the text after that of the answer",
        ),
        pytest.param(
            turns("<|im_start|>user\n@<|im_end|>\n", "<|im_start|>assistant\n@<|im_end|>\n", "")
            + "{{ '<|im_start|>assistant\n' }}",
            EOS,
            "<|im_start|>user\n7 boats?<|im_end|>\n<|im_start|>assistant\n",
            "It is 42.<|im_end|>",
            id="always a generation prompt",
        ),
        pytest.param(
            turns("<|im_start|>user\n@<|im_end|>\n", "<|im_start|>assistant\n@<|im_end|>\n", ""),
            EOS,
            "<|im_start|>user\n7 boats?<|im_end|>\n<|im_start|>assistant\n",
            "It is 42.<|im_end|>",
            id="never a generation prompt",
        ),
        pytest.param(
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
            "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + GENERATION,
            EOS,
            "<|im_start|>user\n7 boats?<|im_end|>\n<|im_start|>assistant\n",
            "It is 42.<|im_end|>",
            id="parts only",
        ),
    ],
)
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_what_is_taught_is_what_the_template_writes(
    make: MakeTokenizer, template: str, eos: str, prompt: str, response: str
) -> None:
    tokenizer = make(template, eos)
    end = answer_end_id(tokenizer, TASK)
    taught = encode(tokenizer, TASK, make_example("7 boats?", "It is 42."), end)
    assert tokenizer.decode(taught.prompt_ids) == prompt
    assert tokenizer.decode(taught.prompt_ids + taught.response_ids) == prompt + response
    # Token by token as the template's own text, where that ends with a token.
    ids = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
    assert taught.prompt_ids + taught.response_ids == ids
    assert taught.response_ids[-1] == end
    assert decode_answer(tokenizer, TASK, taught.response_ids) == "It is 42."
    assert taught.prompt_ids == encode_prompt(tokenizer, TASK, "7 boats?")


def test_an_end_that_is_not_marked_as_special_ends_and_is_no_part_of_the_answer() -> None:
    tokenizer = byte_level(
        turns("<|user|>@<over>", "<|assistant|>@<over>", "<|assistant|>"), plain=("<over>", "</think>", "\n")
    )
    end = answer_end_id(tokenizer, TASK)
    assert end == tokenizer.convert_tokens_to_ids("<over>")
    taught = encode(tokenizer, TASK, make_example("7 boats?", "It is\n42."), end)
    assert decode_answer(tokenizer, TASK, taught.response_ids) == "It is\n42."


@pytest.mark.parametrize("trim", ["", " | trim", ".lstrip('\n')"])
def test_white_space_around_an_answer_is_what_the_template_leaves_of_it(trim: str) -> None:
    template = (
        f"{{% for m in messages %}}<|im_start|>{{{{ m['content']{trim} }}}}<|im_end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    tokenizer = byte_level(template)
    answer = "\n  42 \n"
    taught = encode(tokenizer, TASK, make_example("7 boats?", answer), answer_end_id(tokenizer, TASK))
    said = [{"role": "user", "content": "7 boats?"}, {"role": "assistant", "content": answer}]
    assert tokenizer.decode(taught.prompt_ids + taught.response_ids) + "\n" == tokenizer.apply_chat_template(
        said, tokenize=False
    )


def test_special_tokens_in_an_answer_stay_text() -> None:
    tokenizer = byte_level(turns("<|user|>@", "<|assistant|><|response|>@<|/response|><|end|>", "<|assistant|>"))
    taught = encode(tokenizer, TASK, make_example("7?", "a <|end|> b"), answer_end_id(tokenizer, TASK))
    assert tokenizer.decode(taught.response_ids) == "a <|end|> b<|/response|><|end|>"
    assert taught.response_ids.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 1


def test_an_answer_that_is_cut_is_cut_within_what_ends_it() -> None:
    tokenizer = byte_level(turns("<|user|>@", "<|assistant|>@<|/response|><|end|>", "<|assistant|>"))
    end = answer_end_id(tokenizer, TASK)
    whole = encode(tokenizer, TASK, make_example("7?", "42"), end).response_ids
    short = TASK.model_copy(update={"max_new_tokens": len(whole) - 1})
    assert encode(tokenizer, short, make_example("7?", "42"), end).response_ids == whole[:-1]


def of_messages(content: str, messages: str = "messages") -> str:
    """A template that writes `content` for each message."""
    return (
        f"{{% for m in {messages} %}}<|im_start|>{{{{ m['role'] }}}}\n{{{{ {content} }}}}<|im_end|>\n{{% endfor %}}"
        f"{GENERATION}"
    )


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (of_messages("m['content']", "messages if m['role'] != 'system'"), "prints the system message nowhere"),
        (of_messages("m['content'][:0] if m['role'] == 'user' else m['content']"), "prints the question nowhere"),
        (of_messages("m['content'][:9] if m['role'] == 'user' else m['content']"), "prints the question nowhere"),
        (of_messages("'Hi' if m['role'] == 'assistant' else m['content']"), "prints the answer nowhere"),
        (of_messages("m['content'] | lower"), "changes the system message(.|\n)*the question(.|\n)*the answer"),
        (of_messages("m['content'] | lower if m['role'] == 'user' else m['content']"), "changes the question"),
        (of_messages("m['content'] | e if m['role'] == 'user' else m['content']"), "changes the question"),
        (of_messages("m['content'] | tojson if m['role'] == 'user' else m['content']"), "changes the question"),
        (of_messages("m['content'].split() | join(' ') if loop.last else m['content']"), "changes the answer"),
        (of_messages("messages[-1]['content'] ~ m['content']"), "prints the answer more than once"),
        ("you are a bot<|im_end|>", "system message nowhere(.|\n)*question nowhere(.|\n)*answer nowhere"),
        ("{{ raise_exception('no system role') }}", "refuses the messages: TemplateError: no system role"),
        ("{% for m in messages %}{{ (m.content | length) + 'a' }}{% endfor %}", "TypeError: unsupported operand"),
        ("{{ messages[0].nothing.more }}", "UndefinedError: .* has no attribute 'nothing'"),
        ("{{ messages[9]['content'] }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        (
            {"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE},
            r"several chat templates \(rag, tool_use\) and none called",
        ),
        (None, "no chat template"),
    ],
)
def test_a_template_that_loses_or_changes_something_is_refused(template: Any, what: str) -> None:
    tokenizer = byte_level(template)
    with pytest.raises(SkdError, match=what) as caught:
        encode_prompt(tokenizer, SYSTEM, "a")
    assert "chat_template" in str(caught.value)
    with pytest.raises(SkdError, match=what):
        answer_end_id(tokenizer, SYSTEM)


def test_named_templates_with_a_default_use_it() -> None:
    tokenizer = byte_level({"default": CHAT_TEMPLATE, "rag": "nothing"})
    assert tokenizer.decode(encode_prompt(tokenizer, TASK, "a")).endswith("user\na<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
        ("{{ 'a' * 9999999 }}", "9,999,999 characters"),
        ("{{ 'a' * 10 ** 12 }}", "1,000,001 characters|MemoryError"),
    ],
)
def test_a_template_that_never_ends_is_given_up(template: str, what: str) -> None:
    tokenizer = byte_level(template)
    with pytest.raises(SkdError, match=what):
        check_rendering(tokenizer, TASK)


def test_notes_say_where_prompts_are_not_the_generation_prompt() -> None:
    plain = byte_level(CHAT_TEMPLATE)
    assert chat_layout(plain, TASK).notes == ()
    opened = byte_level(turns("<|user|>@", "<|assistant|><|response|>@<|end|>", "<|assistant|>"))
    assert "writes '<|response|>' between its generation prompt and an answer" in chat_layout(opened, TASK).notes[0]
    other = byte_level(turns("<|user|>@", "<|assistant|>@<|end|>", "<|assistant|><think>\n"))
    assert "generation prompt ends with '<think>\\n', where it writes ''" in chat_layout(other, TASK).notes[0]
    blank = byte_level(turns("User: @\n", "Bot: @\n", "Bot: "))
    assert "first tokens of an answer" in chat_layout(blank, TASK).notes[0]


def test_an_example_that_the_template_writes_otherwise_is_found() -> None:
    think = "m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'].replace('[t]', '')"
    layout = chat_layout(byte_level(of_messages(think)), TASK)
    assert layout.departure(TASK, "7 boats?", "42") == ""
    assert layout.departure(TASK, "7 boats?", "<think>hm</think>42") == "answer"
    assert layout.departure(TASK, "7 [t] boats?", "42") == "question"


def test_a_template_that_prints_the_date_prints_that_of_the_task() -> None:
    tokenizer = byte_level(CHAT_TEMPLATE)
    assert not depends_on_date(tokenizer, TASK)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATE
    assert depends_on_date(tokenizer, TASK)
    assert not depends_on_date(tokenizer, TASK.model_copy(update={"chat_template": False}))
    then = TASK.model_copy(update={"date": "2024-07-26"})
    assert tokenizer.decode(encode_prompt(tokenizer, then, "a")).startswith("26 Jul 2024\n")


def test_preflight_warns_of_held_out_sets_whose_system_message_is_lost() -> None:
    source = {"type": "files", "files": ["a.jsonl"]}
    config = RunConfig.model_validate(
        {
            "name": "run",
            "teacher": "teacher",
            "student": "student",
            "data": {
                "source": {"type": "files", "train": ["train.jsonl"]},
                "held_out": [{"name": "a", "source": source, "task": {"system_prompt": "be brief"}}],
            },
        }
    )
    tokenizer = byte_level(of_messages("m['content']", "messages if m['role'] != 'system'"))
    checks = Checks()
    check_template(checks, "student", tokenizer, config)
    (found,) = checks.found
    assert (found.name, found.level) == ("held-out a", "warning")
    assert "prints the system message nowhere" in found.what
    assert "leave `task.system_prompt` out" in found.hint
