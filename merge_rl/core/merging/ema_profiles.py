"""Power-function EMA of weights: exponents, widths, and how saved ones rebuild others.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
arXiv:2312.02696, section 3 and appendix C. An EMA of exponent γ that ends at time T averages the
training trajectory with the profile p(t) = (γ+1)/T · (t/T)^γ on [0, T]; its width is given as
`ema_std`, the standard deviation of p over T. Times are images seen (`nimg`): exact counts, not
the rounded kimg of a file name. Everything here is float64.

Averages that are updated seldom have exponents down to -1, wider than the flat profile. No
`ema_std` says those: two exponents have each of these widths. They are given by exponent, and by
the time at which they began, without which their squares have no integral.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merge_rl.config import real_number
from merge_rl.errors import ConfigError

Floats: TypeAlias = Sequence[float] | npt.NDArray[np.generic] | Tensor

WIDEST_STD = 1 / math.sqrt(12)  # a flat profile, γ = 0: a uniform average of the whole run

NARROWEST_STD = 1e-7  # the roots of what is much narrower are infinite in float64


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

    `ema_std` in [1e-7, 1/√12), any shape; a float gives a float, all else a float64 tensor.
    Raises ConfigError for widths outside.
    """
    width = as_float64(ema_std)
    if not bool(((width >= NARROWEST_STD) & (width < WIDEST_STD)).all()):
        got, widest = width.flatten().tolist(), f"{WIDEST_STD:.6f} (1/sqrt(12))"
        raise ConfigError(f"expected {NARROWEST_STD} <= ema_std < {widest}, got {got}")
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


def sparse_profile(gamma: float, update_every: int) -> tuple[float, float]:
    """(exponent, start in steps) of an average with exponent `gamma` that skips steps.

    Its decay is that of a single step, (1 − 1/(k+2))^(γ+1) after k steps, but it comes every u
    steps only, which the decay does not know. Over a long time the exponent is therefore

        γ' = (γ+1)/u − 1  > −1

    and the copy of the weights that the average began as keeps the share (start/T)^(γ'+1), with
    start = u (Γ(1+2/u) / Γ(1+1/u))^u: the product of all decays. ema-pytorch's `update_every`.
    """
    u = update_every
    if u < 1 or not gamma > -1:
        raise ConfigError(f"expected update_every >= 1 and an exponent > -1, got {u} and {gamma}")
    start = u * math.exp(u * (math.lgamma(1 + 2 / u) - math.lgamma(1 + 1 / u)))
    return (gamma + 1) / u - 1, start


@dataclass(frozen=True, eq=False)
class Profiles:
    """Profiles of averages of one run: they end at `nimg` (P,), with exponents `gamma` (P,) > −1.

    They began at the time `start` as a copy of the weights: (γ+1)/T · (t/T)^γ from there on, and
    the share (start/T)^(γ+1) evenly before. Raises ConfigError for what is no such profile.
    """

    nimg: Tensor
    gamma: Tensor
    start: float = 0.0

    def __post_init__(self) -> None:
        times, gamma = as_float64(self.nimg), as_float64(self.gamma)
        if times.ndim != 1 or times.shape != gamma.shape or times.numel() == 0:
            got = f"{tuple(times.shape)} and {tuple(gamma.shape)}"
            raise ConfigError(f"expected as many nimg as ema_std, in two lists, got shapes {got}")
        if not bool(((times > 0) & times.isfinite()).all()):
            raise ConfigError(f"expected nimg > 0, got {times.tolist()}")
        if not bool((times > self.start).all()) or self.start < 0:
            told = f"after their start at {self.start:g} images"
            raise ConfigError(f"expected averages that end {told}, got ends {times.tolist()}")
        if not bool((gamma > -1).all()):
            raise ConfigError(f"expected exponents > -1, got {gamma.tolist()}")
        object.__setattr__(self, "nimg", times)
        object.__setattr__(self, "gamma", gamma)

    @classmethod
    def of_widths(cls, nimg: Floats, ema_std: Floats) -> Profiles:
        """Those that end at `nimg`, of relative widths `ema_std`, from the start of training on."""
        times = as_float64(nimg)
        return cls(times, exponent_from_std(as_float64(ema_std)))

    @classmethod
    def known(
        cls, nimg: Sequence[float | None], gamma: Sequence[float | None], start: float = 0.0
    ) -> Profiles | None:
        """Those of lists in which nothing is unknown (None); else None."""
        times, exponents = ([v for v in values if v is not None] for values in (nimg, gamma))
        if len(times) < len(nimg) or len(exponents) < len(gamma):
            return None
        return cls(as_float64(times), as_float64(exponents), start)

    def overlap(self, other: Profiles) -> Tensor:
        """Logarithms of the inner products with others of the same start, (P, Q).

            <p_a, p_b> = (γa+1)(γb+1) / ((γa+γb+1) max(Ta,Tb)) · (min(T)/max(T))^γ_later

        where γ_later belongs to the profile that ends later (appendix C), and start is 0.
        """
        times = (self.nimg, self.gamma, other.nimg, other.gamma)
        if self.start:
            return _log_overlap(*times, self.start)
        lowest = self.gamma.detach().min() + other.gamma.detach().min()
        if lowest <= -1:
            raise ConfigError(
                f"exponents as small as {float(lowest) / 2:.3g} can be compared only where the "
                "start of the averages is known; expected ema_start in the manifest"
            )
        return _log_correlation(*times)

    def coefficients(self, other: Profiles) -> Tensor:
        """Coefficients (P, Q) that rebuild others from these; see `posthoc_coefficients`."""
        log_gram = self.overlap(self)
        # Unit diagonal: the solution does not depend on the unit of time, and the condition number
        # is that of the shapes alone.
        norm = log_gram.diagonal() / 2
        gram = (log_gram - norm[:, None] - norm).exp()
        _check_independent(gram, self)
        log_target = self.overlap(other) - norm[:, None]
        # Each column is normalised in the end, so its scale is free: a narrow output far from every
        # input would otherwise underflow to 0 / 0.
        target = (log_target - log_target.amax(0)).exp()
        solution = torch.linalg.solve(gram, target) * (norm.min() - norm).exp()[:, None]
        coefficients = solution / solution.sum(0)
        same = (self.nimg[:, None] == other.nimg) & (self.gamma[:, None] == other.gamma)
        # Exact in value, yet with the derivative of the formula: 0 is added to it.
        exact = same.double() + (coefficients - coefficients.detach())
        return torch.where(same.any(0), exact, coefficients)

    def row(self, end: float | Tensor, gamma: float | Tensor) -> Tensor:
        """Coefficients (P,) of the profile of exponent `gamma` that ends at `end`.

        It is rebuilt from what ends there or before; what ends later gets 0.
        """
        seen = self.nimg <= end
        if not bool(seen.any()):
            raise ConfigError(f"no checkpoint ends at or before {float(end):.0f} images")
        row = torch.zeros_like(self.nimg)
        known = Profiles(self.nimg[seen], self.gamma[seen], self.start)
        wanted = Profiles(as_float64(end)[None], as_float64(gamma)[None], self.start)
        row[seen] = known.coefficients(wanted)[:, 0]
        return row


