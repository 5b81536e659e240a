"""Diffusions in discrete steps (DDPM) seen as noise levels, so that networks of noise denoise.

A step k mixes data d and unit noise e, with a_k the product of (1 - beta_i) over i <= k:

    x_k = sqrt(a_k) d + sqrt(1 - a_k) e

Divided by sqrt(a_k) it is d + sigma_k e with sigma_k^2 = (1 - a_k) / a_k: the form that denoisers
have. A predicted noise then gives D = x - sigma e, and Euler's step of the probability-flow ODE in
sigma is the step of DDIM without noise (Song et al., 2020, arXiv:2010.02502, equation 12; Karras
et al., 2022, arXiv:2206.00364, section C.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.errors import ConfigError

NoisePrediction = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""(x_k of unit variance, step k, labels) -> the unit noise in it, of the shape of x_k."""

SPACINGS: Final = ("linspace", "leading", "trailing")


def linear_betas(count: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Variances (count,) float64, equally spaced: those of Ho et al., 2020 (arXiv:2006.11239)."""
    return torch.linspace(first, last, count, dtype=torch.float64, device="cpu")


BETAS: Final = "expected betas, two at least, between 0 and 1"


def betas_of(betas: Any) -> tuple[float, ...]:
    """Betas (T,) as numbers; ConfigError for what is no list of such."""
    try:  # on the CPU even where a network is built on the meta device
        steps = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        steps = torch.empty(0, 0)
    if steps.ndim != 1:
        raise ConfigError(f"{BETAS}, got {betas!r:.60}")
    return tuple(steps.tolist())


class StepLevels:
    """The noise levels of a diffusion in steps, and the way from a level to its step.

    Args:
        betas: variances (T,) of the steps, in 0..1, T >= 2.

    Raises ConfigError for others.
    """

    def __init__(self, betas: Tensor) -> None:
        betas = betas.double()
        inside = bool(((betas > 0) & (betas < 1)).all())
        if betas.ndim != 1 or len(betas) < 2 or not inside:
            raise ConfigError(
                "expected two or more betas between 0 and 1, found "
                f"{tuple(betas.shape)} of {float(betas.min()):g}..{float(betas.max()):g}"
                if betas.numel()
                else "expected two or more betas between 0 and 1, found none"
            )
        kept = torch.log1p(-betas).cumsum(0)
        self.log_sigmas = (torch.expm1(-kept).log() / 2).tolist()  # rising

    def ladder(
        self,
        num_steps: int,
        dtype: torch.dtype = torch.float32,
        *,
        spacing: str = "linspace",
        offset: int = 0,
    ) -> Tensor:
        """Decreasing levels (num_steps + 1,) of N equally spaced steps, then 0.

        With T steps in all and i = N - 1 .. 0, the steps are those of the public samplers, named as
        in Lin et al., 2024 (arXiv:2305.08891, table 2):

            linspace   round(i (T - 1) / (N - 1)), both ends among them
            leading    i (T // N) + offset
            trailing   round((i + 1) T / N) - 1

        Raises ConfigError for N above T or below 1 (2 for linspace), and for steps beyond T - 1.
        """
        last = len(self.log_sigmas) - 1
        least = 2 if spacing == "linspace" else 1
        if not least <= num_steps <= last + 1:
            known = f"{least}..{last + 1}"
            raise ConfigError(f"need num_steps in {known} for this network, got {num_steps}")
        if spacing == "linspace":
            stride = last / (num_steps - 1)
            steps = [round(i * stride) for i in range(num_steps)]
        elif spacing == "leading":
            steps = [i * ((last + 1) // num_steps) + offset for i in range(num_steps)]
        else:
            steps = [round((i + 1) * (last + 1) / num_steps) - 1 for i in range(num_steps)]
        if not 0 <= steps[0] <= steps[-1] <= last:
            raise ConfigError(f"expected steps in 0..{last}, got {steps[0]}..{steps[-1]}")
        taken = [self.log_sigmas[step] for step in reversed(steps)]
        levels = torch.tensor(taken, dtype=torch.float64, device="cpu").exp()
        return torch.cat([levels, levels.new_zeros(1)]).to(dtype)

    def step_of(self, sigma: Tensor) -> Tensor:
        """The step of each level, fractional between two (linear in log sigma), 0..T-1; float32."""
        table = torch.tensor(self.log_sigmas, dtype=torch.float64, device=sigma.device)
        wanted = sigma.double().log().clamp(table[0], table[-1])
        above = torch.searchsorted(table, wanted.contiguous()).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        steps = above - 1 + (wanted - low) / (high - low)
        # A level that came through float32 is the step that it was made from.
        whole = steps.round()
        return torch.where((steps - whole).abs() < 1e-3, whole, steps).float()


def denoise(
    predict: NoisePrediction, levels: StepLevels, x: Tensor, sigma: Tensor, labels: Tensor | None
) -> Tensor:
    """D(x; sigma) = x - sigma e, with the noise e that a network of steps predicts; float32."""
    wide = sigma.float().reshape(-1, *[1] * (x.ndim - 1))
    unit = x.float() / (1 + wide.square()).sqrt()
    return x.float() - wide * predict(unit, levels.step_of(sigma), labels)
