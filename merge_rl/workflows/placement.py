"""Where the checkpoints of a search lie: on the accelerator, in memory, or mapped from disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import torch

from merge_rl.errors import ConfigError
from merge_rl.workflows.merging import DISK

SHARE: Final = 0.6  # of what is free; the rest is for the network, its samples and features


def choose_place(
    needed: int, device: str, *, free_device: int | None, free_memory: int, given: str | None = None
) -> str:
    """The device's name, "cpu" or "disk": the first with room for `needed` bytes, or `given`.

    Room is a fixed share of what is free. Only the time of a run depends on the choice: merges are
    the same to the last bit.
    """
    if given is not None:
        if given not in (DISK, "cpu", device) and given != "cuda":
            raise ConfigError(f"expected weights_device {device}, cpu or disk, got {given!r}")
        return given
    if device != "cpu" and free_device is not None and needed <= SHARE * free_device:
        return device
    return "cpu" if needed <= SHARE * free_memory else DISK


def place_weights(needed: int, device: str, given: str | None) -> str:
    """`choose_place` with what is free on this machine now."""
    return choose_place(
        needed,
        device,
        free_device=free_on(device),
        free_memory=free_memory(),
        given=given,
    )


def free_on(device: str) -> int | None:
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info(device)[0])


def free_memory(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that this process may still take.

    What the system has available, or less where a control group, such as a batch system's, grants
    less. Half of the physical memory where neither is told.
    """
    found = [_available(proc), _granted(cgroup)]
    known = [size for size in found if size is not None]
    if known:
        return min(known)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _available(proc: Path) -> int | None:
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    rows = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(row[1]) * 1024 for row in rows), None)


def _granted(cgroup: Path) -> int | None:
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        # Pages of files count as used but are given back when memory is asked for.
        rows = (line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = next((int(row[1]) for row in rows if row[0] == "inactive_file"), 0)
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + cached)
