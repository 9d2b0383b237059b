"""Seeds derived from the run's seed and a place: no two places share one, whatever the seeds.

Sums, products and shifts of a seed and a step would: seed 0 in epoch 1 is then seed 1 in epoch 0.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derived(purpose: str, *place: int) -> int:
    """Return 64 bits that belong to a purpose and a place, e.g. the run's seed, an optimiser step and a row.

    Generators that read fewer bits of a seed (torch's on the CPU reads 32) must not be given it.
    """
    text = "/".join(map(str, (purpose, *place)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def uniform(purpose: str, *place: int) -> float:
    """Return the number in [0, 1) that belongs to a purpose and a place."""
    return (derived(purpose, *place) >> 11) / 2**53


def generator(purpose: str, *place: int) -> np.random.Generator:
    """Return a generator whose whole stream belongs to a purpose and a place."""
    return np.random.default_rng(derived(purpose, *place))
