"""Gaussian policies over theta: log-probabilities, advantages, selection, losses."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from merge_rl.errors import ConfigError


def antithetic_normal(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Unit normal draws (count, dim) float64 in pairs (e, -e), one pair after the other.

    Pairs cancel the even part of the reward's expansion out of the gradient estimate, the largest
    part of its noise. An odd `count` ends with a single draw.
    """
    half = torch.randn((count + 1) // 2, dim, generator=generator, dtype=torch.float64)
    return torch.stack([half, -half], dim=1).reshape(-1, dim)[:count]


def orthogonal_pairs(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Pairs (e, -e) along random directions at right angles, (count, dim) float64.

    Up to `dim` pairs are orthogonal to each other and sqrt(dim) long; then a new set begins, whose
    lengths are those of normal draws, so that in few dimensions no pair comes twice. E[e eᵀ] = I
    in every set. Independent draws overlap, and what one
    direction finds leaks into the others: about sqrt(dim / pairs) of a gradient's length, which
    orthogonal ones leave out (Choromanski et al., 2018, arXiv:1804.02395).
    """
    rows: list[Tensor] = []
    while len(rows) < (count + 1) // 2:
        lengths = torch.full((dim, 1), math.sqrt(dim), dtype=torch.float64)
        if rows:
            normal = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
            lengths = normal.norm(dim=1, keepdim=True)
        square = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(square)
        # With the signs of r's diagonal q is uniform over all rotations (Mezzadri, 2007).
        rows += list(lengths * (q * r.diagonal().sign()).T)
    half = torch.stack(rows[: (count + 1) // 2])
    return torch.stack([half, -half], dim=1).reshape(-1, dim)[:count]


def plain_normal(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Independent unit normal draws (count, dim) float64."""
    return torch.randn(count, dim, generator=generator, dtype=torch.float64)


def gaussian_log_prob(thetas: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(theta; mean, diag(std^2)) of each row: (P, D), (D,), (D,) -> (P,)."""
    z = (thetas - mean) / std
    return -(0.5 * z.square() + std.log() + 0.5 * math.log(2 * math.pi)).sum(1)


def rank_failures_last(rewards: Tensor) -> Tensor:
    """Rewards (P,) with every non-finite one replaced by the worst finite one.

    A failed candidate must not win, and an infinite penalty would drown the others in the batch's
    standard deviation. If none is finite, all are 0: no candidate teaches anything.
    """
    finite = rewards.isfinite()
    if not bool(finite.any()):
        return torch.zeros_like(rewards)
    return torch.where(finite, rewards, rewards[finite].min())


def batch_advantages(rewards: Tensor) -> Tensor:
    """(R - mean) / std over the batch, (P,) -> (P,) (arXiv:2607.02291, equation 5).

    Failed candidates count as the worst finite one. A batch without spread has advantages 0.
    """
    values = rank_failures_last(rewards.double())
    centred = values - values.mean()
    spread = centred.square().mean().sqrt()
    # Below rounding of the rewards themselves a spread is no information.
    if float(spread) <= 1e-12 * max(1.0, float(values.abs().max())):
        return torch.zeros_like(values)
    return centred / spread


def rank_advantages(rewards: Tensor) -> Tensor:
    """Places of the rewards instead of their values, (P,) -> (P,), of mean 0 and variance 1.

    The worst is 0, the next 1 and so on, equal rewards share the mean of their places, then as
    `batch_advantages`: outliers weigh no more than a place (as in CMA-ES and NES; Wierstra et al.,
    2014, section 3.1). Failed candidates count as the worst finite one.
    """
    values = rank_failures_last(rewards.double())
    below = (values[:, None] > values[None, :]).sum(1)
    equal = (values[:, None] == values[None, :]).sum(1)
    return batch_advantages(below + (equal - 1) / 2)


SHAPINGS: Final = {"batch": batch_advantages, "rank": rank_advantages}


def keep_top_fraction(advantages: Tensor, fraction: float) -> Tensor:
    """Mask (P,) of the ceil(fraction P) largest advantages; ties go to the earlier candidate.

    The paper keeps the top 25 % of all rollouts; 1 keeps everything.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"expected a fraction in (0, 1], got {fraction}")
    count = math.ceil(fraction * len(advantages) - 1e-9)
    order = torch.argsort(advantages, descending=True, stable=True)
    mask = torch.zeros(len(advantages), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def clipped_policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip: float
) -> Tensor:
    """- mean min(r A, clip(r, 1 - c, 1 + c) A), r = exp(log_prob - old_log_prob); (P,) -> ().

    PPO's surrogate (Schulman et al., 2017, arXiv:1707.06347, equation 7). On policy r = 1 and its
    gradient is REINFORCE's, -mean A grad log_prob. `clip` infinity switches clipping off.
    """
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clip(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()
