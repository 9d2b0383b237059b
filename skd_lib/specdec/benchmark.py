"""The speculative-decoding benchmark: students draft for their teacher (Leviathan et al. 2023, arXiv 2211.17192).

The teacher alone and with each draft model decode on the same engine, in the same process, in turns, on the same
prompts, so that the speed-up is that of drafting alone, and that the student before and after distillation can be
compared. Prefill is part of every pass.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skd_lib.config import SamplingParams, SpecdecConfig, TaskConfig
from skd_lib.data.chat import check_rendering
from skd_lib.data.examples import Question
from skd_lib.data.tokenize import TokenizedExample, encode_prompt
from skd_lib.errors import SkdError, SkdErrors
from skd_lib.evaluation.generate import ending_ids, load_for_inference
from skd_lib.evaluation.metrics import CorpusMetric
from skd_lib.evaluation.statistics import LEAST_EXAMPLES, paired_bootstrap
from skd_lib.models.files import context_length, load_config, load_tokenizer
from skd_lib.models.heads import common_vocabulary, embedding_rows
from skd_lib.models.references import resolve_model
from skd_lib.models.vocabulary import check_compatible, check_ids, pad_id
from skd_lib.results import Difference, Forwards, Setting, Specdec
from skd_lib.sampling.acceptance import lossless, teacher_only
from skd_lib.sampling.cache import position_limit
from skd_lib.sampling.engine import Sampler
from skd_lib.specdec.theory import break_even, measure_forwards
from skd_lib.specdec.turns import Decoded, OnProgress, Turns
from skd_lib.specdec.vllm import Served, export

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The parts of a benchmark that are the same at every temperature and batch size.

    The drafts have the teacher's tokenizer and device; each row of each turn derives its own seed.
    """

    teacher: PreTrainedModel
    drafts: Mapping[str, PreTrainedModel]
    prompts: Sequence[list[int]]
    eos_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    config: SpecdecConfig
    seed: int = 0

    @cached_property
    def vocabulary(self) -> int:
        """Number of allowed ids: the same with and without a draft, also where heads are padded differently."""
        return common_vocabulary(self.teacher, *self.drafts.values())

    @property
    def gammas(self) -> list[int]:
        """All draft lengths there are figures for."""
        return sorted({self.config.gamma, *self.config.gammas})

    @cached_property
    def batch_sizes(self) -> list[int]:
        """Batch sizes that the prompts can fill."""
        fitting = [size for size in self.config.batch_sizes if size <= len(self.prompts)]
        if len(fitting) < len(self.config.batch_sizes):
            log.warning("%d prompts do not fill every batch of %s", len(self.prompts), self.config.batch_sizes)
        return fitting or [len(self.prompts)]

    def filling(self, batch_size: int) -> int:
        """Return how many of the prompts fill batches of this size."""
        return len(self.prompts) // batch_size * batch_size

    @property
    def first(self) -> dict[str, list[int]]:
        """The draft lengths that are timed to begin with, for each draft model."""
        gammas = self.gammas if self.config.sweep == "all" else [self.config.gamma]
        return dict.fromkeys(self.drafts, gammas)

    def passes(self, due: Mapping[str, list[int]]) -> int:
        """Count the passes that these draft lengths take, the teacher's own included."""
        return self.config.repeats * (1 + sum(map(len, due.values())))

    @property
    def first_passes(self) -> int:
        """Number of passes at first: those of the draft lengths, and of each draft model by itself."""
        return self.passes(self.first) + self.config.repeats * len(self.drafts)

    def sampler(self, draft: PreTrainedModel, gamma: int, temperature: float, batch_size: int) -> Sampler:
        """Make a sampler of the teacher with a draft model."""
        return self._sampler(draft, self.teacher, gamma, temperature, batch_size)

    def alone(self, model: PreTrainedModel, temperature: float, batch_size: int) -> Sampler:
        """Make a sampler of one model by itself."""
        return self._sampler(None, model, 1, temperature, batch_size)

    def _sampler(
        self, draft: PreTrainedModel | None, model: PreTrainedModel, gamma: int, temperature: float, batch_size: int
    ) -> Sampler:
        params = SamplingParams(temperature=temperature)
        return Sampler(
            student=draft,
            teacher=model,
            rule=teacher_only() if draft is None else lossless(),
            gamma=gamma,
            student_params=params,
            teacher_params=params,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            max_new_tokens=self.max_new_tokens,
            batch_size=batch_size,
            vocabulary=self.vocabulary,
        )


