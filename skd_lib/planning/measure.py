"""A short measured run that replaces a plan's assumptions: this machine's speed, the data's lengths, the acceptance."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skd_lib.config import RunConfig, Schedule
from skd_lib.data.sources import load_data
from skd_lib.data.splits import Splits, make_splits
from skd_lib.data.tokenize import TokenizedExample, answer_end_id, encode_all
from skd_lib.distillation.batch import collate
from skd_lib.distillation.loss import cross_entropy
from skd_lib.distillation.rollouts import interleaving_rule
from skd_lib.models.files import load_tokenizer
from skd_lib.models.heads import common_vocabulary
from skd_lib.models.loading import default_device, load_model
from skd_lib.models.precision import compute_dtype
from skd_lib.models.references import resolve_model
from skd_lib.models.student_init import prune_layers
from skd_lib.planning.assumptions import MOST_OF_A_PEAK
from skd_lib.planning.machines import Machine
from skd_lib.planning.memory import skeleton_size
from skd_lib.planning.work import Pass, Rates, forward_bytes, forward_flops, update_seconds
from skd_lib.sampling.acceptance import AcceptanceRule, lossless
from skd_lib.sampling.engine import Sampler
from skd_lib.sampling.timing import Forward, bare, recorded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOOKED_AT = 512
"""Examples whose tokens are counted."""
_SAMPLED_ROWS, _SAMPLED_TOKENS = 8, 48
"""Prompts, and tokens of a response, by which acceptance is measured."""
_REPEATS = 3


def read_splits(config: RunConfig) -> Splits:
    """Return the splits of a run's data.

    Raises:
        SkdError: the data cannot be read.
    """
    return make_splits(load_data(config.data), config.data, config.seed)


def data_figures(config: RunConfig, splits: Splits, train: Sequence[TokenizedExample]) -> dict[str, Any]:
    """Return the assumptions that a run's data replace: rows, and the lengths of some training examples in tokens."""
    figures: dict[str, Any] = {
        "teacher_rows": max(1, len(splits.train_teacher)),
        "train_rows": max(1, len(splits.train_student)),
        "validation_rows": len(splits.validation),
        "test_rows": len(splits.test) + sum(each.examples or 0 for each in config.data.held_out),
    }
    training, most = config.distill.training, config.task.max_new_tokens
    batch = training.batch_size
    if train:
        figures["prompt_tokens"] = fmean(len(example.prompt_ids) for example in train)
        lengths = [len(example.prompt_ids) + min(len(example.response_ids), most) for example in train]
        figures["padding"] = padding(lengths, batch, training.micro_batch_size or batch)
    if answers := [min(len(example.response_ids), most) for example in train if example.response_ids]:
        longest = fmean(max(answers[start : start + batch]) for start in range(0, len(answers), batch))
        figures["response_tokens"] = fmean(answers)
        figures["longest_tokens"] = max(longest, figures["response_tokens"])
    return figures


def padding(lengths: Sequence[int], batch: int, micro: int) -> float:
    """Return the positions that are computed for each token: a batch's rows go together by length, padded."""
    batches = [sorted(lengths[start : start + batch]) for start in range(0, len(lengths), batch)]
    parts = [rows[start : start + micro] for rows in batches for start in range(0, len(rows), micro)]
    return sum(len(rows) * max(rows) for rows in parts) / sum(lengths)


def some_tokens(config: RunConfig, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> list[TokenizedExample]:
    """Tokenise as many training examples as are counted."""
    return tokens_of(config, tokenizer, splits.train_student[:_LOOKED_AT])


def tokens_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Any]) -> list[TokenizedExample]:
    """Tokenise examples as the training does."""
    end = answer_end_id(tokenizer, config.task)
    return encode_all(tokenizer, config.task, examples, end, {end})


