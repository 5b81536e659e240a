"""Noise levels of a diffusion in steps, by hand."""

from __future__ import annotations

import re

import pytest
import torch

from merge_rl.core.sampling.steps import StepLevels
from merge_rl.errors import ConfigError

F64 = torch.float64
# Each step halves what is left of the image: sigma**2 = 1 / alpha_bar - 1 = 2**(t + 1) - 1.
HALVING = StepLevels(torch.full((10,), 0.5))


def levels(*steps: int) -> torch.Tensor:
    return torch.tensor([2.0 ** (step + 1) - 1 for step in steps] + [0], dtype=F64).sqrt()


@pytest.mark.parametrize(
    ("spacing", "offset", "count", "steps"),
    [
        ("linspace", 0, 4, (9, 6, 3, 0)),
        ("linspace", 0, 2, (9, 0)),
        ("linspace", 0, 10, (9, 8, 7, 6, 5, 4, 3, 2, 1, 0)),
        ("leading", 0, 3, (6, 3, 0)),  # 10 // 3 = 3
        ("leading", 1, 3, (7, 4, 1)),
        ("leading", 0, 1, (0,)),
        ("trailing", 0, 3, (9, 6, 2)),  # 10, 6.67 and 3.33, rounded, less one
        ("trailing", 0, 1, (9,)),
    ],
)
def test_steps_of_a_ladder(spacing: str, offset: int, count: int, steps: tuple[int, ...]) -> None:
    found = HALVING.ladder(count, F64, spacing=spacing, offset=offset)
    torch.testing.assert_close(found, levels(*steps), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("spacing", "count", "said"),
    [
        ("linspace", 1, "need num_steps in 2..10 for this network, got 1"),
        ("leading", 0, "need num_steps in 1..10 for this network, got 0"),
        ("trailing", 11, "need num_steps in 1..10 for this network, got 11"),
    ],
)
def test_other_counts_are_refused(spacing: str, count: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        HALVING.ladder(count, spacing=spacing)


@pytest.mark.parametrize(("offset", "ends"), [(7, "7..13"), (-1, "-1..5")])
def test_steps_beyond_the_last_are_refused(offset: int, ends: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"expected steps in 0..9, got {ends}")):
        HALVING.ladder(3, spacing="leading", offset=offset)


def test_a_level_leads_back_to_its_step_and_between_two_to_a_part() -> None:
    at = levels(0, 5, 9)[:-1]
    assert HALVING.step_of(at).tolist() == [0, 5, 9]
    # In the middle of two logarithms, and beyond both ends.
    odd = torch.stack([(at[0] * levels(1)[0]).sqrt(), at[0] / 2, at[2] * 2])
    torch.testing.assert_close(HALVING.step_of(odd), torch.tensor([0.5, 0.0, 9.0]))


@pytest.mark.parametrize("betas", [[], [0.5], [0.5, 0.0], [0.5, 1.0], [[0.5, 0.5]]])
def test_what_are_no_betas_is_refused(betas: list[float]) -> None:
    with pytest.raises(ConfigError, match="expected two or more betas between 0 and 1, found"):
        StepLevels(torch.tensor(betas))


def test_two_steps_are_the_fewest() -> None:
    assert StepLevels(torch.tensor([0.5, 0.5])).log_sigmas == pytest.approx(HALVING.log_sigmas[:2])
    with pytest.raises(ConfigError, match=r"two or more betas .*, found \(1,\)"):
        StepLevels(torch.tensor([0.5]))
