"""From the gradient of merged weights to that of the coefficients, and to that of theta."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_rl.core.merging.buffers import Checkpoints
from merge_rl.core.merging.maps import CoefficientMap
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
    (found,) = torch.autograd.grad(rows, point, grad_outputs=gradient.to(rows), allow_unused=True)
    return torch.zeros_like(theta, dtype=torch.float64) if found is None else found
