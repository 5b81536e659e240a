"""Devices by name, free memory, and where the checkpoints lie."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from merge_rl.config import FinetuneConfig, OptimizeConfig
from merge_rl.errors import ConfigError
from merge_rl.parallel.group import Group
from merge_rl.parallel.rendezvous import Place
from merge_rl.storage.checkpoints import DISK


def require_device(name: str) -> torch.device:
    """The device of that name; ConfigError, with what is there instead, if there is none.

    For the CPU it calls `keep_freed_memory`.
    """
    with suppress(RuntimeError):
        device = torch.device(name)
        if device.type == "cuda":
            _require_cuda(device)
            return device
        if device.type == "cpu":
            keep_freed_memory()
            return device
        if device.type != "meta" and _holds_tensors(device):
            return device
    raise ConfigError(
        f"expected --device {' or '.join(_there())}, which this PyTorch finds here, got {name!r}"
    )


def _require_cuda(device: torch.device) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > (device.index or 0):
        return
    if count:
        names = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"--device {device}: found {names} here")
    version = torch.__version__
    built = torch.version.cuda is not None or torch.version.hip is not None
    why = (
        f"found no GPU, or no driver that PyTorch {version} can use"
        if built
        else f"PyTorch {version} is built without GPUs; install a build with them"
    )
    raise ConfigError(f"--device {device}: {why}; --device cpu needs none")


def _holds_tensors(device: torch.device) -> bool:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        return False
    return True


def _there() -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def unused_gpu(device: str) -> str | None:
    """A note for who works on the CPU of a machine with a GPU; None for all others."""
    if device.partition(":")[0] != "cpu" or not torch.cuda.is_available():
        return None
    return f"works on the CPU; --device cuda takes this machine's {torch.cuda.get_device_name()}"


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
    """Bytes free on a GPU, or in memory for the CPU; None for any other device."""
    kind = torch.device(device).type
    if kind == "cuda" and torch.cuda.is_available():  # pragma: no cover (needs a GPU)
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory() if kind == "cpu" else None


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


_ALLOCATOR: Final = (
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # names of glibc's mallopt(3)


@functools.cache
def keep_freed_memory() -> bool:
    """Have the C library keep what tensors free for the tensors to come; whether it does.

    An activation of a small network takes some hundred KiB. glibc maps and unmaps blocks of that
    size, so that every pass over a batch faults all its pages in again. Blocks up to 32 MiB, the
    most that glibc takes, now come from its heap, of which up to 256 MiB are kept. Once a process;
    nothing is done where the C library is another one, or the user has set an allocator up.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _ALLOCATOR):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 32 << 20)) and bool(mallopt(_TRIM_THRESHOLD, 256 << 20))


def cpu_workers(device: str) -> int:
    """Batches to make side by side: one a core on the CPU, one on an accelerator."""
    return torch.get_num_threads() if device == "cpu" else 1


def own_device(device: str, place: Place, count: int | None = None) -> str:
    """The device of one process: "cuda" means another GPU for every process of a machine.

    `count` is the number of GPUs, by default that of this machine. Raises ConfigError for one GPU
    shared by several processes.
    """
    if device.partition(":")[0] != "cuda" or place.size == 1:
        return device
    if ":" in device and device != f"cuda:{place.local_rank}":
        raise ConfigError(
            f"expected --device cuda with several processes, got {device}: each takes a GPU of "
            "its own"
        )
    count = torch.cuda.device_count() if count is None else count
    if place.local_rank >= count:
        raise ConfigError(
            f"expected a GPU for every process of a machine, found {count} GPUs for process "
            f"{place.local_rank + 1}; start fewer with --nproc-per-node"
        )
    return f"cuda:{place.local_rank}"


def device_facts(device: str) -> dict[str, Any]:
    """What of a device decides how sums round and how much fits: equal on all ranks."""
    if torch.device(device).type == "cuda":  # pragma: no cover (needs a GPU)
        found = torch.cuda.get_device_properties(device)
        return {"name": found.name, "memory": found.total_memory}
    return {
        "name": device,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


Settings = TypeVar("Settings", OptimizeConfig, FinetuneConfig)


def on_device(config: Settings, group: Group) -> Settings:
    """The settings with this process's own device, which is the current one from here on."""
    device = own_device(config.device, group.place)
    require_device(device)
    if device != config.device:  # pragma: no cover (needs a GPU)
        torch.cuda.set_device(device)
    return dataclasses.replace(config, device=device)
