"""A teacher's signals and responses on fixed prompts, stored in files: training then needs no teacher.

Each process writes its share, and the main one a marker at the end, so that a half-written folder is made again. All
processes must see the same folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from skd_lib._core.events import Progress
from skd_lib.distillation.batch import collate, response_states
from skd_lib.distillation.rollouts import RowKey, Strategy
from skd_lib.distillation.teacher_signal import SparseSignal
from skd_lib.errors import SkdError
from skd_lib.models.heads import lm_logits, vocabulary_size
from skd_lib.models.modes import evaluating
from skd_lib.served.teacher import RemoteTeacher
from skd_lib.storage import atomic_file, write_text_atomic
from skd_lib.training.attempts import Heartbeat, living, new_attempt
from skd_lib.training.checkpoints import MARKER

if TYPE_CHECKING:
    from skd_lib.data.tokenize import TokenizedExample

SHARD_POSITIONS = 2**18
"""Positions in a file: 134 MB of 64 tokens each."""
_CHUNK_ELEMENTS = 2**26
log = logging.getLogger(__name__)


class StoredSignals:
    """The teacher's most likely tokens along the examples' responses, read from a complete folder when needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._settings: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        self._files: list[Any] = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._places: dict[bytes, tuple[int, int, int]] = {}
        for number, file in enumerate(self._files):
            start = 0
            for key, length in zip(file.get_tensor("keys"), file.get_tensor("lengths").tolist(), strict=True):
                self._places[bytes(key.tolist())] = (number, start, start + length)
                start += length

    def along(self, example: TokenizedExample) -> SparseSignal:
        """Return the signal along one example's response, on the CPU."""
        place = self._places.get(_key(example))
        if place is None:
            raise SkdError(
                "the stored teacher signal does not have this example",
                where=f"{self._folder}, example {example.example_id!r}",
                hint="remove the folder: it is made again",
            )
        number, start, end = place
        file = self._files[number]
        log_p_NE, ids_NK = (file.get_slice(name)[start:end] for name in ("log_p", "ids"))
        return SparseSignal(log_p_NE, ids_NK, **self._settings)

    def attached(self, strategy: Strategy, device: torch.device) -> Strategy:
        """Add the stored signals to the rollouts of a strategy."""

        def with_signals(examples: Sequence[TokenizedExample], places: Sequence[RowKey]) -> Any:
            signals = tuple(self.along(example).to(device) for example in examples)
            return replace(strategy(examples, places), signals=signals)

        return with_signals


def store_signals(
    folder: Path,
    load_teacher: Callable[[], PreTrainedModel] | RemoteTeacher,
    examples: Sequence[TokenizedExample],
    *,
    k: int,
    temperature: float,
    vocabulary: int,
    rows: int,
    pad_id: int,
    shard_positions: int = SHARD_POSITIONS,
) -> StoredSignals:
    """Store the teacher's `k` most likely tokens along the examples' responses, unless the folder has them.

    The folder is for exactly these examples (duplicates are stored once), teacher and settings. `load_teacher` is
    called if there is something to store. Tokens beyond the student's `vocabulary` do not count. `rows` responses are
    in a forward pass, and a file ends after `shard_positions`.
    """

    def save(own: Path, rank: int, signals: Iterator[tuple[TokenizedExample, SparseSignal]]) -> None:
        for number, shard in enumerate(_shards(signals, shard_positions)):
            with atomic_file(own / f"signals-{rank:04}-{number:05}.safetensors") as temporary:
                save_file(shard, temporary)

    def write(own: Path, rank: int, processes: int) -> dict[str, Any]:
        distinct = {_key(example): example for example in examples}
        ordered = sorted(distinct.values(), key=lambda example: len(example.prompt_ids) + len(example.response_ids))
        if isinstance(load_teacher, RemoteTeacher):
            save(own, rank, load_teacher.signals(ordered[rank::processes], k=k, vocabulary=vocabulary))
            return {"temperature": 1.0, "vocabulary": vocabulary}
        batches = [ordered[start : start + rows] for start in range(0, len(ordered), rows)][rank::processes]
        teacher = load_teacher()
        common = min(vocabulary, vocabulary_size(teacher))
        with evaluating(teacher), torch.no_grad():
            save(own, rank, _signals(teacher, batches, k, temperature, common, pad_id))
        return {"temperature": temperature, "vocabulary": common}

    return StoredSignals(_once(folder, write))


