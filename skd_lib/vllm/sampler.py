"""Rollouts and teacher signals from vLLM servers, with the samples of `skd_lib.sampling.engine`.

A response depends on its prompt, its seed and the weights alone, so rows go to any server, and a batch that was cut off
by a server's end is sampled again with the same result (in fp32; in bf16 vLLM's rounding depends on the batch).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from skd_lib.distillation.batch import Rollout
from skd_lib.distillation.teacher_signal import DenseSignal, SparseSignal, TeacherSignal
from skd_lib.errors import SkdError
from skd_lib.models.adapters import merged_weights
from skd_lib.models.heads import lm_logits
from skd_lib.sampling.acceptance import AcceptanceRule
from skd_lib.sampling.samples import STUDENT, TEACHER, Samples, SamplingStatistics
from skd_lib.vllm.client import Engine
from skd_lib.vllm.fleet import TRIES, Fleet, Wanted
from skd_lib.vllm.settings import RolloutSettings, unpacked

if TYPE_CHECKING:
    from skd_lib.data.tokenize import TokenizedExample
    from skd_lib.distillation.rollouts import RowKey, Strategy

T = TypeVar("T")


@dataclass(frozen=True)
class Note:
    """What a server knows of a response: its tokens, who wrote them, and the teacher's signal by name."""

    tokens: list[int]
    by_teacher: list[bool]
    proposals: list[int]
    truncated: bool
    signal: dict[str, Tensor]

    @property
    def undrafted(self) -> int:
        """Tokens of the teacher's in whose place nothing had been drafted."""
        return sum(wrote and draft < 0 for wrote, draft in zip(self.by_teacher, self.proposals, strict=True))


