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
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from merge_rl.config import SamplerConfig
from merge_rl.core.network import Network
from merge_rl.interfaces import Denoiser
from merge_rl.workflows.rollout.execution import is_out_of_memory, prepare_network

PAYS_BELOW: Final = 2**28  # weights; kernels of larger networks outlast the host's work
BACK_PAYS_BELOW: Final = 2**23  # there a call is made again, which costs larger ones more
CALLS_BEFORE: Final = 32  # of a shape: recording costs as much as several calls
MOST: Final = 8  # graphs kept of one kind
WARM_UPS: Final = 3  # libraries choose kernels and take their workspaces

Given = tuple[Tensor | None, ...]
Made = tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Recording:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    given: Given
    made: Made

    def __call__(self, *given: Tensor | None) -> Made:
        """Run on new values; what is returned is overwritten by the next run."""
        for held, value in zip(self.given, given, strict=True):
            if held is not None and value is not None:
                held.copy_(value)
        self.graph.replay()
        return self.made


class Recorder:
    """Runs a function of tensors, as a graph once it was called often enough with one shape.

    A function that cannot be recorded is announced once, and runs as it is from then on.
    """

    def __init__(self, function: Callable[..., Made], announce: Callable[[str], None]) -> None:
        self.function, self.announce = function, announce
        self._recordings: dict[Any, Recording] = {}
        self._calls: dict[Any, int] = {}
        self._able = True

    def forget(self) -> None:
        """Drop all graphs: an address that they know is no longer valid."""
        self._recordings.clear()

    def __call__(self, *given: Tensor | None) -> Made:
        """function(*given); what it returns may be overwritten by the next call."""
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
            if is_out_of_memory(error):
                raise
            self._able = False
            reason = " ".join(str(error).split())[:120]
            self.announce(f"no CUDA graph of this network ({reason}): it runs call by call")
        return self._recordings.get(key)


def record(function: Callable[..., Made], given: Sequence[Tensor | None]) -> Recording:
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
    """A network that runs as graphs, forwards and, inside `LiveModel.gradients`, backwards.

    Backwards it keeps nothing of the way there but its inputs, and adds the gradients of weights to
    their `grad`. Call `renew` after weights were changed and before the network is called again.

    Args:
        forward: the network as it is prepared: compiled, in bfloat16, or itself.
        network: itself.
        announce: told where there is no graph.
    """

    def __init__(
        self, forward: Denoiser, network: Network, announce: Callable[[str], None]
    ) -> None:
        self.forward, self._network = forward, network
        self._there = Recorder(self._made, announce)
        self._back = Recorder(self._pulled, announce)
        self._addresses: set[int] = set()
        self._weights: list[nn.Parameter] = []

    def __getattr__(self, name: str) -> Any:
        """What samplers ask a network for, such as `prediction`."""
        return getattr(self._network, name)

    def renew(self) -> None:
        """Take note of the weights as they are now."""
        network = self._network
        weights = list(network.parameters())
        tensors = [*weights, *network.buffers(), *network.kept()]
        addresses = {tensor.data_ptr() for tensor in tensors}
        if not self._addresses <= addresses:
            self._there.forget()
            self._back.forget()
        self._addresses = addresses
        trained = [weight for weight in weights if weight.requires_grad]
        if [id(weight) for weight in trained] != [id(weight) for weight in self._weights]:
            self._back.forget()
        self._weights = trained

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        """The network's prediction."""
        if torch.is_grad_enabled() and (x.requires_grad or self._weights):
            anchor = torch.zeros((), device=x.device, requires_grad=True)
            made: Tensor = _Differentiated.apply(self, x, sigma, labels, anchor)  # type: ignore[no-untyped-call]
            return made
        return self.plain(x, sigma, labels)

    def plain(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """The prediction, of which nothing is kept."""
        with torch.no_grad():
            (made,) = self._there(x, sigma, labels)
        assert made is not None
        return made.clone()

    def pull(self, gradient: Tensor, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """The gradient by x; those by the weights are added to their `grad`."""
        mine, *theirs = self._back(gradient.contiguous(), x.contiguous(), sigma, labels)
        totals, parts = list[Tensor](), list[Tensor]()
        for weight, added in zip(self._weights, theirs, strict=True):
            if added is not None:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                totals.append(weight.grad)
                parts.append(added)
        if totals:
            with torch.no_grad():
                torch._foreach_add_(totals, parts)
        assert mine is not None
        return mine.clone()

    def _made(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Made:
        return (self.forward(x, sigma, labels),)

    def _pulled(self, gradient: Tensor, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Made:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            made = self.forward(leaf, sigma, labels)
            return torch.autograd.grad(made, [leaf, *self._weights], gradient, allow_unused=True)


class _Differentiated(torch.autograd.Function):
    """A call of a captured network whose way there is gone over again on the way back."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        captured: CapturedNetwork,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None,
        _anchor: Tensor,
    ) -> Tensor:
        ctx.captured = captured
        ctx.save_for_backward(x, sigma, labels)
        return captured.plain(x, sigma, labels)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        pulled = ctx.captured.pull(gradient, *ctx.saved_tensors)
        return None, pulled, None, None, None


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
    prepared = prepare_network(network, settings, device)
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
