"""Token ids that begin, end and pad a sequence: tokenizer, config and generation config each name some."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from skd_lib.errors import SkdError
from skd_lib.models.files import load_config, load_tokenizer, reading, reason

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

GENERATION = "generation_config.json"


def eos_ids(model: PreTrainedModel | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends a response: the tokenizer's (first), the generation config's and the config's.

    Chat models list several, e.g. Gemma's end of text and end of turn, and they are spread over these three places.

    Raises:
        SkdError: there is none, so no response would ever end.
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


def take_over_ends(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, teacher: Path) -> None:
    """Add the teacher's ids that end a response to a student's, which learns from responses that end so.

    Ids that the student has no row for are left out: no response can contain them.
    """
    from skd_lib.models.heads import vocabulary_size

    found = [*eos_ids(student, tokenizer), *eos_ids(teacher, load_tokenizer(teacher))]
    generation: Any = student.generation_config
    generation.eos_token_id = [one for one in dict.fromkeys(found) if one < vocabulary_size(student)]


def pad_id(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> int:
    """Return the id that pads short rows, where it is masked: the padding token, or the end token if there is none.

    Args:
        tokenizer: The tokenizer.
        rows: Of the smallest embedding that is given the id; padding tokens beyond are not used.

    Raises:
        SkdError: the tokenizer has neither.
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
