"""Paths from noise to data, and what a velocity says about score, noise and data.

A path mixes data d and unit noise e, from noise at t = 0 to data at t = 1 (Ma et al., 2024,
arXiv:2401.08740, with the time axis of its public code):

    x = alpha(t) d + sigma(t) e,        v = dx/dt = alpha'(t) d + sigma'(t) e

Two equations in two unknowns: x and v together fix d and e, and the score is -e / sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Final, Protocol

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.errors import ConfigError, UnknownNameError


class Path(Protocol):
    """alpha and sigma of a path with their derivatives; times are float tensors in [0, 1]."""

    name: ClassVar[str]
    end: ClassVar[float]
    """Where sampling ends: 1, or just before it where the velocity has no limit."""

    def alpha(self, t: Tensor) -> Tensor:
        """Share of the data; rises to 1."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Share of the noise; falls to 0."""
        ...

    def d_alpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha."""
        ...

    def d_sigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma."""
        ...

    def log_slope(self, t: Tensor) -> Tensor:
        """alpha' / alpha: the factor of x in the velocity."""
        ...

    def score_rate(self, t: Tensor) -> Tensor:
        """k = (alpha' / alpha) sigma^2 - sigma sigma': the factor of the score in the velocity."""
        ...

    def inverse(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of the noise e = a x + b v, in a form without 0 / 0 at either end."""
        ...


class Linear:
    """alpha = t, sigma = 1 - t: straight lines, v = d - e."""

    name: ClassVar[str] = "linear"
    end: ClassVar[float] = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """t."""
        return t

    def sigma(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """-1."""
        return -torch.ones_like(t)

    def log_slope(self, t: Tensor) -> Tensor:
        """1 / t; infinite at t = 0."""
        return 1 / t

    def score_rate(self, t: Tensor) -> Tensor:
        """(1 - t) / t; infinite at t = 0."""
        return (1 - t) / t

    def inverse(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """e = x - t v."""
        return torch.ones_like(t), -t


class GVP:
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): the variance is kept throughout."""

    name: ClassVar[str] = "gvp"
    end: ClassVar[float] = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """sin(pi t / 2)."""
        return torch.sin(t * math.pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        """cos(pi t / 2)."""
        return torch.cos(t * math.pi / 2)

    def d_alpha(self, t: Tensor) -> Tensor:
        """(pi / 2) cos(pi t / 2)."""
        return math.pi / 2 * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """-(pi / 2) sin(pi t / 2)."""
        return -math.pi / 2 * self.alpha(t)

    def log_slope(self, t: Tensor) -> Tensor:
        """(pi / 2) cot(pi t / 2); infinite at t = 0."""
        return math.pi / 2 * self.sigma(t) / self.alpha(t)

    def score_rate(self, t: Tensor) -> Tensor:
        """alpha' / alpha, as sigma^2 + alpha^2 = 1."""
        return self.log_slope(t)  # times sigma^2 + alpha^2 = 1

    def inverse(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """e = sigma x - (2 / pi) alpha v."""
        return self.sigma(t), -2 / math.pi * self.alpha(t)


class VP:
    """The variance-preserving diffusion of Song et al., 2021 (arXiv:2011.13456), time reversed.

        log alpha = -(1 - t)^2 (b1 - b0) / 4 - (1 - t) b0 / 2,    sigma^2 = 1 - alpha^2

    with b0 = 0.1, b1 = 20. sigma' has no limit at t = 1, so sampling ends a little before.
    """

    name: ClassVar[str] = "vp"
    end: ClassVar[float] = 0.999
    beta_min: ClassVar[float] = 0.1
    beta_max: ClassVar[float] = 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        left = 1 - t
        return -(left.square()) * (self.beta_max - self.beta_min) / 4 - left * self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        """The exponential of the logarithm above."""
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha^2)."""
        # expm1: near t = 1 the difference 1 - alpha^2 would lose most of its digits.
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        """alpha (log alpha)'."""
        return self.log_slope(t) * self.alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """-alpha alpha' / sigma."""
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def log_slope(self, t: Tensor) -> Tensor:
        """(b0 + (1 - t)(b1 - b0)) / 2."""
        return (self.beta_min + (1 - t) * (self.beta_max - self.beta_min)) / 2

    def score_rate(self, t: Tensor) -> Tensor:
        """alpha' / alpha, as sigma^2 + alpha^2 = 1."""
        return self.log_slope(t)  # times sigma^2 + alpha^2 = 1

    def inverse(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """e = sigma (x - v / (log alpha)')."""
        sigma = self.sigma(t)
        return sigma, -sigma / self.log_slope(t)


PATHS: Final[Mapping[str, Callable[[], Path]]] = {p.name: p for p in (Linear, GVP, VP)}


def make_path(name: str) -> Path:
    """The path called `name`; UnknownNameError suggests the nearest one."""
    if name not in PATHS:
        raise UnknownNameError("path", name, PATHS)
    return PATHS[name]()


def noise_from_velocity(path: Path, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The unit noise e that x and v (same shape) belong to at times t; linear: x - t v."""
    of_x, of_v = path.inverse(require_times(t))
    return of_x * x + of_v * v


def score_from_velocity(path: Path, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """-e / sigma, the gradient of log p_t(x); infinite where sigma is 0 (t = 1)."""
    return -noise_from_velocity(path, v, x, t) / path.sigma(t)


def drift(path: Path, x: Tensor, t: Tensor) -> Tensor:
    """(alpha'/alpha) x: the velocity without the score's part."""
    return path.log_slope(require_times(t)) * x


def require_times(t: Tensor) -> Tensor:
    """The times themselves; ConfigError unless all lie in [0, 1]."""
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ConfigError(f"expected times in 0..1, found {t.min():.6g}..{t.max():.6g}")
    return t


def time_grid(num_steps: int, *, end: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Equally spaced times (num_steps + 1,) from 0 to `end`, both included.

    `num_steps` counts intervals. Raises ConfigError for less than one of them, and unless
    0 < end <= 1.
    """
    if num_steps < 1:
        raise ConfigError(f"need num_steps >= 1, got {num_steps}")
    if not 0 < end <= 1:
        raise ConfigError(f"expected an end of the time grid in (0, 1], got {end:g}")
    return torch.linspace(0, end, num_steps + 1, dtype=dtype)


def noisy_times(settings: SamplerConfig, end: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Times of the noisy steps of a path's SDE, where an ODE would go from 0 to `end`.

    The last of the `num_steps` intervals is the step without noise, of its own size, if there is
    one; so there are `num_steps` times, and one more without a last step.
    """
    if settings.last_step == "none":
        return time_grid(settings.num_steps, end=end, dtype=dtype)
    return time_grid(settings.num_steps - 1, end=1 - settings.last_step_size, dtype=dtype)
