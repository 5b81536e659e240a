"""Gaussian policies: densities, advantages and losses against hand values and torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.core.policy import (
    antithetic_normal,
    batch_advantages,
    clipped_policy_loss,
    gaussian_log_prob,
    keep_top_fraction,
    orthogonal_pairs,
    rank_advantages,
    rank_failures_last,
)
from merge_rl.errors import ConfigError

NAN, INF = math.nan, math.inf


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_log_probability_by_hand() -> None:
    # theta (3, -1), mean (1, 0), std (2, 1/2): z = (1, -2), so
    # -1/2 (1 + 4) - log 2 - log 1/2 - log(2 pi) = -2.5 - log(2 pi).
    found = gaussian_log_prob(f64(3, -1)[None], f64(1, 0), f64(2, 0.5))
    assert found.tolist() == pytest.approx([-2.5 - math.log(2 * math.pi)], abs=1e-14)


def test_log_probability_equals_torch(generator: torch.Generator) -> None:
    thetas = 3 * torch.randn(7, 5, generator=generator, dtype=torch.float64)
    mean = torch.randn(5, generator=generator, dtype=torch.float64)
    std = torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
    normal: Any = torch.distributions.Normal(mean, std)
    expected = normal.log_prob(thetas).sum(1)
    torch.testing.assert_close(gaussian_log_prob(thetas, mean, std), expected)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_antithetic_pairs(count: int) -> None:
    draws = antithetic_normal(count, 3, torch.Generator().manual_seed(4))
    assert draws.shape == (count, 3)
    assert draws.dtype == torch.float64
    for i in range(0, count - 1, 2):
        assert torch.equal(draws[i], -draws[i + 1])
    assert len({float(row.abs()[0]) for row in draws}) == (count + 1) // 2
    # An odd count cuts the last pair; what comes before is the same.
    assert torch.equal(draws, antithetic_normal(8, 3, torch.Generator().manual_seed(4))[:count])


def test_antithetic_draws_are_unit_normal(generator: torch.Generator) -> None:
    # 20,000 squares of variance 2: their mean has a standard error of 0.01 over 2 x 10,000 draws.
    draws = antithetic_normal(20_000, 1, generator)
    assert float(draws.sum()) == 0
    assert float(draws.square().mean()) == pytest.approx(1, abs=0.05)


def test_failed_rewards_become_the_worst_finite_one() -> None:
    assert rank_failures_last(f64(2, NAN, -3, INF, -INF, 5)).tolist() == [2, -3, -3, -3, -3, 5]
    assert rank_failures_last(f64(NAN, INF, -INF)).tolist() == [0, 0, 0]


def test_advantages_by_hand() -> None:
    # Mean of (1, 2, 6) is 3, deviations (-2, -1, 3), mean square 14/3.
    scale = math.sqrt(14 / 3)
    expected = [-2 / scale, -1 / scale, 3 / scale]
    assert batch_advantages(f64(1, 2, 6)).tolist() == pytest.approx(expected, abs=1e-15)


def test_advantages_have_mean_zero_and_std_one(generator: torch.Generator) -> None:
    rewards = -80 + 0.3 * torch.randn(16, generator=generator)
    advantages = batch_advantages(rewards)
    assert advantages.dtype == torch.float64
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-10)
    assert float(advantages.square().mean()) == pytest.approx(1, abs=1e-12)
    assert torch.equal(advantages.argsort(), rewards.argsort())


@pytest.mark.parametrize(("scale", "shift"), [(1e-6, 0.0), (1e6, 0.0), (1.0, 1e4), (2.5, -70.0)])
def test_advantages_ignore_shift_and_scale(
    scale: float, shift: float, generator: torch.Generator
) -> None:
    rewards = torch.randn(9, generator=generator, dtype=torch.float64)
    found = batch_advantages(scale * rewards + shift)
    torch.testing.assert_close(found, batch_advantages(rewards), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("failure", [NAN, INF, -INF])
def test_a_failure_counts_as_the_worst(failure: float) -> None:
    found = batch_advantages(f64(4, failure, 1, 3))
    assert torch.equal(found, batch_advantages(f64(4, 1, 1, 3)))
    assert float(found[1]) == float(found.min()) < 0


@pytest.mark.parametrize(
    "rewards", [(NAN, NAN), (INF, -INF, NAN), (0.1, 0.1, 0.1), (-7.3e5,) * 5, (2.5,), (3.0, NAN)]
)
def test_batches_that_teach_nothing(rewards: tuple[float, ...]) -> None:
    assert batch_advantages(f64(*rewards)).tolist() == [0.0] * len(rewards)


def test_a_spread_of_rounding_teaches_nothing() -> None:
    # 1e-12 of the largest reward, or of 1: the spread of (-s, s) is s.
    for size in (1.0, 4.0, 1024.0):
        middle = 0.0 if size == 1 else size  # numbers there are 1e-4 of such spreads apart
        for spread, expected in ((1.5e-12, [-1.0, 1.0]), (0.75e-12, [0.0, 0.0])):
            found = batch_advantages(f64(middle - spread * size, middle + spread * size))
            assert found.tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("fraction", "count"),
    # ceil(fraction * 8): 0.3 * 8 = 2.4; 0.375 * 8 = 3 exactly; the smallest keeps one.
    [(1.0, 8), (0.3, 3), (0.375, 3), (0.25, 2), (0.01, 1)],
)
def test_number_kept(fraction: float, count: int) -> None:
    advantages = f64(3, -1, 4, 1, -5, 9, 2, 6)
    mask = keep_top_fraction(advantages, fraction)
    kept = sorted(advantages[mask].tolist())
    assert kept == sorted(advantages.tolist())[-count:]


def test_rounding_of_the_fraction_keeps_no_extra() -> None:
    # 0.07 * 100 is 7.000000000000001 in float64: still seven.
    assert int(keep_top_fraction(torch.arange(100.0), 0.07).sum()) == 7


def test_ties_go_to_the_earlier_candidate() -> None:
    assert keep_top_fraction(f64(1, 2, 2, 2), 0.5).tolist() == [False, True, True, False]
    assert keep_top_fraction(f64(0, 0, 0, 0), 0.25).tolist() == [True, False, False, False]
    # Long enough for a sort that is not stable to show itself.
    mask = keep_top_fraction(torch.zeros(1000), 0.3)
    assert mask.nonzero().flatten().tolist() == list(range(300))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, NAN])
def test_fractions_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"expected a fraction in \(0, 1\], got"):
        keep_top_fraction(f64(1, 2), fraction)


@pytest.mark.parametrize("clip", [0.2, 1e-4, INF])
def test_on_policy_gradient_is_reinforce(clip: float, generator: torch.Generator) -> None:
    # d/d mean of log N(theta; mean, std) = (theta - mean) / std^2, so REINFORCE's gradient of the
    # loss is -1/P sum_i A_i (theta_i - mean) / std^2; that of std is
    # -1/P sum_i A_i ((theta_i - mean)^2 / std^3 - 1 / std).
    thetas = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    advantages = f64(1.5, -0.5, 0.25, -1.0, 0.75, -2.0)[:, None]
    mean, std = f64(0.3, -0.2, 0.1).requires_grad_(), f64(1.0, 0.5, 2.0).requires_grad_()
    old = gaussian_log_prob(thetas, mean, std).detach()
    loss = clipped_policy_loss(
        gaussian_log_prob(thetas, mean, std), old, advantages.flatten(), clip
    )
    # Every ratio is 1: the loss itself is minus the mean advantage, 1/6.
    assert float(loss.detach()) == pytest.approx(1 / 6)
    found = torch.autograd.grad(loss, [mean, std])
    z = (thetas - mean.detach()) / std.detach()
    expected_mean = -(advantages * z / std.detach()).mean(0)
    expected_std = -(advantages * (z.square() - 1) / std.detach()).mean(0)
    torch.testing.assert_close(found[0], expected_mean)
    torch.testing.assert_close(found[1], expected_std)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    # Loss -min(r A, clip(r, 0.8, 1.2) A); its slope in log r is -r A where the first is smaller.
    [
        (1.1, 2.0, -2.2, -2.2),  # inside
        (1.5, 2.0, -2.4, 0.0),  # gone far enough: -1.2 * 2
        (0.5, 2.0, -1.0, -1.0),  # gone the wrong way: the gradient brings it back
        (0.5, -3.0, 2.4, 0.0),  # gone far enough: 0.8 * 3
        (1.5, -3.0, 4.5, 4.5),  # gone the wrong way
        (0.9, -3.0, 2.7, 2.7),  # inside
    ],
)
def test_clipping(ratio: float, advantage: float, value: float, slope: float) -> None:
    log_ratio = f64(math.log(ratio)).requires_grad_()
    loss = clipped_policy_loss(log_ratio - 4.0, f64(-4.0), f64(advantage), clip=0.2)
    assert float(loss.detach()) == pytest.approx(value)
    (gradient,) = torch.autograd.grad(loss, [log_ratio])
    assert gradient.tolist() == pytest.approx([slope], abs=1e-12)


def test_the_loss_is_a_mean_over_candidates() -> None:
    # (-2.4 + 2.7) / 2, from the table above.
    loss = clipped_policy_loss(f64(1.5, 0.9).log(), f64(0, 0), f64(2, -3), clip=0.2)
    assert float(loss) == pytest.approx(0.15)


@pytest.mark.parametrize(("count", "dim"), [(12, 6), (7, 3), (16, 7), (4, 1), (6, 20)])
def test_orthogonal_pairs(count: int, dim: int, generator: torch.Generator) -> None:
    draws = orthogonal_pairs(count, dim, generator)
    assert draws.shape == (count, dim)
    torch.testing.assert_close(draws[1::2], -draws[0 : count - count % 2 : 2])
    whole = draws[::2][:dim]
    expected = dim * torch.eye(len(whole), dtype=torch.float64)
    torch.testing.assert_close(whole @ whole.T, expected)


def test_further_pairs_are_orthogonal_among_themselves(generator: torch.Generator) -> None:
    second = orthogonal_pairs(12, 3, generator)[6::2]
    lengths = second.norm(dim=1)
    torch.testing.assert_close(second @ second.T, lengths.square().diag())
    assert not torch.allclose(lengths, torch.tensor(3.0).sqrt().double())


def test_draws_take_what_they_need_of_a_stream() -> None:
    def left(draw: Callable[[torch.Generator], object]) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        draw(generator)
        return generator.get_state()

    def normal(*shape: int) -> Callable[[torch.Generator], object]:
        return lambda given: torch.randn(shape, generator=given, dtype=torch.float64)

    assert torch.equal(left(lambda given: antithetic_normal(8, 5, given)), left(normal(4, 5)))
    assert torch.equal(left(lambda given: orthogonal_pairs(10, 5, given)), left(normal(5, 5)))


def test_orthogonal_pairs_favour_no_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([orthogonal_pairs(2, 3, generator) for _ in range(4000)])
    # E[e e^T] = I: 4,000 independent directions, a standard error of about 0.013.
    torch.testing.assert_close(draws.T @ draws / 8000, torch.eye(3).double(), rtol=0, atol=0.06)


def test_rank_advantages() -> None:
    # Places 1.5, 3, 1.5, 0: 1.5 either way in two of four, over sqrt(4.5 / 4).
    expected = [0.0, math.sqrt(2), 0.0, -math.sqrt(2)]
    assert rank_advantages(f64(10, 1000, 10, 3)).tolist() == pytest.approx(expected, abs=1e-12)
    # Values do not matter, and failures share the last place.
    assert torch.equal(rank_advantages(f64(1, 2, 3)), rank_advantages(f64(-5, 0, 1e9)))
    assert torch.equal(rank_advantages(f64(4, math.nan, 1, 3)), rank_advantages(f64(4, 1, 1, 3)))
    assert rank_advantages(f64(2, 2)).tolist() == [0.0, 0.0]
