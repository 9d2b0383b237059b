"""The work that the training steps share: data to tokens, stored teacher signals, and a resumable training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from skd_lib._core.machine import is_main_process
from skd_lib.config import DistillConfig, MethodName, TaskConfig, TrainingConfig
from skd_lib.distillation.methods import METHODS, samples_every_response
from skd_lib.errors import SkdError
from skd_lib.steps.trained_model import SUMMED, code_version, grouped, load_trainable, save_trained, training_facts
from skd_lib.storage import checkpoint_folder, is_remote

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from skd_lib.config.step import StepConfig
    from skd_lib.data.prepared import PreparedData
    from skd_lib.data.tokenize import TokenizedExample
    from skd_lib.models.precision import Resolved
    from skd_lib.served.teacher import RemoteTeacher
    from skd_lib.tracking.runs import StepRun
    from skd_lib.training.checkpoints import Checkpoints
    from skd_lib.training.run import TrainResult
    from skd_lib.training.stored_teacher import StoredSignals
    from skd_lib.vllm.sampler import VllmEngine

log = logging.getLogger(__name__)
TeacherSource: TypeAlias = "Callable[[], PreTrainedModel] | RemoteTeacher"
"""Loads the teacher, or is a teacher on a server."""
DATA_HELP = "Folder that `prepare_data` wrote."
LEFT_OUT = "left_out_"
"""Prefix of figures: the examples of a split whose prompts are over the limit."""


@dataclass(frozen=True)
class TrainingRun:
    """The settings and models of one training step; `distill` is None for fine-tuning.

    `models` are folders by name, `weights` the digests of their weights. Under `checkpoint_root`, a folder or URI, are
    checkpoints, which are removed when the step has written its model: the same work, started again, goes on from its
    last one if the storage outlives the process. Empty: temporary files.
    """

    step: str
    method: MethodName
    split: Literal["train_teacher", "train_student"]
    training: TrainingConfig
    distill: DistillConfig | None
    task: TaskConfig
    seed: int
    checkpoint_root: str
    models: dict[str, Path]
    weights: dict[str, str]

    @property
    def precision(self) -> Resolved:
        """The precision in which this machine trains."""
        from skd_lib.models.loading import default_device
        from skd_lib.models.precision import resolve_precision

        return resolve_precision(self.training.precision, default_device())

    def checkpoints(self, tokens: Mapping[str, Sequence[TokenizedExample]], limits: Mapping[str, Any]) -> Checkpoints:
        """Return the checkpoints of this very work.

        The token ids of the examples are in the key, with the ids and lengths of `limits`: it changes with any prompt
        or target, be it by the data, the tokenizer, the chat template, the date in that or a limit, and with nothing
        else of these.
        """
        from skd_lib import __version__
        from skd_lib.models.fingerprint import settings_digest
        from skd_lib.training.checkpoints import Checkpoints, checkpoint_key
        from skd_lib.training.stored_teacher import examples_digest

        key = checkpoint_key(
            self.step,
            version=__version__,
            method=self.method,
            training=self.training.model_dump(mode="json", exclude={"checkpoint_minutes", "keep_checkpoints"}),
            precision=self.precision,
            # Another number of nodes goes on from the same checkpoints.
            # The engine changes no samples.
            distill=self.distill
            and self.distill.model_dump(mode="json", exclude={"multinode", "training", "engine", "vllm"})
            | coarser_signal(self.distill),
            seed=self.seed,
            tokens={use: examples_digest(examples) for use, examples in tokens.items()},
            limits=dict(limits),
            weights=self.weights,
            settings={name: settings_digest(folder) for name, folder in self.models.items()},
        )
        root = self.checkpoint_root.rstrip("/")
        return Checkpoints(checkpoint_folder(root) / key, f"{root}/{key}" if is_remote(root) else "")

    def run(
        self,
        student: PreTrainedModel,
        load_teacher: TeacherSource | None,
        tokenizer: PreTrainedTokenizerBase,
        data: PreparedData,
        data_uri: str,
        run: StepRun,
    ) -> tuple[TrainResult, dict[str, float], Checkpoints]:
        """Train `student` in place, and return the result, its closing figures, and the checkpoints.

        `load_teacher` loads the frozen teacher, or is one on a server; it is None for methods without a teacher. `run`
        is the step's MLflow run. The checkpoints are to be removed when all is written.
        """
        from skd_lib.data.tokenize import answer_end_id, encode_all
        from skd_lib.evaluation.generate import ending_ids
        from skd_lib.models.vocabulary import check_ids, pad_id, rows_in_config
        from skd_lib.planning.memory import GIB, config_size, estimate, peak_memory
        from skd_lib.training.run import train

        examples = {self.split: getattr(data, self.split), "validation": data.validation}
        for name, context in ((self.split, "train"), ("validation", "validation")):
            digest = data.manifest["sha256"][f"{name}.jsonl"]
            run.log_dataset(name, digest, data_uri, context=context, rows=len(examples[name]))
        end = answer_end_id(tokenizer, self.task)
        ends = ending_ids(student, tokenizer, self.task)
        tokens = {name: encode_all(tokenizer, self.task, rows, end, ends) for name, rows in examples.items()}
        left_out = {f"{LEFT_OUT}{name}": float(len(rows) - len(tokens[name])) for name, rows in examples.items()}
        rows = min(map(rows_in_config, self.models.values()))
        for each in tokens.values():
            check_ids(each, rows, where=self.step)
        start = time.monotonic()
        limits: dict[str, Any] = {
            "eos_ids": ends,
            "pad_id": pad_id(tokenizer, rows),
            "max_new_tokens": self.task.max_new_tokens,
        }
        with ExitStack() as stack:
            engine = None
            if load_teacher is not None and self.distill is not None and self.distill.engine == "vllm":
                engine = stack.enter_context(self._vllm(self.distill, student, tokens, limits))
            if load_teacher and self.distill and not all(example.response_ids for example in tokens["validation"]):
                # Prompts without answers: the teacher's own show how near the student comes to it.
                tokens["validation"] = self._stored_responses(
                    self.distill, tokens["validation"], student, load_teacher, limits, "seqkd", engine
                )
            self._check_answers(tokens)
            method, teacher, signals = self.method, None, None
            if load_teacher is not None and self.distill is not None:
                if self.distill.engine == "vllm":
                    pass  # the teacher is in the servers
                elif self.distill.teacher_signal.mode == "online":
                    from skd_lib.served.teacher import RemoteTeacher

                    assert not isinstance(load_teacher, RemoteTeacher)  # noqa: S101 - the step refuses it
                    teacher = load_teacher()
                elif not METHODS[method].uses_divergence:
                    # The teacher's stored responses are data like any other.
                    method = "sft"
                    tokens[self.split] = self._stored_responses(
                        self.distill, tokens[self.split], student, load_teacher, limits
                    )
                else:
                    both = [*tokens[self.split], *tokens["validation"]]
                    signals = self._stored_signals(self.distill, both, student, load_teacher, limits["pad_id"])
            checkpoints = self.checkpoints({"train": tokens[self.split], "validation": tokens["validation"]}, limits)
            result = train(
                method=method,
                student=student,
                teacher=teacher if engine is None else engine.head,
                train=tokens[self.split],
                validation=tokens["validation"],
                training=self.training,
                distill=self.distill,
                signals=engine if engine is not None and METHODS[method].uses_divergence else signals,
                sampler_at=None if engine is None else engine.sampler,
                seed=self.seed,
                **limits,
                checkpoints=checkpoints,
                name=self.step,
                on_metrics=lambda step, figures: run.log_metrics(grouped(figures), step=step),
            )
        seconds = time.monotonic() - start
        planned = estimate(
            self.step,
            self.method,
            self.training,
            self.task,
            config_size(student.config),
            None if teacher is None else config_size(teacher.config),
            divergence="forward_kl" if self.distill is None else self.distill.divergence,
            device=student.device,
        )
        memory = {"peak_memory_gib": peak_memory(student.device) / GIB, "estimated_memory_gib": planned.total / GIB}
        log.info("estimated memory of %s; at the peak it was %.2f GiB", planned, memory["peak_memory_gib"])
        return result, {**result_figures(result), **left_out, **memory, "seconds": seconds}, checkpoints

    def _check_answers(self, tokens: Mapping[str, Sequence[TokenizedExample]]) -> None:
        """Refuse examples without answers where there would be no loss on them, and training would change nothing."""
        for split, examples in tokens.items():
            lacking = sum(not example.response_ids for example in examples)
            if lacking and (split == "validation" or self.distill is None or not samples_every_response(self.distill)):
                what = f"{lacking} of {len(examples)} examples of {split} have no answer, and `{self.method}` needs one"
                hint = "add answers, or use a method that samples every response (`skd`), with no fine-tuning first"
                raise SkdError(what, where=self.step, hint=hint)

    def _vllm(
        self,
        distill: DistillConfig,
        student: PreTrainedModel,
        tokens: Mapping[str, Sequence[TokenizedExample]],
        limits: Mapping[str, Any],
    ) -> AbstractContextManager[VllmEngine]:
        """Give the training its vLLM servers."""
        from skd_lib.models.precision import DTYPES
        from skd_lib.vllm.engine import vllm_engine
        from skd_lib.vllm.sampler import check_prompts

        elsewhere = None
        if distill.vllm.pods is not None:
            from skd_lib.multinode.servers import servers

            elsewhere = partial(servers, distill.vllm.pods, distill.vllm.wait_minutes)
        new = self.task.max_new_tokens
        examples = [example for each in tokens.values() for example in each]
        check_prompts(len(example.prompt_ids) for example in examples)
        return vllm_engine(
            distill.model_copy(update={"method": self.method}),
            student=student,
            folders=self.models,
            longest=max(len(example.prompt_ids) + max(len(example.response_ids), new) for example in examples),
            dtype=DTYPES[self.precision],
            elsewhere=elsewhere,
            **limits,
        )

    def _stored_signals(
        self,
        distill: DistillConfig,
        examples: Sequence[TokenizedExample],
        student: PreTrainedModel,
        load_teacher: TeacherSource,
        pad_id: int,
    ) -> StoredSignals:
        """Return the teacher's signal along the examples' own responses, computed unless it is stored."""
        from skd_lib.models.heads import vocabulary_size
        from skd_lib.training.stored_teacher import examples_digest, store_signals

        settings: dict[str, Any] = {
            "k": distill.teacher_signal.top_k,
            "temperature": distill.temperature,
            "vocabulary": vocabulary_size(student),
        }
        folder = self._teacher_folder(distill, kind="signals", examples=examples_digest(examples), **settings)
        rows = self.training.micro_batch_size or self.training.batch_size
        self._keep_answers(load_teacher, folder)
        return store_signals(folder, load_teacher, examples, rows=rows, pad_id=pad_id, **settings)

    def _stored_responses(
        self,
        distill: DistillConfig,
        examples: Sequence[TokenizedExample],
        student: PreTrainedModel,
        load_teacher: TeacherSource,
        limits: Mapping[str, Any],
        method: str = "",
        engine: VllmEngine | None = None,
    ) -> list[TokenizedExample]:
        """Return the examples with the teacher's responses, one to each prompt, sampled unless they are stored.

        `method` says how; empty: the run's. With an engine the teacher is asked there, and not loaded here.
        """
        from skd_lib.distillation.rollouts import Strategy, rollout_for
        from skd_lib.models.heads import vocabulary_size
        from skd_lib.served.teacher import RemoteTeacher
        from skd_lib.training.stored_teacher import examples_digest, store_responses

        method, new = method or self.method, limits["max_new_tokens"]
        sampled = partial(rollout_for, method, distill=distill, steps=1, seed=self.seed, **limits)

        def make_strategy() -> Strategy:
            if isinstance(load_teacher, RemoteTeacher):
                return load_teacher.strategy(distill.sampling.teacher, self.seed, limits["pad_id"], new)
            if engine is not None:
                return sampled(student=student, teacher=engine.head, sampler_at=engine.sampler)
            return sampled(student=student, teacher=load_teacher())

        folder = self._teacher_folder(
            distill,
            kind="responses" if method == "seqkd" else f"responses of {method}",
            examples=examples_digest(examples),
            vocabulary=vocabulary_size(student),
            sampling=distill.sampling.teacher.model_dump(),
            seed=self.seed,
            **limits,
        )
        self._keep_answers(load_teacher, folder)
        served = isinstance(load_teacher, RemoteTeacher)  # which bounds its requests itself
        return store_responses(
            folder, make_strategy, examples, rows=len(examples) if served else self.training.batch_size
        )

    def _keep_answers(self, teacher: TeacherSource, folder: Path) -> None:
        """Keep what a server answers beside the folder that it is for, where the next attempt finds it."""
        from skd_lib.served.teacher import RemoteTeacher

        if isinstance(teacher, RemoteTeacher):
            kept = folder.with_name(f"{folder.name}-asked")
            root = self.checkpoint_root.rstrip("/")
            teacher.keep(kept, f"{root}/{kept.name}" if is_remote(root) else "")

    def _teacher_folder(self, distill: DistillConfig, **inputs: Any) -> Path:
        """Return the folder for what the teacher computes: other runs with the same key find it, and may remove it."""
        from skd_lib import __version__
        from skd_lib.models.fingerprint import settings_digest
        from skd_lib.training.checkpoints import checkpoint_key

        key = checkpoint_key(
            "teacher_signal",
            version=__version__,
            teacher=f"{self.weights['teacher']} {settings_digest(self.models['teacher'])}",
            # Of the teacher's weights, and of what is computed with them.
            precision=[distill.training.teacher_precision, self.precision],
            **inputs,
        )
        return checkpoint_folder(self.checkpoint_root) / key


def coarser_signal(distill: DistillConfig) -> dict[str, Any]:
    """Return what of vLLM's settings changes the loss: fewer of the teacher's tokens."""
    of_servers = distill.engine == "vllm" and distill.vllm.signal == "top_k"
    return {"vllm": {"top_k": distill.vllm.top_k}} if of_servers else {}


def fine_tune(
    step: Literal["teacher_sft", "student_init"],
    own: StepConfig,
    folder: Path,
    digest: str,
    out: Path,
    *,
    checkpoint_root: str,
    base: str,
    title: str,
    data: Path,
    data_uri: str,
    run: StepRun,
    loaded: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, float], Checkpoints] | None:
    """Fine-tune the model of `folder` on ground truth, and save it to `out` with a card; `digest` is of its weights.

    `loaded` is called once the model's files are read. Returns lineage for the record, figures, and the checkpoints, to
    be removed when the outputs are written; None on a process that writes no outputs.
    """
    from skd_lib.data.prepared import PreparedData
    from skd_lib.models.card import Lineage, model_card
    from skd_lib.models.files import load_tokenizer

    prepared = PreparedData.load(data)
    of_teacher = step == "teacher_sft"
    role = "teacher" if of_teacher else "student"
    training_run = TrainingRun(
        step=step,
        method="sft",
        split="train_teacher" if of_teacher else "train_student",
        training=own.teacher_sft.training if of_teacher else own.student_init.training,
        distill=None,
        task=own.task,
        seed=own.seed,
        checkpoint_root=checkpoint_root,
        models={role: folder},
        weights={role: digest},
    )
    model, tokenizer = load_trainable(folder), load_tokenizer(folder)
    loaded()
    result, figures, checkpoints = training_run.run(model, None, tokenizer, prepared, data_uri, run)
    if not is_main_process():
        return None
    lineage = Lineage(
        base=base,
        method="sft",
        data_fingerprint=prepared.fingerprint,
        code_version=code_version(),
        settings=training_facts(training_run.training, result),
    )
    facts = {
        "weights_sha256": save_trained(result.student, tokenizer, out, model_card(title, lineage), result.precision),
        "precision": result.precision,
        "base_weights_sha256": digest,
        "data_fingerprint": prepared.fingerprint,
    }
    return facts, figures, checkpoints


def result_figures(result: TrainResult) -> dict[str, float]:
    """Return a training's closing figures, with the first and the last tenth of the sampler's."""
    figures: dict[str, float] = {
        "steps": result.steps,
        "best_step": result.best_step,
        "best_validation_loss": result.best_validation_loss,
        "first_validation_loss": result.first_validation_loss,
        **{name: result.total(name) for name in SUMMED},
        **result.seconds,
    }
    for name in ("rejection_rate", "tokens_per_teacher_call", "truncated_fraction"):
        course = result.course(name)
        if course is not None:
            figures[f"{name}_first_tenth"], figures[f"{name}_last_tenth"] = course
    return figures
