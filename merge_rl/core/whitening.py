"""Directions in which unit steps of the coefficients change the weights equally.

Checkpoints late in a run, or of one EMA track, are nearly alike: a step of 0.05 along the
difference of two neighbours hardly moves the weights, and the same step towards an early one may
ruin them. The Gram matrix of the checkpoints says which is which, so that exploration can be
measured in weights instead of coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_rl.core.merging import Checkpoints
from merge_rl.errors import ConfigError

_CHUNK = 1 << 20  # elements of each checkpoint held in float64 at a time


def weight_gram(checkpoints: Checkpoints, device: torch.device | None = None) -> Tensor:
    """Inner products of the checkpoints' merged parameters: (G, K, K) float64 on the CPU.

        gram[g, i, j] = sum over the elements of group g of weights_i weights_j

    One pass over the weights, on `device` (where they lie if None), in float64 where it has it.
    The same bits from every kind of storage: products of fixed blocks, in fixed order, each of
    a fresh copy, since libraries choose the order of a sum by where its operands start.
    """
    count, device = checkpoints.num_checkpoints, device or checkpoints.device
    gram = torch.zeros(checkpoints.layout.num_groups, count, count, dtype=torch.float64)
    wide = torch.float32 if device.type == "mps" else torch.float64
    for _, _, group, sources in checkpoints.blocks(_CHUNK):
        rows = torch.stack(list(sources)).to(device).to(wide)
        gram[group] += (rows @ rows.T).to("cpu", torch.float64)
    return gram


def whitened_basis(gram: Tensor, reach: float, cap: float) -> Tensor:
    """Moves of the coefficients, as columns of B (K, K-1), that change the weights alike.

    With C = I - 1/K, the moves whose sum is 0, and C gram C / s = V diag(λ) Vᵀ, where s is the
    mean squared norm of a checkpoint:

        B = V diag(reach / √(λ + ρ)),  ρ = (reach / cap)²

    A unit step along a column changes the weights by `reach` times their norm, or by less where
    checkpoints are so alike that this would take coefficients beyond `cap`: no entry of B exceeds
    `cap`. Columns sum to 0 and come in order of λ, smallest first; each one's largest entry is
    positive, so that no linear algebra library chooses the sign.

    Args:
        gram: (K, K) float64, K >= 2.
        reach: relative change of the weights, > 0.
        cap: largest coefficient of a unit step, > 0.

    Raises ConfigError for a Gram matrix that is not finite, or of weights that are all 0.
    """
    count = len(gram)
    if count < 2:
        raise ConfigError("expected at least 2 checkpoints for the whitened map, got 1")
    size = float(gram.diagonal().mean())
    if not bool(gram.isfinite().all()) or size <= 0:
        raise ConfigError("the whitened map needs finite weights that are not all 0")
    # An orthonormal basis of the moves whose sum is 0 keeps the direction (1, ..., 1) out.
    eye = torch.eye(count, dtype=torch.float64)
    moves = torch.linalg.qr(eye[:, 1:] - 1 / count).Q
    values, vectors = torch.linalg.eigh(moves.T @ (gram / size) @ moves)
    basis = moves @ vectors
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * largest.sign()
    scaled: Tensor = basis * (reach / (values.clamp(min=0) + (reach / cap) ** 2).sqrt())
    return scaled
