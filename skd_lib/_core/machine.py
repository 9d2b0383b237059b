"""What this machine has."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")
"""The control group of this process, as a container sees it."""


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its control group."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # no affinity on macOS and Windows
        cores = os.cpu_count() or 1
    quota = _GROUP / "cpu.max"
    if quota.is_file():
        limit, period = quota.read_text(encoding="ascii").split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def total_memory() -> int:
    """Bytes of memory this process may use: the machine's, within the limit of its control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _GROUP / "memory.max"
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        total = min(total, int(text))
    return total


def free_memory() -> int:
    """Bytes of memory that this process can still take: what the machine has left, within its control group's limit."""
    facts = Path("/proc/meminfo")
    if not facts.is_file():  # macOS does not say
        return total_memory() // 2
    free = _kernel_facts(facts)["MemAvailable:"] * 1024
    limit = _GROUP / "memory.max"
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        used = int((_GROUP / "memory.current").read_text(encoding="ascii"))
        cached = _kernel_facts(_GROUP / "memory.stat").get("inactive_file", 0)  # given back when it is needed
        free = min(free, int(text) - used + cached)
    return max(free, 0)


def _kernel_facts(file: Path) -> dict[str, int]:
    lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    return {name: int(value) for name, value, *_ in lines}


def peak_memory() -> int:
    """The most bytes of memory that this process has had resident."""
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
