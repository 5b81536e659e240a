"""The gradient through steps that draw nothing: with it, that of the reward, derived by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merge_rl.config import SamplerConfig, UpdateConfig
from merge_rl.core.sampling.sde import SDE, Gaussian
from merge_rl.core.step_policy import Action, StillSteps, WindowedSDE, replay
from merge_rl.workflows.finetune.learner import Learner
from merge_rl.workflows.finetune.rollouts import KeptRollouts
from merge_rl.workflows.finetune.updates import PolicyGradient

F64 = torch.float64
THETA, STD, START = 0.9, 0.3, 0.7
REPEATS = 16  # of an estimate, whose spread is its standard error
STEPS = 6  # five that are noisy, and the last


class Scale(nn.Module):
    """x -> theta x, of one number."""

    prediction = "velocity"

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(THETA, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta * x


class Steps:
    """x_{i+1} = theta x_i + std z_i, and a last step without noise."""

    num_noisy = STEPS - 1

    def __init__(self, network: nn.Module, std: float) -> None:
        self.network, self.std = network, std

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def gaussian(self, _index: int, x: Tensor) -> Gaussian:
        return Gaussian(self.network(x), torch.tensor(self.std, dtype=F64))

    def advance(self, _index: int, drawn: Tensor) -> Tensor:
        return drawn

    def last(self, x: Tensor) -> Tensor:
        made: Tensor = self.network(x)
        return made


class Toy:
    """Stands for a rollout; features are the samples themselves."""

    sampler, device = SamplerConfig(), torch.device("cpu")
    autoencoder = SimpleNamespace(levels=lambda x: x)

    def __init__(self, network: nn.Module, window: tuple[int, int] | None, seed: int) -> None:
        self.network, self.window, self.seed = network, window, seed

    @staticmethod
    def extractor(x: Tensor) -> Tensor:
        return x

    def sde(self, _labels: Tensor, network: nn.Module | None = None) -> SDE:
        network = network or self.network
        noisy = Steps(network, STD)
        return WindowedSDE(noisy, Steps(network, 0.0), *self.window) if self.window else noisy

    def replay(self, noise: Tensor, labels: Tensor) -> list[Action]:
        generator = torch.Generator().manual_seed(self.seed)
        draw = lambda: torch.randn(noise.shape, generator=generator, dtype=F64)  # noqa: E731
        return replay(self.sde(labels), noise, draw)


def estimate(window: tuple[int, int] | None, seed: int, *, still: bool, **settings: Any) -> float:
    """d E[-x^2] / d theta from 5,000 rollouts."""
    count = 5000
    network = Scale()
    toy = Toy(network, window, seed)
    noise, labels = torch.full((count, 1), START, dtype=F64), torch.zeros(count).long()
    actions = toy.replay(noise, labels)
    sde, end = toy.sde(labels), actions[-1]
    x = StillSteps.through(sde, end.step + 1, STEPS, sde.advance(end.step, end.drawn)).end
    rewards = -x[:, 0].square()
    kept = KeptRollouts(
        noise, labels, rewards - rewards.mean(), torch.arange(count), 0, -2 * x if still else None
    )
    update = UpdateConfig(ema_decay=0.0, micro_batch=count, **settings)
    policy = PolicyGradient(Learner(network, update), toy, update)  # type: ignore[arg-type]
    policy.begin(kept)
    policy.gradients(kept, 0)
    assert network.theta.grad is not None
    # The loss is minus the mean over images and their draws.
    return -float(network.theta.grad) * len(actions)


def exact(first: int, stop: int) -> float:
    """x_6 is normal: mean theta^6 x_0, and step i adds std^2 theta^(2 (5 - i)) to its variance."""
    powers = [2 * (STEPS - 1 - i) for i in range(first, stop)]
    noise = sum(p * THETA ** (p - 1) for p in powers)
    return -(2 * STEPS * THETA ** (2 * STEPS - 1) * START**2 + STD**2 * noise)


@pytest.mark.parametrize(
    ("window", "epochs"), [(None, 1), ((0, 2), 1), ((2, 4), 2), ((4, 5), 1)], ids=str
)
def test_the_gradient_is_that_of_the_reward(window: tuple[int, int] | None, epochs: int) -> None:
    found = [estimate(window, seed, still=True, epochs=epochs) for seed in range(REPEATS)]
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / math.sqrt(REPEATS)
    expected = exact(*(window or (0, STEPS - 1)))
    assert abs(float(mean) - expected) < 4 * float(error)
    # The check can tell: without those steps a good part of the derivative is missing.
    without = [estimate(window, seed, still=False) for seed in range(REPEATS)]
    missing = expected - sum(without) / REPEATS
    assert abs(missing) > 10 * float(error)


def test_one_pass_is_the_last_one() -> None:
    sde = Steps(Scale(), 0.0)
    still = StillSteps.through(sde, 2, 6, torch.ones(3, 1, dtype=F64))
    torch.testing.assert_close(still.end, torch.full((3, 1), THETA**4, dtype=F64))
    seen: list[bool] = []

    def passing(*, last: bool) -> Any:
        seen.append(last)
        return torch.enable_grad()

    back = still.pull(torch.ones(3, 1, dtype=F64), passing, last=True)
    torch.testing.assert_close(back, torch.full((3, 1), THETA**4, dtype=F64))
    # 3 rows of d theta^4 / d theta.
    grad = sde.network.theta.grad
    assert isinstance(grad, Tensor)
    assert float(grad) == pytest.approx(3 * 4 * THETA**3)
    assert seen == [False, False, False, True]
