"""Models wrapped by PEFT, and architectures that the row cache cannot serve."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from skd_lib.errors import SkdError
from skd_lib.models.heads import decoder, lm_logits, vocabulary_size
from skd_lib.sampling import cache
from skd_lib.sampling.acceptance import AcceptanceRule, lossless, student_only, teacher_only, top_k
from skd_lib.sampling.drafting import AdaptiveGamma
from tests.conftest import TinyModel
from tests.sampling.test_engine import (
    EOS,
    GREEDY,
    PROMPTS,
    STUDENT_SAMPLES,
    VOCABULARY,
    pair,
    reference_rows,
    rows,
    sampler,
)

ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def with_lora(model: PreTrainedModel, **options: Any) -> Any:
    """Random adapters: those that PEFT starts with change nothing, so a test with them would prove nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=32, lora_dropout=0.5, init_lora_weights=False, **options
        )
        return peft.get_peft_model(model, config)


def generated(model: Any, prompt: list[int]) -> list[int]:
    model.eval()
    out = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=list(EOS), pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_student_with_adapters_decodes_as_generate_does(tiny_model: TinyModel, arch: str, adapter: str) -> None:
    model = tiny_model(arch, seed=1, vocab_size=VOCABULARY)
    bare = [generated(model, prompt) for prompt in PROMPTS]
    student = with_lora(model, **ADAPTERS[adapter])
    expected = [generated(student, prompt) for prompt in PROMPTS]
    assert expected != bare
    student.train()  # dropout in the adapters is off while sampling
    s = sampler({"student": student, "teacher": None}, student_only(), student_params=GREEDY)
    assert rows(s.sample(PROMPTS, [0] * 4)) == expected
    assert student.training


def test_student_and_teacher_with_adapters_interleave(tiny_model: TinyModel) -> None:
    models: dict[str, Any] = {
        name: with_lora(model, target_modules=["q_proj"])  # type: ignore[arg-type]
        for name, model in pair(tiny_model).items()
    }
    s = sampler(models, top_k(6), gamma=AdaptiveGamma(4), keep_teacher_states=True, student_params=STUDENT_SAMPLES)
    samples = s.sample(PROMPTS, range(4))
    for model in models.values():
        model.eval()
    assert rows(samples) == reference_rows(models, "top_k", 6, s, PROMPTS, [0, 1, 2, 3])[0]
    assert samples.teacher_states_BTH is not None


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_both_halves_of_a_wrapped_model(tiny_model: TinyModel, adapter: str) -> None:
    model = with_lora(tiny_model(seed=1), **ADAPTERS[adapter]).eval()
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        logits = lm_logits(model, decoder(model)(input_ids=ids).last_hidden_state)
        torch.testing.assert_close(logits, model(input_ids=ids).logits)
    assert vocabulary_size(model) == 320


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
WITHOUT_ROW_CACHE: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 48}, "no rotary positions"),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 48}, "no rotary positions"),
    "falcon": (SHAPE | {"alibi": True}, "no rotary positions"),
    "mamba": (SHAPE | {"state_size": 4}, "layers other than full and sliding-window attention"),
    "qwen3_next": (
        SHAPE | LINEAR | EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8},
        "layers other than full and sliding-window attention",
    ),
}


def other_model(arch: str, seed: int) -> PreTrainedModel:
    options, _ = WITHOUT_ROW_CACHE[arch]
    config = AutoConfig.for_model(arch, bos_token_id=1, eos_token_id=2, initializer_range=0.2, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("arch", WITHOUT_ROW_CACHE)
def test_other_architectures_take_a_slower_path(arch: str, caplog: pytest.LogCaptureFixture) -> None:
    """The same samples, with one warning a process that says why it is slow."""
    models: dict[str, Any] = {"student": other_model(arch, 1), "teacher": other_model(arch, 2)}
    seeds = [11, 12, 13, 14]
    for model in models.values():
        model.config.model_type = f"{arch}-of-this-test"  # no test before has had its warning
    s = sampler(models, top_k(6), batch_size=3, gamma=3, keep_teacher_states=True)
    samples = s.sample(PROMPTS, seeds)
    assert rows(samples) == reference_rows(models, "top_k", 6, s, PROMPTS, seeds)[0]
    assert 0 < samples.statistics.acceptance_rate < 1
    (warning,) = [record.message for record in caplog.records if record.name == cache.__name__]
    assert f"no cache for `{arch}-of-this-test`" in warning
    assert WITHOUT_ROW_CACHE[arch][1] in warning


@pytest.mark.parametrize("rule", [top_k(6), student_only(), teacher_only(), lossless()], ids=lambda rule: rule.name)
def test_a_response_may_end_where_the_models_positions_do(rule: AcceptanceRule) -> None:
    models: dict[str, Any] = {"student": other_model("gpt2", 1), "teacher": other_model("gpt2", 2)}
    s = sampler(models, rule, eos_ids=(), student_params=GREEDY, teacher_params=GREEDY)
    seeds, longest = [11, 12, 13, 14], max(map(len, PROMPTS)) + s.max_new_tokens
    expected = rows(s.sample(PROMPTS, seeds))
    for model in models.values():
        model.config.n_positions = longest
        model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:longest])
    assert rows(s.sample(PROMPTS, seeds)) == expected
    with pytest.raises(SkdError, match=f"need {longest + 1} positions, the model has {longest}\n"):
        sampler(models, rule, max_new_tokens=s.max_new_tokens + 1).sample(PROMPTS, seeds)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_positions_that_stretch_for_the_whole_batch_are_used_up_to_there(
    tiny_model: TinyModel, kind: str
) -> None:
    """A row beyond that length would change what its neighbours sample."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {"factor": 4.0}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 40, **factors}
    limit = 40 if kind == "longrope" else 64
    model = tiny_model("llama", seed=1, vocab_size=VOCABULARY, rope_parameters=rope, max_position_embeddings=limit)
    s = sampler({"student": model, "teacher": model}, lossless(), gamma=3, eos_ids=(), max_new_tokens=10)
    alone = [rows(s.sample([prompt], [5]))[0] for prompt in (PROMPTS[0], [1] * 26)]
    assert rows(s.sample([PROMPTS[0], [1] * 26], [5, 5])) == alone
    with pytest.raises(SkdError, match="37 positions, the model has 36 before its rotary positions stretch"):
        s.sample([PROMPTS[0], [1] * 27], [5, 5])


def test_a_row_cache_and_a_slower_path_interleave(tiny_model: TinyModel) -> None:
    models: dict[str, Any] = {"student": other_model("gpt2", 1), "teacher": tiny_model(seed=2, vocab_size=VOCABULARY)}
    s, seeds = sampler(models, lossless(), student_params=GREEDY, teacher_params=GREEDY), [11, 12, 13, 14]
    assert rows(s.sample(PROMPTS, seeds)) == reference_rows(models, "teacher_only", 0, s, PROMPTS, seeds)[0]


def test_encoder_decoders_are_refused() -> None:
    config = AutoConfig.for_model("t5", d_model=32, d_ff=64, num_layers=2, num_heads=4, vocab_size=48)
    model = AutoModelForSeq2SeqLM.from_config(config)
    for role, rule in (("student", student_only()), ("teacher", teacher_only())):
        with pytest.raises(SkdError, match="`t5` model: it is an encoder-decoder"):
            sampler({"student": None, "teacher": None, role: model}, rule)


def test_virtual_tokens_are_refused(tiny_model: TinyModel) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    student = peft.get_peft_model(tiny_model(), config)
    with pytest.raises(SkdError, match="virtual tokens"):
        sampler({"student": student, "teacher": None}, student_only())
