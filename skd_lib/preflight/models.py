"""Checks of the teacher and its students: vocabularies, contexts, the cut, and settings that do nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from skd_lib.config import LoraConfig, RunConfig, Schedule, TaskConfig
from skd_lib.distillation.methods import METHODS, unread_settings
from skd_lib.errors import SkdError
from skd_lib.models.fingerprint import short
from skd_lib.preflight.checks import Checks
from skd_lib.preflight.templates import check_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from skd_lib.data.examples import Example
    from skd_lib.models.vocabulary import Findings
    from skd_lib.preflight.memory import ModelSize

_TRIED = 50
"""Prompts that are tokenised to find one that is too long, the longest texts first, or one that is not."""
_CUT = 2000
"""Characters of a text that are tokenised to compare tokenizers."""


@dataclass(frozen=True)
class Model:
    """A model of the run, without its weights.

    Attributes:
        role: `teacher` or `student`.
        reference: As configured.
        fingerprint: Of its present content.
        folder: Its files.
        tokenizer: Its tokenizer.
        skeleton: It, on the meta device.
        size: What its memory depends on.
        context: The most positions it takes; None if not limited.
        answer_end: The id that ends an answer; None if the chat template cannot be applied.
        unreachable: Ids of its tokenizer that no text of the data may make, with their tokens.
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
    """Look at a run's student; none where it is cut from the teacher, or cannot be read."""
    if config.student_init.cuts:
        if teacher:
            _cut(checks, teacher, config)
        return None
    student = None if config.student is None else check_model(checks, "student", config.student, config)
    if teacher and student:
        beyond = _same_vocabulary(checks, teacher, student, config)
        return replace(student, unreachable={**student.unreachable, **beyond})
    return student


def check_model(checks: Checks, role: str, reference: str, config: RunConfig) -> Model | None:
    """Look at one model, and whether prompts and answers fit its context; None if it cannot be read."""
    model = checks.attempt(role, lambda: _open_model(checks, role, reference, config.trust_remote_code))
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


def _open_model(checks: Checks, role: str, reference: str, trust_remote_code: bool) -> Model:
    from skd_lib.models.files import load_tokenizer
    from skd_lib.models.references import HubModel, StoredFolder, model_fingerprint, parse_reference, resolve_model
    from skd_lib.models.skeleton import skeleton
    from skd_lib.models.special_ids import stored_generation_config
    from skd_lib.models.vocabulary import check_rows
    from skd_lib.preflight.memory import skeleton_size

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
        _check_weights(checks, role, reference, folder, model)
    rows = check_rows(role, folder)
    _tell(checks, role, rows)
    text = model.config.get_text_config(decoder=True)
    return Model(
        role=role,
        reference=reference,
        fingerprint=fingerprint,
        folder=folder,
        tokenizer=tokenizer,
        skeleton=model,
        size=skeleton_size(model),
        context=getattr(text, "max_position_embeddings", None),
        unreachable=rows.unreachable,
    )


def _check_weights(checks: Checks, role: str, reference: str, folder: Path, model: PreTrainedModel) -> None:
    """The weight files against the config, by their headers, and whether what is in them are numbers."""
    from skd_lib.models.finite import check_finite
    from skd_lib.models.skeleton import check_weights

    if skipped := check_weights(folder, model):
        what = f"its weights are compared with config.json only when they are loaded: {skipped}"
        checks.add(role, "warning", what, where=reference)
    check_finite(folder, model._keys_to_ignore_on_load_unexpected or ())


def _tell(checks: Checks, name: str, found: Findings) -> None:
    for error in found.errors:
        checks.failed(name, error)
    for warning in found.warnings:
        checks.add(name, "warning", warning.what, where=warning.where, hint=warning.hint)


def check_adapters(checks: Checks, config: RunConfig, models: Sequence[Model]) -> None:
    """Whether the layers that adapters are asked for are there, and can hold them, in each model that is trained."""
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


def check_cuts(checks: Checks, teacher: Model, student: Model, examples: Sequence[Example]) -> None:
    """Whether both tokenizers cut texts alike: with the same tokens they need not, and the student's makes the data."""
    for example in examples[:_TRIED]:
        text = example.source[:_CUT]
        cuts = {
            role: model.tokenizer(text)["input_ids"] for role, model in (("teacher", teacher), ("student", student))
        }
        if cuts["teacher"] != cuts["student"]:
            place = next(i for i in range(len(text) + 2) if cuts["teacher"][: i + 1] != cuts["student"][: i + 1])
            shown = {
                role: teacher.tokenizer.convert_ids_to_tokens(ids[place : place + 3]) for role, ids in cuts.items()
            }
            checks.add(
                "tokenizers",
                "warning",
                f"the tokenizers cut the same text in different ways: from token {place} on the teacher's has "
                f"{shown['teacher']}, the student's {shown['student']}; the teacher will read what the student's makes",
                where=example.origin or f"example {example.id}",
                hint="copy the teacher's tokenizer into the student's folder if the student was trained with it, too",
            )
            return


