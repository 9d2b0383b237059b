"""`skd generate`: one model's answer, or a model's with a draft, token by token."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skd_lib.errors import SkdError, SkdErrors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skd_lib.sampling.interleaved import InterleavedSampler, StreamedToken

LEGEND = "[green]drafted and accepted[/], [bold yellow]by the teacher in place of a draft[/], teacher's own"


def generate(
    model: Annotated[str, typer.Argument(help="The model whose output is wanted: a folder or another reference.")],
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt.", show_default="standard input; with --chat: asked for")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="A model that drafts for it, with the same tokenizer (speculative decoding).")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask for messages, one after the other, until an empty one.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy decoding.")] = 0.0,
    gamma: Annotated[int, typer.Option(min=1, help="Tokens drafted for each call of the model.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of what is sampled.")] = 0,
) -> None:
    """Answer a prompt. With --draft, colours show in a terminal which tokens were drafted, and which were replaced.

    The answer is the model's own, with a draft as without one: at temperature 0 token by token, else in distribution.

    Examples: `skd generate runs/demo/student "Fichier introuvable"`,
    `skd generate runs/demo/teacher --draft runs/demo/student --chat`.
    """
    if raw and chat:
        raise SkdError("a conversation needs the chat template", where="--raw", hint="leave out --raw or --chat")
    if prompt is not None and chat:
        raise SkdError(
            "with --chat, messages are asked for", where=f"PROMPT {prompt!r}", hint="leave one of the two out"
        )
    sampler, tokenizer = _load(model, draft, gamma)
    if not raw and not tokenizer.chat_template:
        if chat:
            raise SkdError("its tokenizer has no chat template", where=model, hint="leave --chat out")
        raw = True

    from skd_lib._core.terminal import Console

    console = Console()
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = typer.prompt(">", default="", show_default=False, prompt_suffix=" ") if chat else prompt
        except typer.Abort:  # the end of the input
            console.print()
            return
        if text is None:
            text = sys.stdin.read().rstrip("\n")
        if not text.strip():
            if chat:
                return
            raise SkdError("the prompt is empty", where="skd generate", hint='give it as an argument: "..."')
        messages.append({"role": "user", "content": text})
        if raw:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
        else:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
        rounds = list(
            _shown(
                console,
                tokenizer,
                sampler.stream(ids.to(sampler.teacher.device), max_new_tokens=max_new_tokens, seed=seed, **sampling),
            )
        )
        tokens = [token for tokens in rounds for token in tokens]
        console.print()
        if draft is not None:
            drafted = sum(not token.by_teacher for token in tokens)
            figures = f"tokens: {len(tokens)}, of them drafted: {drafted}; calls of the model: {len(rounds)}"
            legend = f" ({LEGEND})" if console.is_terminal else ""
            console.print(figures + legend, style="dim", highlight=False)
        messages.append({"role": "assistant", "content": _text(tokenizer, tokens)})
        if not chat:
            return


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


def _shown(
    console: Any, tokenizer: PreTrainedTokenizerBase, rounds: Iterator[list[StreamedToken]]
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
