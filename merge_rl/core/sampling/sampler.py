"""From noise to samples: one entry point for denoisers, velocity networks and all solvers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.sampling.compatibility import (
    VELOCITY,
    has_open_end,
    on_path,
    prediction_of,
    require_labels,
    require_sampler,
    scale_of,
)
from merge_rl.core.sampling.edm import EDMSDE, edm_velocity, levels_of
from merge_rl.core.sampling.edm import Churn as Churn
from merge_rl.core.sampling.edm import solve_edm as solve_edm
from merge_rl.core.sampling.guidance import grid_of, guidance_of, guided
from merge_rl.core.sampling.paths import make_path, time_grid
from merge_rl.core.sampling.sde import SDE, NoiseSource, PathSDE, solve_sde
from merge_rl.core.sampling.solvers import (
    NormWatch,
    OnStep,
    Velocity,
    find_tableau,
    runge_kutta_step,
    solve_adaptive,
    solve_fixed,
)
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.interfaces import Denoiser
from merge_rl.rng import ImageStreams


def signed_levels(x: Tensor) -> Tensor:
    """Images in [-1, 1] -> whole numbers on 0..255, float32: 127.5 x + 128, clipped, rounded down.

    Rounding down after adding 128 makes encoding followed by decoding the identity. NaN is mapped
    to 0: what yields it is caught where it is made, not here. The derivative is that of the
    clipping: see `rounded_down`.
    """
    return rounded_down((x.float() * 127.5 + 128).nan_to_num().clip(0, 255))


def unit_levels(x: Tensor) -> Tensor:
    """Images in [0, 1] -> whole numbers on 0..255, float32: 255 x, as `signed_levels`."""
    return rounded_down(x.float().nan_to_num().clip(0, 1) * 255)


def rounded_down(x: Tensor) -> Tensor:
    """floor(x), with the derivative of x: straight through (Bengio et al., 2013, arXiv:1308.3432).

    A step's own derivative is 0 wherever there is one; over a batch of images the rounding is noise
    of half a level, which the mean of the distribution hardly sees. Exact for |x| < 2^23: the
    difference of a number and its floor has no rounding.
    """
    if not x.requires_grad:
        return x.floor()
    return x + (x.floor() - x).detach()


# What commands make of a network before it comes here, and score beside it.
FOR_RUNS: Final = frozenset({"precision", "compile", "sde_num_steps", "guide_network"})


def sample(
    model: Denoiser,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    guide: Denoiser | None = None,
    churn: Churn | None = None,
    draw: NoiseSource | None = None,
    dtype: torch.dtype = torch.float32,
    check_finite: bool = False,
    **settings: Any,
) -> Tensor:
    """Samples (B, C, h, w) of `dtype` from noise of unit variance.

    Args:
        model: a denoiser D(x; sigma, labels) such as EDM2, or, where its attribute `prediction` is
            "velocity", a velocity v(x, t, labels) such as SiT.
        noise: (B, C, h, w).
        labels: (B,) int64 class ids, (B, K) float rows (denoisers), or None.
        guide: the weaker network. A velocity network can do without, by its null class.
        churn: see `solve_edm`; denoisers with a fixed-step ODE solver only.
        draw: noise of the state's shape for churn, which needs it, or for an SDE; by default an
            SDE's noise follows from the starting noise of each image (`ImageStreams.following`).
        dtype: of the solver's state; the network gets float32.
        check_finite: raise NonFiniteSamplesError with the step where samples cease to be finite.
        solver: ODE: "euler", "heun" (the default), "midpoint", "heun3", "rk4" (the 3/8 rule), each
            with fixed steps, or "dopri5", which is adaptive and depends on the whole batch. SDE:
            "sde-euler" (Euler-Maruyama), "sde-heun".
        num_steps: solver intervals. `count_network_calls` says what they cost.
        guidance: strength; 1 is off and then `guide` is not called.
        guidance_interval, guidance_ends: (low, high), noise levels of denoisers or times of a path,
            where guidance holds; elsewhere `guide` is not called. See `Guidance`.
        guidance_channels, low_memory: see `classifier_free`.
        levels, sigma_min, sigma_max, rho: noise levels of denoisers, see `levels_of`.
        path: "linear", "gvp" or "vp": what a velocity network was trained on; "own", the default:
            what it states, else linear.
        diffusion, diffusion_norm: noise of an SDE, see `merge_rl.core.sampling.sde.diffusion`.
        last_step, last_step_size: end of the SDE of a path, see `PathSDE`.
        rtol, atol: of dopri5.

    Settings and their defaults are those of `SamplerConfig`, without what is for whole runs.
    An image is a function of its noise and label, whatever the batch, but for dopri5 and `draw`.
    Raises ConfigError for settings and labels that cannot work, its kind UnknownNameError for
    settings and solvers that are not known.
    """
    known = {item.name for item in dataclasses.fields(SamplerConfig)} - FOR_RUNS
    for name in sorted(settings.keys() - known):
        raise UnknownNameError("setting of sample", name, known)
    return sample_with(
        SamplerConfig(**settings), model, noise, labels, guide=guide, churn=churn, draw=draw,
        dtype=dtype, check_finite=check_finite,
    )  # fmt: skip


def sample_with(
    settings: SamplerConfig,
    model: Denoiser,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    guide: Denoiser | None = None,
    churn: Churn | None = None,
    draw: NoiseSource | None = None,
    dtype: torch.dtype = torch.float32,
    check_finite: bool = False,
    through: Callable[[Velocity], Velocity] | None = None,
    on_step: OnStep | None = None,
    guidance: Tensor | None = None,
) -> Tensor:
    """`sample` with its settings in one object; `settings.guide`, a file, is not looked at.

    `guidance` (3,) float64 is strength, low and high in the place of the settings', with shared
    ends; samples have a derivative by it with `through`.

    With `through` the samples of a solver with fixed steps keep what backpropagation needs, and
    each evaluation of the guided network goes through it; `on_step` hears of the steps instead of
    `check_finite`. Noise of an SDE's steps depends on nothing that has a gradient.
    """
    settings = on_path(settings, model)
    require_sampler(settings, model, guide, guided=guidance is not None)
    require_labels(labels, model, len(noise))
    if churn is not None and (
        settings.is_sde or settings.is_adaptive or prediction_of(model) == VELOCITY
    ):
        raise ConfigError("churn is for the fixed-step ODE solvers of networks that denoise (EDM2)")
    moves = prediction_of(model) == VELOCITY
    scale = scale_of(model) if moves else float(levels_of(settings, model)[0])
    watch = NormWatch(noise * scale) if check_finite else None
    heard = on_step or watch
    with torch.set_grad_enabled(through is not None):
        if settings.is_sde:
            sde = make_sde(
                settings, model, labels, guide=guide, dtype=dtype, guidance=guidance,
                through=through,
            )  # fmt: skip
            samples = solve_sde(sde, noise, draw or following(noise), on_step=heard)
        else:
            evaluate = _network(settings, model, labels, guide, dtype, guidance)
            evaluate = through(evaluate) if through is not None else evaluate
            if moves:
                start = scale_of(model) * noise.to(dtype)
                samples = _solve_path(settings, evaluate, start, heard, has_open_end(model))
            else:
                samples = _solve_denoiser(
                    settings, levels_of(settings, model, dtype), evaluate, noise.to(dtype), churn,
                    draw, heard,
                )  # fmt: skip
    if watch is not None:
        watch.check()
    return samples


def make_sde(
    settings: SamplerConfig,
    model: Denoiser,
    labels: Tensor | None = None,
    *,
    guide: Denoiser | None = None,
    dtype: torch.dtype = torch.float32,
    guidance: Tensor | None = None,
    through: Callable[[Velocity], Velocity] | None = None,
) -> SDE:
    """The SDE that `sample_with` solves, step by step for whoever needs the steps.

    With gradients where they are on: `gaussian(i, x)` at a stored state, and `step_log_prob` of
    the state that followed it, are what a policy gradient needs ("sde-euler").
    """
    settings = on_path(settings, model)
    require_sampler(settings, model, guide, guided=guidance is not None)
    evaluate = _network(settings, model, labels, guide, dtype, guidance)
    evaluate = through(evaluate) if through is not None else evaluate
    if prediction_of(model) != VELOCITY:
        return EDMSDE(
            denoise=evaluate, sigmas=levels_of(settings, model, dtype),
            norm=settings.diffusion_norm, heun=settings.solver == "sde-heun",
        )  # fmt: skip
    return PathSDE.of(settings, evaluate, dtype)


def without_noise(sde: SDE) -> SDE:
    """The steps of an SDE that `make_sde` made, with all noise left out: Euler's of its ODE."""
    if isinstance(sde, EDMSDE):
        return dataclasses.replace(sde, norm=0.0)
    if isinstance(sde, PathSDE):
        return dataclasses.replace(sde, form="constant", norm=0.0)
    raise ConfigError(f"expected an SDE of a network, got {type(sde).__name__}")


