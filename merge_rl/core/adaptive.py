"""Adaptive solvers, through torchdiffeq (extra `adaptive`).

They choose their steps by an error norm over the whole batch: what else is in a batch moves an
image, by 1e-3 and more at the default tolerances. Results for one image are therefore not
reproducible across batches, and rewards, which compare images, refuse them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_rl.core.solvers import Velocity
from merge_rl.errors import ConfigError


def solve_adaptive(
    velocity: Velocity,
    x: Tensor,
    start: float,
    end: float,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    method: str = "dopri5",
    overshoot: bool = True,
) -> Tensor:
    """Integrate dx/dt = velocity from start to end; returns x at the end.

    Args:
        velocity: (x, t) -> dx/dt.
        x: (B, ...) at `start`.
        rtol, atol: tolerances of a step, relative and absolute, as rms over the batch.
        method: a name of torchdiffeq's.
        overshoot: let the last step pass the end and interpolate, as the library does by itself;
            otherwise a step ends there, for velocities that are not defined beyond.

    Raises ConfigError where torchdiffeq is not installed.
    """
    try:
        import torchdiffeq
    except ImportError:
        raise ConfigError(
            f"the solver {method!r} needs torchdiffeq, which is not installed; "
            'expected: pip install "merge_rl[adaptive]"'
        ) from None
    times = torch.tensor([start, end], dtype=x.dtype, device=x.device)
    options = None if overshoot else {"step_t": times[1:]}
    states: Tensor = torchdiffeq.odeint(
        lambda t, y: velocity(y, t), x, times, rtol=rtol, atol=atol, method=method, options=options
    )
    return states[-1]
