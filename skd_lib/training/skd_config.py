"""`SKDConfig`: the arguments of `SKDTrainer`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from skd_lib.config import DistillConfig, parse_section
from skd_lib.distillation.methods import reads_setting, unread_settings
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.training.sharding import check_processes

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
        schedules: Settings that change during the training: of `top_k`, `min_prob`, `mixture`, `gamma` and `lmbda`,
            e.g. `{"top_k": {"start": 50, "end": 5, "shape": "cosine"}}`; shapes are `linear` and `cosine`.
        temperature: Sampling temperature of both models.
        student_temperature: The student's, where it is to be another.
        teacher_temperature: The teacher's, where it is to be another.
        student_top_p: Nucleus of the student's sampling.
        teacher_top_p: Nucleus of the teacher's sampling.
        loss_temperature: Divides both models' logits in the loss.
        temperature_squared: Multiply the divergence by the square of `loss_temperature`.
        selective: Lower the weight of tokens where the models are far apart (SelecTKD): `{}` takes the paper's numbers,
            `{"top": 5, "otherwise": 0.01}`; unset: all tokens count alike.
        replaced_weight: Weight of a cross-entropy added at tokens that the teacher wrote in the student's response.
        max_new_tokens: Longest sampled response.
        max_length: Most tokens of a prompt with its response; longer responses of the data are cut.
        assistant_turns: Answers of a conversation that count: the `last`, as in TRL's GKD, or `all`, each with what
            comes before it as its prompt.
        disable_dropout: Switch the student's dropout off.
        model_init_kwargs: For `from_pretrained`, where the model is given by name.
        teacher_model_init_kwargs: The same for the teacher.
        trust_remote_code: Run code that comes with models given by name.
        engine: What samples: this project's own engine (`transformers`), or vLLM servers with the same samples (`vllm`;
            the teacher is then given by folder or name). They are started here, and end with the trainer, unless `vllm`
            names some.
        vllm: Settings of the servers, those of `distill.vllm` in docs/guides/vllm.md, e.g. `{"urls": ["http://..."]}`.
        fsdp: Shard student and teacher over the processes of torchrun, by PyTorch's FSDP2: weights are gathered while
            responses are sampled. `fsdp_config` is not read.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - as in the base class, and no field
        *TrainingArguments._VALID_DICT_FIELDS,
        *("model_init_kwargs", "teacher_model_init_kwargs", "schedules", "selective", "vllm"),
    ]

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
    schedules: dict[str, Any] | str | None = field(default=None)
    seq_kd: bool = field(default=False)
    temperature: float = field(default=0.5)
    student_temperature: float | None = field(default=None)
    teacher_temperature: float | None = field(default=None)
    student_top_p: float = field(default=0.5)
    teacher_top_p: float = field(default=1.0)
    loss_temperature: float = field(default=1.0)
    temperature_squared: bool = field(default=False)
    selective: dict[str, Any] | str | None = field(default=None)
    replaced_weight: float = field(default=0.0)
    max_new_tokens: int = field(default=128)
    max_length: int | None = field(default=1024)
    assistant_turns: str = field(default="last")
    disable_dropout: bool = field(default=True)
    model_init_kwargs: dict[str, Any] | str | None = field(default=None)
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(default=None)
    trust_remote_code: bool = field(default=False)
    engine: str = field(default="transformers")
    vllm: dict[str, Any] | str | None = field(default=None)
    learning_rate: float = field(default=1e-5)

    def __new__(cls, *_: Any, **options: Any) -> SKDConfig:
        """Find names that are no arguments: Python's own error would not say what to do."""
        known = cls.__dataclass_fields__
        for name in options.keys() - known.keys():
            near = get_close_matches(name, known, 1)
            hint = _OF_SFT.get(name, f"did you mean {near[0]}?" if near else "leave it out")
            raise SkdError("there is no such argument", where=f"SKDConfig, {name}", hint=hint)
        made: SKDConfig = super().__new__(cls)
        return made

    def __post_init__(self) -> None:
        self.remove_unused_columns = False  # rows are tokenised by the collator
        if self.fsdp and self.fsdp_config:
            what = "student and teacher are sharded layer by layer, in one way"
            raise SkdError(what, where="SKDConfig, field `fsdp_config`", hint="leave it out; `fsdp=True` is enough")
        super().__post_init__()
        self.fsdp_plugin_args = None  # the sharding is not accelerate's, see `skd_lib.training.sharding`
        self.accelerator_config.dispatch_batches = False  # batches are lists of examples, no tensors to broadcast

    def distill_config(self) -> DistillConfig:
        """Return these settings as the section `distill` of a run's configuration.

        Raises:
            SkdError: a value is out of range, or names nothing.
        """
        changing = self._schedules()
        given = {name: changing.get(name, getattr(self, name)) for name in _SCHEDULED}
        share = given.pop("lmbda")
        method = self.method
        if self.seq_kd:
            method = "seqkd"
        elif method == "skd" and share is not None and share != 1:
            method = "skd_mixed"
        shares = {} if share is None else {"on_policy_fraction": share, "sampled_fraction": share}
        sampling = {"rule": self.rule, "adaptive_gamma": self.adaptive_gamma, **given}
        temperatures = {"student": self.student_temperature, "teacher": self.teacher_temperature}
        nuclei = {"student": self.student_top_p, "teacher": self.teacher_top_p}
        for role, own in temperatures.items():
            sampling[role] = {"temperature": self.temperature if own is None else own, "top_p": nuclei[role]}
        values = {
            "method": method,
            "divergence": self.divergence or ("forward_kl" if self.beta is None else "jsd"),
            "beta": 0.5 if self.beta is None else self.beta,
            "alpha": self.alpha,
            "temperature": self.loss_temperature,
            "temperature_squared": self.temperature_squared,
            "replaced_weight": self.replaced_weight,
            "selective": self.selective,
            "sampling": {name: value for name, value in sampling.items() if value is not None},
            "engine": self.engine,
            "vllm": self.vllm or {},
            **shares,
        }
        try:
            return parse_section(DistillConfig, values, where="SKDConfig")
        except SkdErrors as error:
            raise SkdErrors(list({one.where: one for one in map(_renamed, error.errors)}.values())) from error

    def _schedules(self) -> dict[str, Any]:
        schedules = self.schedules or {}
        where = "SKDConfig, field `schedules`"
        if not isinstance(schedules, dict):
            raise SkdError(f"{schedules!r} is no mapping", where=where, hint=f"known are {', '.join(_SCHEDULED)}")
        if unknown := sorted(schedules.keys() - set(_SCHEDULED)):
            what = f"`{unknown[0]}` cannot change during the training"
            raise SkdError(what, where=where, hint=f"known are {', '.join(_SCHEDULED)}")
        return schedules