def following(noise: Tensor) -> NoiseSource:
    """What `sample` draws the noise of an SDE's steps from: each image's own, by its start."""
    streams, shape = ImageStreams.following(noise), noise.shape[1:]
    return lambda: streams.randn(shape)


def _network(
    settings: SamplerConfig,
    model: Denoiser,
    labels: Tensor | None,
    guide: Denoiser | None,
    dtype: torch.dtype,
    guidance: Tensor | None = None,
) -> Velocity:
    """(x, t) -> the guided network's prediction in the precision of the state."""
    held = None
    if guidance is not None or settings.guidance != 1:
        held = guidance_of(settings, grid_of(settings, model, dtype), guidance)

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        # The network works in float32 whatever the precision of the state. Times of a grid are on
        # the CPU; filling in a number, unlike copying it, does not wait for the device.
        here = t.float() if t.device == x.device else torch.full((), float(t), device=x.device)
        net = model if held is None else guided(model, guide, settings, held.at(t))
        return net(x.float(), here, labels).to(dtype)

    return evaluate


def _solve_path(
    settings: SamplerConfig, velocity: Velocity, x: Tensor, on_step: OnStep | None, open_end: bool
) -> Tensor:
    path = make_path(settings.path)
    if settings.is_adaptive:
        return _adaptive(settings, velocity, x, 0.0, path.end, on_step)
    times = time_grid(settings.num_steps, end=path.end, dtype=x.dtype)
    return solve_fixed(
        velocity, x, times, solver=settings.solver, open_end=open_end, on_step=on_step
    )


