"""`SKDTrainer`, used as a script would."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from skd_lib.config import DistillConfig, InterleavedConfig
from skd_lib.data.formats import tokenize_row
from skd_lib.errors import SkdError
from skd_lib.training.skd_config import SKDConfig
from skd_lib.training.skd_trainer import SKDTrainer
from tests.conftest import TinyModel

CHAT = [
    {"messages": [{"role": "user", "content": f"Add {n} and 1"}, {"role": "assistant", "content": f"{n + 1}"}]}
    for n in range(8)
]
PLAIN = [{"prompt": f"Add {n} and 1: ", "completion": f"{n + 1}"} for n in range(8)]


@pytest.fixture
def make(tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    def make(
        rows: list[dict[str, Any]] = CHAT,
        *,
        folder: str = "out",
        callbacks: Any = None,
        peft: Any = None,
        **options: Any,
    ):
        options = {"max_steps": 2, "max_new_tokens": 6, "per_device_train_batch_size": 2} | options
        args = SKDConfig(
            output_dir=str(tmp_path / folder),
            gradient_accumulation_steps=2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            learning_rate=1e-3,
            **options,
        )
        return SKDTrainer(
            model=tiny_model(seed=1),
            teacher_model=tiny_model(seed=2, hidden=64),
            args=args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:4]),
            processing_class=tiny_tokenizer,
            callbacks=callbacks,
            peft_config=peft,
        )

    return make


@pytest.mark.parametrize("rows", [CHAT, PLAIN], ids=["messages", "prompt-completion"])
def test_it_trains_and_tells_what_was_replaced(make: Any, rows: list[dict[str, Any]]) -> None:
    trainer = make(rows, max_steps=12)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    steps = [entry for entry in trainer.state.log_history if "rejection_rate" in entry]
    assert len(steps) == 12
    assert all(0 <= entry["rejection_rate"] <= 1 for entry in steps)


def test_all_answers_of_a_conversation_are_trained_on_if_wanted(make: Any) -> None:
    rows = [{"messages": [*row["messages"], *row["messages"]]} for row in CHAT]
    assert len(make(rows).train_dataset) == 8
    trainer = make(rows, assistant_turns="all", max_steps=1)
    assert len(trainer.train_dataset) == 16
    assert len(trainer.eval_dataset) == 8
    trainer.train()
    assert trainer.evaluate(Dataset.from_list(rows[:4])) == trainer.evaluate()
    with pytest.raises(SkdError, match="must be `last` or `all`"):
        make(rows, assistant_turns="first")


@pytest.mark.parametrize("method", ["sft", "seqkd", "supervised_kd", "on_policy", "imitkd", "two_stage", "skd_mixed"])
def test_every_method_trains(make: Any, method: str) -> None:
    assert make(method=method).train().training_loss > 0


def test_a_resumed_training_equals_an_uninterrupted_one(make: Any) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    whole = make(max_steps=6, save_steps=3, save_strategy="steps", folder="whole")
    whole.train()
    make(max_steps=6, save_steps=3, save_strategy="steps", folder="parts", callbacks=[Stop()]).train()
    rest = make(max_steps=6, save_steps=3, save_strategy="steps", folder="parts")
    rest.train(resume_from_checkpoint=True)
    for ours, theirs in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_micro_batches_make_one_step(make: Any) -> None:
    """The gradient of a step depends on its rows, not on how they are cut into micro-batches."""
    one = make(per_device_train_batch_size=4, max_steps=1, lr_scheduler_type="constant")
    one.args.gradient_accumulation_steps = 1
    two = make(per_device_train_batch_size=2, max_steps=1, lr_scheduler_type="constant")
    assert one.train().training_loss == pytest.approx(two.train().training_loss, rel=1e-5)


def test_adapters_are_trained_alone(make: Any) -> None:
    trainer = make(peft=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2))
    trainer.train()
    assert {name.split(".")[-2] for name, weight in trainer.model.named_parameters() if weight.requires_grad} == {
        "default"
    }


def test_adapters_on_adapters_are_refused(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    args = SKDConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    options = {"args": args, "train_dataset": CHAT, "processing_class": tiny_tokenizer}
    student = get_peft_model(tiny_model(seed=1), config)
    with pytest.raises(SkdError, match="the model has adapters already"):
        SKDTrainer(student, tiny_model(seed=2), **options, peft_config=config)
    assert SKDTrainer(student, tiny_model(seed=2), **options).model is student


def test_names_of_gkd_mean_what_they_mean_there() -> None:
    config = SKDConfig(output_dir="x", lmbda=0.5, beta=0.3, temperature=0.9, report_to="none").distill_config()
    assert (config.method, config.sampled_fraction, config.divergence, config.beta) == ("skd_mixed", 0.5, "jsd", 0.3)
    assert config.sampling.student.temperature == config.sampling.teacher.temperature == 0.9
    assert SKDConfig(output_dir="x", seq_kd=True, report_to="none").distill_config().method == "seqkd"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "skdd"}, "unknown method"),
        ({"top_k": -1}, "field `top_k`"),
        ({"divergence": "kl"}, "unknown divergence"),
        ({"loss_temperature": 0}, "field `loss_temperature`"),
        ({"temperature": -1}, "field `temperature`"),
        ({"lmbda": 2}, "field `lmbda`"),
        ({"gamma": 0}, "field `gamma`"),
        ({"topk": 3}, r"SKDConfig, topk: there is no such argument(.|\n)*did you mean top_k"),
        ({"packing": True}, r"SKDConfig, packing(.|\n)*its response is sampled"),
        ({"use_vllm": True}, r"SKDConfig, use_vllm(.|\n)*write engine=.vllm"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"label_smoothing_factor": 0.1}, "field `label_smoothing_factor`"),
        ({"torch_compile": True}, "field `torch_compile`"),
        ({"model_init_kwargs": {"dtype": "float32"}}, "field `model_init_kwargs`: the model is loaded already"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"schedules": {"beta": {"start": 0, "end": 1}}}, "`beta` cannot change"),
        ({"schedules": {"top_k": {"start": 0}}}, "field `top_k`"),
        ({"selective": {"topp": 3}}, "field `selective`"),
        ({"engine": "vllm", "vllm": {"url": "x"}}, "field `vllm`"),
        ({"engine": "vllm", "rule": "mixture"}, r"rule is `mixture`(.|\n)*engine: transformers"),
        ({"engine": "vllm"}, r"teacher_model: with the engine vllm(.|\n)*pass its folder or name"),
        ({"engine": "vllama"}, "field `engine`"),
        ({"fsdp": True}, r"sharding needs at least two processes(.|\n)*torchrun"),
        ({"fsdp": True, "fsdp_config": {"version": 2}}, "field `fsdp_config`"),
    ],
)
def test_wrong_settings_are_named(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SkdError, match=message) as caught:
        make(**options)
    assert "pydantic" not in str(caught.value)
    assert str(caught.value).count("SKDConfig") <= 1


@pytest.mark.parametrize("options", [{"rule": "min_prob", "min_prob": 0.1}, {"rule": "mixture", "mixture": 0.3}])
def test_every_rule_has_its_setting(make: Any, options: dict[str, Any]) -> None:
    trainer = make(**options)
    assert getattr(trainer.distill.sampling, options["rule"]) == options[options["rule"]]
    trainer.train()


STEPS_OWN = {"teacher_signal", "training", "multinode"}
"""Fields of `distill` that are about a pipeline's step: when and where the teacher is asked, on which machines."""