def store_responses(
    folder: Path,
    make_strategy: Callable[[], Strategy],
    examples: Sequence[TokenizedExample],
    *,
    rows: int,
) -> list[TokenizedExample]:
    """Replace the examples' responses by the teacher's, `rows` sampled together, unless the folder has them.

    The folder is for exactly these examples, teacher and settings. `make_strategy` makes the sampling strategy; it is
    called if there is something to sample.
    """

    def write(own: Path, rank: int, processes: int) -> dict[str, Any]:
        strategy, mine = make_strategy(), range(rank, len(examples), processes)
        progress = Progress("teacher responses", len(mine))
        responses: dict[int, list[int]] = {}
        for start in range(0, len(mine), rows):
            chosen = mine[start : start + rows]
            rollout = strategy([examples[index] for index in chosen], [RowKey(0, index) for index in chosen])
            parts = torch.split(rollout.targets_N, rollout.lengths)
            responses |= {index: part.tolist() for index, part in zip(chosen, parts, strict=True)}
            progress.update(len(responses))
        write_text_atomic(own / f"responses-{rank:04}.json", json.dumps(responses))
        return {"responses": len(examples)}

    complete = _once(folder, write)
    responses: dict[int, list[int]] = {}
    for path in complete.glob("responses-*.json"):
        responses |= {int(index): ids for index, ids in json.loads(path.read_text(encoding="utf-8")).items()}
    return [replace(example, response_ids=responses[index]) for index, example in enumerate(examples)]


def examples_digest(examples: Sequence[TokenizedExample]) -> str:
    """Hash the tokens of the examples and their order."""
    return hashlib.blake2b(b"".join(map(_key, examples)), digest_size=16).hexdigest()


def _once(folder: Path, write: Callable[[Path, int, int], dict[str, Any]]) -> Path:
    """Let every process `write` its share, unless there is a complete folder; return the complete folder.

    The marker holds the settings that `write` returns. Two trainings may do this at the same time: each attempt has a
    folder of its own in `folder`.
    """
    state = PartialState()
    complete = gather_object([_complete(folder)])[0]
    if complete is not None:
        log.info("the teacher does not run again: its stored output is in %s", complete)
        return Path(complete)
    own = folder / str(gather_object([new_attempt()])[0])
    with Heartbeat([str(own)] if state.is_main_process else []):
        if state.is_main_process:
            others = {path.name for path in folder.iterdir()} - {own.name}
            for other in others - living(str(folder), others, own=own.name):
                if not (folder / other / MARKER).exists():
                    shutil.rmtree(folder / other, ignore_errors=True)
        state.wait_for_everyone()
        settings = write(own, state.process_index, state.num_processes)
        state.wait_for_everyone()
        if state.is_main_process:
            write_text_atomic(own / MARKER, json.dumps(settings))
        state.wait_for_everyone()
    return own


def _complete(folder: Path) -> Path | None:
    return min((marker.parent for marker in folder.glob(f"*/{MARKER}")), default=None)


def _signals(
    teacher: PreTrainedModel,
    batches: Sequence[Sequence[TokenizedExample]],
    k: int,
    temperature: float,
    vocabulary: int,
    pad_id: int,
) -> Iterator[tuple[TokenizedExample, SparseSignal]]:
    chunk = max(1, _CHUNK_ELEMENTS // vocabulary)
    progress = Progress("teacher signal", len(batches))
    for number, batch in enumerate(batches, start=1):
        prompts, responses = [example.prompt_ids for example in batch], [example.response_ids for example in batch]
        rollout = collate(prompts, responses, pad_id=pad_id, source="ground_truth", device=teacher.device)
        parts = [
            SparseSignal.of_logits(lm_logits(teacher, part_NH), k, temperature=temperature, vocabulary=vocabulary)
            for part_NH in torch.split(response_states(teacher, rollout), chunk)
        ]
        yield from zip(batch, SparseSignal.concatenate(parts).to("cpu").split(rollout.lengths), strict=True)
        progress.update(number)


def _shards(signals: Iterator[tuple[TokenizedExample, SparseSignal]], positions: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of one file after the other: the signals in a row, their lengths and their examples' keys."""
    held: list[tuple[TokenizedExample, SparseSignal]] = []
    for pair in signals:
        held.append(pair)
        if sum(len(signal) for _, signal in held) >= positions:
            yield _tensors(held)
            held = []
    if held:
        yield _tensors(held)


def _tensors(pairs: Sequence[tuple[TokenizedExample, SparseSignal]]) -> dict[str, Tensor]:
    whole = SparseSignal.concatenate([signal for _, signal in pairs])
    return {
        "log_p": whole.log_p_NE.contiguous(),
        "ids": whole.ids_NK.contiguous(),
        "lengths": torch.tensor([len(signal) for _, signal in pairs]),
        "keys": torch.tensor([list(_key(example)) for example, _ in pairs], dtype=torch.uint8),
    }


def _key(example: TokenizedExample) -> bytes:
    """Hash an example's tokens."""
    tokens = json.dumps([list(example.prompt_ids), list(example.response_ids)])
    return hashlib.blake2b(tokens.encode(), digest_size=16).digest()
