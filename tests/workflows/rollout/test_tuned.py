"""Rollouts whose rows hold guidance and a guide's coefficients: gradient, and what is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.merging.tuned_map import Layout, Setup
from merge_rl.workflows.rollout import DifferentiableRollout, Room, TunedRollout, WorkItem
from tests.workflows.rollout.test_differentiable import (
    COEFFICIENTS,
    LABELS,
    SEEDS,
    along,
    directions,
    in_float64,
    merged,
    numeric,
    weighing,
)

__all__ = ["in_float64"]
GUIDE = torch.tensor([[0.4, 0.5, 0.1], [0.7, 0.2, 0.1]], dtype=torch.float64)
EDM2 = SamplerConfig(num_steps=4, sigma_min=0.1, sigma_max=3.0)
WHOLE = Layout(2, 3, guidance=True, guide=(2, 3))


def tuned(sampler: SamplerConfig = EDM2, *, exact: bool = True) -> TunedRollout:
    """An EDM2 that a merge of the same checkpoints guides."""
    found, guide = (merged("edm2", EDM2, exact=exact) for _ in range(2))
    assert found.live is not None
    assert guide.live is not None
    found.rollout.guide = guide.live.model
    found.rollout = found.rollout.with_sampler(sampler)
    return TunedRollout(
        found.live, found.rollout, name="", layout=WHOLE, guide=guide.live, guide_start=GUIDE
    )


def rows(strength: float = 1.6, low: float = 0.3, high: float = 1.9) -> Tensor:
    values = torch.tensor([strength, low, high], dtype=torch.float64)
    return WHOLE.join(Setup(COEFFICIENTS, values, GUIDE))


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
def test_the_gradient_of_rows_is_that_of_central_differences(solver: str) -> None:
    rollout = tuned(SamplerConfig(solver=solver, num_steps=3, sigma_min=0.1, sigma_max=3.0))
    rooms, item = (None, Room(images=2, kept=0)), WorkItem(rows(), SEEDS, LABELS)
    both = [DifferentiableRollout(rollout, room=room)(item, weighing) for room in rooms]
    ways = directions(both[0].gradient, 1)
    expected = numeric(rollout, rows(), ways)
    for made in both:
        torch.testing.assert_close(along(made.gradient, ways), expected, rtol=1e-5, atol=1e-7)
        assert bool((made.gradient.abs() > 1e-5).all())


@pytest.mark.parametrize("strength", [1.0, 1.6])
def test_features_with_a_gradient_are_those_without(strength: float) -> None:
    rollout = tuned(exact=False)
    item = WorkItem(rows(strength), SEEDS, LABELS)
    made = DifferentiableRollout(rollout)(item, weighing)
    (features,) = rollout.features_of([item])
    assert torch.equal(made.features, features)
    assert bool((made.gradient[2] != 0).tolist() == [True, strength != 1, strength != 1])


def test_a_merge_alone_has_the_guidance_of_the_settings() -> None:
    sampler = SamplerConfig(num_steps=4, sigma_min=0.1, sigma_max=3.0, guidance=1.6)
    searched = tuned(sampler, exact=False)
    (alone,) = searched.features_of([WorkItem(COEFFICIENTS, SEEDS, LABELS)])
    asked = [WorkItem(rows(2.5), SEEDS, LABELS), WorkItem(COEFFICIENTS, SEEDS, LABELS)]
    other, back = searched.features_of(asked)
    assert torch.equal(back, alone)
    assert not torch.equal(other, alone)
    # Settings and rows of the same strength everywhere are the same.
    (same,) = searched.features_of([WorkItem(rows(1.6, 0.0, 3.0), SEEDS, LABELS)])
    assert torch.equal(same, alone)


def test_without_a_sound_image_no_row_has_a_gradient() -> None:
    rollout = tuned(exact=False)
    spoilt = rows()
    spoilt[0, 0] = torch.inf
    made = DifferentiableRollout(rollout)(WorkItem(spoilt, SEEDS, LABELS), weighing)
    assert len(made.dropped) == len(SEEDS)
    assert bool(made.gradient[:2].isnan().all())
