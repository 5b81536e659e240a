"""Power-function EMA of weights: exponents, widths, decays.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
arXiv:2312.02696, section 3 and appendix C. An EMA of exponent γ that ends at time T averages the
training trajectory with the profile p(t) = (γ+1)/T · (t/T)^γ on [0, T]; its width is given as
`ema_std`, the standard deviation of p over T. Times are images seen (`nimg`): exact counts, not
the rounded kimg of a file name. Everything here is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merge_rl.config import real_number
from merge_rl.errors import ConfigError

Floats: TypeAlias = Sequence[float] | npt.NDArray[np.generic] | Tensor

WIDEST_STD = 1 / math.sqrt(12)  # a flat profile, γ = 0: a uniform average of the whole run


def as_float64(values: float | Floats) -> Tensor:
    """The same numbers as a float64 tensor; arrays and lists are copied."""
    if isinstance(values, Tensor):
        return values.to(torch.float64)
    return torch.from_numpy(np.array(values, dtype=np.float64))


@overload
def exponent_from_std(ema_std: float) -> float: ...
@overload
def exponent_from_std(ema_std: Floats) -> Tensor: ...
def exponent_from_std(ema_std: float | Floats) -> float | Tensor:
    """Exponent γ > 0 of the profile whose relative width is `ema_std`, elementwise.

    The largest root of γ³ + 7γ² + (16 − a)γ + (12 − a) = 0 with a = ema_std⁻² (appendix C).
    For a > 12 all three roots are real, and Viète's formula gives the largest in closed form:

        γ = ⅔ √(1+3a) · cos( ⅓ arccos( −(1+18a) / (1+3a)^{3/2} ) ) − 7/3

    `ema_std` in (0, 1/√12), any shape; a float gives a float, all else a float64 tensor.
    """
    width = as_float64(ema_std)
    if not bool(((width > 0) & (width < WIDEST_STD)).all()):
        got = width.flatten().tolist()
        raise ConfigError(f"expected 0 < ema_std < {WIDEST_STD:.6f} (1/sqrt(12)), got {got}")
    a = width.pow(-2)
    angle = torch.arccos(-(1 + 18 * a) * (1 + 3 * a).pow(-1.5))
    gamma = 2 / 3 * (1 + 3 * a).sqrt() * torch.cos(angle / 3) - 7 / 3
    return float(gamma) if isinstance(ema_std, (int, float)) else gamma


@overload
def std_from_exponent(gamma: float) -> float: ...
@overload
def std_from_exponent(gamma: Floats) -> Tensor: ...
def std_from_exponent(gamma: float | Floats) -> float | Tensor:
    """Relative width √((γ+1) / ((γ+2)² (γ+3))) of the profile of exponent γ >= 0, elementwise."""
    g = as_float64(gamma)
    if not bool((g >= 0).all()):
        raise ConfigError(f"expected an exponent >= 0, got {g.flatten().tolist()}")
    width = ((g + 1) / ((g + 2).square() * (g + 3))).sqrt()
    return float(width) if isinstance(gamma, (int, float)) else width


def ema_beta(ema_std: float, nimg_after: int, batch: int) -> float:
    """Decay of one EMA update, ema ← β ema + (1 − β) weights, with β = (1 − batch/nimg)^(γ+1).

    `nimg_after` counts the images seen *after* the step, the step's `batch` included; at the
    first step both are equal, β = 0 and the EMA starts as a copy of the weights.
    """
    if not 0 < batch <= nimg_after:
        raise ConfigError(f"expected 0 < batch <= nimg_after, got {batch} and {nimg_after}")
    return float((1 - batch / nimg_after) ** (exponent_from_std(float(ema_std)) + 1))


def ema_response(end: float, ema_std: float, length: int) -> Tensor:
    """Weight of each of the times 0, 1, …, length−1 in an EMA that ends at `end`; sums to 1.

    Proportional to t^γ for t <= end and 0 after it. Returns (length,) float64.
    """
    if not 1 <= end < length:
        raise ConfigError(f"expected 1 <= end < length, got end {end} and length {length}")
    t = torch.arange(length, dtype=torch.float64)
    response = (t / end).pow(exponent_from_std(float(ema_std))) * (t <= end)
    return response / response.sum()


def parse_std_list(text: str) -> list[float]:
    """Widths written as "0.05,0.10" or as a range "0.010,0.015,...,0.250"; sorted, each once."""
    parts = [part.strip() for part in text.split(",")]
    values: list[float] = []
    try:
        for i, part in enumerate(parts):
            if part == "...":
                first, second = values[-2], values[-1]
                values += _range_after(first, second, last=_width(parts[i + 1]))
            else:
                values.append(_width(part))
    except (ValueError, IndexError):
        shape = '"0.05,0.10" or "0.010,0.015,...,0.250"'
        raise ConfigError(f"expected a list of widths such as {shape}, got {text!r}") from None
    exponent_from_std(values)  # refuses widths that no profile has
    # 12 digits: 0.010 + 8 * 0.005 must be the 0.05 of a file name, not 0.049999999999999996.
    return sorted({round(value, 12) for value in values})


def _width(text: str) -> float:
    number = real_number(text)
    if number is None:
        raise ValueError(text)
    return number


def _range_after(first: float, second: float, *, last: float) -> list[float]:
    """The values that follow `second` at the step second − first, before `last`."""
    step = second - first
    count = round((last - second) / step) if step > 0 else 0
    if count < 1 or abs(second + count * step - last) > 1e-6 * step:
        raise ValueError(f"{last} is not ahead of {second} by whole steps of {step}")
    return [first + i * step for i in range(2, 1 + count)]
