"""Kernel distances: by hand, invariants, official numbers, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_rl.core.distances.kernels import (
    Kernel,
    RBFKernel,
    cubic_kernel,
    kernel_distance,
    quadratic_distance,
)
from merge_rl.core.distances.statistics import FeatureStats
from merge_rl.errors import ConfigError, StatisticsError, TooFewSamplesError

PAIRS = ("a_vs_b", "a_vs_d", "c_vs_a")
Draws = list[tuple[Tensor, Tensor]]


def official_draws(
    state: np.random.RandomState, sizes: tuple[int, int], count: int, size: int, order: str
) -> Draws:
    """Row indices as other tools draw them; order "xy" draws those of the first set first."""
    draws = []
    for _ in range(count):
        found = {}
        for name in order:
            drawn = state.choice(sizes["xy".index(name)], size, replace=False)
            found[name] = torch.from_numpy(drawn)
        draws.append((found["x"], found["y"]))
    return draws


def distances_of(x: Tensor, y: Tensor, draws: Draws, kernel: Kernel = cubic_kernel) -> Tensor:
    found = [kernel_distance(x[i], y[j], kernel) for i, j in draws]
    return torch.tensor(found, dtype=torch.float64)


def test_kernel_distance_by_hand() -> None:
    # D = 2, k = (x·y/2 + 1)³. x: (2, 0), (0, 2): k = 1. y: (2, 2), (4, 0): k = (8/2 + 1)³ = 125.
    # Across: 4/2, 8/2, 4/2, 0 plus 1, cubed: 27, 125, 27, 1, mean 45. 1 + 125 − 2·45 = 36.
    x, y = torch.tensor([[2, 0], [0, 2]]), torch.tensor([[2, 2], [4, 0]])
    assert cubic_kernel(x, y).tolist() == [[27, 125], [27, 1]]
    assert kernel_distance(x, y) == pytest.approx(36, rel=1e-14)
    # With the diagonals, x: 27, 27, 1, 1, mean 14; y: 125, 729, 125, 125, mean 276.
    assert kernel_distance(x, y, biased=True) == pytest.approx(14 + 276 - 90, rel=1e-14)


def test_rbf_distance_by_hand() -> None:
    # Bandwidth² 1/(2 ln 2) makes k = 2^−d². x: 0, 1; y: 0, 2 on a line. Within 1/2 and 1/16; across
    # 1, 1/16, 1/2, 1/2, mean 33/64. With the diagonals: 3/4 and 17/32.
    kernel = RBFKernel(1 / math.sqrt(2 * math.log(2)))
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    expected = 1 / 2 + 1 / 16 - 33 / 32
    assert kernel_distance(x, y, kernel) == pytest.approx(expected, rel=1e-13)
    expected = 3 / 4 + 17 / 32 - 33 / 32
    assert kernel_distance(x, y, kernel, biased=True) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("block", [1024, 77])
@pytest.mark.parametrize(
    ("kernel", "key"),
    [
        (cubic_kernel, "exact_{}_float64"),
        (RBFKernel(10), "exact_rbf_sigma10_{}_float64"),
        (RBFKernel(3), "exact_rbf_sigma3_{}_float64"),
    ],
)
def test_all_pairs_match_exact_values(
    features: dict[str, Tensor], official: dict[str, Any],
    pair: str, block: int, kernel: Kernel, key: str,
) -> None:  # fmt: skip
    x, _, y = pair.partition("_vs_")
    for biased in (False, True):
        expected = official["kid"][pair][key.format("biased" if biased else "unbiased")]
        value = kernel_distance(features[x], features[y], kernel, biased=biased, block=block)
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("key", ["clean_fid", "clean_fid_small"])
def test_subsets_match_clean_fid(
    features: dict[str, Tensor], official: dict[str, Any], pair: str, key: str
) -> None:
    x, y = (features[name] for name in pair.split("_vs_"))
    settings = official["kid"][pair][key]["settings"]
    size = min(len(x), len(y), settings["max_subset_size"])
    state = np.random.RandomState(settings["numpy_global_seed"])
    draws = official_draws(state, (len(x), len(y)), settings["num_subsets"], size, "yx")
    value = float(distances_of(x, y, draws).mean())
    assert value == pytest.approx(official["kid"][pair][key]["value"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("family", ["torch_fidelity", "dgm_eval"])
def test_subsets_match_torch_fidelity_and_dgm_eval(
    features: dict[str, Tensor], official: dict[str, Any], pair: str, family: str
) -> None:
    x, y = (features[name] for name in pair.split("_vs_"))
    entries = {k: v for k, v in official["kid"][pair].items() if k.startswith(family)}
    entries.pop("torch_fidelity_default", None)  # an error there: too few rows for its default
    assert entries
    for expected in entries.values():
        settings = expected["settings"]
        count = settings.get("kid_subsets", settings.get("n_subsets"))
        size = settings.get("kid_subset_size", settings.get("subset_size"))
        seed = settings.get("rng_seed", settings.get("numpy_global_seed"))
        kernel = RBFKernel(settings["sigma"]) if "sigma" in settings else cubic_kernel
        state = np.random.RandomState(seed)
        draws = official_draws(state, (len(x), len(y)), count, size, "xy")
        values = distances_of(x, y, draws, kernel)
        assert float(values.mean()) == pytest.approx(expected["mean"], rel=1e-4, abs=1e-6)
        assert float(values.std(correction=0)) == pytest.approx(expected["std"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kernel", [cubic_kernel, RBFKernel(2.0)])
def test_subsets_estimate_without_bias(kernel: Kernel, generator: torch.Generator) -> None:
    # Each pair of rows is in as many of all subsets of 3 as any other: their mean is the distance.
    x, y = torch.randn(5, 2, generator=generator), 1 + torch.randn(4, 2, generator=generator)
    firsts = [torch.tensor(rows) for rows in itertools.combinations(range(5), 3)]
    seconds = [torch.tensor(rows) for rows in itertools.combinations(range(4), 3)]
    values = distances_of(x, y, list(itertools.product(firsts, seconds)), kernel)
    assert float(values.mean()) == pytest.approx(kernel_distance(x, y, kernel), rel=1e-12)


@pytest.mark.parametrize("kernel", [cubic_kernel, RBFKernel(2.0)])
def test_order_of_rows_and_of_sets_is_of_no_account(
    kernel: Kernel, generator: torch.Generator
) -> None:
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (7, 11))
    before = x.clone()
    value = kernel_distance(x, y, kernel, block=3)
    assert kernel_distance(y, x, kernel, block=4) == pytest.approx(value, rel=1e-10)
    assert kernel_distance(x.flip(0), y[[3, *range(3), *range(4, 11)]], kernel) == pytest.approx(
        value, rel=1e-10
    )
    assert torch.equal(x, before)


def test_rbf_ignores_translation_and_scales_with_its_bandwidth(generator: torch.Generator) -> None:
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (9, 13))
    value = kernel_distance(x, y + 0.5, RBFKernel(1.5))
    moved = kernel_distance(x + 20, y + 20.5, RBFKernel(1.5))
    scaled = kernel_distance(4 * x, 4 * y + 2, RBFKernel(6.0))
    assert moved == pytest.approx(value, rel=1e-10)
    assert scaled == pytest.approx(value, rel=1e-10)


def test_biased_distance_of_a_set_to_itself_is_zero(features: dict[str, Tensor]) -> None:
    for kernel in (cubic_kernel, RBFKernel(3.0)):
        value = kernel_distance(features["c"], features["c"], kernel, biased=True)
        assert value == pytest.approx(0, abs=1e-12)


def test_features_without_a_kernel_distance_are_refused() -> None:
    x = torch.ones(3, 4)
    with pytest.raises(TooFewSamplesError, match="at least 2 feature rows, got 1"):
        kernel_distance(x, x[:1])
    with pytest.raises(StatisticsError, match="got 4 and 2"):
        kernel_distance(x, x[:, :2])
    with pytest.raises(StatisticsError, match="got 0 and 0"):
        kernel_distance(x[:, :0], x[:, :0])
    with pytest.raises(StatisticsError, match="got 3 of 3 rows"):
        kernel_distance(x * torch.nan, x)
    with pytest.raises(ConfigError, match="got 0"):
        kernel_distance(x, x, block=0)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.inf, math.nan])
def test_bandwidths_that_are_none_are_refused(bandwidth: float) -> None:
    with pytest.raises(ConfigError, match=f"positive bandwidth, got {bandwidth}"):
        RBFKernel(bandwidth)


def test_a_quadratic_distance_from_moments_by_hand() -> None:
    # One dimension, mean 1, variance 4; rows 2 and 4 lie 1 and 3 from it. Of the kernel less its
    # constant, z² z'² + 2 z z': the pair has 9 + 6, the mean square 5 meets the variance in 20,
    # and the reference has 16 with itself: 15 + 16 - 2 * 20.
    real = FeatureStats(9, torch.ones(1).double(), 4 * torch.ones(1, 1).double())
    assert quadratic_distance(torch.tensor([[2.0], [4.0]]), real) == pytest.approx(-9.0)


def test_a_quadratic_distance_is_that_of_its_kernel() -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (12, 40))
    cov = (y - y.mean(0)).T @ (y - y.mean(0)) / 40
    found = quadratic_distance(x + 0.3, FeatureStats(40, y.mean(0), cov))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - y.mean(0), b - y.mean(0)
        return (a @ b.T / 5 + 1).square()

    pairs = kernel(x + 0.3, x + 0.3)
    within = (pairs.sum() - pairs.trace()) / (12 * 11)
    expected = within + kernel(y, y).mean() - 2 * kernel(x + 0.3, y).mean()
    assert found == pytest.approx(float(expected), rel=1e-10)
