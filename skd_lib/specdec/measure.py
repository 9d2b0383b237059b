"""From folders and inputs to figures: what the pipeline step and `skd specdec` have in common."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from transformers import PreTrainedModel

from skd_lib.config import SpecdecConfig, TaskConfig
from skd_lib.data.tokenize import encode_prompt
from skd_lib.evaluation.inference import ending_ids, load_for_inference
from skd_lib.models.heads import embedding_rows
from skd_lib.models.special_ids import pad_id
from skd_lib.sampling.cache import position_limit
from skd_lib.specdec.benchmark import benchmark
from skd_lib.specdec.plan import Plan
from skd_lib.specdec.result import SpecdecResult
from skd_lib.specdec.turns import OnProgress
from skd_lib.specdec.vllm import Served, export

log = logging.getLogger(__name__)


def measure(
    teacher: Served,
    drafts: Mapping[str, Served],
    inputs: Sequence[str],
    *,
    task: TaskConfig,
    config: SpecdecConfig,
    seed: int,
    on_progress: OnProgress | None = None,
) -> dict[str, SpecdecResult]:
    """Load the models, decode with them, and add the command that serves each pair at its best draft length.

    Args:
        teacher: The model whose output is wanted.
        drafts: Models that draft for it, by name.
        inputs: Texts; the first `config.examples` are used whose prompts fit the models' positions.
        task: How an input becomes a prompt, and how long a response may be.
        config: What to measure.
        seed: Of what is sampled.
        on_progress: Called after each pass.

    Raises:
        SkdError: as `benchmark`, or a model cannot be loaded.
    """
    model, tokenizer = load_for_inference(teacher.folder)
    loaded = {name: load_for_inference(draft.folder)[0] for name, draft in drafts.items()}
    encoded = (encode_prompt(tokenizer, task, text) for text in inputs)
    fitting = _fitting(encoded, (model, *loaded.values()), task, config)
    prompts = list(islice(fitting, config.examples))
    plan = Plan(
        teacher=model,
        drafts=loaded,
        # Where none fits, the sampler says so.
        prompts=prompts or [encode_prompt(tokenizer, task, text) for text in inputs[:1]],
        eos_ids=ending_ids(model, tokenizer, task),
        pad_id=pad_id(tokenizer, min(map(embedding_rows, (model, *loaded.values())))),
        max_new_tokens=task.max_new_tokens,
        config=config,
        seed=seed,
    )
    return {
        name: result.model_copy(update={"vllm": export(teacher, drafts[name], result.best_gamma)})
        for name, result in benchmark(plan, on_progress).items()
    }


def _fitting(
    prompts: Iterable[list[int]], models: Iterable[PreTrainedModel], task: TaskConfig, config: SpecdecConfig
) -> Iterator[list[int]]:
    """The prompts that fit all models with their answers, and with the longest draft beyond these."""
    block = max(config.gamma, *config.gammas) + 1
    limit = min((most for model in models if (most := position_limit(model, block)) is not None), default=None)
    for number, prompt in enumerate(prompts):
        if limit is None or len(prompt) + task.max_new_tokens <= limit:
            yield prompt
        else:
            log.warning("prompt %d is left out: it has %d tokens and does not fit the models", number, len(prompt))
