"""Models as they are measured: loaded for speed, ending where they were taught to end."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skd_lib.config import TaskConfig
from skd_lib.data.tokenize import answer_end_id
from skd_lib.models.files import load_tokenizer
from skd_lib.models.loading import default_device, load_model
from skd_lib.models.precision import compute_dtype
from skd_lib.models.special_ids import eos_ids


def load_for_inference(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer on this process's device, in the precision that `auto` is there.

    All models are measured alike, whatever they were trained in: scores and seconds are compared with each other.

    Raises:
        SkdError: the folder does not hold a whole model.
    """
    device = default_device()
    model = load_model(path, dtype=compute_dtype("auto", device), device=device)
    return model, load_tokenizer(path)


def ending_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> tuple[int, ...]:
    """Return every id that ends an answer: those the model's files name, and the one that training puts after answers.

    They differ where a chat template ends turns with a token that no file lists as end of sequence.
    """
    return tuple(dict.fromkeys([*eos_ids(model, tokenizer), answer_end_id(tokenizer, task)]))
