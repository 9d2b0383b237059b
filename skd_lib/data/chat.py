"""Layout of a chat template: the place of the answer, found by rendering.

A template is a program, and nothing is concluded from its source. An invented question and answer are rendered, and the
place of the answer in the text separates the prompt from what ends an answer. So prompt and response together are the
template's own text for the whole conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from skd_lib.config import TaskConfig
from skd_lib.data.conversations import Conversation
from skd_lib.data.examples import Question
from skd_lib.data.rendering import Message, Template, render, try_rendering
from skd_lib.data.template_text import ending, letters, tokens_behind
from skd_lib.errors import SkdError, SkdErrors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With everything that templates change: upper case, a line break, quotes, and signs that HTML escapes.
_QUESTION = 'Question 7:\n"What" <is> 2 & 3?'
_ANSWER = 'Answer 8:\n"It" <is> 5 & 6.'
_SYSTEM = 'Rule 9:\n"Be" <very> kind & brief.'
_DAYS = ("2021-02-03", "2034-11-25")
_THINKING = ("reasoning_content", "thinking", "reasoning")
_HINT = "correct the chat template, or set `task.chat_template: false` and write the prompt in `task.prompt`"


@dataclass(frozen=True)
class ChatLayout:
    """The form in which a tokenizer's chat template writes the conversations of a task.

    Attributes:
        template: The template.
        parts: Messages hold a list of parts (`{"type": "text", ...}`) instead of a string.
        lead: White space that belongs to the answer: tokenizers join it to the answer's first word.
        anchor: Text before the answer when it is tokenised, so that its first token is that of the rendered text:
            SentencePiece puts a blank before any text, but not after a line break.
        tail: Text between the answer and the token that ends it.
        closing: The special tokens that follow, up to the one that ends the answer; none where the template has none.
        after: All that the template writes after an answer.
        opens: The prompt before an answer of text is not the template's own generation prompt: thinking may begin in
            another way.
        notes: Differences from the template's own text, in words.
    """

    template: Template
    parts: bool
    lead: str
    anchor: str
    tail: str
    closing: tuple[int, ...]
    after: str
    opens: bool
    notes: tuple[str, ...]

    def prompt(self, task: TaskConfig, question: Question) -> str:
        """Return everything that the template writes before the answer to a question."""
        before, _, _ = self._rendered(task, question, _ANSWER).rpartition(_ANSWER)
        return before.removesuffix(self.lead)

    def answer(self, task: TaskConfig, question: Question, answer: str) -> str:
        """Return the answer as the template writes it: some templates remove white space around it."""
        if answer == answer.strip():
            return answer
        start = self.prompt(task, question) + self.lead
        text = self._rendered(task, question, answer)
        written = text[len(start) : len(text) - len(self.after)] if text.startswith(start) else ""
        return written if written.strip() == answer.strip() else answer

    def parted(self, task: TaskConfig, question: Question, answer: str) -> tuple[str, str]:
        """Return the prompt of an answer of text, and the answer, with white space before it that belongs to it.

        Thinking in the answer (`<think>`) stands where some templates write an empty part of thinking otherwise
        (Qwen3): then the prompt ends before it. An answer of which a template drops the thinking stays as it is.
        """
        start = self.prompt(task, question)
        if self.opens:
            text, said = self._rendered(task, question, answer), letters(answer)
            written = text[: len(text) - len(self.after)] if text.endswith(self.after) else ""
            inside = written[len(start) :] if written.startswith(start) else ""
            if not letters(inside).endswith(said) and letters(written).endswith(said):
                opened = self._rendered(task, question, None, add_generation_prompt=True)
                for before in (start, opened):
                    if written.startswith(before):
                        return before, written[len(before) :]
        return start, self.lead + self.answer(task, question, answer)

    def thinking_end(self, task: TaskConfig, talk: Conversation) -> str:
        """Return what the template writes between an answer's thinking, in a field of its own, and its text."""
        thoughts = _thoughts(talk)
        content = talk.answer["content"].strip() if talk.answer else ""
        if not thoughts or not content:
            return ""
        before, found, _ = self.whole(task, talk)[1].rpartition(content)
        _, thought, end = before.rpartition(thoughts[0])
        return end.strip() if found and thought else ""

    def whole(self, task: TaskConfig, talk: Conversation) -> tuple[str, str]:
        """Return the prompt of a conversation, and the template's text from there to its end.

        For answers with more than text, such as calls of tools, which a template may open in another way than text.
        """
        text = self._rendered(task, talk, talk.answer)
        opened = self._rendered(task, talk, None, add_generation_prompt=True)
        for before in (self.prompt(task, talk), opened, self._rendered(task, talk, None)):
            if text.startswith(before):
                return before, text[len(before) :]
        what = "the chat template writes the conversation in another way when this answer follows"
        raise SkdError(what, hint="correct the template, or remove this row")

    def departure(self, task: TaskConfig, question: Question, answer: str) -> str:
        """Return the part of an example that the template changes: by name; empty if none.

        The names are `question`, `tools`, `answer`, and `thinking` for an answer's thinking in a field of its own.
        """
        prompt = self.prompt(task, question)
        asked = [question] if isinstance(question, str) else _written(question)
        if not all(text.strip() in prompt for text in asked):
            return "question"
        if not isinstance(question, str):
            if not all(name in prompt for name in _names(question.tools)):
                return "tools"
            if question.answer is None:
                return ""
            if not question.is_plain:
                _, written = self.whole(task, question)
                called = _names(question.answer.get("tool_calls", ()))
                if not all(name in written for name in called):
                    return "answer"
                return "" if all(letters(each) in letters(written) for each in _thoughts(question)) else "thinking"
        ours = "".join(self.parted(task, question, answer)) + self.after
        return "" if self._rendered(task, question, answer) == ours else "answer"

    def tokens(self, tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
        """Return the token ids of an answer of `parted`, without those that end it; special tokens in it stay text."""
        return tokens_behind(tokenizer, self.anchor, answer + self.tail)

    def _rendered(
        self,
        task: TaskConfig,
        question: Question,
        answer: str | Message | None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        return render(
            self.template,
            conversation(task, question, answer, parts=self.parts),
            tools=() if isinstance(question, str) else question.tools,
            add_generation_prompt=add_generation_prompt,
            date=task.date,
        )


def _written(talk: Conversation) -> list[str]:
    """Return the texts that a template must write before the answer: of old answers some leave parts out."""
    return [message["content"] for message in talk.asked if message["role"] in ("system", "user")]


def _thoughts(talk: Conversation) -> list[str]:
    """Return the thinking of a conversation's answer, where it has fields of its own."""
    answer = talk.answer or {}
    return [str(answer[name]).strip() for name in _THINKING if answer.get(name)]


def _names(described: Iterable[Any]) -> list[str]:
    """Return the names of tools, or of called ones."""
    functions = (each.get("function", each) for each in described)
    return [str(function["name"]) for function in functions if isinstance(function, dict) and "name" in function]


def chat_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the tokenizer's chat template."""
    where = str(tokenizer.name_or_path)
    if not tokenizer.chat_template:
        hint = "set `task.chat_template: false`, or use an instruction-tuned model"
        raise SkdError("the tokenizer has no chat template", where=where, hint=hint)
    try:
        source = str(tokenizer.get_chat_template())
    except ValueError as error:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise SkdError(
            f"the tokenizer has several chat templates ({names}) and none called `default`",
            where=where,
            hint="save the one for plain conversations as chat_template.jinja, or set `task.chat_template: false`",
        ) from error
    return Template(source, json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True))


def conversation(
    task: TaskConfig, question: Question, answer: str | Message | None = None, *, parts: bool = False
) -> list[Message]:
    """Return the messages of one example; without an answer, those before it.

    A conversation is taken as it is: the task's prompt is not put around it; the task's system prompt comes first where
    it has no system message.
    """
    if isinstance(question, str):
        asked: list[Message] = [{"role": "user", "content": task.prompt.replace("{source}", question)}]
    else:
        asked = [{key: value for key, value in each.items() if key != "weight"} for each in question.asked]
    if task.system_prompt and asked[0]["role"] != "system":
        asked = [{"role": "system", "content": task.system_prompt}, *asked]
    if answer is not None:
        said = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        asked.append({key: value for key, value in said.items() if key != "weight"})
    if parts:
        return [each | {"content": [{"type": "text", "text": each["content"]}]} for each in asked]
    return asked


def check_rendering(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> None:
    """Check in a child process, once for each template, that the chat template ends, if the task wants one."""
    if not task.chat_template:
        return
    template = chat_template(tokenizer)
    error = try_rendering(template, json.dumps(conversation(task, _QUESTION, _ANSWER)), task.date)
    if error is not None:
        raise error


def depends_on_date(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> bool:
    """Return whether the prompts of a task change with the date, because the chat template prints it."""
    if not task.chat_template or "strftime_now" not in chat_template(tokenizer).source:
        return False
    check_rendering(tokenizer, task)
    layout = chat_layout(tokenizer, task)
    prompts = {layout.prompt(task.model_copy(update={"date": day}), _QUESTION) for day in ("", *_DAYS)}
    return len(prompts) > 1


def chat_layout(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> ChatLayout:
    """Find the layout in which the tokenizer's chat template writes this task's conversations."""
    return _layout(tokenizer, chat_template(tokenizer), task.prompt, task.system_prompt, task.date)


@lru_cache(maxsize=32)
def _layout(
    tokenizer: PreTrainedTokenizerBase, template: Template, prompt: str, system_prompt: str, date: str
) -> ChatLayout:
    system = f"{system_prompt}\n{_SYSTEM}" if system_prompt else ""
    task = TaskConfig(prompt=prompt, system_prompt=system, date=date)
    failures: list[SkdError] = []
    for parts in (False, True):
        try:
            return _read_layout(tokenizer, template, task, parts=parts)
        except SkdError as error:
            failures.append(error)
    # What the template says about parts is of no use where it does not want them.
    as_text, as_parts = failures
    raise as_parts if _severity(as_parts) < _severity(as_text) else as_text


def _severity(error: SkdError) -> int:
    if error.__cause__ is not None:  # the template raised something
        return 9
    return len(error.errors) if isinstance(error, SkdErrors) else 1


def _read_layout(
    tokenizer: PreTrainedTokenizerBase, template: Template, task: TaskConfig, *, parts: bool
) -> ChatLayout:
    def rendered(answer: str | None) -> str:
        messages = conversation(task, _QUESTION, answer, parts=parts)
        return render(template, messages, add_generation_prompt=answer is None, date=task.date)

    text, generation = rendered(_ANSWER), rendered(None)
    before, answer, after = text.rpartition(_ANSWER)
    given = {"system message": task.system_prompt, "question": task.prompt.replace("{source}", _QUESTION)}
    wrong = [
        (what, problem)
        for what, string in given.items()
        if (problem := _misprint(what, string.strip(), before if answer else text))
    ]
    if not answer:
        wrong.append(("answer", _misprint("answer", _ANSWER, text)))
    elif _ANSWER in before:
        wrong.append(("answer", "prints the answer more than once"))
    if wrong:
        where = str(tokenizer.name_or_path)
        hints = {"system message": f"leave `task.system_prompt` out, or {_HINT}"}
        errors = [
            SkdError(f"the chat template {problem}", where=where, hint=hints.get(what, _HINT))
            for what, problem in wrong
        ]
        raise errors[0] if len(errors) == 1 else SkdErrors(errors)

    pairs = enumerate(zip(generation, before, strict=False))
    common = next((place for place, (one, other) in pairs if one != other), min(len(generation), len(before)))
    extra = before[len(generation) :] if common == len(generation) else before[common:]
    # Text that only opens the answer belongs to it.
    lead = extra if not extra.strip() else extra[len(extra.rstrip(" ")) :]
    opening = extra.removesuffix(lead) if common == len(generation) else ""
    tail, closing = ending(tokenizer, after)
    notes = _notes(generation, before, opening, common)
    start = list(tokenizer(before.removesuffix(lead), add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for anchor in ("", "\n"):
        made = [*start, *tokens_behind(tokenizer, anchor, lead + _ANSWER)[:2]]
        if made == whole[: len(made)]:
            break
    else:
        anchor = ""
        notes.append("the first tokens of an answer differ from those of the template's whole text, tokenised at once")
    opens = bool(opening) or common < len(generation)
    return ChatLayout(template, parts, lead, anchor, tail, closing, after, opens, tuple(notes))


def _notes(generation: str, before: str, opening: str, common: int) -> list[str]:
    where = "between its generation prompt and an answer"
    if opening:
        return [f"the chat template writes {opening!r} {where}: in training, prompts end with it"]
    if common < len(generation):
        return [
            f"the chat template's generation prompt ends with {generation[common:]!r}, where it writes "
            f"{before[common:]!r} before a given answer: in training, prompts end as before a given answer"
        ]
    return []


def _misprint(what: str, string: str, text: str) -> str:
    """Say what a template does to a string that its text must contain; empty if nothing."""
    if string in text:
        return ""
    changed = letters(string) in letters(text)
    return f"changes the {what}: {string!r} is not in the text" if changed else f"prints the {what} nowhere"
