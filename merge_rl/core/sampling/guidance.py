"""Guidance: away from a weaker network, or from the same network without a class; and where."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.sampling.compatibility import VELOCITY, on_path, prediction_of
from merge_rl.core.sampling.edm import levels_of
from merge_rl.core.sampling.paths import make_path, noisy_times, time_grid
from merge_rl.interfaces import Denoiser


def grid_of(
    settings: SamplerConfig, model: object, dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """Times or noise levels (N + 1,) float64 between which a solver steps; None: it chooses them.

    They are those of a state of `dtype`, from noise to data.
    """
    if settings.is_adaptive:
        return None
    if prediction_of(model) != VELOCITY:
        return levels_of(settings, model, dtype).double()
    settings = on_path(settings, model)
    end = make_path(settings.path).end
    if not settings.is_sde:
        return time_grid(settings.num_steps, end=end, dtype=dtype).double()
    noisy = noisy_times(settings, end, dtype).double()
    return torch.cat([noisy, noisy.new_full((1,), end)]) if noisy[-1] < end else noisy


@dataclass(frozen=True, eq=False)
class Guidance:
    """The weight of guidance at a noise level or time: `strength` in an interval, 1 outside.

    At a level or time t of an interval (low, high] each evaluation of the network has

        sharp ends (no grid):   strength where low < t <= high, or t = low = 0; else 1
        shared ends (a grid):   1 + (strength - 1) s(t)

    with s(t) the share of t's step that lies in the interval; t = 0 and an interval that ends there
    are Kynkäänniemi et al.'s, 2024 (arXiv:2404.07724), and JiT's. A step of the grid begins with
    the level or time that it comes from. s is piecewise linear in both ends, and is where the ends
    are levels of the grid what sharp ones make of noise levels: so the weight has a derivative by
    strength and ends. By an end it is that of the step which the end cuts.

    Args:
        values: (3,) float64, strength, low, high, with 0 <= low <= high.
        grid: (N + 1,) float64 rising or falling, or None.
    """

    values: Tensor
    grid: Tensor | None = None

    def at(self, t: Tensor) -> float | Tensor:
        """The weight at t (0-dim); a tensor where it has a derivative, else a number."""
        if self.grid is None:
            strength, low, high = self.values.tolist()
            # In the precision of t: a level of the grid is the number that it is written as.
            inside = bool((t > low) & (t <= high)) or (low == 0 and float(t) == 0)
            return strength if inside else 1.0
        below, above = self._step(float(t))
        _, low, high = self.values.detach().tolist()
        if high < below or low > above:
            return 1.0
        parts = ((self.values[1:] - below) / (above - below)).clamp(0, 1)
        weight = 1 + (self.values[0] - 1) * (parts[1] - parts[0])
        return weight if weight.requires_grad else float(weight)

    def _step(self, t: float) -> tuple[float, float]:
        """The lower and upper end of the step that t is in."""
        grid = self.grid if self.grid is not None else torch.zeros(2)
        falling = bool(grid[0] > grid[-1])
        rising = grid.flip(0) if falling else grid
        index = int(torch.searchsorted(rising, t, right=not falling).clamp(1, len(rising) - 1))
        return float(rising[index - 1]), float(rising[index])


def guidance_of(
    settings: SamplerConfig, grid: Tensor | None, values: Tensor | None = None
) -> Guidance:
    """The guidance of settings, or of `values` (strength, low, high) with shared ends instead."""
    if values is not None:
        return Guidance(values, grid)
    low, high = settings.guidance_interval or (0.0, torch.inf)
    fixed = torch.tensor([settings.guidance, low, high], dtype=torch.float64)
    return Guidance(fixed, grid if settings.guidance_ends == "shared" else None)


def guided(
    model: Denoiser, guide: Denoiser | None, settings: SamplerConfig, weight: float | Tensor
) -> Denoiser:
    """The model with guidance of a weight: by a guide, else by the null class that it has."""
    if not isinstance(weight, Tensor) and weight == 1:
        return model
    if guide is not None:
        return autoguided(model, guide, weight)
    return classifier_free(
        model, int(model.null_label), weight,  # type: ignore[attr-defined]
        channels=settings.guidance_channels, low_memory=settings.low_memory,
    )  # fmt: skip


def _mixed(strong: Tensor, weak: Tensor, weight: float | Tensor) -> Tensor:
    """weak + weight (strong - weak); with a weight of 1 that has a derivative, `strong` itself."""
    if isinstance(weight, Tensor) and float(weight.detach()) == 1:
        return strong + (weight - 1) * (strong - weak)
    return weak + weight * (strong - weak)


def autoguided(model: Denoiser, guide: Denoiser, guidance: float | Tensor) -> Denoiser:
    """guide + guidance (model - guide), at the same x, sigma or t, labels.

    For denoised samples: Karras et al., 2024 (arXiv:2406.02507, equation 3). A path's velocity is
    linear in the denoised sample, so the same combination of velocities is the same guidance.
    """

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        weaker = guide(x, sigma, labels)
        return _mixed(model(x, sigma, labels), weaker, guidance)

    return denoise


def classifier_free(
    model: Denoiser,
    null_label: int,
    guidance: float | Tensor,
    *,
    channels: int | None = 3,
    low_memory: bool = False,
) -> Denoiser:
    """v_null + guidance (v_class - v_null) on the first channels; the others stay v_class.

    Ho & Salimans, 2022 (arXiv:2207.12598). The public samplers of SiT guide three of the four
    latent channels, and published numbers depend on it.

    Args:
        model: a network that takes class ids (B,), `null_label` among them.
        null_label: the id that means "no class".
        guidance: strength, a number or 0-dim; 1 is off.
        channels: how many are guided (at most what there are); None for all.
        low_memory: two forward passes of B images instead of one of 2B.
    """

    def denoise(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        null = torch.full((len(x),), null_label, device=x.device)
        if labels is None:  # nothing to be guided towards
            return model(x, t, null)
        if low_memory:
            with_class, without = model(x, t, labels), model(x, t, null)
        else:
            both = model(torch.cat([x, x]), t, torch.cat([labels.to(null), null]))
            with_class, without = both.chunk(2)
        mixed = _mixed(with_class, without, guidance)
        if channels is None or channels >= x.shape[1]:
            return mixed
        return torch.cat([mixed[:, :channels], with_class[:, channels:]], dim=1)

    return denoise
