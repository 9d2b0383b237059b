"""Everything that can be known to be wrong with a run before it starts, found in one go and in seconds.

No weights are loaded, and those of a hub model are not even fetched.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from skd_lib import storage
from skd_lib.config import HeldOutFiles, HubSource, MultinodeConfig, RunConfig, TeacherPrecision, TrainingConfig
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.methods import METHODS, unread_settings

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

    from skd_lib.data.sources import SourceSplits
    from skd_lib.memory import ModelSize

Level = Literal["ok", "warning", "error"]
T = TypeVar("T")
MAX_ROWS = 200_000
"""Rows of each data file that are checked; `prepare_data` checks all."""
MAX_HUB_ROWS = 1_000
MAX_TOKENIZED = 200
_TRACKING = "tracking"
_SYMBOLS: dict[Level, str] = {"ok": "✓", "warning": "!", "error": "✗"}
_COLOURS: dict[Level, str] = {"ok": "green", "warning": "yellow", "error": "red"}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        level: How it is.
        what: What was found.
        where: File, row, field or model; empty if there is none.
        hint: What to do about it; empty if nothing.
    """

    name: str
    level: Level
    what: str
    where: str = ""
    hint: str = ""


@dataclass
class PreflightReport:
    """What `run_checks` found.

    Attributes:
        checks: One or more for each thing that was looked at, in order.
        data_fingerprint: Identifies the data's content and preparation; empty if the data cannot be read.
    """

    checks: list[Check] = field(default_factory=list)
    data_fingerprint: str = ""

    @property
    def tracking_works(self) -> bool:
        """Whether the tracking store answered (or tracking is off)."""
        return not any(check.name == _TRACKING and check.level == "error" for check in self.checks)

    def errors(self) -> list[SkdError]:
        """What must be mended before the run can start."""
        return [
            SkdError(check.what, where=check.where or check.name, hint=check.hint)
            for check in self.checks
            if check.level == "error"
        ]

    def raise_errors(self) -> None:
        """Raise what must be mended, if anything.

        Raises:
            SkdErrors: all of it.
        """
        if errors := self.errors():
            raise SkdErrors(errors)

    def table(self) -> Table:
        """The report for a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Preflight", show_lines=False)
        for column in ("", "check", "found"):
            table.add_column(column)
        for check in self.checks:
            found = Text(f"{check.where}: {check.what}" if check.where else check.what)
            if check.hint:
                found.append(f"\nhint: {check.hint}", style="dim")
            table.add_row(Text(_SYMBOLS[check.level], style=_COLOURS[check.level]), check.name, found)
        return table

    def markdown(self) -> str:
        """The report as a Markdown table."""
        lines = ["# Preflight", "", "| | check | found | what to do |", "|---|---|---|---|"]
        for check in self.checks:
            found = f"{check.where}: {check.what}" if check.where else check.what
            cells = (_SYMBOLS[check.level], check.name, found, check.hint)
            lines.append(f"| {' | '.join(_markdown_cell(cell) for cell in cells)} |")
        return "\n".join(lines) + "\n"


def run_checks(
    config: RunConfig,
    *,
    checkpoint_root: str,
    tracking_uri: str,
    pipeline_root: str | None = None,
    require_gpu: bool = False,
    variants: Sequence[RunConfig] = (),
) -> PreflightReport:
    """Look at everything a run needs. Nothing is raised for what is wrong: it is all in the report.

    Args:
        config: The run.
        checkpoint_root: Folder (local or gs://) for the training steps' checkpoints; empty: not looked at.
        tracking_uri: MLflow's tracking URI; empty: tracking is off.
        pipeline_root: Folder (local or gs://) for the pipeline's artifacts; None: not looked at.
        require_gpu: A missing GPU is an error.
        variants: Runs of a comparison, which share data, task and teacher with `config`; then `config` is none itself.
    """
    checks = _Checks()
    teacher = _model(checks, "teacher", config.teacher, config)
    runs = variants or [config]
    students = [_student(checks, teacher, run) for run in _distinct(runs, lambda run: (run.student, run.student_init))]
    for run in _distinct(runs, lambda run: run.distill):
        _unread(checks, run)
    report = PreflightReport(checks.found)
    report.data_fingerprint = _data(checks, config, [model for model in (teacher, *students) if model], runs)
    if config.task.wants_comet:
        _comet(checks, config.evaluation.comet.model)
    _writable(checks, "checkpoints", checkpoint_root, lambda: storage.check_checkpoint_root(checkpoint_root))
    _writable(checks, "artifacts", pipeline_root or "")
    _multinode(checks, runs, checkpoint_root)
    _tracking(checks, tracking_uri)
    gpu = _gpu(checks, require_gpu)
    for run in _distinct(runs, lambda run: run.distill.training.teacher_precision):
        _precision(checks, run.distill.training.teacher_precision)
    if teacher and len(runs) == 1 and (run.student_init.mode == "prune" or students[0]):
        student = students[0]
        _memory(checks, run, teacher.size, student.size if student else _cut_size(teacher.size, run), gpu)
    return report


def _distinct(runs: Sequence[RunConfig], what: Callable[[RunConfig], object]) -> list[RunConfig]:
    """The first of all runs that are alike in something."""
    keys = [what(run) for run in runs]
    return [run for number, run in enumerate(runs) if keys.index(keys[number]) == number]


def _student(checks: _Checks, teacher: _Model | None, config: RunConfig) -> _Model | None:
    """Look at a run's student; none where it is cut from the teacher, or cannot be read."""
    if config.student_init.mode == "prune":
        if teacher:
            _cut(checks, teacher, config)
        return None
    student = None if config.student is None else _model(checks, "student", config.student, config)
    if teacher and student:
        _same_vocabulary(checks, teacher, student, config)
    return student


# --- collecting ---------------------------------------------------------------------------------------------------


class _Checks:
    """Collects what is found; an error in one check does not keep the others from being made."""

    def __init__(self) -> None:
        self.found: list[Check] = []

    def add(self, name: str, level: Level, what: str, *, where: str = "", hint: str = "") -> None:
        self.found.append(Check(name, level, what, where, hint))

    def failed(self, name: str, error: SkdError) -> None:
        for each in error.errors if isinstance(error, SkdErrors) else [error]:
            self.add(name, "error", each.what, where=each.where, hint=each.hint)

    def attempt(self, name: str, look: Callable[[], T]) -> T | None:
        """The result of `look`, or None if it raised an `SkdError`, which is then noted."""
        try:
            return look()
        except SkdError as error:
            self.failed(name, error)
            return None


def _markdown_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


# --- models -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    role: str
    reference: str
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    size: ModelSize
    context: int | None
    answer_end: int | None = None
    """What ends an answer; None if the chat template cannot be applied."""


def _model(checks: _Checks, role: str, reference: str, config: RunConfig) -> _Model | None:
    model = checks.attempt(role, lambda: _open_model(role, reference, config.trust_remote_code))
    if model is None:
        return None
    size = f"{model.size.parameters / 1e6:,.1f} M parameters, {model.size.layers} layers"
    checks.add(role, "ok", f"{reference}: {size}, context {model.context or 'not limited'}")
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


def _open_model(role: str, reference: str, trust_remote_code: bool) -> _Model:
    from transformers import AutoConfig

    from skd_lib.memory import model_size
    from skd_lib.models.loading import load_tokenizer
    from skd_lib.models.references import HubModel, StoredFolder, parse_reference, resolve_model

    far = isinstance(parse_reference(reference), HubModel | StoredFolder)
    folder = resolve_model(reference, trust_remote_code=trust_remote_code, weights=not far)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    size = model_size(folder, trust_remote_code=trust_remote_code)
    text = AutoConfig.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    ).get_text_config()
    return _Model(role, reference, folder, tokenizer, size, getattr(text, "max_position_embeddings", None))


def _answer_end(checks: _Checks, model: _Model, config: RunConfig) -> int:
    """The id that ends an answer; the model had better stop at it."""
    from skd_lib.data.tokenize import answer_end_id
    from skd_lib.models.loading import eos_ids

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


def _comet(checks: _Checks, reference: str) -> None:
    """A run without COMET's scores is still a run: what is wrong with its model is no error."""
    from skd_lib.comet.checkpoint import check_reference

    try:
        check_reference(reference)
    except SkdError as error:
        checks.add("comet", "warning", f"no scores by COMET: {error.what}", where=error.where, hint=error.hint)
    else:
        checks.add("comet", "ok", reference)


def _same_vocabulary(checks: _Checks, teacher: _Model, student: _Model, config: RunConfig) -> None:
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


def _cut(checks: _Checks, teacher: _Model, config: RunConfig) -> None:
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


def _cut_size(teacher: ModelSize, config: RunConfig) -> ModelSize:
    kept = (config.student_init.keep_first or 0) + (config.student_init.keep_last or 0)
    return teacher.pruned(min(kept, teacher.layers))


def _unread(checks: _Checks, config: RunConfig) -> None:
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


# --- data ---------------------------------------------------------------------------------------------------------


def _data(checks: _Checks, config: RunConfig, models: list[_Model], runs: Sequence[RunConfig]) -> str:
    """Look at rows, splits, lengths and training schedules; the data's fingerprint, empty if it cannot be read."""
    from skd_lib.data import sources
    from skd_lib.data.manifest import data_fingerprint
    from skd_lib.data.splits import cut_missing

    max_rows = MAX_HUB_ROWS if isinstance(config.data.source, HubSource) else MAX_ROWS

    def look() -> SourceSplits:
        return cut_missing(sources.load(config.data.source, max_rows=max_rows), config.data, config.seed)

    splits = checks.attempt("data", look)
    if splits is None:
        return ""
    counts = {"train": splits.train, "validation": splits.validation or [], "test": splits.test or []}
    some = any(len(rows) >= max_rows for rows in counts.values())
    rows = ", ".join(f"{name} {len(examples)}" for name, examples in counts.items())
    checks.add(
        "data", "ok", f"rows before near duplicates are dropped: {rows}{' (the first rows only)' if some else ''}"
    )
    if models and models[-1].answer_end is not None:
        _lengths(checks, config, models[-1].tokenizer, models[-1].answer_end, splits)
    _schedules(checks, config, len(splits.train), runs)
    _held_out(checks, config)
    return checks.attempt("data", lambda: data_fingerprint(config.data)) or ""


def _held_out(checks: _Checks, config: RunConfig) -> None:
    """The further test sets: a run goes on without those that cannot be read."""
    from skd_lib.data.sources import load_held_out

    for held_out in config.data.held_out:
        name = f"held-out {held_out.name}"
        limit = MAX_ROWS if isinstance(held_out.source, HeldOutFiles) else MAX_HUB_ROWS
        try:
            rows = len(load_held_out(held_out, max_rows=limit))
        except SkdError as error:
            hint = "mend it, or the run goes on and reports this set as missing"
            checks.add(name, "warning", error.brief, hint=hint)
        else:
            checks.add(name, "ok", f"{rows} rows{' (the first rows only)' if rows >= limit else ''}")


def _lengths(
    checks: _Checks, config: RunConfig, tokenizer: PreTrainedTokenizerBase, end: int, splits: SourceSplits
) -> None:
    """A sample of each split against the limits on prompt and answer."""
    from skd_lib.data.tokenize import encode

    task = config.task
    for name in ("train", "validation", "test"):
        sample = (getattr(splits, name) or [])[:MAX_TOKENIZED]
        encoded = [encode(tokenizer, task, example, end) for example in sample]
        prompts = [len(example.prompt_ids) for example in encoded]
        long = sum(length > task.max_prompt_tokens for length in prompts)
        cut = sum(example.response_ids[-1] != end for example in encoded)
        hints = [
            *(["raise task.max_prompt_tokens: examples with longer prompts are left out"] if long else []),
            *(["raise task.max_new_tokens: longer answers are cut"] if cut else []),
        ]
        checks.add(
            f"{name} lengths",
            "error" if long == len(sample) else "warning" if hints else "ok",
            f"of {len(sample)} examples {long} have prompts over {task.max_prompt_tokens} tokens (longest "
            f"{max(prompts)}), {cut} have answers over {task.max_new_tokens} tokens",
            hint="; ".join(hints),
        )


def _schedules(checks: _Checks, config: RunConfig, rows: int, runs: Sequence[RunConfig]) -> None:
    """Whether batches divide, and how many optimiser steps that makes."""
    from skd_lib.training.run import schedule

    trainings: list[tuple[str, TrainingConfig, MultinodeConfig | None, int | None]] = []
    if config.teacher_sft.enabled:
        sft = config.teacher_sft
        trainings.append(("teacher_sft", sft.training, sft.multinode, config.data.teacher_examples))
    tuned = [run for run in runs if run.student_init.mode == "sft"]
    distilled = _distinct(runs, lambda run: (run.distill.training, run.distill.multinode))
    students: list[tuple[str, TrainingConfig, MultinodeConfig | None]] = [
        *(("student_init", run.student_init.training, None) for run in _distinct(tuned, lambda run: run.student_init)),
        *(("distill", run.distill.training, run.distill.multinode) for run in distilled),
    ]
    trainings += [(*student, config.data.student_examples) for student in students]
    for step, training, multinode, limit in trainings:
        examples = min(rows, limit or rows)
        try:
            planned = schedule(training, examples, processes=multinode.least_processes if multinode else 1)
        except SkdError as error:
            checks.failed(step, error)
        else:
            checks.add(step, "ok", f"{planned.steps} optimiser steps of {training.batch_size} on {examples} examples")
    for run in _distinct(runs, lambda run: (run.distill.method, run.distill.teacher_signal)):
        _stored_signal(checks, run, min(rows, config.data.student_examples or rows))


def _stored_signal(checks: _Checks, config: RunConfig, examples: int) -> None:
    """How much storage the teacher's signal takes at most."""
    signal = config.distill.teacher_signal
    if signal.mode == "stored" and METHODS[config.distill.method].divergence:
        size = examples * config.task.max_new_tokens * (8 * signal.top_k + 4)
        what = (
            f"top {signal.top_k} tokens of {examples} examples: at most {size / 2**30:.1f} GiB beside the checkpoints"
        )
        checks.add("teacher_signal", "ok", what)


# --- surroundings -------------------------------------------------------------------------------------------------


def _writable(checks: _Checks, name: str, uri: str, usable: Callable[[], object] = lambda: None) -> None:
    if not uri:
        return
    try:
        usable()
        storage.check_writable(uri)
    except SkdError as error:
        checks.failed(name, error)
    else:
        checks.add(name, "ok", f"{uri} can be written")


def _multinode(checks: _Checks, runs: Sequence[RunConfig], checkpoint_root: str) -> None:
    """Whether this cluster will take a TrainJob from this service account."""
    sections = [section for run in runs for section in (run.teacher_sft.multinode, run.distill.multinode) if section]
    if not sections:
        return
    from skd_lib.multinode.exchange import check_reachable

    checks.attempt("multinode", lambda: check_reachable({"checkpoint_root": checkpoint_root}))

    def look() -> bool:
        from skd_lib.multinode.cluster import ROLE_HINT, Cluster

        cluster = Cluster.connect()
        if not cluster.may_create_jobs():
            what = "this service account may not create TrainJobs"
            raise SkdError(what, where=f"namespace {cluster.namespace}", hint=ROLE_HINT)
        return True

    if checks.attempt("multinode", look):
        nodes = ", ".join(sorted({str(section.nodes) for section in sections}))
        checks.add("multinode", "ok", f"TrainJobs may be created here; nodes asked for: {nodes}")


def _tracking(checks: _Checks, uri: str) -> None:
    if not uri:
        checks.add(_TRACKING, "ok", "off")
        return
    from skd_lib.tracking.client import check_tracking

    # A server that is down is told within seconds; what the training steps wait is theirs to decide.
    with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT="5", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"):
        error = check_tracking(uri)
    if error is not None:
        checks.failed(_TRACKING, error)
    else:
        checks.add(_TRACKING, "ok", f"MLflow answers at {uri}")


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _gpu(checks: _Checks, required: bool) -> bool:
    import torch

    if torch.cuda.is_available():
        checks.add("GPU", "ok", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
        return True
    if required:
        hint = "run on a machine with a GPU and a driver that fits this PyTorch (`nvidia-smi`), or do not require one"
        checks.add("GPU", "error", f"none is visible to PyTorch {torch.__version__}", hint=hint)
    else:
        checks.add("GPU", "ok", "none is visible here; none was asked for")
    return False


def _precision(checks: _Checks, precision: TeacherPrecision) -> None:
    """Whether the teacher can be quantised."""
    if precision not in ("8bit", "4bit"):
        return
    from skd_lib.models.loading import check_quantization

    try:
        check_quantization(precision)
    except SkdError as error:
        checks.failed("teacher precision", error)
    else:
        checks.add("teacher precision", "ok", f"{precision}, by bitsandbytes")


def _memory(checks: _Checks, config: RunConfig, teacher: ModelSize, student: ModelSize, gpu: bool) -> None:
    from skd_lib.memory import GIB, available_memory, estimates

    found = estimates(config, teacher, student, element=2 if gpu else 4, gpu=gpu)
    largest = max(found, key=lambda estimate: estimate.total)
    if not gpu and os.environ.get("KUBERNETES_SERVICE_HOST"):
        # Here it says nothing about the nodes that the training steps will get.
        checks.add("memory", "ok", f"estimate for {largest}")
        return
    available, of_what = available_memory()
    enough = largest.total <= available
    checks.add(
        "memory",
        "ok" if enough else "warning",
        f"estimate for {largest}; {of_what} has {available / GIB:.1f} GiB",
        hint=""
        if enough
        else "lower training.micro_batch_size, set gradient_checkpointing, use training.lora, or take more memory",
    )