def benchmark(plan: Plan, on_progress: OnProgress | None = None) -> dict[str, Specdec]:
    """Decode the prompts with and without each draft model.

    Raises:
        SkdError: no prompts, a response at temperature 0 that is not the teacher's own, or a batch that does not fit
            into memory.
    """
    if not plan.prompts:
        raise SkdError(
            "there are no prompts to decode", where="speculative decoding", hint="give the test split examples"
        )
    started = time.perf_counter()
    responses = sum(map(plan.filling, plan.batch_sizes)) * len(plan.config.temperatures) * plan.first_passes
    progress = Decoded(on_progress, total=responses)
    settings: dict[str, list[Setting]] = {name: [] for name in plan.drafts}
    for batch_size in plan.batch_sizes:
        forwards = {name: _forwards(plan, draft, batch_size) for name, draft in plan.drafts.items()}
        for temperature in plan.config.temperatures:
            for name, setting in Turns(plan, temperature, batch_size, forwards, progress).run().items():
                settings[name].append(setting)
    seconds = time.perf_counter() - started
    return {name: _result(plan, name, found, seconds) for name, found in settings.items()}


def measure(
    teacher: Served,
    drafts: Mapping[str, Served],
    inputs: Sequence[Question],
    *,
    task: TaskConfig,
    config: SpecdecConfig,
    seed: int,
    on_progress: OnProgress | None = None,
) -> dict[str, Specdec]:
    """Load the models, decode with them, and add the command that serves each pair at its best draft length.

    Args:
        teacher: The model whose output is wanted.
        drafts: Models that draft for it, by name.
        inputs: Texts or conversations; the first `config.examples` are used whose prompts fit the models' positions.
        task: The prompt template, and the length limit of a response.
        config: Draft lengths, batch sizes, temperatures and repeats.
        seed: Of the sampled tokens.
        on_progress: Called after each batch.

    Raises:
        SkdError: as `benchmark`, or a model cannot be loaded.
    """
    if config.engine == "vllm":
        return _measure_served(teacher, drafts, inputs, task, config, seed, on_progress)
    model, tokenizer = load_for_inference(teacher.folder)
    loaded = {name: load_for_inference(draft.folder)[0] for name, draft in drafts.items()}
    results = measure_loaded(
        model, tokenizer, loaded, inputs, task=task, config=config, seed=seed, on_progress=on_progress
    )
    return {
        name: result.model_copy(update={"vllm": export(teacher, drafts[name], result.draft_length or config.gamma)})
        for name, result in results.items()
    }


def compare_drafts(first: Specdec, second: Specdec) -> Difference | None:
    """Return first minus second in tokens a teacher call, with the bootstrap's interval over the prompts of both.

    None with fewer than `LEAST_EXAMPLES` prompts.
    """
    measured = [np.array(each.by_prompt, dtype=np.float64).reshape(-1, 2) for each in (first, second)]
    if len(measured[0]) < LEAST_EXAMPLES:
        return None
    return paired_bootstrap(*(CorpusMetric(counts_N2, lambda sums: sums[0] / sums[1], "") for counts_N2 in measured))


def measure_references(
    teacher: str, drafts: Mapping[str, str], inputs: Sequence[Question], *, task: TaskConfig, **options: Any
) -> dict[str, Specdec]:
    """Check models given by reference, and `measure` them; `options` are its other arguments.

    Raises:
        SkdError: as `measure`, or the models do not fit each other.
    """
    folders = {reference: resolve_model(reference) for reference in (teacher, *drafts.values())}
    unlike = [
        error for reference in drafts.values() for error in check_compatible(folders[teacher], folders[reference])
    ]
    if unlike:
        raise SkdErrors(unlike)
    check_rendering(load_tokenizer(folders[teacher]), task)
    served = {reference: Served.from_reference(reference, folder) for reference, folder in folders.items()}
    of_drafts = {name: served[reference] for name, reference in drafts.items()}
    return measure(served[teacher], of_drafts, inputs, task=task, **options)


