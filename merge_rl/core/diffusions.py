"""How much noise an SDE of a path adds, as a function of time: the diffusion forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import torch
from torch import Tensor

from merge_rl.core.interpolants import Path, require_times
from merge_rl.errors import ConfigError, UnknownNameError

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
