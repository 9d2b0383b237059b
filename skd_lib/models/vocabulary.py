"""Comparison of the vocabularies of teacher and student.

Distillation compares two distributions over one vocabulary, and speculative decoding passes token ids from one model
to the other: an id must mean the same in both.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from skd_lib.errors import SkdError
from skd_lib.models.files import load_config, load_tokenizer
from skd_lib.models.special_ids import eos_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skd_lib.data.tokenize import TokenizedExample

log = logging.getLogger(__name__)

_EXAMPLES_SHOWN = 5
_WAY_OUT = "choose a teacher and a student of one model family, or cut the student from the teacher (`mode: prune`)"


@dataclass(frozen=True)
class Findings:
    """Problems of one or two vocabularies.

    Attributes:
        errors: Problems that keep the models from being used.
        warnings: Problems that do no harm as long as no text contains the ids of `unreachable`.
        unreachable: Ids that no prompt and no answer may contain, with their tokens.
    """

    errors: list[SkdError] = field(default_factory=list)
    warnings: list[SkdError] = field(default_factory=list)
    unreachable: dict[int, str] = field(default_factory=dict)


def check_compatible(teacher: Path, student: Path, *, trust_remote_code: bool = False) -> list[SkdError]:
    """Return what keeps two models from being used together, see `check_rows` and `compare`; log the warnings."""
    found = [
        check_rows("teacher", teacher, trust_remote_code=trust_remote_code),
        check_rows("student", student, trust_remote_code=trust_remote_code),
        compare(teacher, student, trust_remote_code=trust_remote_code),
    ]
    for each in found:
        for warning in each.warnings:
            log.warning("%s", warning.brief)
    return [error for each in found for error in each.errors]


def check_rows(role: str, path: Path, *, trust_remote_code: bool = False) -> Findings:
    """Find ids of the tokenizer in a model's folder that the model, teacher or student, has no row for.

    Tokens that were added to a tokenizer (for images, for padding) are not made of any text that does not spell them
    out: models for text alone leave out their rows (gemma-3-1b-it). Any other token may come up.
    """
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    size = rows_in_config(path, trust_remote_code=trust_remote_code)
    beyond = {id_: token for token, id_ in sorted(tokenizer.get_vocab().items()) if id_ >= size}
    if not beyond:
        return Findings()
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    reached = {id_: beyond[id_] for id_ in beyond if id_ not in tokenizer.added_tokens_decoder or id_ in used}
    shown = reached or beyond
    error = SkdError(
        f"the {role}'s tokenizer has {len(shown)} ids that its model has no row for (vocab_size {size}): "
        + _some(shown),
        where=str(path),
        hint="resize the model's embeddings to the tokenizer, or use the tokenizer the model was trained with"
        if reached
        else "make sure that no prompt or answer contains them",
    )
    return Findings([error]) if reached else Findings(warnings=[error], unreachable=beyond)


def compare(teacher: Path, student: Path, *, trust_remote_code: bool = False) -> Findings:
    """Compare the vocabularies of two models.

    Compares the token of each id that both models have a row for, the beginning-of-sequence id (prompts start with it)
    and the set of ids that end a response. Does not compare the sizes of the vocabularies, which are padded differently
    within one family (Qwen2: 152064 rows at 7B, 151936 at 0.5B), nor padding ids, which are always masked. A token that
    was added to one of the tokenizers alone, as for padding, is a warning. So are ids that end the teacher's responses
    and not the student's, as with an instruct teacher and a base student: responses end at either's, and the student
    gets them too.

    Args:
        teacher: Folder of the teacher.
        student: Folder of the student, whose tokenizer is that of the data.
        trust_remote_code: Run Python code that comes with the models.
    """
    folders = {"teacher": teacher, "student": student}
    tokenizers = {role: load_tokenizer(path, trust_remote_code=trust_remote_code) for role, path in folders.items()}
    sizes = {role: rows_in_config(path, trust_remote_code=trust_remote_code) for role, path in folders.items()}
    pair = f"teacher {teacher}, student {student}"
    common = min(sizes.values())
    ours, theirs = (tokens_by_id(tokenizers[role], common) for role in ("teacher", "student"))
    ends = {role: eos_ids(folders[role], tokenizers[role]) for role in folders}
    differing = differing_ids(ours, theirs)
    added = {
        id_
        for id_ in differing
        if _only_added(id_, ours, tokenizers["teacher"], theirs)
        or _only_added(id_, theirs, tokenizers["student"], ours)
    }
    found = Findings()
    for level, ids in ((found.errors, [id_ for id_ in differing if id_ not in added]), (found.warnings, sorted(added))):
        if ids:
            examples = "; ".join(
                f"{id_} is {_shown(ours.get(id_))} for the teacher, {_shown(theirs.get(id_))} for the student"
                for id_ in ids[:_EXAMPLES_SHOWN]
            )
            what = f"the tokenizers differ in {len(ids)} of {len(ours.keys() | theirs.keys())} ids: {examples}"
            hint = _WAY_OUT if level is found.errors else "make sure that no prompt or answer contains them"
            level.append(SkdError(what, where=pair, hint=hint))
    if found.errors:
        return found  # special ids of different vocabularies say nothing
    found.unreachable.update(
        {id_: token for token, id_ in tokenizers["student"].get_vocab().items() if id_ in added or id_ >= common}
    )
    bos = {role: tokenizer.bos_token_id for role, tokenizer in tokenizers.items()}
    if bos["teacher"] != bos["student"]:
        found.errors.append(_special_difference("begin-of-sequence id", bos["teacher"], bos["student"], pair))
    if set(ends["teacher"]) != set(ends["student"]):
        teachers, students = sorted(ends["teacher"]), sorted(ends["student"])
        difference = _special_difference("end-of-sequence ids", teachers, students, pair)
        known = set(ends["student"]) <= set(ends["teacher"])
        (found.warnings if known else found.errors).append(difference)
    return found


def check_ids(examples: Iterable[TokenizedExample], rows: int, where: str) -> None:
    """Check that the smallest embedding has a row for every token of the examples; `where` names the step."""
    for example in examples:
        largest = max((*example.prompt_ids, *example.response_ids), default=0)
        if largest >= rows:
            raise SkdError(
                f"example {example.example_id} has the token id {largest}, and the model has {rows} rows",
                where=where,
                hint="its text contains a token that only the tokenizer has, not the model: remove it from the data",
            )


def rows_in_config(folder: Path, *, trust_remote_code: bool = False) -> int:
    """Return the rows of a stored model's embedding, padding rows included, from its config."""
    return int(load_config(folder, trust_remote_code=trust_remote_code).get_text_config().vocab_size)


