"""Checks of the teacher and its students: vocabularies, contexts, the cut, and settings that do nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from skd_lib.config import RunConfig
from skd_lib.errors import SkdError
from skd_lib.methods import unread_settings
from skd_lib.models.fingerprint import short
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.templates import check_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skd_lib.memory import ModelSize


@dataclass(frozen=True)
class Model:
    """A model of the run, without its weights.

    Attributes:
        role: `teacher` or `student`.
        reference: As configured.
        fingerprint: Of its present content.
        folder: Its files.
        tokenizer: Its tokenizer.
        size: What its memory depends on.
        context: The most positions it takes; None if not limited.
        answer_end: The id that ends an answer; None if the chat template cannot be applied.
    """

    role: str
    reference: str
    fingerprint: str
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    size: ModelSize
    context: int | None
    answer_end: int | None = None


def check_student(checks: Checks, teacher: Model | None, config: RunConfig) -> Model | None:
    """Look at a run's student; none where it is cut from the teacher, or cannot be read."""
    if config.student_init.cuts:
        if teacher:
            _cut(checks, teacher, config)
        return None
    student = None if config.student is None else check_model(checks, "student", config.student, config)
    if teacher and student:
        _same_vocabulary(checks, teacher, student, config)
    return student


def check_model(checks: Checks, role: str, reference: str, config: RunConfig) -> Model | None:
    """Look at one model, and whether prompts and answers fit its context; None if it cannot be read."""
    model = checks.attempt(role, lambda: _open_model(role, reference, config.trust_remote_code))
    if model is None:
        return None
    size = f"{model.size.parameters / 1e6:,.1f} M parameters, {model.size.layers} layers"
    context = f"context {model.context or 'not limited'}"
    checks.add(role, "ok", f"{reference}: {size}, {context}, {short(model.fingerprint)}")
    needed = config.task.max_prompt_tokens + config.task.max_new_tokens
    if model.context is not None and needed > model.context:
        checks.add(
            role,
            "error",
            f"max_prompt_tokens {config.task.max_prompt_tokens} + max_new_tokens {config.task.max_new_tokens} exceed "
            f"the {role}'s context of {model.context} tokens",
            where="task",
            hint=f"lower them to {model.context} together",
        )
    for held_out in config.data.held_out:
        asked = held_out.task.max_prompt_tokens + held_out.task.max_new_tokens
        if model.context is not None and asked > model.context:
            checks.add(
                f"held-out {held_out.name}",
                "warning",
                f"max_prompt_tokens + max_new_tokens are {asked}, the {role}'s context has {model.context} tokens",
                where="data.held_out",
                hint="set lower ones in its `task`; examples that do not fit count as not answered",
            )
    return replace(model, answer_end=checks.attempt(role, lambda: _answer_end(checks, model, config)))


def _open_model(role: str, reference: str, trust_remote_code: bool) -> Model:
    from skd_lib.memory import model_size
    from skd_lib.models.files import load_config, load_tokenizer
    from skd_lib.models.references import HubModel, StoredFolder, model_fingerprint, parse_reference, resolve_model

    far = isinstance(parse_reference(reference), HubModel | StoredFolder)
    fingerprint = model_fingerprint(reference)
    folder = resolve_model(reference, fingerprint=fingerprint, trust_remote_code=trust_remote_code, weights=not far)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    size = model_size(folder, trust_remote_code=trust_remote_code)
    text = load_config(folder, trust_remote_code=trust_remote_code).get_text_config()
    return Model(role, reference, fingerprint, folder, tokenizer, size, getattr(text, "max_position_embeddings", None))


def _answer_end(checks: Checks, model: Model, config: RunConfig) -> int:
    """The id that ends an answer; the model had better stop at it."""
    from skd_lib.data.tokenize import answer_end_id
    from skd_lib.models.special_ids import eos_ids

    check_template(checks, model.role, model.tokenizer, config)
    end = answer_end_id(model.tokenizer, config.task)
    stops = eos_ids(model.folder, model.tokenizer)
    if end not in stops:
        checks.add(
            model.role,
            "warning",
            f"answers end with the token {model.tokenizer.convert_ids_to_tokens(end)!r}, which is not among the "
            f"model's end-of-sequence ids {list(stops)}",
            where=model.reference,
            hint="add its id to eos_token_id in generation_config.json, or generation will run past the answer",
        )
    return end


def check_comet(checks: Checks, reference: str) -> None:
    """A run without COMET's scores is still a run: what is wrong with its model is no error."""
    from skd_lib.comet.checkpoint import check_reference

    try:
        check_reference(reference)
    except SkdError as error:
        checks.add("comet", "warning", f"no scores by COMET: {error.what}", where=error.where, hint=error.hint)
    else:
        checks.add("comet", "ok", reference)


def _same_vocabulary(checks: Checks, teacher: Model, student: Model, config: RunConfig) -> None:
    from skd_lib.models.vocabulary import check_compatible

    def look() -> list[SkdError]:
        return check_compatible(teacher.folder, student.folder, trust_remote_code=config.trust_remote_code)

    errors = checks.attempt("tokenizers", look)
    if errors is None:
        return
    for error in errors:
        checks.failed("tokenizers", error)
    if not errors:
        checks.add("tokenizers", "ok", "teacher and student have the same token ids")
    if config.task.chat_template and teacher.tokenizer.chat_template != student.tokenizer.chat_template:
        checks.add(
            "tokenizers",
            "warning",
            "teacher and student have different chat templates; the teacher will see prompts in the student's",
            hint="copy the teacher's chat template into the student's folder if the teacher answers badly",
        )


def _cut(checks: Checks, teacher: Model, config: RunConfig) -> None:
    first, last = config.student_init.keep_first or 0, config.student_init.keep_last or 0
    kept, layers = first + last, teacher.size.layers
    if kept < layers:
        checks.add("student", "ok", f"cut from the teacher: {kept} of {layers} layers are kept")
    else:
        checks.add(
            "student",
            "error",
            f"keep_first {first} + keep_last {last} cuts nothing from a teacher of {layers} layers",
            where="student_init",
            hint=f"their sum must be less than {layers}",
        )


def cut_size(teacher: ModelSize, config: RunConfig) -> ModelSize:
    """The size of the student that is cut from the teacher."""
    kept = (config.student_init.keep_first or 0) + (config.student_init.keep_last or 0)
    return teacher.pruned(min(kept, teacher.layers))


def check_unread(checks: Checks, config: RunConfig) -> None:
    """Settings of the distillation that will do nothing, and are perhaps meant to."""
    distill = config.distill
    for path in unread_settings(distill):
        checks.add(
            "distill",
            "warning",
            f"it has a value, which method `{distill.method}` with divergence `{distill.divergence}` does not read",
            where=f"distill.{path}",
            hint="leave it out, or choose the method or divergence it belongs to (`skd config`)",
        )
