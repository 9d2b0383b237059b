"""The whole of a distillation as three functions: `distill`, `evaluate`, `benchmark`, in this process.

They do what the pipeline's steps and the commands do, without Kubeflow, and without MLflow.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from skd_lib._core.machine import is_main_process
from skd_lib.config import (
    Columns,
    EvaluationConfig,
    FilesSource,
    RunConfig,
    SpecdecConfig,
    TaskConfig,
    apply,
    load_config,
    parse_section,
    refuse_multinode,
)
from skd_lib.config.step import step_config
from skd_lib.errors import SkdError, unwritable
from skd_lib.storage import write_text_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from skd_lib.evaluation.evaluate import Evaluation
    from skd_lib.results import Course, Specdec

    Model: TypeAlias = PreTrainedModel | str | Path
    """A loaded model, or its hub id, folder or other reference (`skd_lib.models.references`)."""

SectionT = TypeVar("SectionT", TaskConfig, EvaluationConfig, SpecdecConfig)
_MARKS = ".skd"
"""Folder in the output folder: what each part of it was made from, and checkpoints."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Distilled:
    """The result of `distill`.

    Attributes:
        student: Folder of the distilled student, in the Hugging Face layout, with its model card.
        initial_student: Folder of the student before.
        teacher: Folder of the teacher, fine-tuned unless `teacher_sft.enabled` is false.
        data: Folder of the prepared data: `test.jsonl` and the other splits.
        figures: Closing figures of the training: `first_validation_loss`, `best_validation_loss`, `best_step`, `steps`,
            `rejection_rate_first_tenth`, `seconds`, ...
        course: Curves of the training: losses, rejection rate, response length.
    """

    student: Path
    initial_student: Path
    teacher: Path
    data: Path
    figures: Mapping[str, float]
    course: Course

    @property
    def validation_loss(self) -> tuple[float, float]:
        """The validation loss before training, and the lowest, which is the student's."""
        return self.figures["first_validation_loss"], self.figures["best_validation_loss"]


def distill(
    config: RunConfig | Mapping[str, Any] | str | Path,
    output_dir: str | Path = "distilled",
    *,
    overrides: Mapping[str, Any] | None = None,
) -> Distilled:
    """Prepare the data, fine-tune the teacher, make the student and distil it: the training part of a run.

    Started again with the same settings, it takes what is done from `output_dir` and goes on from the last checkpoint.
    With several GPUs, start the script with torchrun.

    Args:
        config: A run's YAML file, or its content as a mapping or a `RunConfig`. A mapping needs `teacher`, `student`
            and `data`; `name` may be left out.
        output_dir: Gets the folders `data`, `teacher`, `initial_student` and `student`.
        overrides: Fields in place of the config's, by dotted name: `{"distill.method": "on_policy"}`.

    Raises:
        SkdError: a field is wrong, the data or a model cannot be read, the models do not fit each other, or training
            broke down.
    """
    run = _run_config(config, dict(overrides or {}))
    refuse_multinode(run, where="distill")

    from accelerate import PartialState

    from skd_lib.data.prepared import data_fingerprint
    from skd_lib.models.loading import default_device
    from skd_lib.models.records import read_record
    from skd_lib.models.references import model_fingerprint
    from skd_lib.steps import distill as training
    from skd_lib.steps import prepare_data, student_init, teacher_sft
    from skd_lib.steps.kfp_call import Call, called
    from skd_lib.steps.preflight import with_columns

    run, _ = with_columns(run)
    out = Path(output_dir)
    place = {name: out / name for name in ("data", "teacher", "initial_student", "student")}
    _check_output(output_dir, place)
    processes = PartialState(cpu=default_device().type == "cpu")
    processes.wait_for_everyone()
    root = {"checkpoint_root": str(out / _MARKS / "checkpoints")}

    def made(name: str, step: Callable[..., None], after: str, *, together: bool, **options: Any) -> str:
        """Make a part unless it is there, made from the same, and return the key of what it is made from."""
        key = _key(options["config"], after)
        mark = out / _MARKS / f"{name}.txt"
        there = mark.is_file() and mark.read_text(encoding="utf-8") == key and place[name].is_dir()
        processes.wait_for_everyone()
        if there:
            log.info("%s is there already", place[name])
            return key
        if is_main_process():
            write_text_atomic(mark, "")  # the folder is this function's own, and is not finished
        if together or is_main_process():
            with called(Call(output_file=mark.with_name("outputs.json"))):
                step(**options)
        processes.wait_for_everyone()
        if is_main_process():
            write_text_atomic(mark, key)
        processes.wait_for_everyone()
        return key

    def settings(step: str, fingerprint: str = "") -> str:
        return step_config(step, run, fingerprint=fingerprint)

    data = made(
        "data",
        prepare_data.main,
        "",
        together=False,
        config=settings("prepare_data", data_fingerprint(run.data)),
        data_out=place["data"],
    )
    teacher = made(
        "teacher",
        teacher_sft.main,
        data,
        together=run.teacher_sft.enabled,
        config=settings("teacher_sft", model_fingerprint(run.teacher)),
        data=place["data"],
        teacher_out=place["teacher"],
        **root,
    )
    initial = made(
        "initial_student",
        student_init.main,
        teacher,
        together=run.student_init.trains,
        config=settings("student_init", model_fingerprint(run.student) if run.student else ""),
        teacher=place["teacher"],
        data=place["data"],
        student_out=place["initial_student"],
        **root,
    )
    made(
        "student",
        training.main,
        initial,
        together=True,
        config=settings("distill"),
        student=place["initial_student"],
        teacher=place["teacher"],
        data=place["data"],
        student_out=place["student"],
        **root,
    )
    (out / _MARKS / "outputs.json").unlink(missing_ok=True)
    record = read_record(place["student"])
    return Distilled(**place, figures=record.figures, course=record.course)


