"""Rollouts of a policy: to features, to samples, and under its SDE again step by step."""

from __future__ import annotations

from torch import Tensor

from merge_rl.core.sampling.sampler import following, make_sde, sample_with, without_noise
from merge_rl.core.sampling.sde import SDE, solve_sde
from merge_rl.core.sampling.solvers import NormWatch
from merge_rl.core.step_policy import Action, WindowedSDE, replay
from merge_rl.interfaces import Denoiser
from merge_rl.workflows.rollout import Rollout, made_again

Window = tuple[int, int]
"""(first, stop): the steps first..stop-1 are noisy, the others take those of the ODE."""


class PolicyRollout(Rollout):
    """A rollout under an SDE with noise in a window of steps, or in all (None); or under an ODE.

    What an image is follows from the weights, its starting noise and its label, so that a rollout
    can be gone through again without having been kept.
    """

    window: Window | None = None

    def sde(self, labels: Tensor, network: Denoiser | None = None) -> SDE:
        """The SDE of images with these labels; of another network of the same kind, if given."""
        noisy = make_sde(
            self.sampler, network or self._network, labels.to(self.device), guide=self._guide
        )
        if self.window is None:
            return noisy
        return WindowedSDE(noisy, without_noise(noisy), *self.window)

    def latents(self, noise: Tensor, labels: Tensor, *, check_finite: bool = False) -> Tensor:
        """Samples of one batch, (B, C, h, w) float32 on the device."""
        if not self.sampler.is_sde:
            return super().latents(noise, labels, check_finite=check_finite)
        start = noise.to(self.device)
        watch = NormWatch(self.sde(labels).start(start)) if check_finite else None
        samples = solve_sde(self.sde(labels), start, following(noise), on_step=watch)
        if watch is not None:
            watch.check()
        return samples

    def followed(self, noise: Tensor, labels: Tensor, network: Denoiser) -> Tensor:
        """Samples of an ODE, with gradients in the memory of one call of `network`."""
        return sample_with(
            self.sampler, network, noise.to(self.device), labels.to(self.device),
            guide=self._guide, through=made_again,
        )  # fmt: skip

    def replay(self, noise: Tensor, labels: Tensor) -> list[Action]:
        """The actions of one batch at the present weights, on the device."""
        return replay(self.sde(labels), noise.to(self.device), following(noise))
