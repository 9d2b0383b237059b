"""What became of each drafted block, read off who wrote a response's tokens.

With `lossless` every block ends in one token of the teacher (its replacement of the first rejected draft, or its bonus
after a whole accepted block), unless the response ends inside the block. So a response's sources tell its blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from skd_lib.sampling.samples import TEACHER, Samples


@dataclass(frozen=True)
class Block:
    """One teacher call for one row.

    Attributes:
        accepted: Drafted tokens that stand.
        by_teacher: Whether the teacher's own token follows them; not where the response ended before.
    """

    accepted: int
    by_teacher: bool

    @property
    def tokens(self) -> int:
        """Response tokens of the block."""
        return self.accepted + self.by_teacher


def split_blocks(sources: Sequence[int]) -> list[Block]:
    """The blocks of one response, from its tokens' sources (`STUDENT` or `TEACHER`)."""
    blocks, accepted = [], 0
    for source in sources:
        if source == TEACHER:
            blocks.append(Block(accepted, True))
            accepted = 0
        else:
            accepted += 1
    return [*blocks, Block(accepted, False)] if accepted else blocks


def blocks_of(samples: Samples) -> list[list[Block]]:
    """The blocks of each response, in the order of the prompts."""
    lengths = samples.mask_BT.sum(-1).tolist()
    return [split_blocks(row[:length]) for row, length in zip(samples.source_BT.tolist(), lengths, strict=True)]


@dataclass(frozen=True)
class Acceptance:
    """Counts by position in the block; position 0 is the first drafted token.

    Attributes:
        tested: Blocks in which the teacher tested this position: all before it had been accepted.
        accepted: Those in which it was accepted, too.
        blocks: All blocks, which is teacher calls counted once a row.
        tokens: Response tokens.
    """

    tested: tuple[int, ...]
    accepted: tuple[int, ...]
    blocks: int
    tokens: int

    @classmethod
    def count(cls, blocks: Iterable[Block], gamma: int) -> Acceptance:
        """Count over blocks of `gamma` drafted tokens."""
        tested, accepted, number, tokens = [0] * gamma, [0] * gamma, 0, 0
        for block in blocks:
            number += 1
            tokens += block.tokens
            for position in range(block.accepted):
                tested[position] += 1
                accepted[position] += 1
            if block.by_teacher and block.accepted < gamma:
                tested[block.accepted] += 1
        return cls(tuple(tested), tuple(accepted), number, tokens)

    @property
    def rate(self) -> float:
        """Accepted / tested over all positions; 1 where nothing was tested."""
        return sum(self.accepted) / sum(self.tested) if any(self.tested) else 1.0

    @property
    def by_position(self) -> list[float]:
        """Accepted / tested, up to the last position that was ever tested."""
        return [accepted / tested for accepted, tested in zip(self.accepted, self.tested, strict=True) if tested]

    @property
    def tokens_per_block(self) -> float:
        """Block efficiency: response tokens for each teacher call."""
        return self.tokens / self.blocks
