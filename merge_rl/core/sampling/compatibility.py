"""Sampler settings, labels and the network they meet: what cannot work is refused first."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

import torch
from torch import Tensor, nn

from merge_rl.config import (
    FIXED_SOLVERS,
    OWN,
    PATH_NAMES,
    SDE_SOLVERS,
    SOLVERS,
    SamplerConfig,
)
from merge_rl.core.sampling.edm import levels_of
from merge_rl.core.sampling.sde import PathSDE
from merge_rl.core.sampling.solvers import find_tableau
from merge_rl.errors import ConfigError, MergeRLError, UnknownNameError
from merge_rl.interfaces import Denoiser
from merge_rl.untrusted import reason

DENOISED, VELOCITY = "denoised", "velocity"
# What a family's sampler can do; every solver works for both today.
SOLVERS_OF: Final = {DENOISED: SOLVERS, VELOCITY: SOLVERS}


def prediction_of(model: object) -> str:
    """What a network predicts: "denoised" (EDM2, and where nothing is said) or "velocity" (SiT)."""
    prediction = str(getattr(model, "prediction", DENOISED))
    if prediction not in SOLVERS_OF:
        raise UnknownNameError("prediction of a network", prediction, SOLVERS_OF)
    return prediction


def has_open_end(model: object) -> bool:
    """Whether a network cannot be asked where sampling ends, which fixed-step methods then spare.

    Noise levels end in 0, where the slope of a denoiser is not defined; of velocity networks, those
    say it whose attribute `open_end` is true (JiT).
    """
    return prediction_of(model) == DENOISED or bool(getattr(model, "open_end", False))


def scale_of(model: object) -> float:
    """Standard deviation of the noise that a velocity network starts from; 1 if it says none."""
    return float(getattr(model, "noise_scale", 1.0))


def on_path(settings: SamplerConfig, model: object) -> SamplerConfig:
    """The settings with the path by its name: "own" is what a network states, else linear."""
    if settings.path != OWN:
        return settings
    return dataclasses.replace(settings, path=getattr(model, "stated_path", None) or PATH_NAMES[0])


def require_solver(solver: str, prediction: str = DENOISED) -> None:
    """Raise UnknownNameError unless networks of this prediction can be sampled with a solver."""
    if solver not in SOLVERS_OF[prediction]:
        raise UnknownNameError("solver", solver, SOLVERS_OF[prediction])


def require_sampler(
    settings: SamplerConfig,
    model: Denoiser,
    guide: Denoiser | None = None,
    *,
    guided: bool = False,
) -> None:
    """Raise ConfigError unless a network can be sampled with these settings, `guided` at will."""
    prediction, settings = prediction_of(model), on_path(settings, model)
    require_solver(settings.solver, prediction)
    if settings.is_sde and settings.num_steps < 2:
        raise ConfigError(f"need num_steps >= 2 for an SDE, got {settings.num_steps}")
    path = getattr(model, "stated_path", None)
    if path not in (None, settings.path):
        raise ConfigError(
            f"the network's path is {path}, got {settings.path}; expected sampler.path={path}"
        )
    if prediction == DENOISED:
        _require_edm(settings, model)
    elif settings.is_sde:
        if scale_of(model) != 1:
            raise ConfigError(
                f"an SDE needs a path from noise of unit variance; this network's has the scale "
                f"{scale_of(model):g}"
            )
        PathSDE.of(settings, _no_velocity)  # refuses what would be infinite
    if guided or settings.guidance != 1:
        _require_guidance(settings, model, guide)


def _no_velocity(x: Tensor, _t: Tensor) -> Tensor:
    return x


def _require_edm(settings: SamplerConfig, model: Denoiser) -> None:
    levels_of(settings, model)  # refuses levels that cannot be
    if settings.is_sde and settings.diffusion != "sigma":
        raise ConfigError(
            f"the diffusion form {settings.diffusion!r} belongs to paths; networks that denoise "
            "(EDM2) have 'sigma' with a norm"
        )


def _require_guidance(settings: SamplerConfig, model: Denoiser, guide: Denoiser | None) -> None:
    if settings.is_adaptive and settings.guidance_ends == "shared":
        raise ConfigError(
            f"{settings.solver} chooses its own steps, of which no share can lie in an interval; "
            "expected guidance_ends sharp, or a solver with fixed steps"
        )
    _require_interval(settings, model)
    if guide is not None:
        _require_alike(model, guide)
    elif getattr(model, "null_label", None) is None:
        null = prediction_of(model) == VELOCITY or getattr(model, "noise_levels", None)
        needed = "a network with a null class, or a guide network" if null else "a guide network"
        strength = settings.guidance
        if strength == 1:
            raise ConfigError(f"tuning guidance needs {needed}; name a weaker one with --guide")
        raise ConfigError(f"guidance {strength:g} needs {needed}; 1 switches guidance off")


def _require_alike(model: Denoiser, guide: Denoiser) -> None:
    """Refuse a guide that predicts something else, or of other samples or classes."""
    if prediction_of(guide) != prediction_of(model):
        raise ConfigError(
            f"the guide predicts {prediction_of(guide)!r}, the network "
            f"{prediction_of(model)!r}; expected two networks of one family"
        )
    own, other = (list(getattr(one, "sample_shape", ())) for one in (model, guide))
    if own and other and own != other:
        raise ConfigError(f"the guide's samples are {other}, the network's {own}; expected equal")
    own_classes, classes = (getattr(one, "label_dim", None) for one in (model, guide))
    if classes and own_classes is not None and classes != own_classes:
        raise ConfigError(
            f"the guide has {classes} classes, the network {own_classes}; expected as many, or none"
        )


def _require_interval(settings: SamplerConfig, model: Denoiser) -> None:
    """Refuse an interval in which no step lies, and noise levels where times are meant."""
    if settings.guidance_interval is None:
        return
    low, high = settings.guidance_interval
    times = prediction_of(model) == VELOCITY
    first = 1.0 if times else float(levels_of(settings, model).max())
    if low >= first or (times and 1 < high < math.inf):
        what = "times from 0 for noise to 1" if times else f"noise levels below {first:g}"
        raise ConfigError(f"expected a guidance_interval of {what}, got {low:g},{high:g}")


def require_reward_solver(settings: SamplerConfig) -> None:
    """Raise ConfigError for a solver under which an image depends on the others of its batch."""
    if settings.is_adaptive:
        raise ConfigError(
            f"{settings.solver} chooses its steps by the whole batch, so that a reward would "
            f"depend on which images are made together; expected one of "
            f"{', '.join((*FIXED_SOLVERS, *SDE_SOLVERS))}"
        )


def require_labels(labels: Tensor | None, model: object, count: int) -> None:
    """Raise ConfigError unless labels are `count` class ids of the network, or rows for them.

    The null class is one of the ids. A network without classes takes any ids and ignores them.
    """
    if labels is None:
        return
    if len(labels) != count:
        raise ConfigError(f"expected {count} labels, one for each image, found {len(labels)}")
    classes: int | None = getattr(model, "label_dim", None)
    if not classes or labels.ndim != 1 or labels.is_floating_point() or not count:
        return
    last = classes - 1 if getattr(model, "null_label", None) is None else classes
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > last:
        raise ConfigError(f"expected labels in 0..{last}, found {low if low < 0 else high}")


def count_network_calls(
    solver: str,
    num_steps: int,
    *,
    prediction: str = DENOISED,
    open_end: bool | None = None,
    last_step: str = "mean",
) -> int:
    """Network calls an image costs (nfe), per network and without the null class's.

    ODE: stages times N; where the end is open, as for EDM, the last interval costs one call if the
    method would need the slope at its end (2N - 1 for Heun). SDE: N, or 2N - 1 for Heun; with
    "none" as the last step of a path 2N. Adaptive solvers have no fixed number: ConfigError.
    """
    require_solver(solver, prediction)
    if solver in FIXED_SOLVERS:
        tableau = find_tableau(solver)
        short = prediction == DENOISED if open_end is None else open_end
        spared = tableau.stages - 1 if short and tableau.reaches_end else 0
        return tableau.stages * num_steps - spared
    if solver not in SDE_SOLVERS:
        raise ConfigError(f"{solver} chooses its own steps: it has no fixed number of calls")
    stages = SDE_SOLVERS.index(solver) + 1
    ends_noisy = prediction == VELOCITY and last_step == "none"
    return stages * num_steps - (0 if ends_noisy else stages - 1)


def require_call(model: nn.Module) -> None:
    """Call a stated network on one sample of zeros; ConfigError, with its reason, if it fails."""
    if hasattr(model, "statement"):
        with torch.no_grad():
            _called(model)


def without_gradient(model: nn.Module) -> str | None:
    """Why what a stated network makes has no gradient by its weights; None where it has one."""
    name = type(model).__name__
    model.requires_grad_(True)
    with torch.enable_grad():
        made = _called(model)
    model.requires_grad_(False)
    if made.requires_grad:
        return None
    return f"the network {name} has no derivative: what it makes does not depend on a gradient"


def _called(model: nn.Module) -> Tensor:
    device = next((tensor.device for tensor in model.state_dict().values()), None)
    said: Any = model.statement
    x, labels = torch.zeros(1, *said.sample_shape, device=device), None
    if said.label_dim:
        labels = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        made: Tensor = model(x, torch.tensor(0.5, device=device), labels)
    except (MergeRLError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        what = f"x {tuple(x.shape)}, t (1,)" + (" and labels (1,)" if said.label_dim else "")
        name, problem = type(model).__name__, f"{type(error).__name__}: {reason(error)}"
        raise ConfigError(
            f"calling the network {name}, in float32, with {what} failed: {problem}"
        ) from error
    return made


def require_class_ids(labels: Tensor, count: int) -> None:
    """Raise ConfigError unless labels (B,) on the CPU are class ids in 0..count-1.

    Labels on an accelerator pass unread: looking at them would wait for everything that is queued
    there, in every call of the network. In a compiled network, which is for accelerators, all do.
    """
    if torch.compiler.is_compiling() or labels.device.type != "cpu" or not labels.numel():
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= count:
        odd = low if low < 0 else high
        raise ConfigError(f"expected labels in 0..{count - 1}, found {odd}")


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., K-1, 0, 1, ...: (count,) int64; every run of K rows has each class once."""
    return torch.arange(count) % max(num_classes, 1)
