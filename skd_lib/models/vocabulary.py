"""Vocabularies: comparison of teacher and student, and the ids that begin, end and pad a sequence.

Distillation compares two distributions over one vocabulary, and speculative decoding passes token ids from one model
to the other: an id must mean the same in both. Tokenizer, config and generation config each name some special ids.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from skd_lib.errors import SkdError, SkdErrors
from skd_lib.models.files import load_config, load_tokenizer, reading, reason

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from skd_lib.data.tokenize import TokenizedExample

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"
_EXAMPLES_SHOWN = 5
_WAY_OUT = (
    "use models with one tokenizer: of one model family, or a student that is cut from the teacher (`mode: prune`)"
)


@dataclass(frozen=True)
class Findings:
    """Problems of one or two vocabularies.

    Warnings do no harm as long as no text contains the ids of `unreachable`, which has their tokens.
    """

    errors: list[SkdError] = field(default_factory=list)
    warnings: list[SkdError] = field(default_factory=list)
    unreachable: dict[int, str] = field(default_factory=dict)


def check_compatible(teacher: Path, student: Path) -> list[SkdError]:
    """Return what keeps two models from being used together, see `check_rows` and `compare`; log the warnings."""
    return _told(
        [
            check_rows("teacher", teacher),
            check_rows("student", student),
            compare(teacher, student),
        ]
    )


def tokenizer_of(model: PreTrainedModel, *, hint: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the place that a model was loaded from."""
    if (found := _stored_tokenizer(model)) is not None:
        return found
    what = "there is no tokenizer where the model was loaded from"
    raise SkdError(what, where=model.name_or_path or type(model).__name__, hint=hint)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, models: Mapping[str, PreTrainedModel | Path]) -> None:
    """Check that models, by their roles, fit the tokenizer that is used with them; log the warnings.

    The tokens are held to what `check_rows` and `compare` ask. A model without a tokenizer where it was loaded from has
    the one that is used.

    Raises:
        SkdErrors: an id has no row in a model, or is another token there.
    """
    rows = {role: rows_of(model) for role, model in models.items()}
    common = min(rows.values())
    found: list[Findings] = []
    known = False
    for role, model in models.items():
        where = str(model if isinstance(model, Path) else model.name_or_path or type(model).__name__)
        own = _stored_tokenizer(model)
        found.append(_without_row(f"the {role}'s tokenizer", own or tokenizer, rows[role], where))
        known = known or own is None or own.get_vocab() == tokenizer.get_vocab()
        if own is not None:
            both = {"the tokenizer in use": tokenizer, f"the {role}'s own": own}
            found.append(_compare_tokens(both, common, where)[0])
    if not known:  # no model's own: changed after it was loaded, say
        found.append(_without_row("the tokenizer in use", tokenizer, max(rows.values()), ""))
    if errors := _told(found):
        raise SkdErrors(errors)


def _told(found: Iterable[Findings]) -> list[SkdError]:
    """Return all errors, and log the warnings."""
    found = list(found)
    for warning in (warning for each in found for warning in each.warnings):
        log.warning("%s", warning.brief)
    return [error for each in found for error in each.errors]