def check_reach(checks: Checks, model: Model, task: TaskConfig, examples: Sequence[Example]) -> None:
    """Whether a text, or the chat template, makes an id that the models have no row for or know nothing of."""
    from skd_lib.data.tokenize import encode

    if not model.unreachable or model.answer_end is None:
        return
    spelt = re.compile("|".join(re.escape(token.strip() or token) for token in model.unreachable.values()), re.I)
    for number, example in enumerate(examples):
        if number and not spelt.search(f"{example.source}\n{example.target}"):
            continue
        encoded = encode(model.tokenizer, task, example, model.answer_end)
        reached = model.unreachable.keys() & {*encoded.prompt_ids, *encoded.response_ids}
        if reached:
            token = model.unreachable[min(reached)]
            checks.add(
                "data",
                "error",
                f"its prompt or answer has the token {token!r} (id {min(reached)}), which was added to a tokenizer "
                "alone: a model has no row for it, or has never seen it",
                where=example.origin or f"example {example.id}",
                hint="leave the token out of the data and the chat template, or use models that both have it",
            )
            return


def check_positions(
    checks: Checks, run: RunConfig, models: Sequence[Model], train: Sequence[Example], test: Sequence[Example]
) -> None:
    """Whether prompts and answers fit where a model's rotary positions do not stretch yet: no further is sampled.

    Looks at the longest training prompts where the method samples, and whether any test prompt can be answered.

    Args:
        checks: Takes what is found.
        run: The run.
        models: Its teacher, and its student unless that is cut from the teacher.
        train: What the student is trained on.
        test: What all models answer.
    """
    from skd_lib.data.tokenize import encode_prompt
    from skd_lib.sampling.cache import position_limit, stretches

    task, facts, tokenizer = run.task, METHODS[run.distill.method], models[-1].tokenizer
    for model in models:
        sampling = position_limit(model.skeleton, _longest_block(run))
        answering = position_limit(model.skeleton, 1)
        if sampling is None or answering is None or not stretches(model.skeleton):
            continue
        if task.max_prompt_tokens + task.max_new_tokens <= sampling:
            continue
        found = "{} and an answer of {} tokens need {} positions, the rotary ones of the {} stretch beyond {}"
        student_writes = facts.student_writes and (model.role == "student" or run.student_init.cuts)
        if student_writes or (facts.teacher_writes and model.role == "teacher"):
            for example in sorted(train, key=lambda each: -len(each.source))[:_TRIED]:
                length = len(encode_prompt(tokenizer, task, example.source))
                needed = length + task.max_new_tokens
                if length <= task.max_prompt_tokens and needed > sampling:
                    prompt = f"its prompt of {length}"
                    checks.add(
                        "distill",
                        "error",
                        found.format(prompt, task.max_new_tokens, needed, model.role, sampling)
                        + f": `{run.distill.method}` cannot sample it",
                        where=example.origin or f"example {example.id}",
                        hint=f"lower task.max_prompt_tokens to {max(sampling - task.max_new_tokens, 1)}: longer "
                        "prompts are left out",
                    )
                    break
        texts = sorted((example.source for example in test), key=len)[:_TRIED]
        shortest = min((len(encode_prompt(tokenizer, task, text)) for text in texts), default=0)
        needed = shortest + task.max_new_tokens
        if needed > answering:
            prompt = f"the shortest test prompt of {shortest}"
            what = found.format(prompt, task.max_new_tokens, needed, model.role, answering)
            hint = "lower task.max_new_tokens, or shorten the prompts"
            checks.add("evaluation", "error", f"{what}: nothing can be answered", where="task", hint=hint)


def _longest_block(run: RunConfig) -> int:
    """How far the sampler of a run's distillation looks beyond a row's last token."""
    facts, sampling = METHODS[run.distill.method], run.distill.sampling
    if not (facts.student_writes and facts.teacher_writes):
        return 1
    gamma = sampling.gamma
    drafted = max(gamma.start, gamma.end) if isinstance(gamma, Schedule) else gamma
    drafted = min(drafted, run.task.max_new_tokens) if sampling.adaptive_gamma else drafted
    return int(drafted) + (sampling.rule == "lossless")


def _answer_end(checks: Checks, model: Model, config: RunConfig) -> int:
    """The id that ends an answer; the model had better stop at it."""
    from skd_lib.data.tokenize import answer_end_id
    from skd_lib.models.special_ids import eos_ids, pad_id

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


def check_comet(checks: Checks, reference: str) -> None:
    """A run without COMET's scores is still a run: what is wrong with its model is no error."""
    from skd_lib.evaluation.comet.checkpoint import check_reference

    try:
        check_reference(reference)
    except SkdError as error:
        checks.add("comet", "warning", f"no scores by COMET: {error.what}", where=error.where, hint=error.hint)
    else:
        checks.add("comet", "ok", reference)


def _same_vocabulary(checks: Checks, teacher: Model, student: Model, config: RunConfig) -> Mapping[int, str]:
    """Whether both speak the same tokens; those that no text may make."""
    from skd_lib.models.vocabulary import compare

    def look() -> Findings:
        return compare(teacher.folder, student.folder)

    found = checks.attempt("tokenizers", look)
    if found is None:
        return {}
    _tell(checks, "tokenizers", found)
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
