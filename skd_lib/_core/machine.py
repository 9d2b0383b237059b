"""The machine and the pipeline run of this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

RUN_ID_VARIABLE = "KFP_RUN_ID"
POD_VARIABLE = "KFP_POD_NAME"
"""Environment variable that Kubeflow Pipelines sets in each of its pods."""
ENGINE_IMAGE_VARIABLE = "SKD_ENGINE_IMAGE"
"""Environment variable that the pipeline sets: the image of vLLM's servers in pods of their own."""
CONTROL_GROUP = Path("/sys/fs/cgroup")
"""The control group of this process, as a container sees it."""


def pipeline_run_id() -> str:
    """Return the id of the pipeline run that this process belongs to; empty if it is run by hand."""
    return os.environ.get(RUN_ID_VARIABLE, "")


def is_main_process() -> bool:
    """Return whether this process writes the outputs; of several that train together one does."""
    return int(os.environ.get("RANK") or 0) == 0


def usable_cores() -> int:
    """Return the cores this process may use: its affinity, and the quota of its control group."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # no affinity on macOS and Windows
        cores = os.cpu_count() or 1
    quota = CONTROL_GROUP / "cpu.max"
    if quota.is_file():
        limit, period = quota.read_text(encoding="ascii").split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def total_memory() -> int:
    """Return the bytes of memory this process may use: the machine's, within the limit of its control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _memory_limit()
    return total if limit is None else min(total, limit)


def _memory_limit() -> int | None:
    file = CONTROL_GROUP / "memory.max"
    text = file.read_text(encoding="ascii").strip() if file.is_file() else "max"
    return None if text == "max" else int(text)


def free_memory() -> int:
    """Return the bytes of memory this process can still take, within the limit of its control group."""
    facts = Path("/proc/meminfo")
    if not facts.is_file():  # macOS does not say
        return total_memory() // 2
    free = _kernel_facts(facts)["MemAvailable:"] * 1024
    limit = _memory_limit()
    if limit is not None:
        used = int((CONTROL_GROUP / "memory.current").read_text(encoding="ascii"))
        cached = _kernel_facts(CONTROL_GROUP / "memory.stat").get("inactive_file", 0)  # given back when it is needed
        free = min(free, limit - used + cached)
    return max(free, 0)


def _kernel_facts(file: Path) -> dict[str, int]:
    lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    return {name: int(value) for name, value, *_ in lines}


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had resident."""
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
