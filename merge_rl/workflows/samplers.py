"""Which samplers a network is scored under."""

from __future__ import annotations

import dataclasses
from typing import Final

from merge_rl.config import SamplerConfig
from merge_rl.config.sampler import sde_counterpart
from merge_rl.core.compatibility import VELOCITY, prediction_of
from merge_rl.errors import UnknownNameError

CHOICES: Final = ("ode", "sde", "both")


def samplers_of(
    model: object, settings: SamplerConfig | None = None, which: str | None = None
) -> dict[str, SamplerConfig]:
    """{"ode": ..., "sde": ...}, or one of them, from the settings of one.

    By default both for networks that predict velocities (SiT), whose papers report both; else the
    kind that the settings have. What the settings are not, ODE or SDE, is made of them: Heun with
    the same `num_steps`, Euler-Maruyama with `sde_num_steps`.
    """
    if which is not None and which not in CHOICES:
        raise UnknownNameError("sampler", which, CHOICES)
    base = settings or SamplerConfig()
    if which is None:
        own = "sde" if base.is_sde else "ode"
        which = "both" if prediction_of(model) == VELOCITY else own
    ode = dataclasses.replace(base, solver="heun") if base.is_sde else base
    named = {"ode": ode, "sde": sde_counterpart(base)}
    return named if which == "both" else {which: named[which]}
