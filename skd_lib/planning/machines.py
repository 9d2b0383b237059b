"""The machines that a plan can be made for, by the figures of their data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from skd_lib._core.machine import total_memory
from skd_lib.errors import SkdError

GB, TFLOPS = 1e9, 1e12


@dataclass(frozen=True)
class Machine:
    """Devices of one kind.

    Attributes:
        kind: Name of the kind.
        devices: How many there are.
        per_node: Devices of one machine, which are paid for together.
        flops: Peak of dense matrix products in the precision of training (bf16; fp32 on a CPU), a second and device.
        bandwidth: Bytes a second and device between it and its memory.
        memory: Bytes of a device.
        link: Bytes a second, one way, between devices of one machine.
        network: Bytes a second and device, one way, between machines.
        element: Bytes of a weight in that precision.
        price: An example, in dollars for a device and hour: look up your own.
        source: Of the figures.
    """

    kind: str
    devices: int
    per_node: int
    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float
    element: int
    price: float
    source: str

    @property
    def name(self) -> str:
        """Return the profile's name."""
        return self.kind if self.devices == 1 else f"{self.kind}x{self.devices}"

    def paid(self, devices: int) -> int:
        """Return the devices that are paid for where some are used: those of whole machines."""
        return min(-(-devices // self.per_node) * self.per_node, max(self.devices, devices))


def _gpu(
    kind: str, per_node: int, tflops: float, bandwidth: float, memory: float, link: float, price: float, source: str
) -> Machine:
    # Network: 400 Gbit/s a GPU where eight share a machine, 100 Gbit/s for one alone.
    network = 50 if per_node > 1 else 12.5
    return Machine(
        kind,
        per_node,
        per_node,
        tflops * TFLOPS,
        bandwidth * GB,
        memory * GB,
        link * GB,
        network * GB,
        2,
        price,
        source,
    )


MACHINES = {
    machine.kind: machine
    for machine in (
        _gpu("l4", 1, 121, 300, 24, 32, 0.8, "NVIDIA L4 data sheet (without sparsity)"),
        _gpu("a100", 1, 312, 2039, 80, 300, 4.0, "NVIDIA A100 80GB SXM data sheet"),
        _gpu("h100", 8, 989, 3350, 80, 450, 6.0, "NVIDIA H100 SXM data sheet (without sparsity)"),
        _gpu("h200", 8, 989, 4800, 141, 450, 7.0, "NVIDIA H200 SXM data sheet (without sparsity)"),
        Machine("cpu", 1, 1, 200 * GB, 20 * GB, 0, 1 * GB, 1 * GB, 4, 0.2, "a guess for a few cores: use --measure"),
    )
}
"""By kind; a name such as h100x64 says how many devices. Without a number it is one machine."""


def this_machine() -> Machine | None:
    """Return one device of this machine, on which `skd run` trains; None for a GPU of an unknown kind."""
    import torch

    if not torch.cuda.is_available():
        return load_machine("cpu")
    words = re.split(r"[^a-z0-9]+", torch.cuda.get_device_name(0).lower())
    memory = torch.cuda.get_device_properties(0).total_memory
    known = (machine for kind, machine in MACHINES.items() if kind in words)
    return next((replace(machine, devices=1, memory=memory) for machine in known), None)


def load_machine(name: str, *, price: float | None = None) -> Machine:
    """Return a machine by the name of a profile: a kind, or a kind and a number of devices (h100x8).

    Raises:
        SkdError: there is no such kind.
    """
    found = re.fullmatch(r"([a-z]+\d*?)(?:x([1-9]\d{0,5}))?", name)
    if found is None or found[1] not in MACHINES:
        hint = f"a kind of {', '.join(MACHINES)}, with a number of devices if you like: h100x8"
        raise SkdError(f"there is no profile {name!r}", where="--profile", hint=hint)
    machine = MACHINES[found[1]]
    if machine.kind == "cpu":
        machine = replace(machine, memory=total_memory())
    if found[2]:
        machine = replace(machine, devices=int(found[2]))
    return machine if price is None else replace(machine, price=price)
