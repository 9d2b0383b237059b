"""The arithmetic and the traffic of forward and training passes, and the time they take on given devices.

A decoder multiplies each token with each weight of its layers: 2 operations a weight (Kaplan et al. 2020, arXiv
2001.08361, section 2.1), and 4 a layer, query element and attended position for scores and values; the backward pass
takes twice as much, recomputed activations once more (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). A forward
also reads its weights and the keys and values of its rows, which is most of the time where tokens are few (Pope et al.
2022, arXiv 2211.05102). Both are added: no overlap is assumed, which is at most twice the roofline's larger one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

from skd_lib.planning.memory import ModelSize


@dataclass(frozen=True)
class Rates:
    """What a device achieves.

    Attributes:
        inference: Operations a second in forward passes.
        training: The same in forward with backward passes.
        bandwidth: Bytes a second from its memory.
        update: The same while the optimiser works.
        layer: Seconds that a layer of a forward takes beside that; as much for each exchange of split layers.
        link: Bytes a second to other devices of its machine.
        network: Bytes a second to other machines.
        element: Bytes of a weight.
    """

    inference: float
    training: float
    bandwidth: float
    update: float
    layer: float
    link: float
    network: float
    element: int


@dataclass(frozen=True)
class Pass:
    """A forward pass of `width` tokens in each of `rows` rows, which attend to `context` positions on average.

    Attributes:
        rows: Rows; may be a mean.
        width: Tokens of a row.
        context: Positions attended to.
        at_head: Positions in all that the head sees.
        cached: Keys and values come from memory.
    """

    rows: float
    width: float
    context: float
    at_head: float
    cached: bool = True


def forward_flops(size: ModelSize, forward: Pass) -> float:
    """Return the operations of a forward pass."""
    token = 2 * size.computing + 4 * size.layers * size.attended * forward.context
    return forward.rows * forward.width * token + forward.at_head * 2 * size.vocabulary * size.hidden


def forward_bytes(size: ModelSize, forward: Pass, element: int) -> float:
    """Return the bytes that a forward pass reads: weights, and cached keys and values."""
    weights = size.inside + (size.vocabulary * size.hidden if forward.at_head else 0)
    cached = forward.rows * forward.context * size.layers * size.cache if forward.cached else 0
    return (weights + cached) * element


Terms = dict[str, float]
"""Seconds by what they go into: arithmetic, memory, latency, link."""


def added(*terms: Terms) -> Terms:
    """Return the sums by term."""
    return {name: sum(each.get(name, 0.0) for each in terms) for name in dict.fromkeys(chain(*terms))}


def times(factor: float, terms: Terms) -> Terms:
    """Return multiples by term."""
    return {name: factor * seconds for name, seconds in terms.items()}


def forward_terms(size: ModelSize, forward: Pass, rates: Rates, *, split: int = 1) -> Terms:
    """Return the time of a forward pass on `split` devices that share the model (tensor parallelism).

    These add up their parts twice a layer: each sends and receives about twice the states (a ring's all-reduce).
    """
    states = forward.rows * forward.width * size.hidden * rates.element
    shared = split > 1
    return {
        "arithmetic": forward_flops(size, forward) / rates.inference / split,
        "memory": forward_bytes(size, forward, rates.element) / rates.bandwidth / split,
        "latency": size.layers * rates.layer * (3 if shared else 1),
        "link": size.layers * 4 * states * (split - 1) / split / rates.link,
    }


def training_terms(size: ModelSize, forward: Pass, rates: Rates, *, passes: int) -> Terms:
    """Return the time of a forward and a backward pass, which together are as many forward passes."""
    uncached = replace(forward, cached=False)
    return {
        "arithmetic": passes * forward_flops(size, uncached) / rates.training,
        "memory": passes * forward_bytes(size, uncached, rates.element) / rates.bandwidth,
        "latency": passes * size.layers * rates.layer,
    }


def update_seconds(trained: float, rates: Rates) -> float:
    """Return the time of AdamW's update: weight, gradient and two moments are read, three of them written, in fp32."""
    return 7 * 4 * trained / rates.update


def reduce_seconds(elements: float, devices: int, rates: Rates, *, per_node: int, element: int = 4) -> float:
    """Return the time to add up gradients of all devices and to give them to all, by the slowest link.

    Between machines there are as many rings as devices in one: each has the network of another device, and a part.
    """
    if devices == 1:
        return 0.0
    slowest = rates.link if devices <= per_node else min(rates.link, per_node * rates.network)
    return 2 * (devices - 1) / devices * elements * element / slowest


def gather_seconds(elements: float, devices: int, rates: Rates, *, per_node: int, element: int) -> float:
    """Return the time in which each device gets the parts of sharded weights that it lacks."""
    return reduce_seconds(elements, devices, rates, per_node=per_node, element=element) / 2
