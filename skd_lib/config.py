"""The configuration of one run: one YAML file, validated before anything is loaded.

Every field is documented where it is defined; `load_config` turns what pydantic finds wrong into sentences
that name the file and the field.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from skd_lib.errors import SkdError, SkdErrors

Method = Literal["sft", "supervised_kd", "on_policy", "skd"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
DivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]
TeacherPrecision = Literal["auto", "bf16", "fp32", "8bit", "4bit"]
MetricName = Literal["chrf", "bleu", "rougeL", "accuracy"]


class Section(BaseModel):
    """A part of the configuration. Unknown fields are errors: a misspelt name must never be swallowed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingParams(Section):
    """How one model samples. Never read from a model's `generation_config`."""

    temperature: float = Field(1.0, ge=0, description="Divides the logits; 0 is greedy decoding.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus: smallest set of tokens with at least this mass.")


# --- data ---------------------------------------------------------------------------------------------------------


class Columns(Section):
    """Which columns hold what."""

    source: str = Field("source", description="The input text.")
    target: str = Field("target", description="The reference answer.")


class FilesSource(Section):
    """JSONL, CSV or Parquet files; each split is a list of local paths or gs:// URIs."""

    type: Literal["files"] = "files"
    train: list[str] = Field(min_length=1)
    validation: list[str] = Field([], description="Empty: cut from train by `data.validation_fraction`.")
    test: list[str] = Field([], description="Empty: cut from train by `data.test_fraction`.")
    columns: Columns = Columns()


