"""Settings of a sampler, and the names that they know."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Final

from merge_rl.errors import ConfigError, UnknownNameError

FIXED_SOLVERS: Final = ("euler", "heun", "midpoint", "heun3", "rk4")
ADAPTIVE_SOLVERS: Final = ("dopri5",)
SDE_SOLVERS: Final = ("sde-euler", "sde-heun")
SOLVERS: Final = (*FIXED_SOLVERS, *ADAPTIVE_SOLVERS, *SDE_SOLVERS)
PATH_NAMES: Final = ("linear", "gvp", "vp")
DIFFUSIONS: Final = (
    "sigma", "linear", "decreasing", "sbdm", "constant", "increasing-decreasing",
)  # fmt: skip
LAST_STEPS: Final = ("mean", "euler", "tweedie", "none")
PRECISIONS: Final = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How noise becomes samples; each family of networks reads what concerns it.

    What depends on the network (its family, its classes) is checked where both meet, see
    `merge_rl.core.sampling.compatibility`.
    """

    solver: str = "heun"
    num_steps: int = 32  # intervals; those of an SDE include the last one, without noise
    # Noise levels of networks that denoise (EDM2).
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    # The path of networks that predict velocities (SiT).
    path: str = "linear"
    # SDE solvers. EDM2 has the form sigma and ends in the denoised sample.
    diffusion: str = "sigma"
    diffusion_norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04
    sde_num_steps: int = 250  # num_steps where an SDE is scored beside the ODE
    # dopri5.
    rtol: float = 1e-3
    atol: float = 1e-6
    guidance: float = 1.0  # 1 is off
    guide: str | None = None  # model file or folder of the weaker network
    guidance_channels: int | None = 3  # guided by the null class; None: all
    low_memory: bool = False  # guidance by the null class in two forward passes
    precision: str = "float32"  # of the network's forward pass; the state stays float32
    compile: bool = False  # torch.compile, on accelerators

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, "num_steps", ">= 1", self.num_steps)
        require(self.sde_num_steps >= 2, "sde_num_steps", ">= 2", self.sde_num_steps)
        require(0 <= self.guidance < math.inf, "guidance", ">= 0", self.guidance)
        norm = self.diffusion_norm
        require(0 <= norm < math.inf, "diffusion_norm", "finite and >= 0", norm)
        inside = 0 < self.last_step_size < 1
        require(inside, "last_step_size", "in (0, 1)", self.last_step_size)
        for name in ("rtol", "atol"):
            require(0 < getattr(self, name) < math.inf, name, "> 0", getattr(self, name))
        if self.guidance_channels is not None:
            require(self.guidance_channels >= 1, "guidance_channels", ">= 1 or null (all)",
                     self.guidance_channels)  # fmt: skip
        for name, known in (
            ("path", PATH_NAMES), ("diffusion", DIFFUSIONS), ("last_step", LAST_STEPS),
            ("precision", PRECISIONS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise UnknownNameError(name, getattr(self, name), known)

    @property
    def is_sde(self) -> bool:
        """Whether noise is added on the way."""
        return self.solver in SDE_SOLVERS

    @property
    def is_adaptive(self) -> bool:
        """Whether the solver chooses its own steps, by all images of a batch."""
        return self.solver in ADAPTIVE_SOLVERS


def sde_counterpart(sampler: SamplerConfig, *, num_steps: int | None = None) -> SamplerConfig:
    """The SDE to score beside an ODE: Euler-Maruyama with `sde_num_steps`; an SDE is its own.

    Gains under one of the two need not carry over to the other, so that both are worth a score.
    """
    if sampler.is_sde:
        return dataclasses.replace(sampler, num_steps=num_steps or sampler.num_steps)
    steps = num_steps or sampler.sde_num_steps
    return dataclasses.replace(sampler, solver="sde-euler", num_steps=steps)


def require(good: bool, name: str, expected: str, found: object) -> None:
    """Raise ConfigError unless a setting is good."""
    if not good:
        raise ConfigError(f"expected {name} {expected}, got {found!r}")
