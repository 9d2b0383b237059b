"""Drafts measured by vLLM itself: its servers are started, get requests, and say how much of their drafts stood.

Each server runs for itself, one after the other: the teacher without a draft, then with each of the drafts. So a
machine that is busy for a while slows one of them alone, which the range over the passes shows. Every request has a
cache salt of its own: no prompt finds a prefix of another, or of an earlier pass, in vLLM's cache. Of each setting some
requests go ahead untimed.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from skd_lib.config import SpecdecConfig
from skd_lib.errors import SkdError
from skd_lib.evaluation.generate import GREEDY
from skd_lib.models.files import load_tokenizer
from skd_lib.models.heads import embedding_rows
from skd_lib.models.loading import load_model
from skd_lib.models.vocabulary import pad_id
from skd_lib.results import ServedMeasurement, ServedModel, Specdec
from skd_lib.sampling.acceptance import student_only
from skd_lib.sampling.engine import Sampler
from skd_lib.specdec.turns import Decoded, OnProgress
from skd_lib.specdec.visit import Load, Visit
from skd_lib.specdec.vllm import OWN_CODE, Served, export, is_misread, refusals, serve_words
from skd_lib.vllm.client import Engine
from skd_lib.vllm.serve import environment, free_port, launch, on_gpu, plain_link, running

log = logging.getLogger(__name__)

ON_CPU = ("--enforce-eager", "--kv-cache-memory-bytes", str(2**30))
"""Compiling would take minutes and gain little, and vLLM would take nearly all memory. Later arguments prevail."""
PER_REQUEST = ("--per-request-spec-decode-metrics", "summary")
"""Lets vLLM say in each answer how much of its drafts stood."""
_SMALL = 4 * 2**30


def measure_served(
    teacher: Served,
    drafts: Mapping[str, Served],
    prompts: Sequence[Sequence[int]],
    config: SpecdecConfig,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> ServedMeasurement:
    """Start vLLM with the teacher alone and with each draft, and measure what it says of them.

    Args:
        teacher: The model whose output is wanted.
        drafts: Models that draft for it, by name; none measures the teacher alone.
        prompts: Token ids, rendered as in training.
        config: Batch sizes that the prompts cannot fill are left out, and on a CPU temperatures above 0, where vLLM
            draws other tokens than the teacher's.
        max_new_tokens: Length limit of a response.
        eos_ids: Ids that end a response, besides those that vLLM finds in the teacher's files.
        seed: Of what is sampled.
        on_progress: Called with the responses decoded, and all that will be.

    Raises:
        SkdError: a pair that vLLM cannot serve, no prompts, or a server that does not start; its last lines are part of
            the message.
    """
    gpu, notes = on_gpu(), list[str]()
    _require_servable(teacher, drafts, config.vllm_arguments, gpu=gpu)
    if not prompts:
        raise SkdError("there are no prompts to decode", where="vLLM", hint="give some that fit the models' positions")
    greedy = [temperature for temperature in config.temperatures if temperature == 0]
    if not gpu and len(greedy) < len(config.temperatures):
        why = "with a draft on a CPU, vLLM is right at temperature 0 only: what it samples is not the teacher's"
        if not greedy:
            raise SkdError(why, where="specdec.temperatures", hint="add 0, or measure on a GPU")
        notes.append(f"Only temperature 0 was measured: {why}.")
    filled, most = [size for size in config.batch_sizes if size <= len(prompts)], max(config.batch_sizes)
    if len(filled) < len(config.batch_sizes):
        notes.append(f"{len(prompts)} prompts do not fill {most} requests in flight, which was left out.")
    temperatures = config.temperatures if gpu else greedy
    load = Load(prompts, eos_ids, max_new_tokens, temperatures, filled or [len(prompts)], config.repeats, seed)
    started = time.perf_counter()
    settings = len(load.temperatures) * len(load.concurrencies)
    progress = Decoded(on_progress, total=(1 + len(drafts)) * settings * config.repeats * len(load.prompts))
    python = environment()
    torch.cuda.empty_cache()  # what this process has freed, for the servers
    more = (*(() if gpu else ON_CPU), *config.vllm_arguments)

    def visit(draft: Served | None) -> Visit:
        with _server(python, teacher, draft, config.gamma, more) as (engine, command):
            visit = Visit(engine, command, load, progress, drafted=draft is not None)
            visit.run()
        notes.extend(visit.notes)
        return visit

    alone = visit(None)
    drafted = {name: visit(draft) for name, draft in drafts.items()}
    reference = alone.greedy[0] if alone.greedy else None
    models = {name: _model(each, reference) for name, each in drafted.items()}
    for name, model in models.items():
        if model.equal is not None and 2 * model.equal < (repeated := _equal(alone.greedy, alone.greedy[0])):
            notes.append(
                f"With {name} {model.equal} of {len(prompts)} greedy responses are the teacher's own, and {repeated} "
                "without: more than rounding? Compare again with --dtype float32."
            )
    asks_transformers = not gpu and "float32" in config.vllm_arguments and _is_small(teacher.folder)
    return ServedMeasurement(
        version=alone.version,
        device="gpu" if gpu else "cpu",
        gamma=config.gamma,
        prompts=len(prompts),
        max_new_tokens=max_new_tokens,
        repeats=config.repeats,
        alone=_model(alone, reference),
        drafts=models,
        equal_to_transformers=_equal([greedy_by_transformers(teacher.folder, load)], reference)
        if reference and asks_transformers
        else None,
        notes=list(dict.fromkeys(notes)),
        seconds=time.perf_counter() - started,
    )


def specdec_of(measurement: ServedMeasurement, teacher: Served, drafts: Mapping[str, Served]) -> dict[str, Specdec]:
    """Return the figures of each draft, with those of the first temperature and concurrency as the headline."""
    results = {}
    for name, model in measurement.drafts.items():
        headline = model.passes[0]
        counts = headline.counts
        assert counts is not None  # noqa: S101 - it was measured with a draft
        results[name] = Specdec(
            engine="vllm",
            acceptance_rate=counts.acceptance_rate,
            tokens_per_teacher_call=counts.accepted_length,
            speedup=measurement.speedup(headline),
            gamma=measurement.gamma,
            temperature=headline.temperature,
            batch_size=headline.concurrency,
            prompts=measurement.prompts,
            repeats=measurement.repeats,
            tokens=headline.tokens,
            teacher_only_tokens_per_second=measurement.alone.passes[0].tokens_per_second,
            speculative_tokens_per_second=headline.tokens_per_second,
            acceptance_by_position=counts.by_position,
            seconds=measurement.seconds,
            served=measurement.model_copy(update={"drafts": {name: model}}),
            vllm=export(teacher, drafts[name], measurement.gamma).model_copy(
                update={"command": model.command, "started": True}
            ),
        )
    return results


def greedy_by_transformers(folder: Path, load: Load) -> list[list[int]]:
    """Return the teacher's greedy responses in fp32, decoded here."""
    model = load_model(folder, dtype=torch.float32)
    sampler = Sampler(
        student=model,
        teacher=None,
        rule=student_only(),
        student_params=GREEDY,
        eos_ids=tuple(load.eos_ids),
        pad_id=pad_id(load_tokenizer(folder), embedding_rows(model)),
        max_new_tokens=load.max_new_tokens,
        batch_size=8,
    )
    return sampler.sample([list(prompt) for prompt in load.prompts], [0] * len(load.prompts)).responses()


