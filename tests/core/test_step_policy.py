"""Steps of an SDE as a policy: densities, ratios, gradients derived by hand, windows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.sampling.edm import EDMSDE, edm_noise_levels
from merge_rl.core.sampling.paths import make_path, time_grid
from merge_rl.core.sampling.sampler import following, make_sde, without_noise
from merge_rl.core.sampling.sde import SDE, PathSDE, solve_sde
from merge_rl.core.sampling.solvers import solve_fixed
from merge_rl.core.step_policy import Action, StillSteps, WindowedSDE, replay, step_loss
from merge_rl.errors import ConfigError
from merge_rl.models.edm2 import EDM2
from merge_rl.models.sit import SiT
from tests.gaussian import denoised, path_velocity

SHAPE = (1, 8, 8)
TINY_SIT = {
    "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 8, "depth": 1,
    "num_heads": 2, "num_classes": 3, "learn_sigma": False,
}  # fmt: skip
TINY_EDM2 = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_channels": 8,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8,
    "logvar_channels": 8,
}  # fmt: skip


def network(family: str) -> SiT | EDM2:
    generator = torch.Generator().manual_seed(3)
    built = SiT(**TINY_SIT) if family == "sit" else EDM2(**TINY_EDM2)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in built.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * drawn + (0.5 if parameter.ndim == 0 else 0))
    return built.eval()


def path_sde(velocity: object = None, *, steps: int = 4, end: float = 0.9) -> PathSDE:
    path = make_path("linear")
    return PathSDE(
        velocity=velocity or path_velocity(path),  # type: ignore[arg-type]
        path=path,
        times=time_grid(steps, end=end, dtype=torch.float64),
    )


def edm_sde(steps: int = 5) -> EDMSDE:
    sigmas = edm_noise_levels(steps, sigma_min=0.1, sigma_max=5, dtype=torch.float64)
    return EDMSDE(denoise=denoised, sigmas=sigmas)


def noise_of(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("sde", [path_sde(), edm_sde()], ids=["path", "edm"])
def test_an_action_is_what_the_rollout_did(sde: SDE) -> None:
    noise, seen = noise_of(3), list[Tensor]()
    solve_sde(sde, noise, following(noise), on_step=lambda _i, x: seen.append(x))
    actions = replay(sde, noise, following(noise))
    assert [action.step for action in actions] == list(range(sde.num_noisy))
    for action, after in zip(actions, seen, strict=False):
        assert torch.equal(action.drawn, after)
    assert torch.equal(actions[1].x, actions[0].drawn)


@pytest.mark.parametrize("sde", [path_sde(), edm_sde()], ids=["path", "edm"])
def test_its_density_is_that_of_the_gaussian(sde: SDE) -> None:
    for action in replay(sde, noise_of(2), following(noise_of(2))):
        mean, std = sde.gaussian(action.step, action.x)
        gaussian = Independent(Normal(mean, std.expand(mean.shape)), 3)
        expected: Tensor = gaussian.log_prob(action.drawn)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(action.log_prob, expected)


@pytest.mark.parametrize("family", ["sit", "edm2"])
@pytest.mark.parametrize("window", [None, (1, 3)], ids=["all steps", "window"])
def test_on_policy_the_ratio_is_one(family: str, window: tuple[int, int] | None) -> None:
    model = network(family).requires_grad_(True)
    settings = SamplerConfig(solver="sde-euler", num_steps=5)
    labels, noise = torch.tensor([0, 2]), noise_of(2).float()
    sde = make_sde(settings, model, labels)
    if window:
        sde = WindowedSDE(sde, without_noise(sde), *window)
    actions = replay(sde, noise, following(noise))
    assert len(actions) == (2 if window else 4)
    for action in actions:
        found = step_loss(sde, action, torch.tensor([1.5, -0.5]), clip=0.2)
        assert found.ratio == pytest.approx(1, abs=1e-5)
        assert found.clipped == 0
        assert found.old_kl == pytest.approx(0, abs=1e-9)
        assert float(found.loss.detach()) == pytest.approx(
            -0.5, abs=1e-4
        )  # minus the mean advantage


def test_gradient_on_policy_is_reinforce_by_hand() -> None:
    # v = theta everywhere on the linear path: S = -(x - t v)/(1 - t) and w = 1 - t, so that the
    # mean x + (v + w S) h moves by h (1 + t) with theta, and the gradient of the loss is
    # -mean_b A_b sum_d z_bd h (1 + t) / std.
    theta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    sde = path_sde(lambda x, _t: theta.expand(x.shape))
    noise, advantages = noise_of(2), torch.tensor([2.0, -0.5], dtype=torch.float64)
    action = replay(sde, noise, following(noise))[2]
    step_loss(sde, action, advantages, clip=0.2).loss.backward()  # type: ignore[no-untyped-call]
    t, h = 0.45, 0.225
    std = math.sqrt(2 * (1 - t) * h)
    with torch.no_grad():
        z = (action.drawn - sde.gaussian(2, action.x).mean) / std
    expected = -(advantages * z.flatten(1).sum(1)).mean() * h * (1 + t) / std
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad, expected)


def shifted(action: Action, log_ratio: float) -> Action:
    """The same action, as if it had been so much less likely when it was drawn."""
    return action._replace(log_prob=action.log_prob - log_ratio)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [(0.3, 1.0, False), (0.3, -1.0, True), (-0.3, 1.0, True), (-0.3, -1.0, False)],
)
def test_ratios_beyond_the_clip_pull_no_further(
    log_ratio: float, advantage: float, moves: bool
) -> None:
    theta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    sde = path_sde(lambda x, _t: theta.expand(x.shape))
    action = shifted(replay(sde, noise_of(1), following(noise_of(1)))[0], log_ratio)
    found = step_loss(sde, action, torch.tensor([advantage]), clip=0.2)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert found.ratio == pytest.approx(math.exp(log_ratio))
    assert found.clipped == 1
    edge = step_loss(sde, action, torch.tensor([advantage]), clip=abs(found.ratio - 1))
    assert edge.clipped == 0  # at the clip, not beyond it
    assert found.old_kl == pytest.approx(math.expm1(log_ratio) - log_ratio)
    assert theta.grad is not None
    assert (float(theta.grad) != 0) == moves


def test_per_dimension_ratios_are_roots() -> None:
    sde = path_sde()
    action = shifted(replay(sde, noise_of(2), following(noise_of(2)))[0], 6.4)
    found = step_loss(sde, action, torch.ones(2), clip=0.2, per_dimension=True)
    assert found.ratio == pytest.approx(math.exp(6.4 / 64))


def test_kl_to_the_reference_by_hand() -> None:
    # Velocities that differ by 0.3 everywhere: means differ by 0.3 h (1 + t) in 64 dimensions.
    path = make_path("linear")
    own = path_velocity(path)
    sde, reference = path_sde(own), path_sde(lambda x, t: own(x, t) + 0.3)
    action = replay(sde, noise_of(3), following(noise_of(3)))[1]
    t, h = 0.225, 0.225
    expected = 64 * (0.3 * h * (1 + t)) ** 2 / (2 * 2 * (1 - t) * h)
    plain = step_loss(sde, action, torch.zeros(3), clip=0.2)
    found = step_loss(sde, action, torch.zeros(3), clip=0.2, kl_weight=0.5, reference=reference)
    assert found.reference_kl == pytest.approx(expected)
    assert float(found.loss - plain.loss) == pytest.approx(0.5 * expected)
    unweighed = step_loss(sde, action, torch.zeros(3), clip=0.2, reference=reference)
    assert (unweighed.reference_kl, float(unweighed.loss)) == (0, float(plain.loss))
    by_dimension = step_loss(
        sde, action, torch.zeros(3), clip=0.2, kl_weight=0.5, per_dimension=True,
        reference=reference,
    )  # fmt: skip
    assert float(by_dimension.loss - plain.loss) == pytest.approx(0.5 * expected / 64)


def test_outside_of_the_window_lies_the_ode() -> None:
    sde = path_sde()
    noise = noise_of(2)
    windowed = WindowedSDE(sde, without_noise(sde), 2, 3)
    seen: list[Tensor] = []
    solve_sde(windowed, noise, following(noise), on_step=lambda _i, x: seen.append(x))
    ode: list[Tensor] = []
    velocity = path_velocity(sde.path)
    solve_fixed(velocity, noise, sde.times, solver="euler", on_step=lambda _i, x: ode.append(x))
    torch.testing.assert_close(seen[1], ode[1])  # two steps before the window
    assert not torch.allclose(seen[2], ode[2])
    after = seen[2] + velocity(seen[2], sde.times[3]) * (sde.times[4] - sde.times[3])
    torch.testing.assert_close(seen[3], after)
    assert [action.step for action in replay(windowed, noise, following(noise))] == [2]


def test_still_steps_are_those_of_a_rollout_without_noise() -> None:
    sde, noise = without_noise(path_sde()), noise_of(2)
    still = StillSteps.through(sde, 0, sde.num_noisy + 1, sde.start(noise))
    torch.testing.assert_close(still.end, solve_sde(sde, noise, following(noise)))


def test_an_edm_window_steps_by_euler() -> None:
    sde = edm_sde()
    x, still = noise_of(1), without_noise(sde)
    here, ahead = sde.sigmas[1], sde.sigmas[2]
    mean, std = still.gaussian(1, x)
    torch.testing.assert_close(mean, x + (ahead - here) * (x - denoised(x, here)) / here)
    assert float(std) == 0


@pytest.mark.parametrize("window", [(0, 0), (3, 5), (-1, 2)])
def test_windows_that_do_not_fit_are_refused(window: tuple[int, int]) -> None:
    sde = path_sde()
    assert WindowedSDE(sde, without_noise(sde), 0, 4).num_noisy == 4  # the widest
    with pytest.raises(ConfigError, match=r"expected a window within noisy steps 0\.\.3"):
        WindowedSDE(sde, without_noise(sde), *window)
