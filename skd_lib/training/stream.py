"""The order in which examples are trained on."""

from __future__ import annotations

from functools import lru_cache

from skd_lib._core.seeds import generator
from skd_lib.distillation.rollouts import Place


class TrainingStream:
    """An endless stream of examples in seeded order: shuffled epoch after shuffled epoch, with no short batches.

    A position in the stream alone tells which example stands there, to which optimiser step it belongs and in which
    row. So the same rows are trained on, with the same seeds, however a step is divided into micro-batches and
    processes, and a resumed run goes on exactly where it stopped.

    Args:
        examples: Number of examples in an epoch.
        batch_size: Rows of an optimiser step, over all processes.
        seed: The run's seed.
    """

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def example(self, position: int) -> int:
        """Index of the example at a position."""
        epoch, offset = divmod(position, self.examples)
        return self._order(epoch)[offset]

    def place(self, position: int) -> Place:
        """Optimiser step and row of a position."""
        return Place(*divmod(position, self.batch_size))

    def _shuffled(self, epoch: int) -> list[int]:
        order: list[int] = generator("order", self.seed, epoch).permutation(self.examples).tolist()
        return order