def _stored_tokenizer(model: PreTrainedModel | Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a folder, which must have one, or of the place that a model was loaded from, if any."""
    from transformers import AutoTokenizer

    if isinstance(model, Path):
        return load_tokenizer(model)
    if not model.name_or_path:
        return None
    try:
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(model.name_or_path))
    except (OSError, ValueError, KeyError):
        return None  # weights without a tokenizer


def check_rows(role: str, path: Path) -> Findings:
    """Find ids of the tokenizer in a model's folder that the model, teacher or student, has no row for.

    Tokens that were added to a tokenizer (for images, for padding) are not made of any text that does not spell them
    out: models for text alone leave out their rows (gemma-3-1b-it). Any other token may come up.
    """
    return _without_row(f"the {role}'s tokenizer", load_tokenizer(path), rows_in_config(path), str(path))


def _without_row(which: str, tokenizer: PreTrainedTokenizerBase, size: int, where: str) -> Findings:
    beyond = {id_: token for token, id_ in sorted(tokenizer.get_vocab().items()) if id_ >= size}
    if not beyond:
        return Findings()
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    reached = {id_: beyond[id_] for id_ in beyond if id_ not in tokenizer.added_tokens_decoder or id_ in used}
    shown = reached or beyond
    error = SkdError(
        f"{which} has {len(shown)} ids that its model has no row for (vocab_size {size}): " + _some(shown),
        where=where,
        hint="resize the model's embeddings to the tokenizer, or use the tokenizer the model was trained with"
        if reached
        else "make sure that no prompt or answer contains them",
    )
    return Findings([error]) if reached else Findings(warnings=[error], unreachable=beyond)


def compare(teacher: Path, student: Path) -> Findings:
    """Compare the vocabularies of two models.

    Compares the token of each id that both models have a row for, the beginning-of-sequence id (prompts start with it)
    and the set of ids that end a response. Does not compare the sizes of the vocabularies, which are padded differently
    within one family (Qwen2: 152064 rows at 7B, 151936 at 0.5B), nor padding ids, which are always masked. A token that
    was added to one of the tokenizers alone, as for padding, is a warning. So are ids that end the teacher's responses
    and not the student's, as with an instruct teacher and a base student: responses end at either's, and the student
    gets them too.
    """
    folders = {"teacher": teacher, "student": student}
    tokenizers = {role: load_tokenizer(path) for role, path in folders.items()}
    sizes = {role: rows_in_config(path) for role, path in folders.items()}
    pair = f"teacher {teacher}, student {student}"
    common = min(sizes.values())
    ends = {role: eos_ids(folders[role], tokenizers[role]) for role in folders}
    found, added = _compare_tokens({f"the {role}": tokenizers[role] for role in folders}, common, pair)
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


def _compare_tokens(
    tokenizers: Mapping[str, PreTrainedTokenizerBase], common: int, where: str
) -> tuple[Findings, set[int]]:
    """Compare two tokenizers' tokens of the ids below `common`; return also the ids that were added to one alone."""
    (first, one), (second, other) = tokenizers.items()
    ours, theirs = (tokens_by_id(each, common) for each in (one, other))
    differing = differing_ids(ours, theirs)
    added = {id_ for id_ in differing if _only_added(id_, ours, one, theirs) or _only_added(id_, theirs, other, ours)}
    found = Findings()
    for level, ids in ((found.errors, [id_ for id_ in differing if id_ not in added]), (found.warnings, sorted(added))):
        if ids:
            examples = "; ".join(
                f"{id_} is {_shown(ours.get(id_))} for {first}, {_shown(theirs.get(id_))} for {second}"
                for id_ in ids[:_EXAMPLES_SHOWN]
            )
            what = f"the tokenizers differ in {len(ids)} of {len(ours.keys() | theirs.keys())} ids: {examples}"
            hint = _WAY_OUT if level is found.errors else "make sure that no prompt or answer contains them"
            level.append(SkdError(what, where=where, hint=hint))
    return found, added


def check_ids(examples: Iterable[TokenizedExample], rows: int, where: str) -> None:
    """Check that the smallest embedding has a row for every token of the examples; `where` names the step."""
    for example in examples:
        largest = max((*example.prompt_ids, *example.response_ids), default=0)
        if largest >= rows:
            name = f"example {example.example_id}" if example.example_id else "an example"
            raise SkdError(
                f"{name} has the token id {largest}, and the model has {rows} rows",
                where=where,
                hint="its text contains a token that only the tokenizer has, not the model: remove it from the "
                "data, or resize the model's embeddings",
            )


def rows_of(model: PreTrainedModel | Path) -> int:
    """Return the rows of a model's embedding, padding rows included; of a stored one from its config."""
    from skd_lib.models.heads import embedding_rows

    return rows_in_config(model) if isinstance(model, Path) else embedding_rows(model)


def rows_in_config(folder: Path) -> int:
    """Return the rows of a stored model's embedding, padding rows included, from its config."""
    return int(load_config(folder).get_text_config().vocab_size)


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


# --- special ids ------------------------------------------------------------------------------------------------------


def eos_ids(model: PreTrainedModel | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends a response: the tokenizer's (first), the generation config's and the config's.

    Chat models list several, e.g. Gemma's end of text and end of turn, and they are spread over these three places.
    """
    where = str(model if isinstance(model, Path) else model.name_or_path)
    if isinstance(model, Path):
        config, generation = load_config(model), stored_generation_config(model)
    else:
        config, generation = model.config, model.generation_config
    found = [*_ids(tokenizer.eos_token_id), *_ids(getattr(generation, "eos_token_id", None))]
    try:
        found += _ids(getattr(config.get_text_config(decoder=True), "eos_token_id", None))
    except ValueError as error:
        hint = "correct it in config.json"
        raise SkdError(f"eos_token_id of config.json: {error}", where=where, hint=hint) from error
    if not found:
        what = "neither the tokenizer nor the model names an end-of-sequence token"
        raise SkdError(what, where=where, hint="set eos_token in tokenizer_config.json")
    return tuple(dict.fromkeys(found))


def take_over_ends(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel | Path
) -> None:
    """Add the teacher's ids that end a response to a student's, which learns from responses that end so.

    Ids that the student has no row for are left out: no response can contain them. A teacher without a tokenizer where
    it was loaded from has the student's.
    """
    from skd_lib.models.heads import vocabulary_size

    found = [*eos_ids(student, tokenizer), *eos_ids(teacher, _stored_tokenizer(teacher) or tokenizer)]
    generation: Any = student.generation_config
    generation.eos_token_id = [one for one in dict.fromkeys(found) if one < vocabulary_size(student)]


def pad_id(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> int:
    """Return the id that pads short rows, where it is masked: the padding token, or the end token if there is none.

    Padding tokens beyond the `rows` of the smallest embedding that is given the id are not used.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and (rows is None or candidate < rows):
            return int(candidate)
    raise SkdError(
        "the tokenizer has neither a padding nor an end-of-sequence token",
        where=str(tokenizer.name_or_path),
        hint="set pad_token or eos_token in tokenizer_config.json",
    )


def without_sampling_defaults(config: GenerationConfig | None) -> GenerationConfig:
    """Return a generation config with the special ids of `config` only: no temperature, top_k, penalties."""
    from transformers import GenerationConfig

    if config is None:
        return GenerationConfig()
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def stored_generation_config(path: Path) -> GenerationConfig | None:
    """Load the generation config of a model folder; None if it has none."""
    from transformers import GenerationConfig

    with reading(path):
        if not (path / GENERATION).is_file():
            return None
    try:
        config = GenerationConfig.from_pretrained(path, local_files_only=True)
        if isinstance(config.pad_token_id, int) and config.pad_token_id < 0:
            config.pad_token_id = None  # as the first LLaMA says that it has none
        for value in (config.bos_token_id, config.eos_token_id, config.pad_token_id):
            _ids(value)
    except Exception as error:  # whatever a broken file makes its class do
        raise SkdError(
            f"cannot read its {GENERATION}: {reason(error)}",
            where=str(path),
            hint="fetch the file again; without it, special ids are those of tokenizer and config.json",
        ) from error
    return config


def _ids(value: Any) -> list[int]:
    """Return ids as a list."""
    values = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in values):
        raise ValueError(f"must be a token id or a list of them, got {value!r}")
    return list(values)
