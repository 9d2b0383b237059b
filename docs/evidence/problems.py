"""Arithmetic with written-out steps: problems that can be had in any number, with answers that can be checked.

`3*8+7-5` is answered by `3*8=24`, `24+7=31`, `31-5=26` and `#### 26`, a line each. Every line is one fact, looked up by
its two operands, and needs the line before: one wrong fact and the rest is about another number, as in GSM8K's
solutions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from skd_lib.errors import SkdError

FACTORS = range(2, 10)
DRAWS = 20
"""Draws per problem before it is an error that too few differ."""


@dataclass(frozen=True)
class ProblemSpace:
    """Shape of the problems.

    Attributes:
        largest: No number in a problem or its solution is above it, or below 0.
        addends: The smallest and the largest number that is added or subtracted.
        operations: The fewest and the most steps of a solution.
        products: Share of problems that begin with a product of two one-digit numbers.
    """

    largest: int = 199
    addends: tuple[int, int] = (1, 9)
    operations: tuple[int, int] = (3, 5)
    products: float = 0.25

    def with_addends(self, addends: tuple[int, int]) -> ProblemSpace:
        """Return the same problem with other numbers added and subtracted."""
        return replace(self, addends=addends)

    @property
    def symbols(self) -> list[str]:
        """Everything that problems and solutions are written in."""
        return ["+", "-", "*", "=", "\n", "#### ", *(str(number) for number in range(self.largest + 1))]

    def draw(self, rng: random.Random) -> tuple[str, str]:
        """Return a problem and its solution."""
        steps = rng.randint(*self.operations)
        if rng.random() < self.products:
            left, right = rng.choice(FACTORS), rng.choice(FACTORS)
            value = left * right
            question, lines = f"{left}*{right}", [f"{left}*{right}={value}"]
        else:
            value = rng.randint(0, self.largest)
            question, lines = str(value), []
        while len(lines) < steps:
            addend = rng.randint(*self.addends)
            signs = [sign for sign, to in (("+", value + addend), ("-", value - addend)) if 0 <= to <= self.largest]
            sign = rng.choice(signs)
            result = value + addend if sign == "+" else value - addend
            lines.append(f"{value}{sign}{addend}={result}")
            question, value = f"{question}{sign}{addend}", result
        return question, "\n".join([*lines, f"#### {value}"])


def distinct(space: ProblemSpace, count: int, seed: int) -> list[tuple[str, str]]:
    """Return distinct problems with their solutions; the same ones for the same seed.

    Raises:
        SkdError: there may not be so many.
    """
    rng = random.Random(seed)  # noqa: S311 - to be repeatable, not secret
    found: dict[str, str] = {}
    for _ in range(DRAWS * count):
        found.update([space.draw(rng)])
        if len(found) == count:
            return list(found.items())
    raise SkdError(
        f"only {len(found)} distinct problems were found, {count} are wanted",
        where="the problems",
        hint="allow larger numbers or more operations, or ask for fewer problems",
    )