def measure(
    config: RunConfig,
    machine: Machine,
    on_progress: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure the assumptions of a run's plan on this machine, in a few minutes.

    Forward passes of both models at several shapes are timed, in turns, and what arithmetic, memory and layers cost is
    fitted to them; then training passes, the optimiser, and the acceptance of the student as it is before training.

    Args:
        config: The run; its models are loaded.
        machine: The profile whose peaks the shares are of; one device is measured.
        on_progress: Called with what is being measured.
        clock: Seconds; `time.process_time` on a CPU that others use, with one thread.

    Raises:
        SkdError: a model or the data cannot be read, or the student is on a server.
    """
    on_progress("loading the models and the data")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, transformers, mlflow"], check=False, capture_output=True)
    imports = time.perf_counter() - start
    device = default_device()
    dtype = compute_dtype(config.distill.training.precision, device)
    folder = resolve_model(config.teacher, trust_remote_code=config.trust_remote_code)
    start = time.perf_counter()
    teacher = load_model(folder, dtype=dtype, device=device, trust_remote_code=config.trust_remote_code)
    loading = time.perf_counter() - start
    student = _student(config, teacher)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.trust_remote_code)
    splits = read_splits(config)
    figures = data_figures(config, splits, some_tokens(config, tokenizer, splits))
    batch = config.distill.training.batch_size
    micro = config.distill.training.micro_batch_size or batch
    examples = tokens_of(config, tokenizer, splits.train_student[:batch])

    on_progress("forward passes")
    length = round(figures["prompt_tokens"] + figures.get("response_tokens", config.task.max_new_tokens / 2))
    inference, bandwidth, layer = _speeds([teacher, student], (batch, micro, length), config, machine.element, clock)
    on_progress("training passes")
    training, update = _training(student, examples[:micro], (inference, bandwidth, layer), machine.element, clock)
    on_progress("acceptance")
    figures["acceptance"], figures["draw_seconds"] = _acceptance(
        interleaving_rule(config.distill.sampling, 0, 1), config, teacher, student, examples, clock
    )
    figures["draft_acceptance"], _ = _acceptance(lossless(), config, teacher, student, examples, clock)
    shares = {
        "inference_share": inference / machine.flops,
        "training_share": training / machine.flops,
        "bandwidth_share": bandwidth / machine.bandwidth,
        "update_share": update / machine.bandwidth,
    }
    # What costs nothing that can be seen has no end of it.
    figures |= {name: min(share, MOST_OF_A_PEAK) for name, share in shares.items()}
    return figures | {"layer_seconds": layer, "start_seconds": imports + 2 * loading}


def fitted(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return the costs, none negative, with the least squares of relative errors of rows x costs from the seconds."""
    matrix = np.array(rows) / np.array(seconds)[:, None]
    best, least = np.zeros(matrix.shape[1]), np.inf
    for count in range(1, matrix.shape[1] + 1):
        for chosen in itertools.combinations(range(matrix.shape[1]), count):
            costs = np.zeros(matrix.shape[1])
            costs[list(chosen)] = np.linalg.lstsq(matrix[:, chosen], np.ones(len(matrix)), rcond=None)[0]
            error = float(((matrix @ costs - 1) ** 2).sum())
            if (costs >= 0).all() and error < least:
                best, least = costs, error
    return [float(cost) for cost in best]


def _student(config: RunConfig, teacher: PreTrainedModel) -> PreTrainedModel:
    if config.student is None:
        initial = config.student_init
        return prune_layers(teacher, initial.keep_first or 0, initial.keep_last or 0)
    folder = resolve_model(config.student, trust_remote_code=config.trust_remote_code)
    return load_model(folder, dtype=teacher.dtype, device=teacher.device, trust_remote_code=config.trust_remote_code)


def _speeds(
    models: Sequence[PreTrainedModel],
    batch: tuple[int, int, int],
    config: RunConfig,
    element: int,
    clock: Callable[[], float],
) -> tuple[float, float, float]:
    """Return operations and bytes a second, and seconds a layer, that forward passes of these shapes show."""
    given = config.distill.sampling.gamma
    gamma = max(2, given.end if isinstance(given, Schedule) else given)
    rows, micro, length = batch
    shapes = sorted({(1, 1), (rows, 1), (rows, gamma), (1, length), (micro, length)})
    forwards = [
        Forward(model, count, width, max(length, width), at_head=count * min(width, gamma))
        for model in models
        for count, width in shapes
    ]
    passes = [bare([forward]) for forward in forwards]
    taken: list[list[float]] = [[] for _ in passes]
    for repeat in range(_REPEATS + 1):
        for run, seconds in zip(passes, taken, strict=True):
            one = _timed(run, models[0].device, clock)
            if repeat:
                seconds.append(one)
    costs = []
    for forward in forwards:
        size = skeleton_size(forward.model)
        asked = Pass(forward.rows, forward.tokens, forward.visible - forward.tokens / 2, forward.at_head)
        costs.append([forward_flops(size, asked), forward_bytes(size, asked, element), size.layers])
    operation, byte, layer = fitted(costs, [median(seconds) for seconds in taken])
    return 1 / max(operation, 1e-18), 1 / max(byte, 1e-15), layer


def _training(
    student: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    speeds: tuple[float, float, float],
    element: int,
    clock: Callable[[], float],
) -> tuple[float, float]:
    """Return operations a second in training, and bytes a second of the optimiser."""
    dtype, size = student.dtype, skeleton_size(student)
    student = student.float().train()
    prompts = [example.prompt_ids for example in examples]
    responses = [example.response_ids or [0] * 8 for example in examples]
    rollout = collate(prompts, responses, pad_id=0, source="ground_truth", device=student.device)
    optimiser = torch.optim.AdamW(student.parameters(), lr=0.0, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()

    def gradient() -> None:
        with torch.autocast(student.device.type, dtype, enabled=dtype != torch.float32):
            loss = cross_entropy(student, rollout).loss
        loss.backward()  # type: ignore[no-untyped-call]

    gradients, updates = [], []
    for repeat in range(_REPEATS + 1):
        seconds = _timed(gradient, student.device, clock), _timed(update, student.device, clock)
        optimiser.zero_grad()
        if repeat:
            gradients.append(seconds[0])
            updates.append(seconds[1])
    rows, width = rollout.input_ids_BL.shape
    asked = Pass(rows, width, width / 2, rollout.tokens, cached=False)
    besides = 3 * (forward_bytes(size, asked, element) / speeds[1] + size.layers * speeds[2])
    whole = median(gradients)
    student.to(dtype).eval()
    for weight in student.parameters():
        weight.grad = None
    any_rates = Rates(1, 1, 1, 1, 0, 1, 1, element)
    return 3 * forward_flops(size, asked) / max(whole - besides, whole / 4), update_seconds(
        size.parameters, any_rates
    ) / median(updates)


def _acceptance(
    rule: AcceptanceRule,
    config: RunConfig,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    clock: Callable[[], float],
) -> tuple[float, float]:
    """Return the acceptance of some samples, and the seconds of a drawn token beside the forward passes."""
    sampling = config.distill.sampling
    prompts = [example.prompt_ids for example in examples[:_SAMPLED_ROWS]]
    sampler = Sampler(
        student=student,
        teacher=teacher,
        rule=rule,
        gamma=2,
        student_params=sampling.student,
        teacher_params=sampling.teacher,
        eos_ids=(),
        pad_id=0,
        max_new_tokens=min(_SAMPLED_TOKENS, config.task.max_new_tokens),
        vocabulary=common_vocabulary(student, teacher),
    )
    seeds = list(range(len(prompts)))
    with recorded(student, teacher) as forwards:  # those of a pass without graphs
        counts = replace(sampler, graphs=False).sample(prompts, seeds).statistics
    taken = _timed(lambda: sampler.sample(prompts, seeds), student.device, clock)
    besides = taken - _timed(bare(forwards), student.device, clock)
    return counts.acceptance_rate, max(0.0, besides / (counts.drafted + counts.teacher_calls))


def _timed(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start
