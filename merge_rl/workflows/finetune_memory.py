"""Too little memory: told before the work where it can be known, and with what to lower."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator

import torch

from merge_rl.config.finetune import FinetuneConfig
from merge_rl.errors import MemoryShortageError
from merge_rl.workflows.placement import free_memory, free_on

FLOAT_BYTES = 4
# What allocators say differs between devices and versions.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "alloc_cpu")


def training_bytes(config: FinetuneConfig, num_weights: int, processes: int = 1) -> int:
    """Bytes of all copies of the weights: network, gradients, Adam's two moments, average, start.

    Adapters need moments and gradients of themselves alone, which are small beside the network.
    Of several processes each holds the network, which samples, and the start; with `ddp` buckets
    of gradients too, with `fsdp` a share of all else and of the weights in training.
    """
    update, full = config.update, config.lora.rank == 0
    whole, rest = 1 + (update.kl_weight > 0), (3 if full else 0) + (update.ema_decay > 0)
    if processes == 1:
        return FLOAT_BYTES * num_weights * (whole + rest)
    if config.parallel == "fsdp":
        return FLOAT_BYTES * (num_weights * whole + -(-num_weights * (1 + rest) // processes))
    return FLOAT_BYTES * num_weights * (whole + rest + full)


def require_memory(config: FinetuneConfig, num_weights: int, processes: int = 1) -> None:
    """Raise MemoryShortageError if the copies of the weights alone exceed what is free.

    Of one process, of so many: those of one machine share its memory where they are on the CPU.
    """
    needed = training_bytes(config, num_weights, processes)
    free = free_memory() if config.device == "cpu" else free_on(config.device)
    if free is None or needed <= free:
        return
    hints = ["--lora-rank 8 (adapters in place of all weights)"] if config.lora.rank == 0 else []
    hints += ["--ema 0 (no moving average)"] if config.update.ema_decay else []
    if processes > 1 and config.parallel == "ddp":
        hints += ["--parallel fsdp (shards in place of copies)"]
    hints += ["--kl 0 (no frozen reference)"] if config.update.kl_weight else []
    raise MemoryShortageError(
        f"training {num_weights:,} weights takes {_gib(needed)} for weights, gradients and "
        f"averages, but {_gib(free)} are free on {config.device}; lower it with "
        f"{' or '.join(hints) or 'a smaller network'}"
    )


@contextlib.contextmanager
def memory_advice(config: FinetuneConfig) -> Iterator[None]:
    """Turn what the libraries say when memory runs out into a sentence on what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _shortage(config, error) from None
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in _SIGNS):
            raise
        raise _shortage(config, error) from None


def _shortage(config: FinetuneConfig, error: BaseException) -> MemoryShortageError:
    said = " ".join(str(error).split())[:120]
    return MemoryShortageError(
        f"too little memory on {config.device} for this step; lower --micro-batch "
        f"({config.update.micro_batch} images with gradients at a time), --batch "
        f"({config.batch} without), or train adapters with --lora-rank ({said or 'no details'})"
    )


def peak_memory(device: str) -> int:
    """Bytes: the most that was allocated on an accelerator, or by this process on the CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
