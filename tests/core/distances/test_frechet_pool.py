"""Distances of a pool with replaced rows: both ways against recomputation, singular cases too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from merge_rl.core.distances import frechet_pool
from merge_rl.core.distances.frechet import frechet_distance
from merge_rl.core.distances.frechet_pool import FrechetPool, ReferenceFactor
from merge_rl.core.distances.statistics import FeatureStats, feature_stats
from merge_rl.errors import StatisticsError, TooFewSamplesError


def draw(count: int, dim: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
    spread = torch.logspace(0, -2, dim)
    turn, _ = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(4)))
    rows: Tensor = (torch.randn(count, dim, generator=generator) * spread + shift) @ turn + 0.4
    return rows


@pytest.fixture
def always_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices too are updated, not decomposed for every candidate."""
    monkeypatch.setattr(frechet_pool, "MIN_RANK", 1)
    monkeypatch.setattr(frechet_pool, "MAX_SHARE", math.inf)


def explicit(features: Tensor, fresh: Tensor, real: Tensor) -> list[float]:
    """Distances from the moments of all rows, the first n of them replaced."""
    size = fresh.shape[1]
    sets = [torch.cat([new, features[size:]]) for new in fresh]
    return [frechet_distance(feature_stats(x), feature_stats(real)) for x in sets]


SIZES = [
    pytest.param(300, 24, 400, 10, id="usual"),
    pytest.param(40, 24, 30, 10, id="few rows"),
    pytest.param(20, 24, 400, 5, id="pool of lower rank"),
    pytest.param(300, 24, 12, 10, id="reference of lower rank"),
    pytest.param(15, 24, 12, 4, id="both of lower rank"),
    pytest.param(30, 6, 40, 30, id="all rows"),
    pytest.param(25, 1, 25, 3, id="one dimension"),
    pytest.param(300, 24, 400, 0, id="nothing replaced"),
]