def evaluate(
    model: Model,
    dataset: Iterable[Any] | str | Path,
    task: TaskConfig | Mapping[str, Any] | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: EvaluationConfig | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Answer a dataset by greedy decoding, and score the answers with 95 % intervals.

    Example:
        >>> found = evaluate("student", [{"source": "Add 1 and 2.", "target": "#### 3"}], "gsm8k")
        >>> found.scores.metrics["accuracy"].score, found.scores.metrics["accuracy"].low

    Args:
        model: A loaded model in the precision that it is to have, or its hub id, folder or other reference.
        dataset: Rows with an input and a reference answer (`source` and `target`, `prompt` and `completion`,
            `question` and `answer`, ...), or a data file.
        task: A task by name (`gsm8k`, `translation`, ...), or its fields: `prompt`, `metrics`, `max_new_tokens`, ...
        tokenizer: Of a loaded model; unset: from where the model was loaded.
        config: Fields of `evaluation`: `batch_size`, `bootstrap_samples`, `judge`.
        seed: Of the bootstrap.

    Returns:
        Scores, and for each example the answer with its own scores.

    Raises:
        SkdError: the data cannot be read, no metric can be computed, or the model cannot be loaded.
    """
    from skd_lib.data.chat import check_rendering
    from skd_lib.evaluation.evaluate import check_answers
    from skd_lib.evaluation.evaluate import evaluate as score
    from skd_lib.evaluation.served import remote_teacher
    from skd_lib.models.modes import evaluating

    settings = _section(TaskConfig, {"name": task} if isinstance(task, str) else task, "evaluate, task")
    if settings.wants_comet:
        settings = settings.without_comet()
        if settings.wants_comet:
            hint = "add another metric to the task; COMET has a step of its own in the pipeline"
            raise SkdError("COMET is the task's only metric", where="task.metrics", hint=hint)
    wanted = _section(EvaluationConfig, config or {}, "evaluate, config")
    rows = _examples(dataset)
    check_answers(rows, where="evaluate, dataset")
    if isinstance(model, str | Path) and (remote := remote_teacher(Path(model), settings)):
        return score(remote, remote.tokenizer, rows, settings, wanted, seed=seed)
    language_model, words = _loaded(model, tokenizer)
    check_rendering(words, settings)
    with evaluating(language_model):
        return score(language_model, words, rows, settings, wanted, seed=seed)


def benchmark(
    teacher: Model,
    draft: Model,
    prompts: Sequence[str] | str | Path,
    *,
    task: TaskConfig | Mapping[str, Any] | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: SpecdecConfig | Mapping[str, Any] | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Specdec:
    """Measure one model as the draft of another in speculative decoding.

    Example:
        >>> found = benchmark("teacher", "student", ["Add 1 and 2."], config={"gamma": 4})
        >>> found.acceptance_by_position, found.tokens_per_teacher_call, found.speedup

    Args:
        teacher: The model whose output is wanted: loaded, or its hub id, folder or other reference.
        draft: The model that drafts for it, with the same tokenizer.
        prompts: Inputs, or a file of them: .txt with one a line, or a data file with the column `source`.
        task: A task by name, or its fields `prompt`, `chat_template`, `max_new_tokens` (unset: 128), ...
        tokenizer: Of loaded models; unset: from where the teacher was loaded.
        config: Fields of `specdec`: `gamma`, `gammas`, `temperatures`, `batch_sizes`, `repeats`, `examples`.
        seed: Of what is sampled.
        on_progress: Called with the responses that are decoded, and with how many there will be.

    Raises:
        SkdError: the models do not fit each other, there are no prompts, or the output at temperature 0 is not the
            teacher's own.
    """
    from skd_lib.config.run import check_gammas
    from skd_lib.data.chat import check_rendering
    from skd_lib.models.modes import evaluating
    from skd_lib.models.vocabulary import check_tokenizer
    from skd_lib.specdec.benchmark import measure_loaded, measure_references
    from skd_lib.specdec.prompts import read_prompts

    fields = {"name": task} if isinstance(task, str) else task
    settings = _section(TaskConfig, {"max_new_tokens": 128} if fields is None else fields, "benchmark, task")
    wanted = _section(SpecdecConfig, config or {}, "benchmark, config")
    try:
        check_gammas(wanted, settings)
    except ValueError as error:
        raise SkdError(str(error), where="benchmark", hint="lower gamma and gammas") from error
    inputs = (
        read_prompts(Path(prompts), column="source", limit=wanted.examples)
        if isinstance(prompts, str | Path)
        else _texts(prompts)
    )
    options: dict[str, Any] = {"task": settings, "config": wanted, "seed": seed, "on_progress": on_progress}
    if isinstance(teacher, str | Path) and isinstance(draft, str | Path):
        return measure_references(str(teacher), {"draft": str(draft)}, inputs, **options)["draft"]
    of_teacher, words = _loaded(teacher, tokenizer)
    of_draft, _ = _loaded(draft, words)
    check_tokenizer(words, {"teacher": of_teacher, "draft": of_draft})
    check_rendering(words, settings)
    with evaluating(of_teacher, of_draft):
        return measure_loaded(of_teacher, words, {"draft": of_draft}, inputs, **options)["draft"]


def _check_output(output_dir: str | Path, place: Mapping[str, Path]) -> None:
    """Make the folder, and refuse one that holds what `distill` has not made and would replace.

    Raises:
        SkdError: such a folder is there, or nothing can be written there.
    """
    out = Path(output_dir)
    if "://" in str(output_dir):
        raise SkdError("this is no local folder", where=f"distill, output_dir {output_dir}", hint="name a folder")
    for name, folder in place.items():
        if folder.exists() and not (out / _MARKS / f"{name}.txt").exists():
            what = "this is there already and not made by `distill`, which would replace it"
            raise SkdError(what, where=str(folder), hint="give an `output_dir` of its own")
    try:
        (out / _MARKS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(error, str(out)) from error


def _run_config(config: Any, overrides: dict[str, Any]) -> RunConfig:
    if isinstance(config, str | Path):
        return load_config(Path(config), overrides)
    if not isinstance(config, RunConfig | Mapping):
        what = f"a {type(config).__name__} is no configuration"
        raise SkdError(what, where="distill, config", hint="pass a YAML file, or its content as a mapping")
    values = config.model_dump(exclude_unset=True) if isinstance(config, RunConfig) else {"name": "distill", **config}
    return parse_section(RunConfig, apply(values, overrides, where="distill"), where="distill")


def _section(section: type[SectionT], values: Any, where: str) -> SectionT:
    if isinstance(values, section):
        return values
    if not isinstance(values, Mapping):
        raise SkdError(f"a {type(values).__name__} is no mapping", where=where, hint="pass fields by name")
    return parse_section(section, dict(values), where=where)


def _key(settings: str, after: str) -> str:
    from skd_lib import __version__

    # The number goes up where settings that are left out mean something else than before.
    return hashlib.sha256(json.dumps([__version__, 2, settings, after]).encode()).hexdigest()


def _loaded(model: Model, tokenizer: PreTrainedTokenizerBase | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model in its present mode, and its tokenizer."""
    from skd_lib.evaluation.generate import load_for_inference
    from skd_lib.models.heads import check_supported
    from skd_lib.models.references import resolve_model
    from skd_lib.models.vocabulary import tokenizer_of

    if isinstance(model, str | Path):
        loaded, own = load_for_inference(resolve_model(str(model)))
        return loaded, tokenizer or own
    if not hasattr(model, "config"):
        what = f"a {type(model).__name__} is no model"
        raise SkdError(what, where="model", hint="pass a model of transformers, or its hub id or folder")
    check_supported(model)
    return model, tokenizer or tokenizer_of(model, hint="pass `tokenizer`")


def _texts(prompts: Iterable[Any]) -> list[str]:
    """Return prompts that are all texts.

    Raises:
        SkdError: one is not.
    """
    found = list(prompts) if isinstance(prompts, Iterable) else [prompts]
    for number, prompt in enumerate(found):
        if not isinstance(prompt, str):
            what = f"must be text, got a {type(prompt).__name__}"
            raise SkdError(what, where=f"benchmark, prompt {number}", hint="pass texts, or a file of rows or messages")
    return found


def _examples(dataset: Any) -> Sequence[Any]:
    """Return the examples of rows in memory, or of a file; what are examples already stays as it is."""
    from skd_lib.data import sources
    from skd_lib.data.examples import Example
    from skd_lib.data.rows import NAMED_ROWS, Problems, check_rows, usual_columns

    if isinstance(dataset, str | Path):
        return sources.load(FilesSource(train=[str(dataset)])).train
    if not isinstance(dataset, Iterable):
        what = f"a {type(dataset).__name__} is no dataset"
        raise SkdError(what, where="evaluate, dataset", hint="pass rows, or a data file")
    rows: Iterator[Any] = iter(dataset)
    first_rows = list(islice(rows, NAMED_ROWS))
    if not first_rows:
        raise SkdError("the dataset is empty", where="evaluate, dataset", hint="pass at least one row")
    both = chain(first_rows, rows)
    if isinstance(first_rows[0], Example):
        return list(both)

    def checked() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(both, start=1):
            if not isinstance(row, Mapping):
                what = f"a row is a {type(row).__name__}, not a mapping"
                hint = 'pass rows such as {"source": ..., "target": ...}'
                raise SkdError(what, where=f"evaluate, dataset, row {number}", hint=hint)
            yield f"row {number}", dict(row)

    names = dict.fromkeys(name for row in first_rows if isinstance(row, Mapping) for name in row)
    columns = usual_columns(names, "evaluate, dataset") or Columns()
    problems = Problems()
    examples = check_rows(checked(), columns, problems)
    problems.raise_any()
    return examples
