"""The trace of a root after a change of low rank: the rule, the change, and the promised bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from merge_rl.core.distances.root_trace import root_rule, root_trace_changes


def test_the_rule_is_the_root() -> None:
    rule = root_rule()
    assert rule.nodes.shape == rule.weights.shape
    assert bool((rule.weights > 0).all())
    assert rule.variation < 3e-10
    values = torch.tensor([0.0, 1e-25, 1e-12, 3e-7, 0.02, 0.5, 1.0], dtype=torch.float64)
    logs = torch.log1p(values[:, None] / rule.nodes.square())
    found = logs @ rule.weights / math.pi + rule.slope * values
    # Off by no more than the variation anywhere: it is 0 at 0.
    torch.testing.assert_close(found, values.sqrt(), rtol=0, atol=rule.variation)


def test_a_change_by_hand() -> None:
    # One dimension, N = 2: the rows 1 and -1 have mean 0 and variance 2. The first becomes 3:
    # rows 3 and -1 have mean 1 and variance 8, so the root grows from sqrt 2 to sqrt 8.
    values = torch.tensor([2.0], dtype=torch.float64)
    removed, added = torch.tensor([[1.0]]).double(), torch.tensor([[[3.0]]]).double()
    changes, errors = root_trace_changes(values, removed, added, 2, root_rule())
    assert float(changes) == pytest.approx(math.sqrt(2), rel=1e-8)
    assert 0 < float(errors) < 1e-8


def spread_rows(count: int, dim: int, decay: float, generator: torch.Generator) -> Tensor:
    rows = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return rows * torch.logspace(0, -decay, dim, dtype=torch.float64)


def diagonalised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the covariance of rows (N, r), and the rows in its basis and scale."""
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    scaled = (rows - rows.mean(0)) @ vectors / (len(rows) - 1) ** 0.5
    return values.clamp(min=0), scaled


def root_trace(rows: Tensor) -> float:
    # Singular values of the centred rows: exact to rounding, however small they are.
    centred = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
    return float(torch.linalg.svdvals(centred).sum())


@pytest.mark.parametrize(
    ("count", "dim", "size", "decay"),
    [(300, 40, 7, 1), (300, 40, 7, 5), (90, 60, 20, 3), (200, 64, 1, 5), (500, 30, 60, 2)],
)
def test_changes_match_and_keep_their_bound(
    count: int, dim: int, size: int, decay: float, generator: torch.Generator
) -> None:
    rows = spread_rows(count, dim, decay, generator)
    fresh = torch.stack(
        [s * spread_rows(size, dim, decay, generator) + s / 9 for s in (0.1, 1.0, 3.0)]
    )
    values, scaled = diagonalised(rows)
    _, vectors = torch.linalg.eigh(torch.cov(rows.T))
    added = (fresh - rows.mean(0)) @ vectors / (count - 1) ** 0.5
    changes, errors = root_trace_changes(values, scaled[:size], added, count, root_rule())
    for new, change, error in zip(fresh, changes.tolist(), errors.tolist(), strict=True):
        expected = root_trace(torch.cat([new, rows[size:]])) - root_trace(rows)
        assert abs(change - expected) <= error < 1e-6


def test_candidates_do_not_disturb_each_other(generator: torch.Generator) -> None:
    # One that is a thousand times too large needs other nodes; the others keep theirs.
    values, scaled = diagonalised(spread_rows(100, 20, 2, generator))
    added = torch.stack([scaled[50:55], 1000 * scaled[55:60], scaled[60:65]])
    together, bounds = root_trace_changes(values, scaled[:5], added, 100, root_rule())
    alone = [root_trace_changes(values, scaled[:5], x[None], 100, root_rule()) for x in added]
    torch.testing.assert_close(together, torch.cat([c for c, _ in alone]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bounds, torch.cat([e for _, e in alone]), rtol=1e-9, atol=0)
    assert bounds[1] > 100 * bounds[0]


def test_rows_that_take_a_direction_with_them(generator: torch.Generator) -> None:
    # 20 rows span 19 dimensions; without three of them it is 16, and determinants vanish.
    rows = spread_rows(20, 19, 1, generator)
    values, scaled = diagonalised(rows)
    added = 0.5 * scaled[3:6][None]
    changes, errors = root_trace_changes(values, scaled[:3], added, 20, root_rule())
    expected = root_trace(torch.cat([added[0], scaled[3:]]) * 19**0.5) - root_trace(rows)
    assert abs(float(changes) - expected) <= float(errors)
    # Rounding is what is felt: with 17 rows more it is not.
    values, scaled = diagonalised(spread_rows(37, 19, 1, generator))
    _, usual = root_trace_changes(values, scaled[:3], 0.5 * scaled[3:6][None], 37, root_rule())
    assert float(errors) > 3 * float(usual)


def test_several_threads_share_a_batch(generator: torch.Generator) -> None:
    # Batched factorisations of some size take other ways where there are several threads.
    rows = spread_rows(300, 6, 1, generator)
    values, scaled = diagonalised(rows)
    added = torch.stack([s * scaled[200:290] for s in (0.5, 2.0)])
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        try:
            found.append(root_trace_changes(values, scaled[:90], added, 300, root_rule())[0])
        finally:
            torch.set_num_threads(threads)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    expected = root_trace(torch.cat([added[1], scaled[90:]]) * 299**0.5) - root_trace(rows)
    assert float(found[0][1]) == pytest.approx(expected, rel=1e-7)
