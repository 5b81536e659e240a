"""Settings of a sampler, and the names that they know."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from merge_rl.config.setting import MODEL, require_choices, setting
from merge_rl.errors import ConfigError

FIXED_SOLVERS: Final = ("euler", "heun", "midpoint", "heun3", "rk4")
ADAPTIVE_SOLVERS: Final = ("dopri5",)
SDE_SOLVERS: Final = ("sde-euler", "sde-heun")
SOLVERS: Final = (*FIXED_SOLVERS, *ADAPTIVE_SOLVERS, *SDE_SOLVERS)
PATH_NAMES: Final = ("linear", "gvp", "vp")
OWN: Final = "own"
DIFFUSIONS: Final = (
    "sigma", "linear", "decreasing", "sbdm", "constant", "increasing-decreasing",
)  # fmt: skip
LAST_STEPS: Final = ("mean", "euler", "tweedie", "none")
LEVELS: Final = (OWN, "edm")
ENDS: Final = ("sharp", "shared")
MOST_STEPS: Final = 100_000
MOST_IMAGES: Final = 10**9
PRECISIONS: Final = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How noise becomes samples; each family of networks reads what concerns it.

    What depends on the network (its family, its classes) is checked where both meet, see
    `merge_rl.core.sampling.compatibility`.
    """

    solver: str = setting(
        "heun", f"{', '.join(SOLVERS)}; dopri5 depends on the batch, a search refuses it.",
        MODEL, "--solver",
    )  # fmt: skip
    num_steps: int = setting(
        32, "Solver intervals; those of an SDE include the last one, without noise.",
        MODEL, "--num-steps",
    )  # fmt: skip
    levels: str = setting(
        "own", "Noise levels: a network's own where it has any (DiT), or edm: by sigma_min etc.",
        MODEL, choices=LEVELS,
    )  # fmt: skip
    sigma_min: float = setting(0.002, "Lowest noise level of networks that denoise (EDM2).", MODEL)
    sigma_max: float = setting(80.0, "Highest noise level of networks that denoise (EDM2).", MODEL)
    rho: float = setting(7.0, "How noise levels crowd at the lowest one (EDM2).", MODEL)
    path: str = setting(
        OWN, "Path of networks that predict velocities; own: what they state, else linear.",
        MODEL, choices=(OWN, *PATH_NAMES),
    )  # fmt: skip
    diffusion: str = setting(
        "sigma", "Noise of an SDE; EDM2 has sigma alone, and ends in the denoised sample.",
        MODEL, "--diffusion", choices=DIFFUSIONS,
    )  # fmt: skip
    diffusion_norm: float = setting(1.0, "Factor of an SDE's noise.", MODEL)
    last_step: str = setting(
        "mean", "End of a path's SDE.", MODEL, "--last-step", choices=LAST_STEPS
    )
    last_step_size: float = setting(0.04, "Time that the end of a path's SDE takes.", MODEL)
    sde_num_steps: int = setting(250, "num_steps where an SDE is scored beside the ODE.", MODEL)
    rtol: float = setting(1e-3, "Relative tolerance of dopri5.", MODEL)
    atol: float = setting(1e-6, "Absolute tolerance of dopri5.", MODEL)
    guidance: float = setting(1.0, "Strength of guidance; 1 is off.", MODEL, "--guidance")
    guidance_interval: tuple[float, float] | None = setting(
        None,
        "LOW,HIGH: noise levels above LOW up to HIGH (EDM2, DiT), or such times from 0 for noise "
        "to 1 (SiT, REPA, JiT), where guidance holds.",
        MODEL, "--guidance-interval", metavar="LOW,HIGH", unset="everywhere",
    )  # fmt: skip
    guidance_ends: str = setting(
        "sharp",
        "How a step that an end of the interval cuts is guided: sharp (each call of the network is "
        "inside or not), or shared (guided by the share of the step that is inside).",
        MODEL, choices=ENDS,
    )  # fmt: skip
    guide: str | None = setting(
        None, "Model file or folder of the weaker network; none: the null class.",
        MODEL, "--guide", path=True,
    )  # fmt: skip
    guide_network: str | None = setting(
        None, "Your own, package.module:factory, of the guide.", MODEL, "--guide-network",
        unset="what its config says, else the network's",
    )  # fmt: skip
    guidance_channels: int | None = setting(
        3, "Channels guided by the null class; null: all.", MODEL
    )
    low_memory: bool = setting(
        False, "Guidance by the null class in two forward passes instead of a doubled batch.",
        MODEL, "--low-memory",
    )  # fmt: skip
    precision: str = setting(
        "float32", "Precision of the network's forward pass; the state stays float32.",
        MODEL, "--precision", choices=PRECISIONS,
    )  # fmt: skip
    compile: bool = setting(False, "torch.compile, on accelerators.", MODEL)

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, "num_steps", ">= 1", self.num_steps)
        require(self.num_steps <= MOST_STEPS, "num_steps", f"<= {MOST_STEPS}", self.num_steps)
        require(self.sde_num_steps >= 2, "sde_num_steps", ">= 2", self.sde_num_steps)
        require(0 <= self.guidance < math.inf, "guidance", ">= 0", self.guidance)
        if self.guidance_interval is not None:
            self._require_interval(self.guidance_interval)
        norm = self.diffusion_norm
        require(0 <= norm < math.inf, "diffusion_norm", "finite and >= 0", norm)
        inside = 0 < self.last_step_size < 1
        require(inside, "last_step_size", "in (0, 1)", self.last_step_size)
        for name in ("rtol", "atol"):
            require(0 < getattr(self, name) < math.inf, name, "> 0", getattr(self, name))
        if self.guidance_channels is not None:
            require(self.guidance_channels >= 1, "guidance_channels", ">= 1 or null (all)",
                     self.guidance_channels)  # fmt: skip
        require_choices(self)

    @staticmethod
    def _require_interval(interval: tuple[float, ...]) -> None:
        good = len(interval) == 2 and 0 <= interval[0] < interval[1]
        require(good, "guidance_interval", "two numbers, 0 <= LOW < HIGH", interval)

    @cached_property
    def is_sde(self) -> bool:
        """Whether noise is added on the way."""
        return self.solver in SDE_SOLVERS

    @cached_property
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


def require_images(name: str, count: int, least: int | None = None) -> None:
    """Raise ConfigError unless so many images can be made, and are enough."""
    require(least is None or count >= least, name, f">= {least}", count)
    require(count <= MOST_IMAGES, name, f"<= {MOST_IMAGES} images", count)