def measure_loaded(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafts: Mapping[str, PreTrainedModel],
    inputs: Sequence[Question],
    *,
    task: TaskConfig,
    config: SpecdecConfig,
    seed: int,
    on_progress: OnProgress | None = None,
) -> dict[str, Specdec]:
    """Decode with models that are loaded, on one device and of one tokenizer; the arguments are those of `measure`.

    Raises:
        SkdError: as `benchmark`, or the engine is vLLM.
    """
    if config.engine == "vllm":
        hint = "give the models' folders or hub ids"
        raise SkdError("vLLM reads models from files, and these are loaded", where="specdec.engine", hint=hint)
    block = max(config.gamma, *config.gammas) + 1
    limits = [most for model in (teacher, *drafts.values()) if (most := position_limit(model, block)) is not None]
    encoded = (encode_prompt(tokenizer, task, text) for text in inputs)
    # Where none fits, the sampler says so.
    prompts = list(islice(_fitting(encoded, limits, task), config.examples)) or [
        encode_prompt(tokenizer, task, text) for text in inputs[:1]
    ]
    rows = min(map(embedding_rows, (teacher, *drafts.values())))
    numbered = (TokenizedExample(prompt, [], f"prompt {number}") for number, prompt in enumerate(prompts))
    check_ids(numbered, rows, where="speculative decoding")
    plan = Plan(
        teacher=teacher,
        drafts=drafts,
        prompts=prompts,
        eos_ids=ending_ids(teacher, tokenizer, task),
        pad_id=pad_id(tokenizer, rows),
        max_new_tokens=task.max_new_tokens,
        config=config,
        seed=seed,
    )
    return benchmark(plan, on_progress)


def _forwards(plan: Plan, draft: PreTrainedModel, batch_size: int) -> Forwards:
    prompt = median(map(len, plan.prompts))
    positions = int(prompt) + plan.max_new_tokens // 2  # as many as halfway through a typical response
    return measure_forwards(plan.teacher, draft, rows=batch_size, positions=positions, gammas=plan.gammas)


def _measure_served(
    teacher: Served,
    drafts: Mapping[str, Served],
    inputs: Sequence[Question],
    task: TaskConfig,
    config: SpecdecConfig,
    seed: int,
    on_progress: OnProgress | None,
) -> dict[str, Specdec]:
    """Measure with vLLM the prompts that fit the models with their answers, and with a draft beyond these."""
    from skd_lib.specdec.served import measure_served, specdec_of

    tokenizer = load_tokenizer(teacher.folder)
    contexts = (context_length(load_config(model.folder)) for model in (teacher, *drafts.values()))
    # Near its limit vLLM drafts token 0 in the draft's place.
    limits = [most - config.gamma - 2 for most in contexts if most is not None]
    encoded = (encode_prompt(tokenizer, task, text) for text in inputs)
    measured = measure_served(
        teacher,
        drafts,
        list(islice(_fitting(encoded, limits, task), config.examples)),
        config,
        max_new_tokens=task.max_new_tokens,
        eos_ids=ending_ids(teacher.folder, tokenizer, task),
        seed=seed,
        on_progress=on_progress,
    )
    return specdec_of(measured, teacher, drafts)


def _fitting(prompts: Iterable[list[int]], limits: Iterable[int], task: TaskConfig) -> Iterator[list[int]]:
    """Yield the prompts that are with their answers within the least of the limits."""
    limit = min(limits, default=None)
    for number, prompt in enumerate(prompts):
        if limit is None or len(prompt) + task.max_new_tokens <= limit:
            yield prompt
        else:
            log.warning("prompt %d is left out: it has %d tokens and does not fit the models", number, len(prompt))


def _result(plan: Plan, name: str, settings: list[Setting], seconds: float) -> Specdec:
    config, headline = plan.config, settings[0]
    at_gamma = next(length for length in headline.lengths if length.gamma == config.gamma)
    timed = headline.timed(config.gamma)
    same_names = {**at_gamma.model_dump(), **headline.model_dump(), **timed.model_dump()}
    own = {
        "repeats": config.repeats,
        "ties": sum(length.timed.ties for setting in settings for length in setting.lengths if length.timed),
        "teacher_only_tokens_per_second": headline.teacher_alone.tokens_per_second,
        "draft_only_tokens_per_second": headline.draft_alone and headline.draft_alone.tokens_per_second,
        "speculative_tokens_per_second": timed.tokens_per_second,
        "break_even": max(
            break_even(headline.forwards, length.expected_tokens_per_teacher_call, length.gamma)
            for length in headline.lengths
        ),
        "teacher_parameters": plan.teacher.num_parameters(),
        "draft_parameters": plan.drafts[name].num_parameters(),
        "teacher_only_latency": headline.teacher_alone.latency,
        "seconds": seconds,
        "settings": settings,
    }
    return Specdec.model_validate(same_names | own)
