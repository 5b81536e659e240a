"""The SDE of EDM's probability-flow ODE."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from merge_rl.core.edm import edm_velocity
from merge_rl.core.sde import Gaussian
from merge_rl.core.solvers import Velocity, find_tableau, runge_kutta_step


@dataclass(frozen=True, kw_only=True)
class EDMSDE:
    """Towards lower noise levels: dx = (sigma + w) S |dsigma| + sqrt(2 w |dsigma|) dW, w = q sigma.

    S = (D - x) / sigma^2 is the score. q = 0 is the ODE and q = 1 the reverse of the process that
    adds noise (Song et al., 2021, arXiv:2011.13456); any q keeps the marginals (Karras et al.,
    2022, arXiv:2206.00364, equation 6 with beta = q / sigma). Noise levels of few-step rollouts
    halve from one to the next, where the Euler-Maruyama formula would add far too much noise;
    both steps below therefore integrate what is linear exactly. With r = sigma_next / sigma:

        sde-euler: D is held still over the step, which makes the SDE linear in x:
            mean D + r^(1 + q) (x - D),    std sigma_next sqrt(1 - r^(2 q))
        sde-heun: all noise of the step first, y = x + sqrt(q (sigma^2 - sigma_next^2)) z, then
            Heun's step of the ODE from the level sqrt(sigma^2 + q (sigma^2 - sigma_next^2))

    The last interval, to sigma = 0, adds no noise and ends in D.

    Args:
        denoise: (x, sigma) -> D, in the precision of the state.
        sigmas: (N + 1,), decreasing, the last one 0.
        norm: q.
        heun: whether to take the second-order step.
    """

    denoise: Velocity
    sigmas: Tensor
    norm: float = 1.0
    heun: bool = False

    @property
    def num_noisy(self) -> int:
        """N - 1."""
        return len(self.sigmas) - 2

    def start(self, noise: Tensor) -> Tensor:
        """noise * sigmas[0], in the precision of the levels."""
        return noise.to(self.sigmas.dtype) * self.sigmas[0]

    def gaussian(self, index: int, x: Tensor) -> Gaussian:
        """What step `index` draws from: of x_next, or for Heun of the state it starts from."""
        sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
        if self.heun:
            return Gaussian(x, self._extra(index).sqrt())
        ratio = sigma_next / sigma
        denoised = self.denoise(x, sigma)
        mean = denoised + ratio ** (1 + self.norm) * (x - denoised)
        return Gaussian(mean, sigma_next * (1 - ratio ** (2 * self.norm)).sqrt())

    def advance(self, index: int, drawn: Tensor) -> Tensor:
        """What was drawn, or for Heun the end of the ODE step that starts there."""
        if not self.heun:
            return drawn
        raised = (self.sigmas[index].square() + self._extra(index)).sqrt()
        velocity, heun = edm_velocity(self.denoise), find_tableau("heun")
        return runge_kutta_step(heun, velocity, drawn, raised, self.sigmas[index + 1])

    def last(self, x: Tensor) -> Tensor:
        """D at the last level above 0."""
        return self.denoise(x, self.sigmas[-2])

    def _extra(self, index: int) -> Tensor:
        """Variance that a Heun step adds: the integral of 2 w over the interval."""
        here, ahead = self.sigmas[index].square(), self.sigmas[index + 1].square()
        return self.norm * (here - ahead)
