"""SDEs of a path: diffusion coefficients, Euler-Maruyama and Heun steps, log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.sampling.paths import (
    Path,
    make_path,
    noisy_times,
    require_times,
    score_from_velocity,
)
from merge_rl.core.sampling.solvers import OnStep, Velocity
from merge_rl.errors import ConfigError, UnknownNameError


class Gaussian(NamedTuple):
    """Normal distribution with one standard deviation for all dimensions."""

    mean: Tensor  # (B, ...)
    std: Tensor  # 0-dim


class NoisyStep(NamedTuple):
    """One noisy step: where it led, and the Gaussian its noise was drawn from.

    `drawn` is the value of that Gaussian: x_next itself for "sde-euler". "sde-heun" adds its noise
    before it calls the network, so that the density of x_next has no closed form; `drawn` is then
    the state in between, and its log-probability does not depend on the weights.
    """

    x_next: Tensor
    mean: Tensor
    std: Tensor
    drawn: Tensor

    @property
    def log_prob(self) -> Tensor:
        """Log density of `drawn`, (B,) float64; see `step_log_prob`."""
        return step_log_prob(self.drawn, self.mean, self.std)


def step_log_prob(drawn: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of Normal(mean, std^2 I) at `drawn`, summed over dimensions: (B,) float64.

        -|drawn - mean|^2 / (2 std^2) - n log std - n/2 log 2 pi

    Summed, not averaged, so that differences are log ratios of probabilities; in float64, as those
    differences are small beside the sums. 0 where std is 0: such a step draws nothing.
    """
    if float(std) == 0:
        return mean.new_zeros(len(mean), dtype=torch.float64)
    scale = std.double()
    z = ((drawn - mean).double() / scale).flatten(1)
    constant = z.shape[1] * (scale.log() + math.log(2 * math.pi) / 2)
    return -z.square().sum(1) / 2 - constant


class SDE(Protocol):
    """A discretised SDE from noise to samples: noisy steps, then one that adds no noise."""

    @property
    def num_noisy(self) -> int:
        """How many steps are noisy."""
        ...

    def start(self, noise: Tensor) -> Tensor:
        """The state that a rollout begins with, from unit noise."""
        ...

    def gaussian(self, index: int, x: Tensor) -> Gaussian:
        """What noisy step `index` draws from at x; differentiable in the network's weights."""
        ...

    def advance(self, index: int, drawn: Tensor) -> Tensor:
        """The end of noisy step `index` after its draw."""
        ...

    def last(self, x: Tensor) -> Tensor:
        """Samples from the state after all noisy steps."""
        ...


def noisy_step(sde: SDE, index: int, x: Tensor, noise: Tensor) -> NoisyStep:
    """Step `index` of an SDE at x with unit `noise`, both (B, ...)."""
    mean, std = sde.gaussian(index, x)
    drawn = mean + std * noise.to(mean)
    return NoisyStep(sde.advance(index, drawn), mean, std, drawn)


def solve_sde(
    sde: SDE, noise: Tensor, draw: NoiseSource, *, on_step: OnStep | None = None
) -> Tensor:
    """Samples (B, ...) from unit noise; `draw` is called once for each noisy step."""
    x = sde.start(noise)
    for i in range(sde.num_noisy):
        x = noisy_step(sde, i, x, draw()).x_next
        if on_step is not None:
            on_step(i, x)
    x = sde.last(x)
    if on_step is not None:
        on_step(sde.num_noisy, x)
    return x


