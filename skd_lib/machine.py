"""What this machine has."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its control group."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # no affinity on macOS and Windows
        cores = os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text(encoding="ascii").split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def total_memory() -> int:
    """Bytes of memory this process may use: the machine's, within the limit of its control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        total = min(total, int(text))
    return total


def free_memory() -> int:
    """Bytes of memory that this process can still take: what the machine has left, within its control group's limit."""
    facts = Path("/proc/meminfo")
    if not facts.is_file():  # macOS does not say
        return total_memory() // 2
    free = _kernel_facts(facts)["MemAvailable:"] * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        cached = _kernel_facts(group / "memory.stat").get("inactive_file", 0)  # given back when it is needed
        free = min(free, int(text) - int(used.read_text(encoding="ascii")) + cached)
    return max(free, 0)


def _kernel_facts(file: Path) -> dict[str, int]:
    lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    return {name: int(value) for name, value, *_ in lines}


def peak_memory() -> int:
    """The most bytes of memory that this process has had resident."""
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