def test_every_setting_of_the_methods_has_its_argument() -> None:
    given = SKDConfig(
        output_dir="x",
        report_to="none",
        method="imitkd",
        divergence="jsd",
        beta=0.2,
        alpha=0.3,
        rule="mixture",
        lmbda=0.4,
        schedules={"top_k": {"start": 50, "end": 5}, "mixture": {"start": 0, "end": 1}},
        min_prob=0.3,
        gamma=4,
        adaptive_gamma=False,
        temperature=0.7,
        teacher_temperature=0.2,
        student_top_p=0.6,
        teacher_top_p=0.9,
        loss_temperature=2.0,
        temperature_squared=True,
        replaced_weight=0.1,
        selective={"top": 3},
    ).distill_config()
    changed = {name for name, value in given if value != getattr(DistillConfig(), name)}
    assert changed == DistillConfig.model_fields.keys() - STEPS_OWN - {"engine", "vllm"}
    sampling = {name for name, value in given.sampling if value != getattr(InterleavedConfig(), name)}
    assert sampling == InterleavedConfig.model_fields.keys()
    assert (given.sampling.student.temperature, given.sampling.teacher.temperature) == (0.7, 0.2)
    assert given.sampling.top_k.end == 5
    assert given.selective.top == 3


def test_servers_are_settings_too() -> None:
    servers = {"urls": ["http://10.0.0.5:8000"], "signal": "top_k", "top_k": 8}
    given = SKDConfig(output_dir="x", report_to="none", engine="vllm", vllm=servers).distill_config()
    assert (given.engine, given.vllm.urls, given.vllm.top_k) == ("vllm", servers["urls"], 8)