class HubSource(Section):
    """A dataset of the Hugging Face hub."""

    type: Literal["hub"]
    dataset: str = Field(description="Dataset id, e.g. `openai/gsm8k`.")
    subset: str | None = None
    revision: str | None = Field(None, description="Commit or tag; pin it for reproducible runs.")
    train_split: str = "train"
    validation_split: str | None = None
    test_split: str | None = Field("test", description="Empty: cut from train by `data.test_fraction`.")
    columns: Columns = Columns()

    @field_validator("subset", "revision", "validation_split", "test_split", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        return None if value == "" else value


class GettextWheel(Section):
    """The gettext catalogs inside one wheel of a Python package index."""

    requirement: str = Field(description="Pinned requirement, e.g. `django==5.2.19`.", pattern=r"^[\w.-]+==[\w.]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class GettextSource(Section):
    """Translation pairs from the catalogs that Python packages ship: wheels are fetched with pip, never installed."""

    type: Literal["gettext"]
    language: str = Field(description="Language of the source side, e.g. `fr`; the target side is the msgid.")
    train: list[GettextWheel] = Field(min_length=1)
    validation: list[GettextWheel] = Field(min_length=1)
    test: list[GettextWheel] = Field(min_length=1)
    min_words: int = Field(3, ge=1, description="Pairs with fewer words on either side are left out.")
    max_words: int | None = Field(None, ge=1, description="Pairs with more words on either side are left out.")


DataSource = Annotated[FilesSource | HubSource | GettextSource, Field(discriminator="type")]


class DataConfig(Section):
    """Where examples come from and how they are split."""

    source: DataSource
    teacher_examples: int | None = Field(
        None, ge=1, description="Training examples for the teacher's SFT; all if unset."
    )
    student_examples: int | None = Field(None, ge=1, description="Training examples for the student; all if unset.")
    validation_examples: int | None = Field(None, ge=1, description="At most this many validation examples.")
    test_examples: int | None = Field(None, ge=1, description="At most this many test examples.")
    validation_fraction: float = Field(0.1, gt=0, lt=0.5, description="Used when the source has no validation split.")
    test_fraction: float = Field(0.1, gt=0, lt=0.5, description="Used when the source has no test split.")
    near_duplicate_threshold: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Jaccard similarity of character 5-grams above which a training row that resembles a held-out row "
        "is dropped; 1 drops exact duplicates only.",
    )


class TaskConfig(Section):
    """How an example becomes a prompt, and how an answer is judged."""

    prompt: str = Field("{source}", description="Template of the prompt; `{source}` is replaced by the input text.")
    system_prompt: str | None = Field(None, description="System message, where a chat template is used.")
    chat_template: bool = Field(True, description="Wrap the prompt in the tokenizer's chat template.")
    stop: list[str] = Field([], description="The answer ends before the first of these strings, e.g. a newline.")
    metrics: list[MetricName] = Field(["chrf", "bleu"], min_length=1, description="The first decides promotion.")
    max_prompt_tokens: int = Field(256, ge=1)
    max_new_tokens: int = Field(256, ge=1)

    @field_validator("prompt")
    @classmethod
    def _has_source(cls, prompt: str) -> str:
        if "{source}" not in prompt:
            raise ValueError("the template must contain {source}, the place of the input text")
        return prompt


# --- training -----------------------------------------------------------------------------------------------------


class LoraConfig(Section):
    """Train low-rank adapters (arXiv 2106.09685) beside frozen weights; the model that is saved has them merged in.

    Gradients and optimiser states are of the adapters alone, which saves 12 bytes a frozen weight.
    """

    rank: int = Field(16, ge=1, description="Width of an adapter.")
    alpha: float = Field(32.0, gt=0, description="An adapter's output is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of an adapter while training.")
    target_modules: list[str] = Field(
        [], description="Layers with adapters, by the end of their names, e.g. `q_proj`; empty: all but the head."
    )


class TrainingConfig(Section):
    """One training run. Defaults are the paper's (Xu et al. 2025, arXiv 2410.11325)."""

    learning_rate: float = Field(1e-5, gt=0)
    lr_scheduler: Scheduler = "linear"
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: float = Field(3, gt=0, description="Ignored when `max_steps` is set.")
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps.")
    batch_size: int = Field(8, ge=1, description="Sequences per optimiser step, over all devices.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Sequences per forward and device; unset: as many as the optimiser step needs."
    )
    eval_steps: int = Field(
        25, ge=1, description="Steps between validations and checkpoints; the best checkpoint is kept."
    )
    keep_checkpoints: int = Field(1, ge=1, description="So many of the newest checkpoints are kept, besides the best.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Attention dropout while training; always off while sampling.")
    gradient_checkpointing: bool = Field(
        False,
        description="Compute activations again in the backward pass: less memory, more time. Sampling keeps its cache.",
    )
    explosion_factor: float = Field(
        100,
        gt=1,
        description="A step is skipped if its loss is more than so many times the median of the last 50 steps', as it "
        "is if its loss or gradient is not finite.",
    )
    max_skipped_steps: int = Field(
        5, ge=1, description="Training stops, its last good checkpoint kept, when so many steps in a row were skipped."
    )
    lora: LoraConfig | None = Field(None, description="Unset: all weights are trained.")
    fsdp: bool = Field(
        False,
        description="With several processes (torchrun): shard weights, gradients and optimiser states over them "
        "(PyTorch's FSDP2), instead of a copy of all on each device.",
    )

    @model_validator(mode="after")
    def _whole_weights_under_adapters(self) -> TrainingConfig:
        if self.fsdp and self.lora is not None:
            raise ValueError("fsdp: leave it off with `lora`: frozen weights have no optimiser states to be sharded")
        return self


class TeacherTrainingConfig(TrainingConfig):
    """As for the student, but for the schedule."""

    lr_scheduler: Scheduler = "cosine"


class DistillTrainingConfig(TrainingConfig):
    """As for fine-tuning, and how the teacher is held meanwhile."""

    teacher_precision: TeacherPrecision = Field(
        "auto",
        description="Of the frozen teacher's weights: `auto` is bf16 where the device computes in it, else fp32; "
        "`8bit` and `4bit` (NF4) need a CUDA GPU and the package bitsandbytes.",
    )


class TeacherSftConfig(Section):
    """Supervised fine-tuning of the teacher on the task."""

    enabled: bool = Field(True, description="False: the teacher is used as it is.")
    training: TeacherTrainingConfig = TeacherTrainingConfig()


class StudentInitConfig(Section):
    """Where the student starts from."""

    mode: Literal["as_is", "sft", "prune"] = Field("as_is", description="`prune`: cut from the fine-tuned teacher.")
    keep_first: int | None = Field(None, ge=1, description="`prune`: keep this many of the teacher's first layers ...")
    keep_last: int | None = Field(None, ge=1, description="... and this many of its last ones.")
    training: TrainingConfig = Field(TrainingConfig(), description="`sft`: how.")

    @model_validator(mode="after")
    def _layers_for_prune(self) -> StudentInitConfig:
        given = self.keep_first is not None or self.keep_last is not None
        if self.mode == "prune" and (self.keep_first is None or self.keep_last is None):
            raise ValueError("mode `prune` needs both keep_first and keep_last")
        if self.mode != "prune" and given:
            raise ValueError(f"keep_first and keep_last belong to mode `prune`, not to `{self.mode}`")
        return self


class InterleavedConfig(Section):
    """The sampler of SKD (Xu et al. 2025, arXiv 2410.11325, Algorithm 1)."""

    top_k: int = Field(
        25,
        ge=0,
        description="A drafted token is kept if it is among the teacher's K likeliest; 0 is pure teacher sampling.",
    )
    gamma: int = Field(5, ge=1, description="Tokens drafted per teacher call; the most, if `adaptive_gamma`.")
    adaptive_gamma: bool = Field(
        True,
        description="Draft fewer tokens where the measured acceptance says that more would be wasted. Only speed "
        "depends on it, the samples do not.",
    )
    student: SamplingParams = SamplingParams(temperature=0.5, top_p=0.5)
    teacher: SamplingParams = SamplingParams(temperature=0.5, top_p=1.0)


class DistillConfig(Section):
    """How the student is trained under the teacher."""

    method: Method = "skd"
    divergence: DivergenceName = "forward_kl"
    beta: float = Field(
        0.5, ge=0, le=1, description="`jsd` only: weight of the teacher in the mixture (0: forward KL, 1: reverse KL)."
    )
    temperature: float = Field(1.0, gt=0, description="Divides both models' logits in the loss.")
    on_policy_fraction: float = Field(
        1.0,
        ge=0,
        le=1,
        description="`on_policy` only: share of batches the student generates (lambda in GKD, arXiv 2306.13649); "
        "the others are ground truth.",
    )
    sampling: InterleavedConfig = InterleavedConfig()
    training: DistillTrainingConfig = DistillTrainingConfig()


# --- measuring and keeping ----------------------------------------------------------------------------------------


class EvaluationConfig(Section):
    """Greedy decoding of the test set, scored with the task's metrics."""

    batch_size: int = Field(16, ge=1)
    bootstrap_samples: int = Field(1000, ge=100, description="Resamples for the 95 % intervals.")


class SpecdecConfig(Section):
    """Speculative decoding: the student drafts for the teacher."""

    examples: int = Field(32, ge=1, description="Test prompts used.")
    gamma: int = Field(5, ge=1)
    batch_size: int = Field(1, ge=1)
    temperature: float = Field(
        0.0, ge=0, description="0: greedy; the output is then checked against the teacher's own."
    )
    repeats: int = Field(3, ge=1, description="Timings are medians over this many passes.")


class RegistryConfig(Section):
    """The MLflow model registry."""

    model_name: str = Field("skd-student", pattern=r"^[^/:]+$", description="Name of the registered model.")
    min_improvement: float = Field(
        0.0, ge=0, description="A challenger must beat the champion's task metric by more than this."
    )


class RunConfig(Section):
    """Everything one run needs."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="Name of the run: lower case, digits and dashes."
    )
    teacher: str = Field(description="Hub id, local folder, gs:// URI, or wheel://NAME==VERSION/PATH.gguf?sha256=HEX.")
    student: str | None = Field(None, description="Like `teacher`; unset where `student_init.mode` is `prune`.")
    seed: int = Field(0, ge=0, lt=2**31)
    trust_remote_code: bool = Field(False, description="Run Python code that comes with a model. Leave it off.")
    data: DataConfig
    task: TaskConfig = TaskConfig()
    teacher_sft: TeacherSftConfig = TeacherSftConfig()
    student_init: StudentInitConfig = StudentInitConfig()
    distill: DistillConfig = DistillConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    specdec: SpecdecConfig = SpecdecConfig()
    registry: RegistryConfig = RegistryConfig()

    @model_validator(mode="after")
    def _student_is_named_or_cut(self) -> RunConfig:
        pruned = self.student_init.mode == "prune"
        if pruned and self.student is not None:
            raise ValueError("student: leave it out, `student_init.mode: prune` cuts the student from the teacher")
        if not pruned and self.student is None:
            raise ValueError(f"student: needed for `student_init.mode: {self.student_init.mode}`")
        return self


SectionT = TypeVar("SectionT", bound=Section)


def parse_section(model: type[SectionT], values: Any, *, where: str) -> SectionT:
    """Validate `values`, a mapping or its JSON text, as `model`.

    Raises:
        SkdErrors: everything that is wrong, naming `where` and each field.
        SkdError: the text is not JSON.
    """
    if isinstance(values, str):
        values = parse_json(values, where=where)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise SkdErrors([_field_error(model, detail, where) for detail in error.errors()]) from error


def parse_json(text: str, *, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        SkdError: it is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SkdError(f"not JSON: {error}", where=where, hint="pass the section as one JSON object") from error


def load_config(path: Path) -> RunConfig:
    """Read a run's YAML file.

    Raises:
        SkdError: the file is missing, is not YAML, or has a wrong, missing or unknown field.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SkdError(f"cannot read the config: {error.strerror}", where=str(path), hint="check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SkdError(f"not a YAML file: {error}", where=str(path)) from error
    if not isinstance(values, dict):
        raise SkdError("the config must be a mapping of fields", where=str(path))
    return parse_section(RunConfig, values, where=str(path))


def _field_error(model: type[BaseModel], detail: Any, where: str) -> SkdError:
    path, section_type = _locate(model, detail["loc"])
    section = {name: info.description or "" for name, info in section_type.model_fields.items()}
    field = ".".join(path)
    message = detail["msg"].removeprefix("Value error, ")
    hint = ""
    if detail["type"] == "extra_forbidden":
        message = "unknown field"
        similar = difflib.get_close_matches(path[-1], section, n=1)
        guess = f"did you mean `{similar[0]}`? " if similar else ""
        hint = f"{guess}fields here: {', '.join(section)}"
    elif detail["type"] == "missing":
        message = "this field is required"
        description = section.get(path[-1])
        hint = f"add it: {description}" if description else "add it"
    elif detail["type"] in {"union_tag_not_found", "union_tag_invalid"}:
        annotation = section_type.model_fields[path[-1]].annotation
        kinds = ", ".join(f"`{tag}`" for variant in _sections(annotation) for tag in _tags(variant))
        field = f"{field}.type"
        message = f"unknown type {detail['ctx']['tag']!r}" if "tag" in detail["ctx"] else "this field is required"
        hint = f"one of {kinds}"
    elif detail["type"] != "value_error":
        message = f"{message}, got {reprlib.repr(detail['input'])}"
        hint = section.get(path[-1], "") if path else ""
    return SkdError(message, where=f"{where}, field `{field}`" if field else where, hint=hint)


def _locate(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel]]:
    """Follow an error's location; the path as the user wrote it, and the section that its last field is in.

    In a union pydantic puts the variant's tag into the location (`source.files.train`): it leads to the variant,
    and is no part of the user's path.
    """
    path: list[str] = []
    here: type[BaseModel] = model
    variants: dict[Any, type[Section]] = {}
    for index, part in enumerate(loc):
        if part in variants:
            here, variants = variants[part], {}
            continue
        path.append(str(part))
        field = here.model_fields.get(str(part))
        if field is None:
            continue
        sections = _sections(field.annotation)
        variants = {tag: section for section in sections for tag in _tags(section)} if len(sections) > 1 else {}
        if len(sections) == 1 and index < len(loc) - 1:
            here = sections[0]
    return path, here


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _tags(section: type[Section]) -> tuple[Any, ...]:
    tag = section.model_fields.get("type")
    return get_args(tag.annotation) if tag else ()