def _require_servable(teacher: Served, drafts: Mapping[str, Served], arguments: Sequence[str], *, gpu: bool) -> None:
    for name, draft in drafts.items():
        if reasons := refusals(teacher, draft, on_gpu=gpu):
            raise SkdError(reasons[0], where=f"draft `{name}`, {draft.name}", hint="vLLM was not started")
        if OWN_CODE in serve_words(teacher, draft, 1) and OWN_CODE not in arguments:
            raise SkdError(
                "Python code comes with a model, and vLLM would run it",
                where=f"{teacher.name}, {draft.name}",
                hint=f"read it, then allow it: specdec.vllm_arguments: [{OWN_CODE}]",
            )


@contextmanager
def _server(
    python: Path, teacher: Served, draft: Served | None, gamma: int, more: Sequence[str]
) -> Iterator[tuple[Engine, str]]:
    """Run a server, and give its line with the models' own names in the place of their folders on this machine."""
    logs = Path(tempfile.mkdtemp(prefix="skd-vllm-"))
    port = free_port()
    unsaid = [*(PER_REQUEST if draft is not None else ()), "--host", "127.0.0.1", "--port", str(port)]
    with ExitStack() as links:
        local = None if draft is None else Served(draft.folder, str(draft.folder))
        if local is not None and is_misread(local):
            local = Served(local.folder, str(links.enter_context(plain_link(local.folder))))
        words = serve_words(Served(teacher.folder, str(teacher.folder)), local, gamma)
        log.info("starting vLLM: %s", shlex.join(["vllm", *words, *more]))
        try:
            with running(lambda written: launch(python, [*words, *more, *unsaid], {}, written), port, logs) as engine:
                yield engine, shlex.join(["vllm", *serve_words(teacher, draft, gamma), *more])
        except SkdError as error:
            hint = f"the log is {logs / 'vllm.log'}; give vLLM other limits by --vllm-arguments, specdec.vllm_arguments"
            raise SkdError(error.what, where=error.where, hint=hint) from error
    shutil.rmtree(logs)


def _model(visit: Visit, reference: list[list[int]] | None) -> ServedModel:
    equal = None if reference is None else _equal(visit.greedy, reference)
    return ServedModel(command=visit.command, passes=visit.passes, equal=equal)


def _equal(passes: Sequence[list[list[int]]], reference: list[list[int]]) -> int:
    """Count the responses that are the reference's in every pass."""
    return sum(all(each[row] == wanted for each in passes) for row, wanted in enumerate(reference))


def _is_small(folder: Path) -> bool:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= _SMALL
