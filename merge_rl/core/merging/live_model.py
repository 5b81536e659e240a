"""A network whose weights are a merge, changed in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from merge_rl.core.merging.buffers import Checkpoints, as_float32
from merge_rl.core.merging.maps import CoefficientMap
from merge_rl.core.network import Network, against
from merge_rl.errors import ConfigError

_CHUNK = 1 << 20  # elements of each checkpoint held in float64 at a time


def coefficient_gradient(checkpoints: Checkpoints, gradient: Tensor) -> Tensor:
    """The gradient of the coefficients, (G, K) float64 on the CPU, from that of the weights.

        w_g = sum_k c[g, k] w_{g,k}   =>   dL / dc[g, k] = <dL / dw_g, w_{g,k}>

    One pass over the checkpoints, the bytes of one merge, whatever the number of groups. Products
    are summed in float64 (float32 where the device has no float64) over fixed blocks in a fixed
    order: the same bits from every kind of storage.

    Args:
        checkpoints: what was merged.
        gradient: (size,), of the flat weights, on the device to work on.

    Raises ConfigError for a gradient of another shape.
    """
    if tuple(gradient.shape) != (checkpoints.layout.size,):
        expected = f"({checkpoints.layout.size},)"
        raise ConfigError(f"expected a gradient {expected}, got {tuple(gradient.shape)}")
    device = gradient.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    shape = checkpoints.layout.num_groups, checkpoints.num_checkpoints
    found = torch.zeros(shape, dtype=wide, device=device)
    for start, stop, group, sources in checkpoints.blocks(_CHUNK):
        rows = torch.stack(list(sources)).to(device).to(wide)
        found[group] += rows @ gradient[start:stop].to(wide)
    return found.to("cpu", torch.float64)


def theta_gradient(coefficients: CoefficientMap, theta: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of theta, (D,) float64: (dc / dtheta)ᵀ times that of the coefficients (G, K)."""
    point = theta.detach().to(torch.float64).clone().requires_grad_(True)
    with torch.enable_grad():
        rows = coefficients(point)
    (found,) = torch.autograd.grad(against(rows, gradient.to(rows)), point, allow_unused=True)
    return torch.zeros_like(theta, dtype=torch.float64) if found is None else found


class LiveModel:
    """A network whose parameters are views of one flat buffer, so that a merge writes in place.

    Merges are made on the network's device, chunk by chunk where the checkpoints lie elsewhere.
    """

    def __init__(self, model: nn.Module, checkpoints: Checkpoints) -> None:
        state = model.state_dict()
        device = next((tensor.device for tensor in state.values()), checkpoints.device)
        self.model, self.checkpoints = model, checkpoints
        self._flat = torch.empty(checkpoints.layout.size, device=device)
        views = checkpoints.layout.views(self._flat)
        expected = {name: tensor.shape for name, tensor in state.items()}
        found = {name: tensor.shape for name, tensor in {**views, **checkpoints.fixed}.items()}
        if expected != found:
            names = expected.keys() | found.keys()
            odd = sorted(name for name in names if expected.get(name) != found.get(name))
            raise ConfigError(
                f"the network and the checkpoints differ in {len(odd)} tensors, first {odd[0]!r}"
            )
        self._bind(views)

    def _bind(self, views: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, view in views.items():
                owner, leaf = self._owner(name)
                # A parameter made of a view shares its version counter: caches of derived weights
                # notice every merge.
                setattr(owner, leaf, nn.Parameter(view, requires_grad=False))
            for name, tensor in self.checkpoints.fixed.items():
                owner, leaf = self._owner(name)
                current = getattr(owner, leaf)
                value = as_float32(tensor).to(self._flat.device)
                if isinstance(current, nn.Parameter):
                    setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
                else:
                    setattr(owner, leaf, value)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def set_coefficients(self, coefficients: Tensor) -> None:
        """Turn the network into the merge with these coefficients (G, K)."""
        with torch.no_grad():
            self.checkpoints.merge(coefficients, out=self._flat)

    @contextmanager
    def gradients(self) -> Iterator[Tensor]:
        """Inside, backward passes add the gradient of the flat weights up in the tensor (size,).

        It is whole once this is left. Parameters outside the merge have none, and afterwards none
        has. Weights must not change inside.
        """
        total = torch.zeros_like(self._flat)
        views = self.checkpoints.layout.views(total)
        try:
            for name, view in views.items():
                parameter = self.model.get_parameter(name)
                parameter.requires_grad_(True).grad = view
            network = self.model
            with network.derived_once() if isinstance(network, Network) else nullcontext():
                yield total
        finally:
            for name in views:
                parameter = self.model.get_parameter(name)
                parameter.requires_grad_(False).grad = None
