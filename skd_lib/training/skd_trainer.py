"""`SKDTrainer`: SKD and the other methods as a `transformers.Trainer`, for use without the pipeline.

The constructor is that of TRL's `GKDTrainer`: change the two names `GKDTrainer` and `GKDConfig`, and a script trains
by SKD. Checkpoints, resume, callbacks, loggers, learning rates and data parallelism are the Trainer's own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)

from skd_lib.config import DistillConfig, parse_section
from skd_lib.data.formats import tokenize_row
from skd_lib.data.tokenize import TokenizedExample
from skd_lib.distillation.batch import Rollout, collate
from skd_lib.distillation.loss import Objective, objective_for
from skd_lib.distillation.methods import METHODS, unread_settings
from skd_lib.distillation.rollouts import RowKey, Strategy, rollout_for
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.models.heads import check_supported
from skd_lib.models.modes import evaluating
from skd_lib.models.vocabulary import check_tokenizer, eos_ids, pad_id
from skd_lib.sampling.samples import SamplingStatistics
from skd_lib.training.figures import sampling_figures
from skd_lib.training.trainer import through_wrapper

log = logging.getLogger(__name__)


@dataclass
class SKDConfig(TrainingArguments):
    """Arguments of `SKDTrainer`: those of `transformers.TrainingArguments`, and these.

    Names that TRL's `GKDConfig` has mean the same here.

    Attributes:
        method: Where responses come from, see docs/reference/methods.md.
        divergence: Which divergence from the teacher is minimised. Unset: `forward_kl`, or where `beta` is given the
            generalised Jensen-Shannon divergence with it, as in GKD.
        beta: Weight of the teacher in the mixture of `jsd`; 0 is the forward, 1 the reverse KL.
        alpha: Skewness of `skew_kl` and `skew_reverse_kl`.
        rule: Which drafts the teacher lets stand.
        top_k: Of the rule `top_k`: a draft stands if it is among the teacher's `top_k` most likely tokens.
        min_prob: Of the rule `min_prob`: least teacher probability of a draft that stands.
        mixture: Of the rule `mixture`: the teacher's share.
        gamma: Most tokens drafted for each teacher call.
        adaptive_gamma: Draft fewer where the measured acceptance says that more would be wasted.
        lmbda: Share of the sequences that are sampled; the others are the data's. 1 with `skd`, as in the paper.
        seq_kd: The teacher writes the responses (method `seqkd` with a divergence is not offered).
        temperature: Sampling temperature of both models.
        student_top_p: Nucleus of the student's sampling.
        teacher_top_p: Nucleus of the teacher's sampling.
        loss_temperature: Divides both models' logits in the loss.
        replaced_weight: Weight of a cross-entropy added at tokens that the teacher wrote in the student's response.
        max_new_tokens: Longest sampled response.
        max_length: Most tokens of a prompt with its response; longer responses of the data are cut.
        disable_dropout: Switch the student's dropout off.
        model_init_kwargs: For `from_pretrained`, where the model is given by name.
        teacher_model_init_kwargs: The same for the teacher.
        trust_remote_code: Run code that comes with models given by name.
    """

    method: str = field(default="skd")
    divergence: str | None = field(default=None)
    beta: float | None = field(default=None)
    alpha: float = field(default=0.1)
    rule: str = field(default="top_k")
    top_k: int = field(default=25)
    min_prob: float | None = field(default=None)
    mixture: float | None = field(default=None)
    gamma: int = field(default=5)
    adaptive_gamma: bool = field(default=True)
    lmbda: float | None = field(default=None)
    seq_kd: bool = field(default=False)
    temperature: float = field(default=0.5)
    student_top_p: float = field(default=0.5)
    teacher_top_p: float = field(default=1.0)
    loss_temperature: float = field(default=1.0)
    replaced_weight: float = field(default=0.0)
    max_new_tokens: int = field(default=128)
    max_length: int | None = field(default=1024)
    disable_dropout: bool = field(default=True)
    model_init_kwargs: dict[str, Any] | None = field(default=None)
    teacher_model_init_kwargs: dict[str, Any] | None = field(default=None)
    trust_remote_code: bool = field(default=False)
    learning_rate: float = field(default=1e-5)

    def __post_init__(self) -> None:
        self.remove_unused_columns = False  # rows are tokenised by the collator
        super().__post_init__()
        self.accelerator_config.dispatch_batches = False  # batches are lists of examples, no tensors to broadcast

    def distill_config(self) -> DistillConfig:
        """Return these settings as the section `distill` of a run's configuration.

        Raises:
            SkdError: a value is out of range, or names nothing.
        """
        method, share = self.method, self.lmbda
        if self.seq_kd:
            method = "seqkd"
        elif method == "skd" and share is not None and share < 1:
            method = "skd_mixed"
        divergence = self.divergence or ("forward_kl" if self.beta is None else "jsd")
        shares = {} if share is None else {"on_policy_fraction": share, "sampled_fraction": share}
        sampling = {
            name: getattr(self, name) for name in ("rule", "top_k", "min_prob", "mixture", "gamma", "adaptive_gamma")
        }
        sampling = {name: value for name, value in sampling.items() if value is not None}
        sampling |= {
            "student": {"temperature": self.temperature, "top_p": self.student_top_p},
            "teacher": {"temperature": self.temperature, "top_p": self.teacher_top_p},
        }
        values = {
            "method": method,
            "divergence": divergence,
            "beta": 0.5 if self.beta is None else self.beta,
            "alpha": self.alpha,
            "temperature": self.loss_temperature,
            "replaced_weight": self.replaced_weight,
            "sampling": sampling,
            **shares,
        }
        try:
            return parse_section(DistillConfig, values, where="SKDConfig")
        except SkdErrors as error:
            raise SkdErrors(list({one.where: one for one in map(_renamed, error.errors)}.values())) from error


_OWN_NAMES = {
    "sampling.student.temperature": "temperature",
    "sampling.teacher.temperature": "temperature",
    "sampling.student.top_p": "student_top_p",
    "sampling.teacher.top_p": "teacher_top_p",
    "on_policy_fraction": "lmbda",
    "sampled_fraction": "lmbda",
    "temperature": "loss_temperature",
}
"""Fields of the section `distill` that have another name in `SKDConfig`."""


def _renamed(error: SkdError) -> SkdError:
    """Return the error with the field's name in `SKDConfig`."""
    path = re.sub(r".*field `([\w.]+).*", r"\1", error.where)
    own = next(
        (own for name, own in _OWN_NAMES.items() if path.startswith(name)), path.removeprefix("sampling.").split(".")[0]
    )
    return SkdError(error.what, where=f"SKDConfig, field `{own}`", hint=error.hint)