_ROWS = "rows are recognised by their fields: `messages`, `prompt` and `completion`, or `prompt`; leave it out"
_ENGINE = 'write engine="vllm", and vllm={"urls": ["http://host:port"]} for servers that run already'
_OF_SFT = {
    "packing": "each row is a sequence of its own, since its response is sampled; leave it out",
    "dataset_text_field": _ROWS,
    "dataset_kwargs": _ROWS,
    "dataset_num_proc": "rows are tokenised batch by batch; leave it out",
    "eos_token": "set it in the tokenizer",
    "pad_token": "set it in the tokenizer",
    "completion_only_loss": "the loss is on the responses always; leave it out",
    "assistant_only_loss": "the loss is on the responses always; `assistant_turns` says on which",
    "max_seq_length": "it is called max_length",
    **dict.fromkeys(("use_vllm", "vllm_mode", "vllm_gpu_memory_utilization", "vllm_server_base_url"), _ENGINE),
    "teacher_model_name_or_path": "pass the name to SKDTrainer, as `teacher_model`",
}
"""Arguments of TRL's GKDConfig and of its other trainers, and what to do without them."""
_SCHEDULED = ("top_k", "min_prob", "mixture", "gamma", "lmbda")
_OWN_NAMES = {
    "sampling.student.temperature": "temperature",  # or student_temperature
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
    if "field `" not in error.where:  # it is about several
        return error
    path = re.sub(r".*field `([\w.]+).*", r"\1", error.where)
    own = next(
        (own for name, own in _OWN_NAMES.items() if f"{path}.".startswith(f"{name}.")),
        path.removeprefix("sampling.").split(".")[0],
    )
    return SkdError(error.what, where=f"SKDConfig, field `{own}`", hint=error.hint)


_REFUSED = {
    "use_liger_kernel": "Liger's kernels replace a forward pass that the loss does not use; it never holds all logits",
    "label_smoothing_factor": "the loss is a divergence, or the plain cross-entropy",
    "torch_compile": "sampling and loss call the two halves of a model apart",
    "include_num_input_tokens_seen": "responses have no tokens before they are sampled; each log has their lengths",
}
"""Arguments of transformers that have no effect here, or a wrong one, and why."""


def check_arguments(
    args: Any, model: Any, teacher_model: Any, train_dataset: Any, processing_class: Any, peft_config: Any
) -> None:
    """Find mistakes in the arguments of `SKDTrainer`, before anything is loaded."""
    if model is None:
        raise SkdError("there is no model", where="SKDTrainer", hint="pass the student as `model`")
    if not isinstance(args, SKDConfig):
        what = f"`args` is a {type(args).__name__}, not an SKDConfig"
        raise SkdError(what, where="SKDTrainer, args", hint="SKDConfig takes the same arguments and more")
    if isinstance(train_dataset, Mapping):
        hint = f"pass one of its splits: {', '.join(map(str, train_dataset))}"
        raise SkdError("several splits in a dictionary", where="SKDTrainer, train_dataset", hint=hint)
    if hasattr(train_dataset, "__len__") and not len(train_dataset):
        hint = "give it rows; leave it out where the trainer only evaluates"
        raise SkdError("the dataset is empty", where="SKDTrainer, train_dataset", hint=hint)
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
        what = f"a {type(processing_class).__name__} is no tokenizer"
        hint = "models of text only are trained; pass the processor's `tokenizer`"
        raise SkdError(what, where="SKDTrainer, processing_class", hint=hint)
    if peft_config is not None and hasattr(model, "peft_config"):
        hint = "leave peft_config out to train those, or merge them first: model.merge_and_unload()"
        raise SkdError("the model has adapters already", where="SKDTrainer, peft_config", hint=hint)
    for name, given in (("model_init_kwargs", model), ("teacher_model_init_kwargs", teacher_model)):
        if getattr(args, name) and not isinstance(given, str):
            hint = "leave it out, or give the model by name"
            raise SkdError("the model is loaded already", where=f"SKDConfig, field `{name}`", hint=hint)
    for name, reason in _REFUSED.items():
        if getattr(args, name) not in (False, 0, "no", None):
            raise SkdError(f"not supported: {reason}", where=f"SKDConfig, field `{name}`", hint="leave it out")
    if args.train_sampling_strategy == "group_by_length":
        what = "rows have no length before they are tokenised, and responses have none before they are sampled"
        raise SkdError(what, where="SKDConfig, field `train_sampling_strategy`", hint="leave it out")
    check_processes(args, sharded=bool(args.fsdp), where="SKDConfig", setting="fsdp")


def warn_of_unread(distill: DistillConfig) -> None:
    """Warn of settings that the method does not read."""
    # One temperature of this class is that of both models, of which a method may read one only.
    shared = ("sampling.student", "sampling.teacher")
    unread = [_OWN_NAMES.get(path, path.rpartition(".")[2]) for path in unread_settings(distill) if path not in shared]
    # A name may stand for several fields, of which a method reads one.
    read = {own for path, own in _OWN_NAMES.items() if reads_setting(distill, path)}
    unread = [name for name in unread if name not in read]
    if unread:
        log.warning("method `%s` does not read %s", distill.method, ", ".join(dict.fromkeys(unread)))