def tokens_by_id(tokenizer: PreTrainedTokenizerBase, below: float = math.inf) -> dict[int, str]:
    """Return the token of each id below a limit."""
    return {id_: token for token, id_ in tokenizer.get_vocab().items() if id_ < below}


def differing_ids(ours: Mapping[int, str], theirs: Mapping[int, str]) -> list[int]:
    """Return the ids that are different tokens in two vocabularies, or are in one only."""
    return sorted(id_ for id_ in ours.keys() | theirs.keys() if ours.get(id_) != theirs.get(id_))


def _only_added(id_: int, tokens: dict[int, str], tokenizer: PreTrainedTokenizerBase, others: dict[int, str]) -> bool:
    """Return whether an id was added to this tokenizer alone, and begins or ends no text."""
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    return id_ in tokens and id_ not in others and id_ in tokenizer.added_tokens_decoder and id_ not in used


def _some(tokens: dict[int, str]) -> str:
    ids = sorted(tokens)
    more = ", ..." if len(ids) > _EXAMPLES_SHOWN else ""
    return ", ".join(f"{id_} {tokens[id_]!r}" for id_ in ids[:_EXAMPLES_SHOWN]) + more


def _special_difference(what: str, teacher: object, student: object, pair: str) -> SkdError:
    return SkdError(
        f"the models have different {what}: {teacher} for the teacher, {student} for the student",
        where=pair,
        hint="use the instruction-tuned (or the base) variant of both models, or make tokenizer_config.json and "
        "generation_config.json agree",
    )


def _shown(token: str | None) -> str:
    return "unused" if token is None else repr(token)
