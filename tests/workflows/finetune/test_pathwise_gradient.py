"""Fine-tuning by the reward's gradient: against plain backpropagation, in any parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge_rl.config import FinetuneConfig
from merge_rl.core.sampling.sampler import sample_with
from merge_rl.rng import image_seeds
from merge_rl.workflows.assembly.resolve import resolve_finetune
from merge_rl.workflows.finetune.job import build_finetune
from merge_rl.workflows.finetune.learner import Learner, LoopState
from merge_rl.workflows.finetune.rollouts import KeptRollouts
from merge_rl.workflows.finetune.step import StepParts
from merge_rl.workflows.rewards import RewardGradient
from tests.finetuning import small_config, write_sit_set

pytestmark = pytest.mark.numerics
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, shared_tiny: Path) -> Path:
    return write_sit_set(tmp_path_factory.mktemp("sit"), shared_tiny)


def parts_of(small: Path, micro_batch: int, under: str = "ode") -> StepParts:
    config: FinetuneConfig = small_config(
        small / "raw/sit-2.safetensors",
        algorithm="pathwise",
        rollout={"under": under},
        update={"micro_batch": micro_batch, "max_grad_norm": 1e9},
    )
    job = build_finetune(resolve_finetune(config))
    return StepParts(job, Learner(job.network, config.update))


def kept_of(parts: StepParts) -> KeptRollouts:
    rows = torch.arange(5)
    pull = torch.linspace(-1, 1, 5 * 64).reshape(5, 64)
    return KeptRollouts(parts.job.rollout.noise(range(5)), rows, rows.double(), rows, 0, pull)


def gradients_of(parts: StepParts) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in parts.learner.trained.items() if p.grad is not None}


@pytest.mark.parametrize(("micro_batch", "under"), [(1, "ode"), (2, "ode"), (5, "ode"), (2, "sde")])
def test_the_gradient_is_that_of_plain_backpropagation(
    small: Path, micro_batch: int, under: str
) -> None:
    parts = parts_of(small, micro_batch, under)
    kept = kept_of(parts)
    assert StepParts.gradients(parts, kept, 0)
    found = gradients_of(parts)
    rollout, network = parts.job.rollout, parts.learner.network
    images = []
    for row in range(5):
        part = kept.rows_of(row, row + 1)
        network.zero_grad()
        samples = sample_with(
            rollout.sampler, network, part.noise, part.labels, through=lambda call: call
        )
        assert torch.equal(samples, rollout.latents(part.noise, part.labels))
        levels = rollout.autoencoder.levels(samples)  # type: ignore[attr-defined]
        features = rollout.extractor(levels).float()
        assert part.pull is not None
        # Higher advantages are what is wanted: the loss is minus the mean of their first order.
        (-(features * part.pull).sum() / 5).backward()  # type: ignore[no-untyped-call]
        images.append(gradients_of(parts))
    assert len(found) > 10
    for name, grad in found.items():
        terms = torch.stack([image[name] for image in images])
        # Five float32 sums, and products over the same sums in other groups.
        bound = 64 * EPS * terms.abs().sum(0).clamp(min=float(terms.abs().max()))
        assert bool(((grad - terms.sum(0)).abs() <= bound).all()), name


def test_all_images_are_learnt_from_by_the_derivative_of_the_pools_distance(small: Path) -> None:
    parts = parts_of(small, 5)
    state = parts.renew_pool(LoopState())
    assert state is not None
    assert state.pool is not None
    _, kept = parts.collect(state.pool, 0)
    assert len(kept) == parts.config.images_per_step
    features = parts.features(
        parts.job.rollout, image_seeds(16, parts.config.seed, "rollout", 0), kept.labels
    )
    expected = RewardGradient(parts.job.reward, state.pool).cotangents(features) * len(features)
    assert kept.pull is not None
    torch.testing.assert_close(kept.pull, -expected.float())
