"""`SKDTrainer`: SKD and the other methods as a `transformers.Trainer`, for use without the pipeline.

The constructor is that of TRL's `GKDTrainer`: change the two names `GKDTrainer` and `GKDConfig`, and a script trains
by SKD. Checkpoints, resume, callbacks, loggers, learning rates and data parallelism are the Trainer's own.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from skd_lib.data.formats import tokenize_row, with_answer_end
from skd_lib.data.tokenize import TokenizedExample
from skd_lib.distillation.batch import Rollout, collate
from skd_lib.distillation.loss import objective_for
from skd_lib.distillation.methods import METHODS
from skd_lib.distillation.rollouts import RowKey, Strategy, rollout_for
from skd_lib.errors import SkdError
from skd_lib.models.adapters import check_adapters
from skd_lib.models.heads import check_supported, vocabulary_size
from skd_lib.models.modes import casting_once
from skd_lib.models.references import resolve_model
from skd_lib.models.skeleton import check_loaded
from skd_lib.models.vocabulary import (
    check_ids,
    check_tokenizer,
    eos_ids,
    pad_id,
    rows_of,
    take_over_ends,
    tokenizer_of,
)
from skd_lib.sampling.samples import SamplingStatistics
from skd_lib.training.figures import sampling_figures
from skd_lib.training.rollout_trainer import RolloutTrainer
from skd_lib.training.sharding import place_teacher, shard, whole_states, whole_weights
from skd_lib.training.skd_config import SKDConfig, check_arguments, warn_of_unread
from skd_lib.training.turn_rows import by_turn, check_collated, check_responses, place_of

if TYPE_CHECKING:
    from skd_lib.vllm.sampler import VllmEngine

log = logging.getLogger(__name__)


class SKDTrainer(RolloutTrainer):
    """Train a student under a teacher.

    Args:
        model: The student, or its name or folder.
        teacher_model: The teacher, or its name or folder; None for the method `sft`; no model with `engine="vllm"`.
        args: Settings.
        data_collator: Turns rows into a list of `TokenizedExample`; unset, rows may have the formats of
            `skd_lib.data.formats`.
        train_dataset: Rows.
        eval_dataset: Rows with responses; `eval_loss` is the method's loss on them.
        processing_class: The tokenizer of both models; unset, the student's.
        compute_metrics: Not supported; here so that the arguments are those of other trainers.
        callbacks: See `transformers.Trainer`.
        optimizers: See `transformers.Trainer`.
        preprocess_logits_for_metrics: Not supported.
        peft_config: Adapters of PEFT to train in place of the weights.
        formatting_func: Called with each row; returns a row of a known format.

    Raises:
        SkdError: a setting or a row cannot be used; the message says what, where and what to do.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        teacher_model: PreTrainedModel | str | None = None,
        args: SKDConfig | None = None,
        data_collator: Callable[[list[Any]], list[TokenizedExample]] | None = None,
        train_dataset: Dataset[Any] | Sequence[Mapping[str, Any]] | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: None = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], Mapping[str, Any]] | None = None,
    ) -> None:
        args = args or SKDConfig(output_dir="skd-trainer")
        check_arguments(args, model, teacher_model, train_dataset, processing_class, peft_config)
        if compute_metrics is not None or preprocess_logits_for_metrics is not None:
            raise SkdError(
                "metrics of logits are not supported: the loss never holds all logits",
                where="SKDTrainer",
                hint="leave compute_metrics out; eval_loss is logged, and `skd_lib.evaluate` scores answers",
            )
        if args.assistant_turns not in ("last", "all"):
            what = f"must be `last` or `all`, got {args.assistant_turns!r}"
            raise SkdError(what, where="SKDConfig, field `assistant_turns`")
        if args.assistant_turns == "all":
            train_dataset, eval_dataset = (
                by_turn(dataset, formatting_func, name)
                for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset))
            )
        self.distill = args.distill_config()
        warn_of_unread(self.distill)
        self.facts = METHODS[self.distill.method]
        served = self.distill.engine == "vllm" and self.facts.needs_teacher
        if args.fsdp and (peft_config is not None or not (self.facts.shardable or served)):
            what = "adapters are trained" if self.facts.shardable else f"method is `{self.distill.method}`"
            hint = "leave it off: each process then has both models whole"
            raise SkdError(f"sharding does not work where the {what}", where="SKDConfig, field `fsdp`", hint=hint)
        # Weights in half precision take up small steps only in part; `bf16=True` is mixed precision on fp32 weights.
        student = _loaded(model, {"dtype": torch.float32} | _mapping(args, "model_init_kwargs"), args)
        if peft_config is None and student.dtype in (torch.bfloat16, torch.float16):
            log.warning("the student's weights are %s: small updates are lost; load it in float32", student.dtype)
        processing_class = processing_class or tokenizer_of(student, hint="pass `processing_class`")
        if self.facts.needs_teacher and teacher_model is None:
            raise SkdError(f"method `{self.distill.method}` needs a teacher", where="SKDTrainer, teacher_model")
        teacher: PreTrainedModel | None = None
        if teacher_model is not None and not served:
            teacher = _loaded(teacher_model, _mapping(args, "teacher_model_init_kwargs"), args)
        if teacher is student:
            what = "teacher and student are one model, and training would change both"
            raise SkdError(what, where="SKDTrainer, teacher_model", hint="load it twice")
        for each in (student, teacher):
            if each is not None:
                check_supported(each)
        if peft_config is not None:
            check_adapters(student, peft_config, where="SKDTrainer, peft_config")
        models: dict[str, PreTrainedModel | Path] = {"student": student}
        if teacher is not None:
            models["teacher"] = teacher
        elif served and isinstance(teacher_model, str):  # any other is refused where the servers are started
            models["teacher"] = resolve_model(teacher_model)
        check_tokenizer(processing_class, models)
        if "teacher" in models:
            take_over_ends(student, processing_class, models["teacher"])
        self._rows = min(map(rows_of, models.values()))
        ends = with_answer_end(processing_class, eos_ids(student, processing_class))
        self.eos_ids = tuple(one for one in ends if one < vocabulary_size(student))
        self.pad_id = pad_id(processing_class, self._rows)
        self.engine: VllmEngine | None = None
        if served:
            from skd_lib.training.skd_engine import start_engine

            ids = {"eos_ids": self.eos_ids, "pad_id": self.pad_id}
            student.to(args.device)
            self.engine, running = start_engine(args, self.distill, student, teacher_model, processing_class, **ids)
            self._end_servers = weakref.finalize(self, running.close)
            teacher = self.engine.head
            check_supported(teacher)
        if args.disable_dropout:
            for module in student.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.0
        if peft_config is not None:
            from peft import get_peft_model

            student = get_peft_model(student, peft_config)
        frozen = place_teacher(teacher, args.device)
        if args.fsdp:
            shard(student.to(args.device), frozen, args)
        self._formatting = formatting_func
        super().__init__(
            objective=objective_for(self.distill.method, teacher, self.distill),
            teacher=teacher,
            sharded=bool(args.fsdp),
            model=student,
            args=args,
            data_collator=data_collator or self._tokenized,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_deepspeed_enabled:
            what = "the student is sampled between optimiser steps, which DeepSpeed's shards do not allow"
            raise SkdError(what, where="SKDTrainer", hint="start with torchrun, and set `fsdp=True` to shard")
        self._strategy: Strategy | None = None
        self._statistics = SamplingStatistics()

    def close(self) -> None:
        """End the vLLM servers that were started for this trainer. Without it they end with the process."""
        if self.engine is not None:
            self._end_servers()

    def _tokenized(self, rows: list[Any]) -> list[TokenizedExample]:
        # By turn, rows are formatted when they are divided.
        form = None if self.args.assistant_turns == "all" else self._formatting
        options: dict[str, Any] = {"eos_ids": self.eos_ids, "max_length": self.args.max_length}

        def tokenized(row: Any, where: str = "") -> TokenizedExample:
            example = tokenize_row(self.processing_class, row, **options, where=where)
            check_ids([example], self._rows, where)
            return example

        examples = []
        for row in rows:
            formatted = row if form is None else form(row)
            try:
                examples.append(tokenized(formatted))
            except SkdError:  # again, with the row's place, for which datasets are searched
                datasets = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
                tokenized(formatted, place_of(row, datasets))
                raise
        return examples

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[TokenizedExample]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Rollout]], Tensor]:
        """Make the responses of all micro-batches of an optimiser step together.

        Returns:
            The micro-batches, and the response tokens of the step over all processes.
        """
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return [], torch.zeros((), dtype=torch.long, device=device)
        for batch in batches:
            check_collated(batch)
        examples = [example for batch in batches for example in batch]
        # A row's place in the step's global batch: processes take turns, micro-batch after micro-batch.
        turns = (turn * self.args.world_size + self.args.process_index for turn in range(len(batches)))
        rows = (
            turn * self.args.per_device_train_batch_size + row
            for turn, batch in zip(turns, batches, strict=True)
            for row in range(len(batch))
        )
        keys = [RowKey(self.state.global_step, row) for row in rows]
        with self.accelerator.autocast(), self.gathered(), casting_once(self.model):
            rollout = self._strategy_of_run()(examples, keys)
        check_responses(rollout, "train_dataset")
        self._statistics += rollout.statistics or SamplingStatistics()
        tokens = self.sum_over_processes(torch.tensor(rollout.tokens, device=device)).clamp_min(1)
        return [{"rollout": part} for part in rollout.split([len(batch) for batch in batches])], tokens

    def train(self, *args: Any, **options: Any) -> Any:
        """Train; see `transformers.Trainer.train`."""
        self._strategy = None  # another training may have other schedules, and has other weights at each step
        return super().train(*args, **options)

    def _strategy_of_run(self) -> Strategy:
        if self._strategy is None:
            strategy = rollout_for(
                self.distill.method,
                student=self.model,
                teacher=self.teacher,
                distill=self.distill,
                steps=self.state.max_steps,
                seed=self.args.seed,
                eos_ids=self.eos_ids,
                pad_id=self.pad_id,
                max_new_tokens=self.args.max_new_tokens,
                sampler_at=None if self.engine is None else self.engine.sampler,
            )
            self._strategy = self.engine.attached(strategy, self.args.device) if self.engine else strategy
        return self._strategy

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute the mean loss over the response tokens of the evaluation rows.

        Raises:
            SkdError: a row has no response, or there are no rows.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):  # as in the base class, one of several by name
            several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if dataset not in several:
                known = ", ".join(map(str, several)) or "there is no dictionary of several"
                raise SkdError(
                    f"no dataset is called {dataset!r}", where="evaluate, eval_dataset", hint=f"known: {known}"
                )
            dataset = several[dataset]
        if self.args.assistant_turns == "all":
            dataset = by_turn(dataset, self._formatting, "eval_dataset")
        if isinstance(dataset, dict):
            merged: dict[str, float] = {}
            for name, part in dataset.items():
                merged |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return merged
        if hasattr(dataset, "__len__") and not len(dataset):
            raise SkdError("the dataset is empty", where="eval_dataset", hint="give it rows, or leave it out")
        mean, _ = self.mean_loss(self._ground_truth(dataset))
        metrics = {f"{metric_key_prefix}_loss": mean}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _ground_truth(self, dataset: Any) -> Iterator[Rollout]:
        """Yield this process's share of a dataset with its own responses."""
        for batch in self._own_batches(dataset):
            check_collated(batch)
            prompts, responses = [one.prompt_ids for one in batch], [one.response_ids for one in batch]
            rollout = collate(prompts, responses, pad_id=self.pad_id, source="ground_truth")
            check_responses(rollout, "eval_dataset")
            if self.engine is not None and self.facts.uses_divergence:
                signals = self.engine.signals_along(list(zip(prompts, responses, strict=True)))
                rollout = replace(rollout, signals=tuple(signals))
            yield rollout

    def _own_batches(self, dataset: Any) -> Iterator[list[TokenizedExample]]:
        """Yield this process's share of a dataset, each row once: a distributed loader repeats some to fill batches."""
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            yield from self.get_eval_dataloader(dataset)
            return
        own = range(self.args.process_index, len(dataset), self.args.world_size)
        for start in range(0, len(own), self.args.per_device_eval_batch_size):
            chosen = own[start : start + self.args.per_device_eval_batch_size]
            yield self.data_collator([dataset[index] for index in chosen])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student; with `fsdp` all processes call this together."""
        if not self.sharded:
            super().save_model(output_dir, _internal_call)
            return
        weights = whole_weights(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        states = whole_states(self.model, self.plain_optimizer)
        if self.args.should_save:
            torch.save(states, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_best_model(self) -> None:
        if self.sharded:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def predict(self, *_: Any, **__: Any) -> Any:
        """Refuse: there are no logits to return."""
        raise SkdError(
            "there are no predictions of logits",
            where="SKDTrainer.predict",
            hint="use `evaluate`, or `skd_lib.evaluate`",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the sampler counted since the last log: rejection rate, lengths, tokens a teacher call."""
        if "loss" in logs:
            counts = torch.tensor(astuple(self._statistics), device=self.args.device)
            self._statistics = SamplingStatistics()
            logs = logs | sampling_figures(SamplingStatistics(*self.sum_over_processes(counts).tolist()))
        super().log(logs, start_time)


def _mapping(args: SKDConfig, name: str) -> dict[str, Any]:
    value = getattr(args, name) or {}
    if not isinstance(value, dict):
        hint = 'on a command line write JSON: {"dtype": "bfloat16"}'
        raise SkdError(f"{value!r} is no mapping", where=f"SKDConfig, field `{name}`", hint=hint)
    return value


def _loaded(model: PreTrainedModel | str, options: dict[str, Any], args: SKDConfig) -> PreTrainedModel:
    if not isinstance(model, str):
        return model
    loaded, info = AutoModelForCausalLM.from_pretrained(
        model,
        **{
            "trust_remote_code": args.trust_remote_code,
            **options,
            "ignore_mismatched_sizes": True,  # not ignored: reported below, with the missing ones
            "output_loading_info": True,
        },
    )
    check_loaded(info, Path(model))
    return cast(PreTrainedModel, loaded)