class SKDTrainer(Trainer):
    """Train a student under a teacher.

    Args:
        model: The student, or its name or folder.
        teacher_model: The teacher, or its name or folder; None for the method `sft`.
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
        if model is None:
            raise SkdError("there is no model", where="SKDTrainer", hint="pass the student as `model`")
        if compute_metrics is not None or preprocess_logits_for_metrics is not None:
            raise SkdError(
                "metrics of logits are not supported: the loss never holds all logits",
                where="SKDTrainer",
                hint="leave compute_metrics out; eval_loss is logged, and the command `skd evaluate` scores answers",
            )
        self.distill = args.distill_config()
        if unread := [_OWN_NAMES.get(path, path.rpartition(".")[2]) for path in unread_settings(self.distill)]:
            log.warning("method `%s` does not read %s", self.distill.method, ", ".join(dict.fromkeys(unread)))
        self.facts = METHODS[self.distill.method]
        if args.train_sampling_strategy == "group_by_length":
            what = "rows have no length before they are tokenised, and responses have none before they are sampled"
            raise SkdError(what, where="train_sampling_strategy", hint="leave it out")
        if args.use_liger_kernel:
            what = "Liger's kernels replace a forward pass that the loss does not use"
            raise SkdError(what, where="use_liger_kernel", hint="leave it out; the loss never holds all logits anyway")
        # Weights in half precision take up small steps only in part; `bf16=True` is mixed precision on fp32 weights.
        student = _loaded(model, {"dtype": torch.float32, **(args.model_init_kwargs or {})}, args)
        if peft_config is None and student.dtype in (torch.bfloat16, torch.float16):
            log.warning("the student's weights are %s: small updates are lost; load it in float32", student.dtype)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.name_or_path)
        self.teacher = None if teacher_model is None else _loaded(teacher_model, args.teacher_model_init_kwargs, args)
        if self.facts.needs_teacher and self.teacher is None:
            raise SkdError(f"method `{self.distill.method}` needs a teacher", where="SKDTrainer, teacher_model")
        if self.teacher is student:
            what = "teacher and student are one model, and training would change both"
            raise SkdError(what, where="SKDTrainer, teacher_model", hint="load it twice")
        for each in (student, self.teacher):
            if each is not None:
                check_supported(each)
                check_tokenizer(processing_class, each)
        if args.disable_dropout:
            for module in student.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.0
        self.eos_ids = eos_ids(student, processing_class)
        self.pad_id = pad_id(processing_class)
        if peft_config is not None:
            from peft import get_peft_model

            student = get_peft_model(student, peft_config)
        self._formatting = formatting_func
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator or self._tokenized,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise SkdError(
                "the student is sampled between optimiser steps, which shards of FSDP and DeepSpeed do not allow",
                where="SKDTrainer",
                hint="start one process a GPU without them (torchrun), or use the pipeline's `training.fsdp`",
            )
        self.loss_is_scaled_for_ga = True  # `compute_loss` divides by the tokens of the whole optimiser step
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(requires_grad=False)
            if not getattr(self.teacher, "is_quantized", False):
                self.teacher.to(args.device)
        self._strategy: Strategy | None = None
        self._objective: Objective = objective_for(self.distill.method, self.teacher, self.distill)
        self._statistics = SamplingStatistics()

    def _tokenized(self, rows: list[Any]) -> list[TokenizedExample]:
        formatted = rows if self._formatting is None else [self._formatting(row) for row in rows]
        return [
            tokenize_row(self.processing_class, row, self.eos_ids, max_length=self.args.max_length, where="dataset")
            for row in formatted
        ]

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
        examples = [example for batch in batches for example in batch]
        # A row's place in the step's global batch: processes take turns, micro-batch after micro-batch.
        turns = (turn * self.args.world_size + self.args.process_index for turn in range(len(batches)))
        rows = (
            turn * self.args.per_device_train_batch_size + row
            for turn, batch in zip(turns, batches, strict=True)
            for row in range(len(batch))
        )
        keys = [RowKey(self.state.global_step, row) for row in rows]
        with self.accelerator.autocast():
            rollout = self._strategy_of_run()(examples, keys)
        _check_responses(rollout, "train_dataset")
        self._statistics += rollout.statistics or SamplingStatistics()
        tokens = self.accelerator.reduce(torch.tensor(rollout.tokens, device=device), "sum").clamp_min(1)
        return [{"rollout": part} for part in rollout.split([len(batch) for batch in batches])], tokens

    def _strategy_of_run(self) -> Strategy:
        if self._strategy is None:
            self._strategy = rollout_for(
                self.distill.method,
                student=self.model,
                teacher=self.teacher,
                distill=self.distill,
                steps=self.state.max_steps,
                seed=self.args.seed,
                eos_ids=self.eos_ids,
                pad_id=self.pad_id,
                max_new_tokens=self.args.max_new_tokens,
            )
        return self._strategy

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Rollout],
        return_outputs: bool = False,  # noqa: ARG002 - the base class's signature; only predictions need outputs
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Compute the micro-batch's share of the optimiser step's mean loss over response tokens."""
        sums = through_wrapper(model, self.model, self._loss_sums, inputs["rollout"])
        # Data parallelism averages gradients over processes; the sum over all of them is wanted.
        loss: Tensor = sums.loss / (num_items_in_batch or 1) * self.accelerator.num_processes
        return loss

    def _loss_sums(self, rollout: Rollout) -> Any:
        with self.accelerator.autocast():
            return self._objective(self.model, rollout)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute the mean loss over the response tokens of the evaluation rows.

        Raises:
            SkdError: a row has no response.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            merged: dict[str, float] = {}
            for name, part in dataset.items():
                merged |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return merged
        sums = torch.zeros(2, dtype=torch.float64)
        with evaluating(self.model):
            for batch in self._own_batches(dataset):
                rollout = collate(
                    [example.prompt_ids for example in batch],
                    [example.response_ids for example in batch],
                    pad_id=self.pad_id,
                    source="ground_truth",
                    device=self.args.device,
                )
                _check_responses(rollout, "eval_dataset")
                sums += torch.tensor([self._loss_sums(rollout).loss.item(), rollout.tokens], dtype=torch.float64)
        total, tokens = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / max(tokens, 1)}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _own_batches(self, dataset: Any) -> Iterator[list[TokenizedExample]]:
        """Yield this process's share of a dataset, each row once: a distributed loader repeats some to fill batches."""
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            yield from self.get_eval_dataloader(dataset)
            return
        own = range(self.args.process_index, len(dataset), self.args.world_size)
        for start in range(0, len(own), self.args.per_device_eval_batch_size):
            chosen = own[start : start + self.args.per_device_eval_batch_size]
            yield self.data_collator([dataset[index] for index in chosen])

    def predict(self, *_: Any, **__: Any) -> Any:
        """Refuse: there are no logits to return."""
        raise SkdError(
            "there are no predictions of logits", where="SKDTrainer.predict", hint="use `evaluate`, or `skd generate`"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the sampler counted since the last log: rejection rate, lengths, tokens a teacher call."""
        if "loss" in logs:
            counts = torch.tensor(astuple(self._statistics), device=self.args.device)
            self._statistics = SamplingStatistics()
            logs = logs | sampling_figures(SamplingStatistics(*self.accelerator.reduce(counts, "sum").tolist()))
        super().log(logs, start_time)


def _check_responses(rollout: Rollout, where: str) -> None:
    hint = "give it a `completion` or an assistant message"
    if where == "train_dataset":
        hint += ", or train by a method that samples every response"
    rows = zip(rollout.sources, rollout.lengths, strict=True)
    if any(source == "ground_truth" and not length for source, length in rows):
        raise SkdError(
            "a row has no response, so it has no loss",
            where=where,
            hint=hint,
        )


def _loaded(model: PreTrainedModel | str, options: dict[str, Any] | None, args: SKDConfig) -> PreTrainedModel:
    if not isinstance(model, str):
        return model
    return AutoModelForCausalLM.from_pretrained(
        model, **{"trust_remote_code": args.trust_remote_code, **(options or {})}
    )