def _solve_denoiser(
    settings: SamplerConfig,
    levels: Tensor,
    denoise: Velocity,
    noise: Tensor,
    churn: Churn | None,
    draw: NoiseSource | None,
    on_step: OnStep | None,
) -> Tensor:
    velocity = edm_velocity(denoise)
    if not settings.is_adaptive:
        return solve_edm(
            velocity, noise, levels, solver=settings.solver, churn=churn, draw=draw,
            on_step=on_step,
        )  # fmt: skip
    # The slope is not defined at sigma = 0: adaptive down to sigma_min, then Euler.
    last = levels[-2:]
    x = noise * levels[0]
    x = _adaptive(settings, velocity, x, float(levels[0]), float(last[0]), on_step)
    return runge_kutta_step(find_tableau("euler"), velocity, x, last[0], last[1])


def _adaptive(
    settings: SamplerConfig,
    velocity: Velocity,
    x: Tensor,
    start: float,
    end: float,
    on_step: OnStep | None,
) -> Tensor:
    # A path's network can be asked a little beyond t = 1, a denoiser not below sigma = 0.
    x = solve_adaptive(
        velocity, x, start, end, rtol=settings.rtol, atol=settings.atol, method=settings.solver,
        overshoot=end > start,
    )  # fmt: skip
    if on_step is not None:
        on_step(0, x)
    return x
