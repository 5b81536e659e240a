"""Gradients of the digits' networks, alone and among processes, and launches that take them."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge_rl.core.step_policy import denoising_loss
from merge_rl.workflows.assembly.defaults import load_model
from merge_rl.workflows.finetune.learner import trainable
from tests.quick import Late

BATCH = 8
sharding = Late("merge_rl.workflows.finetune.sharded")


class Terms:
    """What the backward passes of a network alone add to its gradients: |terms|, summed, by name.

    Passes of the same rows have the same bits in whichever process they are made, and whole powers
    of two scale them exactly. What many processes find is then a sum of these terms in another
    order. Any order of m float32 numbers is off by at most (m - 1) u sum |terms| to first order,
    u = eps / 2 (Higham, 2002, Accuracy and Stability, section 4.2): two of them are apart by less
    than m eps sum |terms|, on every processor.
    """

    def __init__(self, network: nn.Module) -> None:
        self.sums: dict[str, Tensor] = {}
        self.passes = 0
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                self.sums[name] = torch.zeros_like(parameter)
                parameter.register_hook(partial(self._add, name))  # type: ignore[no-untyped-call]

    def _add(self, name: str, grad: Tensor) -> None:
        self.passes += name == next(iter(self.sums))
        self.sums[name] += grad.detach().abs()

    def bounds(self) -> dict[str, Tensor]:
        """How far apart sums of these terms in two orders may be."""
        factor = self.passes * torch.finfo(torch.float32).eps
        return {name: total * factor for name, total in self.sums.items()}

    def apart(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
        """The largest difference of two gradients, in units of its bound: at most 1."""
        assert found.keys() == expected.keys() <= self.sums.keys()
        bounds, least = self.bounds(), torch.finfo(torch.float32).tiny
        differences = {name: (found[name] - grad).abs() for name, grad in expected.items()}
        return max(float((d / (bounds[n] + least)).max()) for n, d in differences.items())


def block_by_block(network: nn.Module) -> None:
    """Have gradients of a block's inputs summed within the block first, as `sharded` does.

    Where an activation is used in several places, its gradient is a sum, and what comes before it
    in the network inherits how that was rounded.
    """

    def apart(_block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in given)

    for block in sharding.blocks_of(network):
        block.register_forward_pre_hook(apart)


def loss_of(policy: nn.Module, rows: slice, device: str) -> Tensor:
    """The training loss on some rows of one batch."""
    generator = torch.Generator().manual_seed(4)
    data, noise = (torch.randn(BATCH, 1, 8, 8, generator=generator) for _ in range(2))
    sigma = 0.3 + torch.rand(BATCH, generator=generator)
    parts = (x[rows].to(device) for x in (data, torch.arange(BATCH), sigma, noise))
    return denoising_loss(policy, *parts, sigma_data=0.5)


def gradients(model: Path, *, way: str, rows: slice, device: str = "cpu") -> dict[str, Tensor]:
    """By name, of a network alone, or of one among processes of which each has its rows."""
    network = trainable(load_model(model)).to(device)
    ways = {"alone": lambda n: n, "replicated": sharding.replicated, "sharded": sharding.sharded}
    policy = ways[way](network)
    loss_of(policy, rows, device).backward()  # type: ignore[no-untyped-call]
    if way == "sharded":
        sharding.average_scalars(policy)
    return whole_gradients(policy)


def whole_gradients(network: nn.Module) -> dict[str, Tensor]:
    """By name, as one process would have them; all processes must call it."""
    return {
        name.removeprefix("module."): getattr(grad, "full_tensor", lambda grad=grad: grad)()
        for name, parameter in network.named_parameters()
        if (grad := parameter.grad) is not None
    }


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of a tensor's difference, relative: the largest."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - grad).norm() / grad.norm().clamp(min=1e-20))
        for name, grad in expected.items()
        if float(grad.norm()) > 0
    )


def launched(module: str, folder: Path, work: Path, processes: int) -> list[list[str]]:
    """The words of each line that `module`.in_a_process(folder) prints, launched by torchrun."""
    script = f"import pathlib, sys; from {module} import in_a_process; "
    (work / "go.py").write_text(script + "in_a_process(pathlib.Path(sys.argv[1]))")
    paths = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(work / "go.py")]
    ended = subprocess.run(
        [*launcher, str(folder)], env=environment, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return [line.split() for line in ended.stdout.splitlines()]