@dataclass
class VllmEngine:
    """Servers that sample for one training.

    Attributes:
        engines: The servers; rows are spread over them.
        student: The model in training, whose weights the servers get.
        head: The teacher's head, see `skd_lib.vllm.head`.
        teacher: `skd_lib.models.files.weights_sample` of the teacher: a server with another one is refused.
        settings: How both models sample, and what servers keep of the teacher for each response token; the rule is a
            step's own.
        eos_ids: Ids that end a response.
        pad_id: Fills rows up.
        max_new_tokens: Longest response.
        gamma: Tokens that a server drafts for each call of the teacher, fixed when it starts.
        exchange: A folder that the servers see, too, for the student's weights; None: see `skd_lib.vllm.fleet`.
        dtype: Of the weights that are sent; None leaves them as they are.
        session: Name of this training, on all of its processes.
        process: Number of this one.
    """

    engines: Sequence[Engine]
    student: PreTrainedModel
    head: PreTrainedModel
    teacher: str
    settings: RolloutSettings
    eos_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    gamma: int
    exchange: Path | None = None
    dtype: torch.dtype | None = None
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: int = 0
    _version: str = field(default="", init=False)
    _trainings: int = field(default=0, init=False)
    _keys: Any = field(default_factory=count, init=False)

    def __post_init__(self) -> None:
        self._fleet = Fleet(self.session, self.process, self.exchange)

    def sampler(self, rule: AcceptanceRule, step: int) -> VllmSampler:
        """Return the sampler of an optimiser step; the servers get the student's weights of that step first.

        All processes have the same weights then, whole ones.
        """
        name, value = _served(rule, self.settings.vocabulary)
        settings = self.settings.model_copy(update={"rule": name, "value": value})
        settings.acceptance()
        self._version = f"{self.session}-{self._trainings}-{step}"
        return VllmSampler(self, settings, rule.drafts, tests=rule.accept is not None)

    def along(self, example: TokenizedExample) -> TeacherSignal:
        """Return the teacher's states along an example's response."""
        return self.signals_along([(list(example.prompt_ids), list(example.response_ids))])[0]

    def attached(self, strategy: Strategy, device: torch.device) -> Strategy:
        """Add the teacher's signal to rows that have none, those of ground truth, in another training.

        What the servers read for it is counted in the rollout's statistics: a row with a signal costs no more later.
        """
        self._trainings += 1

        def complete(examples: Sequence[TokenizedExample], keys: Sequence[RowKey]) -> Rollout:
            rollout = strategy(examples, keys)
            missing = [row for row, signal in enumerate(rollout.signals) if signal is None]
            if not missing:
                return rollout
            ids, lengths = rollout.input_ids_BL.tolist(), rollout.lengths
            totals = rollout.sequence_lengths
            pairs = [
                (ids[row][: totals[row] - lengths[row]], ids[row][totals[row] - lengths[row] : totals[row]])
                for row in missing
            ]
            signals = list(rollout.signals)
            for row, signal in zip(missing, self.signals_along(pairs), strict=True):
                signals[row] = signal.to(device)
            read = SamplingStatistics(teacher_positions=sum(totals[row] for row in missing))
            return replace(
                rollout, signals=tuple(signals), statistics=(rollout.statistics or SamplingStatistics()) + read
            )

        return complete

    def signals_along(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[TeacherSignal]:
        """Return the teacher's signal along given responses: one pass over each prompt with its response."""

        def ask(engine: Engine, pair: tuple[list[int], list[int]]) -> TeacherSignal:
            prompt, response = pair
            key = self._key()
            asked = {"key": key, "states_from": len(prompt) - 1}
            # A salt of its own: where a prefix is taken from the cache there are no states.
            engine.generate(
                [*prompt, *response], {"max_tokens": 1, "temperature": 0, "extra_args": {"skd": asked}}, key
            )
            states_TH = unpacked(*engine.rpc("skd_take_states", [key])[key])[: len(response)]
            if len(states_TH) != len(response):
                raise SkdError(f"{len(states_TH)} states came for {len(response)} tokens", where=engine.url)
            dense = DenseSignal(states_TH.to(self.head.get_output_embeddings().weight.device), self.head)
            return dense if self.settings.signal != "top_k" else self._sparse_of(dense)

        return self.spread(ask, pairs)

    def _sparse_of(self, dense: DenseSignal) -> SparseSignal:
        settings = self.settings
        with torch.no_grad():
            logits_NV = lm_logits(self.head, dense.states_NH)
        return SparseSignal.of_logits(
            logits_NV, settings.top_k, temperature=settings.temperature, vocabulary=settings.vocabulary
        )

    def spread(
        self, ask: Callable[[Engine, Any], T], items: Sequence[Any], settings: RolloutSettings | None = None
    ) -> list[T]:
        """Ask the servers for all items, each a pair that begins with its prompt.

        Args:
            ask: Asks one for an item.
            items: In the order of the results.
            settings: How they sample; None: they do not.
        """
        wanted = Wanted(
            settings=(settings or self.settings).model_dump(),
            version=None if settings is None else self._version,
            length=self.max_new_tokens + self.gamma + 1,
            gamma=self.gamma,
            longest=max((len(prompt) for prompt, _ in items), default=0) + self.max_new_tokens,
            teacher=self.teacher,
            bytes=self.student.num_parameters() * (self.dtype or self.student.dtype).itemsize,
            write=self._write_student,
        )
        return self._fleet.spread(self.engines, wanted, ask, items, [len(prompt) for prompt, _ in items])

    def _write_student(self, file: Path) -> None:
        weights = {
            name: value.detach().to("cpu", self.dtype if value.is_floating_point() else None).contiguous()
            for name, value in merged_weights(self.student)
            if name not in self.student.all_tied_weights_keys
        }
        # By the names of the files that the model was loaded from, which vLLM knows.
        save_file(revert_weight_conversion(self.student, weights), file)

    def _key(self) -> str:
        return f"{self.session}-{self.process}-{next(self._keys)}"


@dataclass(frozen=True)
class VllmSampler:
    """Samples by the settings of one optimiser step.

    Attributes:
        engine: The servers.
        settings: How they sample.
        drafts: Of the rule; without it what the student proposed is not told.
        tests: The rule tests drafts. Servers always do, and where it does not, theirs tell nothing of the models.
    """

    engine: VllmEngine
    settings: RolloutSettings
    drafts: bool
    tests: bool

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Samples:
        """Sample one response to each prompt; responses come in the prompts' order.

        Raises:
            SkdError: a server is lost for good, refuses, or breaks drafts off again and again.
        """
        check_prompts(map(len, prompts))
        rows = list(zip(map(list, prompts), seeds, strict=True))
        notes = self.engine.spread(self._row, rows, self.settings)
        return self._samples(rows, notes)

    def _row(self, server: Engine, row: tuple[list[int], int]) -> Note:
        """Sample one row, again where vLLM preempted it: its first token after that was not drafted."""
        for _ in range(TRIES):
            note = self._once(server, row)
            if not note.undrafted:
                return note
        raise SkdError(
            f"vLLM took a row's memory away {TRIES} times while it was sampled",
            where=server.url,
            hint="give the server more memory for keys and values, or fewer rows (`distill.vllm.max_rows`)",
        )

    def _once(self, server: Engine, row: tuple[list[int], int]) -> Note:
        prompt, seed = row
        engine = self.engine
        key = engine._key()
        asked = {"key": key, "seed": seed, "last": prompt[-1], "length": engine.max_new_tokens + engine.gamma + 1}
        params = {
            "temperature": 1.0,  # the worker's settings decide
            "max_tokens": engine.max_new_tokens + 1,  # the held-back token of the prompt is the first
            # At a held-back token that ends responses vLLM would stop: then it goes on to the end, which is cut off.
            "stop_token_ids": [] if prompt[-1] in engine.eos_ids else list(engine.eos_ids),
            "ignore_eos": True,
            "detokenize": False,
            "extra_args": {"skd": asked},
        }
        choice = server.generate(prompt[:-1], params, engine._version)
        tokens = choice["token_ids"]
        ends = (place for place, token in enumerate(tokens) if place and token in engine.eos_ids)
        tokens = tokens[: next(ends, len(tokens)) + 1]
        note = server.rpc("skd_take", {key: len(tokens) - 1})[key]
        if note["tokens"] != tokens[1:] or tokens[0] != prompt[-1]:
            raise SkdError("the server's notes are of other tokens than its answer", where=server.url)
        plain = {name: note.pop(name) for name in ("tokens", "by_teacher", "proposals")}
        signal = {name: unpacked(*value) for name, value in note.items()}
        return Note(**plain, truncated=tokens[-1] not in engine.eos_ids, signal=signal)

    def _samples(self, rows: Sequence[tuple[list[int], int]], notes: Sequence[Note]) -> Samples:
        engine = self.engine
        width = max(len(note.tokens) for note in notes)

        def padded(values: Sequence[Sequence[Any]], fill: int, dtype: torch.dtype) -> Tensor:
            return torch.tensor([[*row, *[fill] * (width - len(row))] for row in values], dtype=dtype)

        def stacked(name: str) -> Tensor | None:
            if name not in notes[0].signal:
                return None
            parts = [note.signal[name] for note in notes]
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

        return Samples(
            tokens_BT=padded([note.tokens for note in notes], engine.pad_id, torch.long),
            mask_BT=padded([[1] * len(note.tokens) for note in notes], 0, torch.bool),
            source_BT=padded(
                [[TEACHER if wrote else STUDENT for wrote in note.by_teacher] for note in notes], STUDENT, torch.int8
            ),
            proposals_BT=padded([note.proposals if self.drafts else [] for note in notes], -1, torch.long),
            truncated_B=torch.tensor([note.truncated for note in notes]),
            teacher_states_BTH=stacked("states"),
            teacher_top=None if (log_p_BTE := stacked("log_p")) is None else (log_p_BTE, cast(Tensor, stacked("ids"))),
            statistics=statistics(rows, notes, engine.gamma, tests=self.tests),
        )


def check_prompts(lengths: Iterable[int]) -> None:
    """Refuse prompts of one token: the last one is held back, and vLLM takes no empty prompt.

    Raises:
        SkdError: there is one.
    """
    if any(length < 2 for length in lengths):
        raise SkdError(
            "a prompt has fewer than 2 tokens, and vLLM needs 2",
            where="distill.engine",
            hint="leave such prompts out, put a template around them, or use `distill.engine: transformers`",
        )


def statistics(
    rows: Sequence[tuple[list[int], int]], notes: Sequence[Note], gamma: int, *, tests: bool
) -> SamplingStatistics:
    """Count what the servers did, from who wrote each token; nothing was tested by a rule that does not.

    A round ends with the teacher's token or with `gamma` accepted drafts. vLLM scores one position more than it has
    drafts, and drafts for the last round in full.
    """
    total = SamplingStatistics()
    for (prompt, _), note in zip(rows, notes, strict=True):
        rounds, block = 0, 0
        for wrote in note.by_teacher:
            block += 1
            if wrote or block == gamma:
                rounds, block = rounds + 1, 0
        rounds += block > 0
        replaced = sum(note.by_teacher)
        accepted = len(note.tokens) - replaced
        total += SamplingStatistics(
            sequences=1,
            tokens=len(note.tokens),
            drafted=rounds * gamma,
            accepted=accepted,
            replaced=replaced,
            tested=accepted + replaced if tests else 0,
            teacher_calls=rounds,
            student_calls=rounds * gamma,
            teacher_positions=len(prompt) - 1 + rounds * (gamma + 1),
            student_positions=len(prompt) - 1 + rounds * gamma,
            truncated=int(note.truncated),
        )
    return total


def _served(rule: AcceptanceRule, vocabulary: int) -> tuple[str, float]:
    """Return the rule's name and number as the worker knows them; the student alone and the teacher alone are top-K."""
    if not rule.asks_teacher:
        return "top_k", vocabulary
    if not rule.drafts:
        return "top_k", 0
    if len(rule.numbers) != 1:
        raise SkdError(
            f"vLLM cannot sample by the rule {rule.name}",
            where="distill.sampling.rule",
            hint="use top_k or min_prob, or `distill.engine: transformers`",
        )
    return rule.name.partition("(")[0], rule.numbers[0]
