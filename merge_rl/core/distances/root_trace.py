"""Trace of a matrix square root after a change of low rank, without its eigenvalues.

For every l >= 0 holds √l = (1/π) ∫₀^∞ log(1 + l/x²) dx. Summed over the eigenvalues of M and of
M' = M + Fᵀ C F, both symmetric and positive semidefinite, and with the matrix determinant lemma,

    tr √M' − tr √M = (1/π) ∫₀^∞ log det(I + C F (M + x²)⁻¹ Fᵀ) dx,

determinants no larger than the rank of the change. In the eigenbasis of M, (M + x²)⁻¹ is a
division, so that one eigendecomposition serves any number of changes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_NODES = 40
_DEPTH, _REACH = 27.0, 1.5  # nodes lie between √h e^-27 and √h e^1.5 for eigenvalues up to h
_GRID = 4001


@dataclass(frozen=True, eq=False)
class RootRule:
    """√l ≈ (1/π) Σ_j weight_j log(1 + l/x_j²) + slope l for l in 0..1.

    nodes and weights (J,) float64, both positive. `variation` is the total variation over 0..1 of
    the rule's error as a function of l. A change of M that moves at most k eigenvalues past any
    point, in either direction, therefore puts the rule wrong by at most k times the variation:
    the numbers of eigenvalues of M and M' below l differ by k at most, and tr √M' − tr √M is the
    integral of that difference over √l.
    """

    nodes: Tensor
    weights: Tensor
    slope: float
    variation: float


@functools.lru_cache(maxsize=1)
def root_rule() -> RootRule:
    """The rule with J = 40 nodes; its variation is about 2e-10.

    Rational functions come closest to √l with poles that crowd at 0 like exp(c √j) (Stahl, 1993,
    Bull. AMS 28): the nodes follow that, and the weights are fitted by least squares on a
    logarithmic grid that reaches below the smallest node.
    """
    steps = (torch.arange(NUM_NODES, dtype=torch.float64) + 0.5) / NUM_NODES
    nodes = torch.exp((_DEPTH + _REACH) * steps.sqrt() - _DEPTH)
    grid = torch.logspace(-2.0 * _DEPTH / math.log(10) - 3, 0, _GRID, dtype=torch.float64)
    # What lies above the last node adds nearly l / x: the slope.
    columns = torch.cat([_logs(grid, nodes), grid[:, None]], 1)
    scale = columns.amax(0)
    fit = torch.linalg.lstsq(
        columns / scale, grid.sqrt()[:, None], rcond=torch.finfo(torch.float64).eps, driver="gelsd"
    )
    solution = fit.solution[:, 0] / scale
    weights, slope = solution[:-1], float(solution[-1])
    fine = torch.cat([grid.new_zeros(1), torch.logspace(-30, 0, 5 * _GRID, dtype=torch.float64)])
    error = _logs(fine, nodes) @ weights + slope * fine - fine.sqrt()
    return RootRule(nodes, weights, slope, float(error.diff().abs().sum()))


def _logs(values: Tensor, nodes: Tensor) -> Tensor:
    return torch.log1p(values[:, None] / nodes.square()) / math.pi


def root_trace_changes(
    values: Tensor, removed: Tensor, added: Tensor, count: int, rule: RootRule
) -> tuple[Tensor, Tensor]:
    """tr √M'_p − tr √M for candidates p that replace the same rows, and bounds on the errors.

    M = diag(values), values (r,) >= 0, is the covariance of N = count rows, and M'_p what it
    becomes when the rows `removed` (n, r) turn into `added` (P, n, r). Rows are taken about the
    mean, divided by √(N−1), in the eigenbasis of M; all in float64. With a candidate's rows R, the
    removed rows O, and h = Σ R − Σ O, by which the mean moves,

        M'_p = M + Rᵀ R − Oᵀ O − h hᵀ/N.

    Returns two tensors (P,): the changes, and what the rule (a bound) and rounding (an estimate)
    put them wrong by at most; infinite where rounding leaves no answer. Costs J products of (n, r)
    and (r, 2n) a candidate.
    """
    changes = removed.new_empty(len(added))
    errors = torch.empty_like(changes)
    highest = max(float(values.max()), torch.finfo(torch.float64).tiny)
    # Something no eigenvalue of M' exceeds. Powers of two keep most candidates together, and none
    # is put wrong by what another one has made.
    growth = added.square().sum((1, 2)) / highest
    doublings = torch.log2(1 + growth).ceil()
    for power in sorted(set(doublings.tolist())):
        part = doublings == power
        nodes = _ScaledRule(rule, highest * 2.0**power)
        changes[part], errors[part] = _changes(values, removed, added[part], count, nodes)
    return changes, errors


class _ScaledRule:
    """The rule for eigenvalues in 0..scale."""

    def __init__(self, rule: RootRule, scale: float) -> None:
        root = math.sqrt(scale)
        self.nodes = (rule.nodes * root).tolist()
        self.weights = (rule.weights * (root / math.pi)).tolist()
        self.slope, self.variation = rule.slope / root, rule.variation * root


def _changes(
    values: Tensor, removed: Tensor, added: Tensor, count: int, rule: _ScaledRule
) -> tuple[Tensor, Tensor]:
    size = len(removed)
    # What is taken away, as rows of [R; O]: the removed rows, and h/√N.
    taken = torch.eye(2 * size).to(removed)[size - 1 :]
    taken[0, :size], taken[0, size:] = count**-0.5, -(count**-0.5)
    changes = rule.slope * _trace_changes(removed, added, count)
    errors = torch.full_like(changes, (size + 1) * rule.variation)
    for node, weight in zip(rule.nodes, rule.weights, strict=True):
        inner = _resolvent_products((values + node**2).reciprocal(), removed, added)
        logs, lost = _log_determinants(inner, taken)
        changes += weight * logs
        errors += weight * lost
    return changes, errors


def _log_determinants(inner: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """log det(I + C F (M + x²)⁻¹ Fᵀ) of candidates (P,), and what rounding does to it.

    F has the added rows R, which C counts +1, and what is taken away, G = `taken` [R; O], which it
    counts −1. With K = F (M + x²)⁻¹ Fᵀ in blocks, the determinant is that of I + K_RR times that of

        I − K_GG + K_GR (I + K_RR)⁻¹ K_RG,

    both symmetric and positive definite: Cholesky factors need no row swaps. (LU factors do, and
    oneMKL 2024.2 goes wrong there from 160 rows on where several threads share a batch.)
    """
    size = inner.shape[-1] // 2
    across = inner[:, :size] @ taken.T
    one = torch.eye(size + 1).to(inner)
    grown, failed_grown = torch.linalg.cholesky_ex(inner[:, :size, :size] + one[:size, :size])
    solved = torch.linalg.solve_triangular(grown, across, upper=False)
    left, failed = torch.linalg.cholesky_ex(one - taken @ inner @ taken.T + solved.mT @ solved)
    pivots = [factor.diagonal(dim1=-2, dim2=-1) for factor in (grown, left)]
    logs = 2 * torch.cat(pivots, -1).log().sum(-1)
    # What is taken is subtracted from 1, and what is large comes in beside it: there digits go.
    largest = inner.diagonal(dim1=-2, dim2=-1).amax(-1)
    margin = pivots[1].amin(-1).square()
    lost = 64 * size * torch.finfo(torch.float64).eps * (1 + largest) / margin
    sound = (failed_grown == 0) & (failed == 0)
    return torch.where(sound, logs, 0.0), torch.where(sound, lost, torch.inf)


def _trace_changes(removed: Tensor, added: Tensor, count: int) -> Tensor:
    """tr M' − tr M of each candidate, (P,)."""
    shift = (added - removed).sum(1)  # row by row first: two large sums would cancel
    grown = added.square().sum((1, 2)) - removed.square().sum()
    return grown - shift.square().sum(1) / count


def _resolvent_products(weights: Tensor, removed: Tensor, added: Tensor) -> Tensor:
    """F diag(weights) Fᵀ of every candidate, (P, 2n, 2n), its added rows first."""
    size = len(removed)
    inner = removed.new_empty(len(added), 2 * size, 2 * size)
    weighted = added * weights
    inner[:, :size, :size] = weighted @ added.mT
    inner[:, :size, size:] = weighted @ removed.T
    inner[:, size:, :size] = inner[:, :size, size:].mT
    inner[:, size:, size:] = (removed * weights) @ removed.T
    return inner
