"""Coefficients that rebuild an average of weights from saved ones, after the training.

Source: Karras et al. 2024, arXiv:2312.02696, section 3.2 and appendix C. Times are images seen;
everything here is float64.

Averages that are updated seldom have exponents down to -1, wider than the flat profile. No
`ema_std` says those: two exponents have each of these widths. They are given by exponent, and by
the time at which they began, without which their squares have no integral.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.core.merging.ema_profiles import (
    Floats,
    as_float64,
    exponent_from_std,
    std_from_exponent,
)
from merge_rl.errors import ConfigError


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
        """Logarithms of the inner products with others of the same start, (P, Q)."""
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
    gives exactly that input. Repeated or indistinguishable inputs are refused.
    """
    outputs = Profiles.of_widths(out_nimg, out_std)
    return Profiles.of_widths(in_nimg, in_std).coefficients(outputs)


def profile_correlation(nimg_a: Floats, std_a: Floats, nimg_b: Floats, std_b: Floats) -> Tensor:
    """Inner products ∫ p_a(t) p_b(t) dt of two lists of profiles: (A,), (A,), (B,), (B,) -> (A, B).

        <p_a, p_b> = (γa+1)(γb+1) / ((γa+γb+1) max(Ta,Tb)) · (min(T)/max(T))^γ_later

    where γ_later belongs to the profile that ends later (appendix C).
    """
    return Profiles.of_widths(nimg_a, std_a).overlap(Profiles.of_widths(nimg_b, std_b)).exp()


def profile_name(gamma: float) -> str:
    """By its width, or by its exponent where no width says it."""
    return f"ema_std {std_from_exponent(gamma):g}" if gamma > 0 else f"exponent {gamma:.3g}"


def _log_correlation(t_a: Tensor, g_a: Tensor, t_b: Tensor, g_b: Tensor) -> Tensor:
    """Logarithm of `profile_correlation`, from times and exponents: (A,)², (B,)² -> (A, B)."""
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
