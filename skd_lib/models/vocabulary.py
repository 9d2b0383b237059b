"""Whether teacher and student speak the same tokens.

Distillation compares two distributions over one vocabulary, and speculative decoding hands token ids from one model
to the other: an id must mean the same in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from skd_lib.errors import SkdError
from skd_lib.models.files import load_config, load_tokenizer
from skd_lib.models.special_ids import eos_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_EXAMPLES_SHOWN = 5
_WAY_OUT = "choose a teacher and a student of one model family, or cut the student from the teacher (`mode: prune`)"


def check_compatible(teacher: Path, student: Path, *, trust_remote_code: bool = False) -> list[SkdError]:
    """Compare the vocabularies of two models.

    Compared are the token of each id that both models have a row for, the beginning-of-sequence id (prompts start
    with it) and the set of ids that end a response. Not compared: the sizes of the models' vocabularies, which are
    padded differently within one family (Qwen2: 152064 rows at 7B, 151936 at 0.5B), and padding ids, which are
    always masked.

    Args:
        teacher: Folder of the teacher.
        student: Folder of the student.
        trust_remote_code: Run Python code that comes with the models.

    Returns:
        What differs; empty if the models fit.

    Raises:
        SkdError: a tokenizer or config cannot be read.
    """
    folders = {"teacher": teacher, "student": student}
    tokenizers = {role: load_tokenizer(path, trust_remote_code=trust_remote_code) for role, path in folders.items()}
    sizes = {role: vocabulary_size(path, trust_remote_code=trust_remote_code) for role, path in folders.items()}
    pair = f"teacher {teacher}, student {student}"
    found = [
        error for role in folders if (error := _beyond_the_model(role, folders[role], tokenizers[role], sizes[role]))
    ]
    common = min(sizes.values())
    ours, theirs = (_tokens_by_id(tokenizers[role], common) for role in ("teacher", "student"))
    differing = sorted(id_ for id_ in ours.keys() | theirs.keys() if ours.get(id_) != theirs.get(id_))
    if differing:
        examples = "; ".join(
            f"{id_} is {_shown(ours.get(id_))} for the teacher, {_shown(theirs.get(id_))} for the student"
            for id_ in differing[:_EXAMPLES_SHOWN]
        )
        found.append(
            SkdError(
                f"the tokenizers differ in {len(differing)} of {len(ours.keys() | theirs.keys())} ids: {examples}",
                where=pair,
                hint=_WAY_OUT,
            )
        )
        return found  # special ids of different vocabularies say nothing
    bos = {role: tokenizer.bos_token_id for role, tokenizer in tokenizers.items()}
    if bos["teacher"] != bos["student"]:
        found.append(_special_difference("begin-of-sequence id", bos["teacher"], bos["student"], pair))
    ends = {role: sorted(eos_ids(folders[role], tokenizers[role])) for role in folders}
    if ends["teacher"] != ends["student"]:
        found.append(_special_difference("end-of-sequence ids", ends["teacher"], ends["student"], pair))
    return found


def common_vocab_size(teacher: Path | PreTrainedModel, student: Path | PreTrainedModel) -> int:
    """Number of ids that both models have a row for; the ids beyond it belong to one of them only."""
    return min(vocabulary_size(teacher), vocabulary_size(student))


def vocabulary_size(model: Path | PreTrainedModel, *, trust_remote_code: bool = False) -> int:
    """Rows of a model's embedding, padding rows included, as its config says."""
    config = load_config(model, trust_remote_code=trust_remote_code) if isinstance(model, Path) else model.config
    return int(config.get_text_config().vocab_size)


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase, below: int) -> dict[int, str]:
    return {id_: token for token, id_ in tokenizer.get_vocab().items() if id_ < below}


def _beyond_the_model(role: str, path: Path, tokenizer: PreTrainedTokenizerBase, size: int) -> SkdError | None:
    beyond = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= size)
    if not beyond:
        return None
    return SkdError(
        f"the {role}'s tokenizer has {len(beyond)} ids that its model has no row for (vocab_size {size}): "
        + ", ".join(f"{id_} {token!r}" for id_, token in beyond[:_EXAMPLES_SHOWN]),
        where=str(path),
        hint="resize the model's embeddings to the tokenizer, or use the tokenizer the model was trained with",
    )


def _special_difference(what: str, teacher: object, student: object, pair: str) -> SkdError:
    return SkdError(
        f"the models have different {what}: {teacher} for the teacher, {student} for the student",
        where=pair,
        hint="use the instruction-tuned (or the base) variant of both models, or make tokenizer_config.json and "
        "generation_config.json agree",
    )


def _shown(token: str | None) -> str:
    return "unused" if token is None else repr(token)