def posthoc_coefficients(
    in_nimg: Floats, in_std: Floats, out_nimg: Floats, out_std: Floats
) -> Tensor:
    """Coefficients that rebuild output EMAs from input EMAs: (I,), (I,), (O,), (O,) -> (I, O).

    Least-squares fit of each output profile by a sum of the input profiles: A X = B with
    A = <in, in>, B = <in, out>; each column is then divided by its own sum, so that it sums to 1
    (section 3.2). Coefficients may be negative and above 1. An output equal to one of the inputs
    gives exactly that input. Raises ConfigError for inputs that are repeated or almost equal.
    """
    outputs = Profiles.of_widths(out_nimg, out_std)
    return Profiles.of_widths(in_nimg, in_std).coefficients(outputs)


def profile_name(gamma: float) -> str:
    """By its width, or by its exponent where no width says it."""
    return f"ema_std {std_from_exponent(gamma):g}" if gamma > 0 else f"exponent {gamma:.3g}"


def _log_correlation(t_a: Tensor, g_a: Tensor, t_b: Tensor, g_b: Tensor) -> Tensor:
    """Logarithms of inner products of profiles from 0 on, (A,)², (B,)² -> (A, B)."""
    t_a, g_a = t_a[:, None], g_a[:, None]
    later = torch.where(t_a >= t_b, g_a, g_b)
    # In logs: a ratio of times such as 1/256 to the power of a γ near 200 underflows.
    ratio = -(t_a.log() - t_b.log()).abs()
    scale = torch.log1p(g_a) + torch.log1p(g_b) - torch.log1p(g_a + g_b)
    return scale - torch.maximum(t_a, t_b).log() + later * ratio


def _log_overlap(t_a: Tensor, g_a: Tensor, t_b: Tensor, g_b: Tensor, start: float) -> Tensor:
    """The same of profiles that began at `start`: what lies before it, and the integral after it.

    (start/Ta)^(γa+1) (start/Tb)^(γb+1) / start
        + (γa+1)(γb+1) / (Ta^(γa+1) Tb^(γb+1)) · ∫ t^(γa+γb) dt from start to min(T)
    """
    t_a, g_a = t_a[:, None], g_a[:, None]
    power = g_a + g_b + 1
    begin = math.log(start)
    share = (g_a + 1) * (begin - t_a.log()) + (g_b + 1) * (begin - t_b.log()) - begin
    span = torch.minimum(t_a, t_b).log() - begin
    # ∫ = start^power (e^(power span) − 1) / power, which is the span itself where power is 0.
    safe = torch.where(power.abs() < 1e-9, torch.full_like(power, 1e-9), power)
    grown = (power * span).clamp(min=0) + (-torch.expm1(-(safe * span).abs()) / safe.abs()).log()
    return torch.logaddexp(share, share + torch.log1p(g_a) + torch.log1p(g_b) + grown)


def _check_independent(gram: Tensor, profiles: Profiles) -> None:
    pairs = list(zip(profiles.nimg.tolist(), profiles.gamma.tolist(), strict=True))
    repeated = sorted({pair for pair in pairs if pairs.count(pair) > 1})
    if repeated:
        listed = ", ".join(f"nimg {t:.0f} with {profile_name(g)}" for t, g in repeated)
        raise ConfigError(f"expected each input profile once, got more than one of {listed}")
    spread = torch.linalg.eigvalsh(gram)
    # 1e-13: beyond this condition number float64 leaves fewer than three digits to a coefficient.
    if not float(spread[0]) > 1e-13 * float(spread[-1]):
        raise ConfigError(
            f"expected input profiles that differ, got {len(pairs)} with a condition number"
            f" above 1e13: two of them are almost equal"
        )