@pytest.mark.parametrize(("count", "dim", "reals", "size"), SIZES)
@pytest.mark.parametrize("updating", [False, True])
def test_distances_are_those_of_all_rows(
    count: int, dim: int, reals: int, size: int, updating: bool, generator: torch.Generator,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if updating:
        request.getfixturevalue("always_update")
    real, features = draw(reals, dim, generator), draw(count, dim, generator, 0.1)
    fresh = torch.stack([draw(size, dim, generator, shift) for shift in (0.0, 0.3, -2.0)])
    pool = ReferenceFactor.from_stats(feature_stats(real)).pool(feature_stats(features))
    found = pool.distances_with(features[:size], fresh)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(explicit(features, fresh, real), rel=1e-6)
    expected = frechet_distance(feature_stats(features), feature_stats(real))
    assert pool.distance == pytest.approx(expected, rel=1e-9)


@pytest.mark.usefixtures("always_update")
def test_both_ways_agree(generator: torch.Generator) -> None:
    real, features = draw(500, 40, generator), draw(200, 40, generator, 0.1)
    fresh = torch.stack([draw(20, 40, generator, 0.1 * i) for i in range(5)])
    pool = ReferenceFactor.from_stats(feature_stats(real)).pool(feature_stats(features))
    exact = pool.distances_with(features[:20], fresh, by_eigenvalues=True)
    torch.testing.assert_close(pool.distances_with(features[:20], fresh), exact, rtol=1e-9, atol=0)


@pytest.mark.usefixtures("always_update")
def test_what_the_bound_does_not_vouch_for_is_decomposed(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where nothing is left of the distance, no bound is below a millionth of it.
    features, fresh = draw(90, 24, generator), draw(8, 24, generator).reshape(2, 4, 24)
    real = torch.cat([fresh[1], features[4:]])
    asked = []
    original = FrechetPool._overlaps_by_eigenvalues

    def watched(self: FrechetPool, old: Tensor, new: Tensor) -> Tensor:
        asked.append(len(new))
        return original(self, old, new)

    monkeypatch.setattr(FrechetPool, "_overlaps_by_eigenvalues", watched)
    pool = ReferenceFactor.from_stats(feature_stats(real)).pool(feature_stats(features))
    found = pool.distances_with(features[:4], fresh).tolist()
    assert asked == [1]
    assert found[0] == pytest.approx(explicit(features, fresh, real)[0], rel=1e-6)
    assert found[1] == pytest.approx(0, abs=1e-6)


def test_many_candidates_in_small_chunks(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, features = draw(300, 8, generator), draw(100, 8, generator, 0.1)
    fresh = torch.stack([draw(6, 8, generator, 0.1 * i) for i in range(7)])
    fresh[2, 1, 3] = math.inf
    pool = ReferenceFactor.from_stats(feature_stats(real)).pool(feature_stats(features))
    at_once = pool.distances_with(features[:6], fresh)
    monkeypatch.setattr(frechet_pool, "CHUNK_BYTES", 1)
    one_by_one = pool.distances_with(features[:6], fresh)
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-12, atol=0, equal_nan=True)
    assert at_once.isnan().tolist() == [False, False, True, False, False, False, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_candidates_that_are_not_finite_are_nan(value: float, generator: torch.Generator) -> None:
    features = draw(60, 4, generator)
    fresh = draw(10, 4, generator).reshape(2, 5, 4)
    fresh[1, 4, 0] = value
    pool = ReferenceFactor.from_stats(feature_stats(features)).pool(feature_stats(features))
    found = pool.distances_with(features[:5], fresh).tolist()
    assert math.isfinite(found[0])
    assert math.isnan(found[1])
    assert pool.distances_with(features[:5], fresh[:0]).shape == (0,)


@pytest.mark.parametrize(("count", "dim"), [(5, 24), (24, 24), (25, 24), (200, 24), (2, 3)])
def test_own_images(count: int, dim: int, generator: torch.Generator) -> None:
    # Fewer rows than dimensions and more go different ways.
    real, features = draw(300, dim, generator), draw(count, dim, generator, 0.2)
    reference = ReferenceFactor.from_stats(feature_stats(real))
    expected = frechet_distance(feature_stats(features), feature_stats(real))
    assert reference.distance_of(features) == pytest.approx(expected, rel=1e-9)


def test_a_reference_of_equal_images(generator: torch.Generator) -> None:
    # No variance: the distance is |μ − μr|² + tr Σ.
    features = draw(50, 4, generator)
    stats = feature_stats(features)
    reference = ReferenceFactor.from_stats(feature_stats(torch.ones(9, 4)))
    expected = float((stats.mean - 1).square().sum() + stats.cov.trace())
    assert reference.pool(stats).distance == pytest.approx(expected, rel=1e-12)
    assert reference.rank == 1


def test_only_directions_that_vary_are_kept() -> None:
    # The second feature is constant, the first varies by less than one.
    cov = torch.diag(torch.tensor([0.25, 0.0, 9.0], dtype=torch.float64))
    stats = FeatureStats(5, torch.zeros(3, dtype=torch.float64), cov)
    reference = ReferenceFactor.from_stats(stats)
    assert reference.rank == 2
    torch.testing.assert_close(reference.factor @ reference.factor.T, cov, rtol=1e-12, atol=0)


def test_what_does_not_fit_is_refused(generator: torch.Generator) -> None:
    features = draw(20, 4, generator)
    reference = ReferenceFactor.from_stats(feature_stats(features))
    pool = reference.pool(feature_stats(features))
    message = r"expected removed rows \(n, 4\), n <= 20, and added rows \(P, n, 4\), got shapes "
    for removed, added in (
        (features[:3], features[:2][None]),
        (features[:3], features[:3]),
        (features[:3, :2], features[None, :3, :2]),
        (features.repeat(2, 1), features.repeat(2, 1)[None]),
    ):
        with pytest.raises(StatisticsError, match=message):
            pool.distances_with(removed, added)
    with pytest.raises(StatisticsError, match="got 3 and 4"):
        reference.pool(feature_stats(features[:, :3]))
    with pytest.raises(TooFewSamplesError, match="at least 2 feature rows, got 1"):
        reference.distance_of(features[:1])
    with pytest.raises(StatisticsError, match="1 of 20 rows with NaN"):
        reference.distance_of(torch.cat([features[:19], torch.full((1, 4), math.nan)]))
