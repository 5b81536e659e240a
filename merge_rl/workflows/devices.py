"""Devices by name: whether they are there, and whether a quicker one is."""

from __future__ import annotations

from contextlib import suppress

import torch

from merge_rl.errors import ConfigError


def require_device(name: str) -> torch.device:
    """The device of that name; ConfigError, with what is there instead, if there is none."""
    with suppress(RuntimeError):
        device = torch.device(name)
        if device.type == "cuda":
            _require_cuda(device)
            return device
        if device.type == "cpu" or (device.type != "meta" and _holds_tensors(device)):
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
