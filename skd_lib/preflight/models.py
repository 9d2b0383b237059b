"""Checks of the teacher and its students: files, vocabularies, contexts, the cut, and settings that have no effect."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from skd_lib.config import LoraConfig, RunConfig, Schedule, TaskConfig
from skd_lib.distillation.methods import unread_settings
from skd_lib.errors import SkdError
from skd_lib.models.fingerprint import short
from skd_lib.preflight.checks import Checks, Level
from skd_lib.preflight.environment import in_cluster
from skd_lib.preflight.templates import check_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from skd_lib.models.vocabulary import Findings
    from skd_lib.planning.memory import ModelSize


@dataclass(frozen=True)
class Model:
    """A model of the run, without its weights.

    Attributes:
        role: `teacher` or `student`.
        reference: As configured.
        fingerprint: Of its present content.
        folder: Its files.
        tokenizer: Its tokenizer.
        skeleton: The model on the meta device.
        size: What its memory depends on.
        context: The most positions it takes; None if not limited.
        answer_end: The id that ends an answer; None if the chat template cannot be applied.
        unreachable: Ids of its tokenizer that no text of the data may contain, with their tokens.
    """

    role: str
    reference: str
    fingerprint: str
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    skeleton: PreTrainedModel
    size: ModelSize
    context: int | None
    answer_end: int | None = None
    unreachable: Mapping[int, str] = field(default_factory=dict)


def check_student(checks: Checks, teacher: Model | None, config: RunConfig) -> Model | None:
    """Check a run's student; return None where it is cut from the teacher, or cannot be read."""
    if config.student_init.cuts:
        if teacher:
            _check_cut(checks, teacher, config)
        return None
    student = None if config.student is None else check_model(checks, "student", config.student, config)
    if teacher and student:
        beyond = _check_same_vocabulary(checks, teacher, student, config)
        if config.specdec.engine == "vllm":
            _check_served(checks, teacher, student, config)
        return replace(student, unreachable={**student.unreachable, **beyond})
    return student


def check_model(checks: Checks, role: str, reference: str, config: RunConfig) -> Model | None:
    """Check one model, and that prompts and answers fit its context; return None if it cannot be read."""
    model = checks.attempt(role, lambda: _open_model(checks, role, reference, config.trust_remote_code))
    if model is None:
        return None
    size = f"{model.size.parameters / 1e6:,.1f} M parameters, {model.size.layers} layers"
    context = f"context {model.context or 'not limited'}"
    checks.add(role, "ok", f"{reference}: {size}, {context}, {short(model.fingerprint)}")
    other = "set lower ones in its `task`; examples that do not fit count as not answered"
    limits: list[tuple[str, Level, TaskConfig, str, str]] = [
        (role, "error", config.task, "task", f"lower them to {model.context} together"),
        *((f"held-out {each.name}", "warning", each.task, "data.held_out", other) for each in config.data.held_out),
    ]
    for name, level, task, where, hint in limits:
        prompt, answer = task.max_prompt_tokens, task.max_new_tokens
        if model.context is not None and prompt + answer > model.context:
            what = f"max_prompt_tokens {prompt} + max_new_tokens {answer} exceed the {role}'s context of"
            checks.add(name, level, f"{what} {model.context} tokens", where=where, hint=hint)
    if config.distill.engine == "vllm":
        _check_room_for_drafts(checks, model, config)
    return replace(model, answer_end=checks.attempt(role, lambda: _answer_end(checks, model, config)))


def _check_room_for_drafts(checks: Checks, model: Model, config: RunConfig) -> None:
    """Check that a context has the positions that vLLM needs besides those of the longest example."""
    from skd_lib.vllm.serve import spare_positions

    longest, gamma = config.task.max_prompt_tokens + config.task.max_new_tokens, config.distill.sampling.gamma
    assert not isinstance(gamma, Schedule)  # noqa: S101 - the configuration refuses it
    if model.context is not None and longest <= model.context < longest + spare_positions(gamma):
        what = f"max_prompt_tokens + max_new_tokens, {longest}, leave fewer than {spare_positions(gamma)} positions of "
        what += f"the {model.role}'s context of {model.context}, which vLLM needs for drafts of {gamma}"
        hint = f"lower them to {model.context - spare_positions(gamma)} together, or use `distill.engine: transformers`"
        checks.add(model.role, "error", what, where="task", hint=hint)


def _open_model(checks: Checks, role: str, reference: str, trust_remote_code: bool) -> Model:
    from skd_lib.models.files import context_length, load_tokenizer
    from skd_lib.models.references import HubModel, StoredFolder, model_fingerprint, parse_reference, resolve_model
    from skd_lib.models.skeleton import check_finite, check_weights, skeleton
    from skd_lib.models.vocabulary import check_rows, stored_generation_config
    from skd_lib.planning.memory import skeleton_size

    far = isinstance(parse_reference(reference), HubModel | StoredFolder)
    fingerprint = model_fingerprint(reference)
    folder = resolve_model(reference, fingerprint=fingerprint, trust_remote_code=trust_remote_code, weights=not far)
    # As the steps load it: they run no code but transformers' own.
    if trust_remote_code and (code := sorted(file.name for file in folder.glob("*.py"))):
        what = f"the code that comes with it ({code[0]}) is not run: the steps load models with transformers' own code"
        hint = "see that transformers' own code is as good: compare their answers"
        checks.add(role, "warning", what, where=reference, hint=hint)
    model = skeleton(folder)
    stored_generation_config(folder)
    tokenizer = load_tokenizer(folder)
    if not far:
        if skipped := check_weights(folder, model):
            what = f"its weights are compared with config.json only when they are loaded: {skipped}"
            checks.add(role, "warning", what, where=reference)
        check_finite(folder, model._keys_to_ignore_on_load_unexpected or ())
    rows = check_rows(role, folder)
    _note_findings(checks, role, rows)
    return Model(
        role=role,
        reference=reference,
        fingerprint=fingerprint,
        folder=folder,
        tokenizer=tokenizer,
        skeleton=model,
        size=skeleton_size(model),
        context=context_length(model.config),
        unreachable=rows.unreachable,
    )