def test_a_share_that_changes_makes_skd_a_mixture() -> None:
    config = SKDConfig(output_dir="x", report_to="none", schedules={"lmbda": {"start": 0, "end": 1}}).distill_config()
    assert (config.method, config.sampled_fraction.end) == ("skd_mixed", 1)


def test_the_command_line_of_transformers_reads_it(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--report_to", "none", "--method", "on_policy", "--selective", '{"top": 7}']
    words += [
        "--teacher_model_init_kwargs",
        '{"dtype": "bfloat16"}',
        "--schedules",
        '{"gamma": {"start": 2, "end": 5}}',
    ]
    (config,) = HfArgumentParser(SKDConfig).parse_args_into_dataclasses(words)
    assert config.teacher_model_init_kwargs == {"dtype": "bfloat16"}
    assert config.distill_config().selective.top == 7
    assert config.distill_config().sampling.gamma.end == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"args": TrainingArguments(output_dir="x", report_to="none")}, "not an SKDConfig"),
        ({"train_dataset": {"train": CHAT, "test": CHAT}}, r"several splits(.|\n)*train, test"),
        ({"train_dataset": []}, "train_dataset: the dataset is empty"),
        ({"processing_class": object()}, "a object is no tokenizer"),
        ({"compute_metrics": len}, "metrics of logits"),
        ({"model": None}, "there is no model"),
        ({"teacher_model": None}, "method `skd` needs a teacher"),
        ({"processing_class": None}, "pass `processing_class`"),
    ],
)
def test_wrong_arguments_are_named(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, arguments: dict[str, Any], message: str
) -> None:
    right = {
        "model": tiny_model(seed=1),
        "teacher_model": tiny_model(seed=2),
        "args": SKDConfig(output_dir="x", report_to="none", use_cpu=True),
        "train_dataset": CHAT,
        "processing_class": tiny_tokenizer,
    }
    with pytest.raises(SkdError, match=message):
        SKDTrainer(**{**right, **arguments})


def test_a_collator_of_tensors_is_refused(make: Any) -> None:
    trainer = make()
    trainer.data_collator = lambda rows: {"input_ids": rows}
    with pytest.raises(SkdError, match=r"data_collator(.|\n)*leave it out"):
        trainer.train()
    with pytest.raises(SkdError, match="data_collator"):
        trainer.evaluate()


def test_the_best_checkpoint_by_one_of_several_validation_sets(make: Any) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "max_steps": 3}
    trainer = make(**options, load_best_model_at_end=True, metric_for_best_model="eval_plain_loss")
    trainer.eval_dataset = {"plain": trainer.eval_dataset, "same": trainer.eval_dataset}
    trainer.train()
    assert trainer.state.best_metric == trainer.evaluate()["eval_plain_loss"]
    assert trainer.evaluate()["eval_same_loss"] == trainer.state.best_metric