@dataclass(frozen=True, kw_only=True)
class PathSDE:
    """dx = (v + w S) dt + sqrt(2 w) dW on a path from noise (t = 0) to data.

        sde-euler (Euler-Maruyama):  x + (v + w S) h + sqrt(2 w h) z
        sde-heun:  y = x + sqrt(2 w h) z, then Heun's step of dy/dt = v + w S from y

    and one last step of size d without noise: "mean" x + (v + w S) d, "euler" x + v d, "tweedie"
    the mean of the data given x, or "none". Score S and velocity v come from one network call.

    Args:
        velocity: (x, t) -> v.
        path: the interpolant.
        times: (N + 1,) of the noisy steps, from 0 to where the last step begins.
        form, norm: the diffusion w(t), see `diffusion`.
        heun: whether to take the second-order step.
        last_step, last_step_size: as above; d is not used by "none".

    Raises ConfigError where w or the score is infinite at a time that is needed.
    """

    velocity: Velocity
    path: Path
    times: Tensor
    form: str = "sigma"
    norm: float = 1.0
    heun: bool = False
    last_step: str = "mean"
    last_step_size: float = 0.04

    @classmethod
    def of(
        cls, settings: SamplerConfig, velocity: Velocity, dtype: torch.dtype = torch.float32
    ) -> PathSDE:
        """The SDE that the settings describe."""
        path = make_path(settings.path)
        return cls(
            velocity=velocity,
            path=path,
            times=noisy_times(settings, path.end, dtype),
            form=settings.diffusion,
            norm=settings.diffusion_norm,
            heun=settings.solver == "sde-heun",
            last_step=settings.last_step,
            last_step_size=settings.last_step_size,
        )

    def __post_init__(self) -> None:
        require_finite_diffusion(self.form, self.path, self.times, norm=self.norm)
        end = self.times[-1]
        if self.last_step == "none" and self.heun and not float(self.path.sigma(end)) > 1e-6:
            raise ConfigError(
                f"sde-heun without a last step needs the score at t = {float(end):g}, where the "
                f"{self.path.name} path has no noise and the score is infinite; expected a last "
                "step of mean, euler or tweedie"
            )

    @property
    def num_noisy(self) -> int:
        """N."""
        return len(self.times) - 1

    def start(self, noise: Tensor) -> Tensor:
        """The noise itself, in the precision of the times."""
        return noise.to(self.times.dtype)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """v + w S at (x, t): one network call."""
        v = self.velocity(x, t)
        return v + self._rate(t) * score_from_velocity(self.path, v, x, t)

    def gaussian(self, index: int, x: Tensor) -> Gaussian:
        """What step `index` draws from: of x_next, or for Heun of the state it starts from."""
        t, h = self._interval(index)
        std = (2 * self._rate(t) * h).sqrt()
        return Gaussian(x if self.heun else x + self.drift(x, t) * h, std)

    def advance(self, index: int, drawn: Tensor) -> Tensor:
        """What was drawn, or for Heun the end of the step that starts there."""
        if not self.heun:
            return drawn
        t, h = self._interval(index)
        slope = self.drift(drawn, t)
        return drawn + h * (slope + self.drift(drawn + h * slope, self.times[index + 1])) / 2

    def last(self, x: Tensor) -> Tensor:
        """The step without noise."""
        if self.last_step == "none":
            return x
        t = self.times[-1]
        if self.last_step == "mean":
            return x + self.drift(x, t) * self.last_step_size
        v = self.velocity(x, t)
        if self.last_step == "euler":
            return x + v * self.last_step_size
        alpha, variance = self.path.alpha(t), self.path.sigma(t).square()
        return (x + variance * score_from_velocity(self.path, v, x, t)) / alpha

    def _rate(self, t: Tensor) -> Tensor:
        return diffusion(self.form, self.path, t, norm=self.norm)

    def _interval(self, index: int) -> tuple[Tensor, Tensor]:
        t = self.times[index]
        return t, self.times[index + 1] - t


Form: TypeAlias = Callable[[Path, Tensor, float], Tensor]
"""(path, t, norm) -> w(t) >= 0, of the shape of t."""


def _sigma(path: Path, t: Tensor, norm: float) -> Tensor:
    return norm * path.sigma(t)


def _linear(_path: Path, t: Tensor, norm: float) -> Tensor:
    return norm * (1 - t)


def _decreasing(_path: Path, t: Tensor, norm: float) -> Tensor:
    return 0.25 * (norm * torch.cos(math.pi * t) + 1).square()


def _sbdm(path: Path, t: Tensor, norm: float) -> Tensor:
    return norm * path.score_rate(t)


def _constant(_path: Path, t: Tensor, norm: float) -> Tensor:
    return torch.full_like(t, norm)


def _increasing_decreasing(_path: Path, t: Tensor, norm: float) -> Tensor:
    return norm * torch.sin(math.pi * t).square()


FORMS: Final[Mapping[str, Form]] = {
    "sigma": _sigma,
    "linear": _linear,
    "decreasing": _decreasing,
    "sbdm": _sbdm,
    "constant": _constant,
    "increasing-decreasing": _increasing_decreasing,
}


def diffusion(name: str, path: Path, t: Tensor, *, norm: float = 1.0) -> Tensor:
    """w(t) of the SDE dx = (v + w score) dt + sqrt(2 w) dW, of the shape of t.

        sigma: q sigma(t)      linear: q (1 - t)     decreasing: (q cos(pi t) + 1)^2 / 4
        sbdm: q k(t)           constant: q           increasing-decreasing: q sin^2(pi t)

    with q = `norm`. Whatever w >= 0 is, the SDE has the marginals of the ODE dx = v dt (Ma et al.,
    2024, arXiv:2401.08740, equation 4). Raises UnknownNameError for another form.
    """
    if name not in FORMS:
        raise UnknownNameError("diffusion form", name, FORMS)
    return FORMS[name](path, require_times(t), norm)


def require_finite_diffusion(name: str, path: Path, times: Tensor, *, norm: float = 1.0) -> Tensor:
    """w at all of `times` (N,); ConfigError where it is infinite, which spoils every sample."""
    values = diffusion(name, path, times, norm=norm)
    odd = ~values.isfinite()
    if bool(odd.any()):
        at = float(times[odd][0])
        others = [form for form in FORMS if bool(FORMS[form](path, times, norm).isfinite().all())]
        raise ConfigError(
            f"the diffusion form {name!r} is infinite at t = {at:g} on the {path.name} path, so "
            f"every sample would be non-finite; expected one of {', '.join(others)}"
        )
    return values


NoiseSource: TypeAlias = Callable[[], Tensor]
"""A source of unit normal noise of the shape of the state."""
