"""What the machine has left."""

from __future__ import annotations

from pathlib import Path


def free_memory() -> int:
    """Bytes of memory that are free for this process: the machine's, or its control group's where that is less."""
    meminfo = Path("/proc/meminfo")
    free = 8 << 30  # where nothing is known
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = (group / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)
