"""What this process may use of the machine: cores and memory, less than there is in a container or a job of a cluster."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60
"""Bytes from which on a limit is none: version 1 of cgroups says 2^63 less a page."""


def n_cores(root: Path = Path("/")) -> int:
    """Cores that this process may run on, at least one: those it is bound to, or its share of time if that is less.

    Args:
        root: where /proc and /sys are.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [share for group in _groups(root, "cpu") if (share := _cpu_share(group))]
    return max(1, min([bound, *map(math.ceil, shares)]))


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that new processes can have: of the machine, or of a cgroup's limit if that is less."""
    left = [bytes_left for group in _groups(root, "memory") if (bytes_left := _memory_left(group)) is not None]
    return max(0, min([_free_bytes(root), *left]))


def _free_bytes(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and of all above it, of version 2 and of a controller of version 1.

    A container sees its own as the top one, whatever /proc says of its path.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = top / path.lstrip("/")
        yield from (own, *(above for above in own.parents if above.is_relative_to(top)))


def _cpu_share(group: Path) -> float | None:
    """Cores' worth of time that a cgroup has; None where it has no limit."""
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _memory_left(group: Path) -> int | None:
    """Bytes that a cgroup may still take; None where it has no limit. What it caches of files counts as free."""
    limit = _text(group / "memory.max") or _text(group / "memory.limit_in_bytes")
    used = _text(group / "memory.current") or _text(group / "memory.usage_in_bytes")
    if not limit.isdecimal() or int(limit) >= _UNLIMITED:
        return None
    stat = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return int(limit) - int(used or 0) + cached


def _text(file: Path) -> str:
    """A small file's text, stripped; empty where there is none."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
