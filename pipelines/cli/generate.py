"""`skd generate`: one model's answers, or a model's with a draft, token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skd_kfp.pipelines.cli.options import say_json
from skd_lib.errors import SkdError, SkdErrors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skd_lib._core.terminal import Console
    from skd_lib.config import TaskConfig
    from skd_lib.data.examples import Question
    from skd_lib.sampling.interleaved import InterleavedSampler, StreamedToken

LEGEND = "[green]drafted and accepted[/], [bold yellow]by the model in place of a draft[/], the model's own"


def generate(
    model: Annotated[str, typer.Argument(help="The model whose output is wanted: a folder or another reference.")],
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt.", show_default="standard input; with --chat: asked for")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="A model that drafts for it, with the same tokenizer (speculative decoding).")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Answer these: .txt with one a line, or a data file (JSONL, JSON, CSV, TSV, Parquet)."),
    ] = None,
    column: Annotated[str, typer.Option(help="Column of --prompts that holds the prompt.")] = "source",
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask for messages, one after the other, until an empty one.")
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(
            help="Put prompts into this task's template: its name, or a YAML file.",
            show_default="the task of the run whose folder MODEL is in, else none",
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give prompts as they are, without any template.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length limit of an answer.", show_default="the task's, else 256")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy decoding.")] = 0.0,
    gamma: Annotated[int, typer.Option(min=1, help="Tokens drafted for each call of the model.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of what is sampled.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each answer, for scripts.")] = False,
) -> None:
    """Answer prompts. With --draft, colours show in a terminal which tokens were drafted, and which were replaced.

    The answer is the model's own, with a draft as without one: at temperature 0 token by token, else in distribution.

    Examples: `skd generate runs/demo/student "Fichier introuvable"`,
    `skd generate runs/demo/teacher --draft runs/demo/student --prompts prompts.txt --json`,
    `skd generate org/model --chat`.
    """
    _check_options(prompt, prompts, task, chat=chat, raw=raw, as_json=as_json)
    from skd_lib.config import TaskConfig

    settings = TaskConfig(chat_template=chat) if raw or chat else _task(model, task)
    questions: list[Question] | None = None
    if prompts is not None:
        from skd_lib.specdec.prompts import read_prompts

        questions = [*read_prompts(prompts, column=column, limit=sys.maxsize)]
    sampler, tokenizer = _load(model, draft, gamma)
    if chat and not tokenizer.chat_template:
        raise SkdError("its tokenizer has no chat template", where=model, hint="leave --chat out")
    settings = settings or TaskConfig(chat_template=bool(tokenizer.chat_template))
    limit = max_new_tokens or settings.max_new_tokens
    options: dict[str, Any] = {"seed": seed, "max_new_tokens": limit, "do_sample": temperature > 0}
    options |= {"temperature": temperature} if temperature else {}

    from skd_lib._core.terminal import Console

    console = Console()

    def ask(question: Question) -> str:
        rounds = _rounds(sampler, tokenizer, settings, question, options)
        written = [*rounds] if as_json else [*_shown(console, tokenizer, rounds)]
        tokens = [token for tokens in written for token in tokens]
        drafted = sum(not token.by_teacher for token in tokens)
        answer = _text(tokenizer, tokens)
        if as_json:
            figures = {
                "prompt": question if isinstance(question, str) else question.question(),
                "answer": answer,
                "tokens": len(tokens),
                "drafted": drafted,
                "replaced": sum(token.proposal >= 0 for token in tokens),
                "calls": len(written),
                "truncated": len(tokens) == limit and tokens[-1].token not in _ends(sampler),
            }
            say_json(figures, lines=True)
            return answer
        console.print()
        if draft is not None:
            counts = f"tokens: {len(tokens)}, of them drafted: {drafted}; calls of the model: {len(written)}"
            legend = f" ({LEGEND})" if console.is_terminal and not console.no_color else ""
            console.print(counts + legend, style="dim", highlight=False)
        return answer

    if chat:
        _talk(console, ask)
        return
    if questions is None:
        questions = [sys.stdin.read().rstrip("\n") if prompt is None else prompt]
        if not str(questions[0]).strip():
            raise SkdError("the prompt is empty", where="skd generate", hint='give it as an argument: "..."')
    for number, question in enumerate(questions):
        if len(questions) > 1 and not as_json:
            asked = question if isinstance(question, str) else question.question()
            console.print(("\n" if number else "") + f"> {asked}", style="bold", markup=False, highlight=False)
        ask(question)


def _check_options(
    prompt: str | None, prompts: Path | None, task: str | None, *, chat: bool, raw: bool, as_json: bool
) -> None:
    """Raise SkdError where options exclude each other."""
    if raw and chat:
        raise SkdError("a conversation needs the chat template", where="--raw", hint="leave out --raw or --chat")
    if prompt is not None and chat:
        raise SkdError(
            "with --chat, messages are asked for", where=f"PROMPT {prompt!r}", hint="leave one of the two out"
        )
    if prompts is not None and (chat or prompt is not None):
        other = "--chat" if chat else f"PROMPT {prompt!r}"
        raise SkdError("prompts are read from the file", where=f"--prompts {prompts}", hint=f"leave out {other}")
    if task is not None and (chat or raw):
        raise SkdError("it has no effect", where="--task", hint=f"leave it out, or {'--chat' if chat else '--raw'}")
    if as_json and chat:
        raise SkdError("a conversation is for people", where="--json", hint="leave out --json or --chat")


def _task(model: str, task: str | None) -> TaskConfig | None:
    """Return the task that is named, else that of the run whose model it is."""
    from skd_lib._core.terminal import say
    from skd_lib.config import TaskConfig, parse_section
    from skd_lib.report.card import run_of

    if task is not None:
        return parse_section(TaskConfig, {"name": task}, where="--task")
    if (run := run_of(Path(model))) is None:
        return None
    template = run.task.prompt.replace("\n", "\\n")
    say(f"note: prompts go into the template of run {run.name}: {template} (--raw: as they are)", err=True)
    return run.task


def _load(model: str, draft: str | None, gamma: int) -> tuple[InterleavedSampler, PreTrainedTokenizerBase]:
    from transformers.utils.logging import disable_progress_bar

    from skd_lib.models.files import load_tokenizer
    from skd_lib.models.loading import default_device, load_model
    from skd_lib.models.references import resolve_model
    from skd_lib.models.vocabulary import check_compatible
    from skd_lib.sampling.acceptance import lossless, teacher_only
    from skd_lib.sampling.interleaved import InterleavedSampler

    disable_progress_bar()  # of loading weights
    folder = resolve_model(model)
    drafts = None if draft is None else resolve_model(draft)
    if drafts is not None and (unlike := check_compatible(folder, drafts)):
        raise SkdErrors(unlike)
    teacher = load_model(folder, device=default_device()).eval()
    if drafts is None:
        return InterleavedSampler(teacher, teacher, teacher_only()), load_tokenizer(folder)
    student = load_model(drafts, device=default_device()).eval()
    return InterleavedSampler(student, teacher, lossless(), gamma), load_tokenizer(folder)


def _rounds(
    sampler: InterleavedSampler,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    question: Question,
    options: dict[str, Any],
) -> Iterator[list[StreamedToken]]:
    """Yield the answer's tokens by round, until one of the task's stop strings is written."""
    import torch

    from skd_lib.data.tokenize import encode_prompt

    ids = torch.tensor([encode_prompt(tokenizer, task, question)], device=sampler.teacher.device)
    written: list[StreamedToken] = []
    for tokens in sampler.stream(ids, **options):
        written += tokens
        yield tokens
        if task.stop and any(stop in _text(tokenizer, written) for stop in task.stop):
            return


def _ends(sampler: InterleavedSampler) -> set[int]:
    """Return the tokens that end an answer."""
    config = sampler.teacher.generation_config
    ends = None if config is None else config.eos_token_id
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _talk(console: Console, ask: Callable[[Question], str]) -> None:
    """Ask for messages until an empty one or the end of the input."""
    from skd_lib.data.conversations import Conversation

    messages: list[dict[str, Any]] = []
    while True:
        try:
            text = typer.prompt(">", default="", show_default=False, prompt_suffix=" ")
        except typer.Abort:
            console.print()
            return
        if not text.strip():
            return
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": ask(Conversation(tuple(messages)))})


def _shown(
    console: Console, tokenizer: PreTrainedTokenizerBase, rounds: Iterator[list[StreamedToken]]
) -> Iterator[list[StreamedToken]]:
    """Print each round's tokens as they come, a character at the earliest when all its bytes are there."""
    told: list[StreamedToken] = []
    written = ""
    for tokens in rounds:
        for token in tokens:
            told.append(token)
            text = _text(tokenizer, told)
            if text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(written):
                continue
            style = "bold yellow" if token.proposal >= 0 else "" if token.by_teacher else "green"
            console.print(text[len(written) :], style=style, end="", markup=False, highlight=False, soft_wrap=True)
            written = text
        yield tokens
    rest = _text(tokenizer, told).removeprefix(written)
    console.print(rest, end="", markup=False, highlight=False, soft_wrap=True)


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[StreamedToken]) -> str:
    ids = [token.token for token in tokens]
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
