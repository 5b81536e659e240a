"""Calls of a network on a GPU as CUDA graphs: all operations started at once.

A small network leaves a GPU waiting for the host, which starts operations one by one. Recorded
once and started as a whole, the same kernels run on the same addresses: same numbers, to the bit. A
merge writes weights in place, so that a graph sees every candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.network import Network
from merge_rl.interfaces import Denoiser
from merge_rl.workflows.rollout.compiled import prepare_network

PAYS_BELOW: Final = 2**25  # weights; larger ones keep the GPU busy, and a graph keeps its memory
CALLS_BEFORE: Final = 32  # of a shape: recording costs as much as several calls
MOST: Final = 8  # graphs kept
WARM_UPS: Final = 3  # libraries choose kernels and take their workspaces

Given = tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Recording:
    """A graph with the tensors that it reads and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    given: Given
    made: Tensor

    def __call__(self, *given: Tensor | None) -> Tensor:
        """Run on new values."""
        for held, value in zip(self.given, given, strict=True):
            if held is not None and value is not None:
                held.copy_(value)
        self.graph.replay()
        return self.made.clone()


class Recorder:
    """Runs a function of tensors, as a graph once it was called often enough with one shape.

    A function that cannot be recorded is announced once, and runs as it is from then on.
    """

    def __init__(self, function: Callable[..., Tensor], announce: Callable[[str], None]) -> None:
        self.function, self.announce = function, announce
        self._recordings: dict[Any, Recording] = {}
        self._calls: dict[Any, int] = {}
        self._able = True

    def forget(self) -> None:
        """Drop all graphs: an address that they know is no longer valid."""
        self._recordings.clear()

    def __call__(self, *given: Tensor | None) -> Tensor:
        """function(*given)."""
        key = _signature(given)
        found = self._recordings.get(key)
        if found is None and self._worth_it(key):
            found = self._record(key, given)
        return self.function(*given) if found is None else found(*given)

    def _worth_it(self, key: Any) -> bool:
        if not self._able or len(self._recordings) >= MOST:
            return False
        self._calls[key] = self._calls.get(key, 0) + 1
        return self._calls[key] > CALLS_BEFORE

    def _record(self, key: Any, given: Sequence[Tensor | None]) -> Recording | None:
        try:
            self._recordings[key] = record(self.function, given)
        except RuntimeError as error:
            self.forget()  # they hold memory, which may be what was missing
            self._able = False
            reason = " ".join(str(error).split())[:120]
            self.announce(f"no CUDA graph of this network ({reason}): it runs call by call")
        return self._recordings.get(key)


def record(function: Callable[..., Tensor], given: Sequence[Tensor | None]) -> Recording:
    """The graph of function(*given), on copies of `given`; RuntimeError where there is none."""
    held = tuple(None if value is None else value.detach().clone() for value in given)
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            function(*held)
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = function(*held)
    return Recording(graph, held, made)


def _signature(given: Sequence[Tensor | None]) -> Any:
    shapes = tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in given)
    return *shapes, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


class CapturedNetwork:
    """A network that runs as graphs where no gradient is wanted.

    Call `renew` after weights were changed and before the network is called again.

    Args:
        forward: the network as it is prepared: compiled, in bfloat16, or itself.
        network: itself.
        announce: told where there is no graph.
    """

    def __init__(
        self, forward: Denoiser, network: Network, announce: Callable[[str], None]
    ) -> None:
        self.forward, self._network = forward, network
        self._recorder = Recorder(forward, announce)
        self._addresses: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        """What samplers ask a network for, such as `prediction`."""
        return getattr(self._network, name)

    def renew(self) -> None:
        """Take note of the weights as they are now."""
        network = self._network
        tensors = [*network.parameters(), *network.buffers(), *network.kept()]
        addresses = {tensor.data_ptr() for tensor in tensors}
        if not self._addresses <= addresses:
            self._recorder.forget()
        self._addresses = addresses

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        """The network's prediction."""
        if torch.is_grad_enabled():
            return self.forward(x, sigma, labels)
        return self._recorder(x, sigma, labels)


def as_graphs(
    network: Denoiser,
    settings: SamplerConfig,
    device: torch.device,
    announce: Callable[[str], None],
    below: int = PAYS_BELOW,
) -> Denoiser:
    """The network as `prepare_network` gives it, and as graphs where that pays.

    On a GPU, with fewer than `below` weights, and of a family that is known to fit
    (`Network.capturable`).
    """
    prepared = prepare_network(network, settings, device, announce)
    if device.type != "cuda" or not isinstance(network, Network) or not network.capturable:
        return prepared
    if sum(weight.numel() for weight in network.parameters()) >= below:
        return prepared
    return CapturedNetwork(prepared, network, announce)


def renew(*networks: Denoiser | None) -> None:
    """Tell those that run as graphs that weights may have changed."""
    for network in networks:
        if isinstance(network, CapturedNetwork):
            network.renew()