def _note_findings(checks: Checks, name: str, found: Findings) -> None:
    for error in found.errors:
        checks.failed(name, error)
    for warning in found.warnings:
        checks.failed(name, warning, "warning")


def _answer_end(checks: Checks, model: Model, config: RunConfig) -> int:
    """Return the id that ends an answer; a model that does not stop there is a warning."""
    from skd_lib.data.tokenize import answer_end_id
    from skd_lib.models.vocabulary import eos_ids, pad_id

    pad_id(model.tokenizer)
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


def _check_same_vocabulary(checks: Checks, teacher: Model, student: Model, config: RunConfig) -> Mapping[int, str]:
    """Check that both models have the same tokens; return those that no text may contain."""
    from skd_lib.models.vocabulary import compare

    found = checks.attempt("tokenizers", lambda: compare(teacher.folder, student.folder))
    if found is None:
        return {}
    _note_findings(checks, "tokenizers", found)
    if not found.errors and not found.warnings:
        checks.add("tokenizers", "ok", "teacher and student have the same token ids")
    if config.task.chat_template and teacher.tokenizer.chat_template != student.tokenizer.chat_template:
        checks.add(
            "tokenizers",
            "warning",
            "teacher and student have different chat templates; the teacher will see prompts in the student's",
            hint="copy the teacher's chat template into the student's folder if the teacher answers badly",
        )
    return found.unreachable


def _check_served(checks: Checks, teacher: Model, student: Model, config: RunConfig) -> None:
    """Check that vLLM can be started with the pair, and say what its step needs."""
    from skd_lib.specdec.vllm import Served, refusals
    from skd_lib.vllm.serve import on_gpu

    pair = [Served(model.folder, model.reference) for model in (teacher, student)]
    reasons = refusals(*pair, on_gpu=True)
    for reason in reasons:
        checks.add("specdec", "error", reason, where="specdec.engine", hint="set it to `transformers`")
    if 0 not in config.specdec.temperatures and not on_gpu():
        what = "with a draft on a CPU vLLM is right at temperature 0 only, and this machine has no GPU"
        level: Level = "warning" if in_cluster() else "error"  # in a pod the step may get another node
        checks.add("specdec", level, what, where="specdec.temperatures", hint="add 0, or measure on a GPU")
    if not reasons:
        needs = "where its environment is missing the step installs it: minutes, 2.5 GB on a CPU, 8 GB on a GPU"
        checks.add("specdec", "ok", f"vLLM will measure the drafts; {needs}")


def check_adapters(checks: Checks, config: RunConfig, models: Sequence[Model]) -> None:
    """Check that each model that is trained with adapters has the layers for them, and can hold them."""
    import torch

    from skd_lib.models.adapters import add_lora

    roles = {model.role: model for model in models if model.role == "teacher" or model.reference == config.student}
    teacher = roles.get("teacher")
    student = teacher if config.student_init.cuts else roles.get("student")
    trained: list[tuple[str, Model | None, LoraConfig | None]] = [
        ("teacher_sft", teacher, config.teacher_sft.training.lora if config.teacher_sft.enabled else None),
        ("student_init", student, config.student_init.training.lora if config.student_init.trains else None),
        ("distill", student, config.distill.training.lora),
    ]
    for section, model, lora in trained:
        if model is not None and lora is not None:
            try:
                with torch.device("meta"):
                    add_lora(copy.deepcopy(model.skeleton), lora, config.seed)
            except SkdError as error:
                checks.add(section, "error", error.what, where=f"{section}.{error.where}", hint=error.hint)


def _check_cut(checks: Checks, teacher: Model, config: RunConfig) -> None:
    first, last = config.student_init.keep_first or 0, config.student_init.keep_last or 0
    kept, layers = first + last, teacher.size.layers
    if kept < layers:
        checks.add("student", "ok", f"cut from the teacher: {kept} of {layers} layers are kept")
    else:
        what = f"keep_first {first} + keep_last {last} cuts nothing from a teacher of {layers} layers"
        checks.add("student", "error", what, where="student_init", hint=f"their sum must be less than {layers}")


def cut_size(teacher: ModelSize, config: RunConfig) -> ModelSize:
    """Return the size of the student that is cut from the teacher."""
    kept = (config.student_init.keep_first or 0) + (config.student_init.keep_last or 0)
    return teacher.pruned(min(kept, teacher.layers))


def check_unread(checks: Checks, config: RunConfig) -> None:
    """Warn about settings of the distillation that have no effect with this method and divergence."""
    distill = config.distill
    for path in unread_settings(distill):
        checks.add(
            "distill",
            "warning",
            f"it has a value, which method `{distill.method}` with divergence `{distill.divergence}` does not read",
            where=f"distill.{path}",
            hint="leave it out, or choose the method or divergence it belongs to (`skd config`)",
        )
