"""Fixtures shared by all tests: a tiny real tokenizer and tiny real models, made here, nothing downloaded."""

from __future__ import annotations

import copy
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

# Before torch is imported: thread pools of parallel test processes spin against each other on small machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# They compare numbers to more digits than bf16 leaves, here and in the processes that they start.
os.environ["SKD_PRECISION"] = "fp32"
if not os.environ.get("SKD_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from pathlib import Path

# SKD_TEST_BF16=on or =off: as if the CPU had all of bf16's instructions or none, in every process.
if os.environ.get("SKD_TEST_BF16"):
    FLAGS = Path(__file__).parent / "support" / "cpu_flags"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FLAGS), os.environ.get("PYTHONPATH")]))
    runpy.run_path(str(FLAGS / "sitecustomize.py"))

from typing import Any, NamedTuple, Protocol

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config
from transformers.models.smollm3 import SmolLM3Config

torch.set_num_threads(1)

PAD, BOS, EOS, TURN = "<|endoftext|>", "<s>", "<|im_end|>", "<|im_start|>"
"""Special tokens, in the order of their ids 0, 1, 2, 3."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Le fichier a été enregistré. Voulez-vous continuer ?",
    "The file has been saved. Do you want to continue?",
    "Please enter a valid email address for the user account.",
    "Veuillez saisir une adresse électronique valide pour le compte utilisateur.",
    "system user assistant translate the sentence to English",
    "Add 12 and 30 to get 42; 3.14 is close to pi.",
]

CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "smollm3": SmolLM3Config,
}
SLIDING_WINDOW = 16


class TinyModel(Protocol):
    """Makes a fresh tiny model with random weights, on the CPU, in float32, in eval mode."""

    def __call__(
        self,
        arch: str = "llama",
        seed: int = 0,
        layers: int = 2,
        hidden: int = 32,
        vocab_size: int = 320,
        **config: Any,
    ) -> PreTrainedModel: ...


class CpuFlags(Protocol):
    """Lets PyTorch report a CPU with these of bf16's instructions and no others; `auto` is what they make of it."""

    def __call__(self, *present: str) -> None: ...


class SaveTinyModel(Protocol):
    """Makes a tiny model and saves it with the tiny tokenizer in Hugging Face layout; returns the folder."""

    def __call__(self, folder: Path, arch: str = "llama", seed: int = 0, **options: Any) -> Path: ...


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 tokens, with a chat template; like Llama's it puts BOS before any text by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        min_frequency=1,
        special_tokens=[PAD, BOS, EOS, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[TURN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """A factory of tiny models; `arch` is a key of `CONFIGS`, `config` overrides fields of the model's config."""
    return _tiny_model


@pytest.fixture(scope="session")
def compile_once() -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """`skd_kfp.pipelines.compiling.compile_pipeline`, which compiles the same only once in all tests of this process.

    In a thread of its own: at each step KFP reads the source of every caller, and pytest's are many.
    """
    from skd_kfp.pipelines.compiling import compile_pipeline

    with ThreadPoolExecutor(1) as thread:

        @cache
        def compiled(*args: Any, **options: Any) -> list[dict[str, Any]]:
            return thread.submit(compile_pipeline, *args, **options).result()

        yield lambda *args, **options: copy.deepcopy(compiled(*args, **options))


@pytest.fixture
def cpu_flags(monkeypatch: pytest.MonkeyPatch) -> CpuFlags:
    """Chooses the CPU that PyTorch reports, and takes back that tests compute in fp32."""

    def choose(*present: str) -> None:
        monkeypatch.delenv("SKD_PRECISION", raising=False)
        flags = {name: name in present for name in ("avx512_bf16", "amx_bf16")}
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: flags)

    return choose


@pytest.fixture(scope="session")
def save_tiny_model(tiny_tokenizer: PreTrainedTokenizerFast) -> SaveTinyModel:
    """A factory of saved tiny models."""

    def save(folder: Path, arch: str = "llama", seed: int = 0, **options: Any) -> Path:
        _tiny_model(arch, seed, **options).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


def _tiny_model(
    arch: str = "llama", seed: int = 0, layers: int = 2, hidden: int = 32, vocab_size: int = 320, **config: Any
) -> PreTrainedModel:
    heads = 4
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": hidden // heads,
        "max_position_embeddings": 512,
        # Ten times the usual: small models with the usual range have nearly uniform outputs, which hide mistakes.
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    if arch in {"mistral", "gemma2", "gemma3"}:
        options["sliding_window"] = SLIDING_WINDOW
    if arch in {"gemma2", "gemma3"}:
        options["query_pre_attn_scalar"] = hidden // heads
        options["layer_types"] = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    if arch == "smollm3":
        options["no_rope_layer_interval"] = 2
    options |= config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            CONFIGS[arch](**options),
            dtype=torch.float32,
            attn_implementation="eager" if arch == "gemma2" else "sdpa",
        )
    return model.eval()


ROOT = Path(__file__).parents[1]


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Skd = Callable[..., Done]


@pytest.fixture
def skd(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    compile_once: Callable[..., list[dict[str, Any]]],
) -> Skd:
    """Runs `skd ARGUMENTS` in this process: to start one, with all it imports, takes longer than most commands."""
    from skd_kfp.pipelines import cli

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("skd_kfp.pipelines.compiling.compile_pipeline", compile_once)

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["skd", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return run