def test_a_student_given_by_name_is_trained_in_fp32(
    tmp_path: Path, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    half = tiny_model(seed=1).bfloat16()
    half.save_pretrained(tmp_path / "student")
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    args = SKDConfig(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False)
    teacher = tiny_model(seed=2)
    assert SKDTrainer(str(tmp_path / "student"), teacher, args, train_dataset=CHAT).model.dtype == torch.float32
    assert not caplog.records
    SKDTrainer(half, teacher, args, train_dataset=CHAT, processing_class=tiny_tokenizer)
    assert "load it in float32" in caplog.text


def test_prompts_alone_are_enough_where_every_response_is_sampled(make: Any) -> None:
    rows = [{"prompt": row["prompt"]} for row in PLAIN]
    trainer = make(rows, eval_strategy="no")
    trainer.train()
    with pytest.raises(SkdError, match="no response"):
        trainer.evaluate()
    with pytest.raises(SkdError, match="no response"):
        make(rows, method="supervised_kd").train()


def test_an_iterable_dataset_trains_and_evaluates(make: Any) -> None:
    trainer = make()
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    rows = trainer.eval_dataset
    trainer.train()
    assert trainer.evaluate(rows.to_iterable_dataset()) == pytest.approx(trainer.evaluate(rows))


def test_a_short_last_batch_trains_in_every_epoch(make: Any) -> None:
    trainer = make(CHAT[:7], max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 4


def test_dropout_is_off_unless_it_is_wanted(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for wanted in (False, True):
        args = SKDConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_dropout=not wanted)
        student = tiny_model(seed=1, attention_dropout=0.5)
        trainer = SKDTrainer(student, tiny_model(seed=2), args, train_dataset=CHAT, processing_class=tiny_tokenizer)
        rates = {module.attention_dropout for module in trainer.model.modules() if hasattr(module, "attention_dropout")}
        assert rates == {0.5 if wanted else 0.0}


def test_models_that_do_not_fit_are_refused(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    args = SKDConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    student = tiny_model(seed=1)
    with pytest.raises(SkdError, match="one model"):
        SKDTrainer(student, student, args, train_dataset=CHAT, processing_class=tiny_tokenizer)
    with pytest.raises(SkdError, match=r"its model has no row for \(vocab_size 200\)"):
        SKDTrainer(student, tiny_model(vocab_size=200), args, train_dataset=CHAT, processing_class=tiny_tokenizer)


def test_there_are_no_predictions(make: Any) -> None:
    with pytest.raises(SkdError, match="no predictions"):
        make().predict(CHAT)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "[]"}, "there are no messages"),
        ({"messages": [{"role": "x", "content": "x"}]}, "message 1: unknown role 'x'"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}, "message 2"),
        ({"prompt": [{"role": "user", "content": "x"}], "completion": "y"}, "`completion`: the prompt is a list"),
        ({"prompt": "x", "completion": 3}, "`completion` is none"),
        ({"text": "x"}, "has the fields text"),
    ],
)
def test_rows_that_it_cannot_read_are_shown(make: Any, row: dict[str, Any], message: str) -> None:
    trainer = make()
    with pytest.raises(SkdError, match=message):
        trainer.data_collator([row])


@pytest.mark.parametrize("turns", ["last", "all"])
def test_a_row_that_it_cannot_read_is_named_by_its_number(make: Any, turns: str) -> None:
    long = {"messages": [{"role": "user", "content": "long " * 99}, {"role": "assistant", "content": "x"}]}
    trainer = make([*CHAT[:5], long], max_length=90, assistant_turns=turns)
    kind = {"last": "row", "all": "answer"}[turns]
    with pytest.raises(SkdError, match=f"train_dataset, {kind} 6: the prompt has"):
        trainer.data_collator(list(trainer.train_dataset))
    trainer.train_dataset, trainer.eval_dataset = None, {"few": [CHAT[0], long]}
    with pytest.raises(SkdError, match="eval_dataset, `few`, row 2: the prompt has"):
        trainer.data_collator([long])


def test_a_training_with_other_steps_has_other_schedules(make: Any) -> None:
    trainer = make(method="two_stage", max_steps=1)
    sources: list[str] = []
    one = trainer.get_batch_samples

    def seen(*arguments: Any) -> Any:
        made = one(*arguments)
        sources.append(made[0][0]["rollout"].sources[0])
        return made

    trainer.get_batch_samples = seen
    trainer.train()
    trainer.args.max_steps = 4
    trainer.train()
    assert sources[1:3] == sources[1:2] * 2
    assert sources[1] != sources[4]


def test_a_response_ends_also_where_the_template_does_not_end_it(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    )
    assert tokenize_row(tokenizer, CHAT[0], [2]).response_ids[-1] == 2
    assert tokenize_row(tiny_tokenizer, CHAT[0], [2]).response_ids.count(2) == 1


def test_evaluations_by_name_and_of_nothing(make: Any) -> None:
    trainer = make()
    trainer.eval_dataset = {"few": CHAT[:2], "none": []}
    assert "eval_loss" in trainer.evaluate("few")
    for name, message in (("many", "known: few, none"), ("none", "the dataset is empty")):
        with pytest.raises(SkdError, match=message):
            trainer.evaluate(name)


def test_a_share_that_the_method_reads_is_not_called_unread(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    make(lmbda=0.5)
    assert "does not read" not in caplog.text
    make(method="supervised_kd", lmbda=0.5)
    assert "does not read" in caplog.text
    assert "lmbda" in caplog.text
