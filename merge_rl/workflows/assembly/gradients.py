"""Whether what settings name has a gradient: by its name, or by a trial of the user's own code."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from merge_rl import own_code
from merge_rl.config import FIXED_SOLVERS, OptimizeConfig, SamplerConfig
from merge_rl.core.sampling.compatibility import without_gradient
from merge_rl.errors import MergeRLError
from merge_rl.rng import seeded_noise
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.workflows.assembly.extractors import (
    SideBySide,
    build_extractor,
    encoders,
    own_weights,
    weights_by_name,
)
from merge_rl.workflows.assembly.networks import load_autoencoder
from merge_rl.workflows.assembly.parts import blank_network, sample_shape
from merge_rl.workflows.rollout import without_derivative


def auto_note(name: str, why: str | None) -> str:
    """Which searcher "auto" is, and why where it is not the gradient's."""
    return f"searcher auto: {name}" + (f", as {why}" if why else "")


def why_no_gradient(config: OptimizeConfig) -> str | None:
    """Why "auto" takes the policy gradient, told by the settings alone; None: no reason."""
    solver = (config.sampler or SamplerConfig()).solver
    if config.generate is not None:
        return "whether what generate returns has a gradient is not known"
    if solver not in FIXED_SOLVERS:
        return f"the solver {solver} has no gradient"
    return why_not_as_set(config)


def tried_in_vain(config: OptimizeConfig, checkpoints: CheckpointSet) -> str | None:
    """Why the user's own network, decoder or extractors have no gradient; None where they have.

    Tried on two samples of noise, once for the same code and weights. Code that cannot be built, or
    not from these samples, is refused later.
    """
    named = config.autoencoder
    decoder = own_code.is_own(named or "")
    found, stated = own_extractors(config), (checkpoints.config or {}).get("model")
    network = own_code.is_own(str(stated))
    if not (decoder or found or network):
        return None
    try:
        model = blank_network(checkpoints, "cpu")
        if network and (why := without_gradient(model)):
            return why
        shape = tuple(sample_shape(model))
    except MergeRLError:
        return _unknown(str(stated), "network") if network else None
    if not (decoder or found):
        return None
    codes = [(name, "extractor") for name in found] + [(named or "", "autoencoder")] * decoder
    try:
        code = tuple(own_code.find(*one) for one in codes)
    except MergeRLError:
        return None
    return _tried(
        code, tuple(found.items()), named, config.autoencoder_weights, shape, config.device
    )


def _unknown(name: str, kind: str) -> str:
    return f"whether the {kind} {name} has a gradient is not known"


@lru_cache(maxsize=4)
def _tried(
    _codes: tuple[Callable[..., Any], ...],
    extractors: tuple[tuple[str, str | None], ...],
    autoencoder: str | None,
    weights: str | None,
    shape: tuple[int, ...],
    device: str,
) -> str | None:
    built, at = [], (autoencoder or "none", "autoencoder")
    try:
        decoder, _ = load_autoencoder(autoencoder, weights, shape=shape, device=device)
        samples = seeded_noise([0, 1], shape).to(device) / 4
        decoder.decode(samples)
        for name, own in extractors:
            at = (name, "extractor")
            built.append(build_extractor(name, own, device)[0])
        return without_derivative(decoder, SideBySide(built, ""), samples)
    except MergeRLError:
        return _unknown(*at)


def own_extractors(config: OptimizeConfig) -> dict[str, str | None]:
    """The user's own extractors of the settings, and the weights of each."""
    given = {config.extractor or "": own_weights(config)}
    given |= {name: config.extra_weights.get(name) for name in config.extra_references}
    found = [
        (one, weights_by_name(name, weights).get(one))
        for name, weights in given.items()
        for one in encoders(name)
    ]
    return {name: weights for name, weights in found if own_code.is_own(name)}


def why_not_as_set(config: OptimizeConfig) -> str | None:
    """Why "auto" takes the policy gradient, whatever generates: reward or search are set for it."""
    search, reward = config.search, config.reward
    if any(term.base.endswith("-full") or own_code.is_own(term.base) for term in reward.terms):
        return f"the reward {reward.text} has no gradient"
    several = reward.num_subsets * reward.num_replacements != 1 or reward.refresh != "rolling"
    given = search.population is not None or search.update is not None
    if several or given or search.policy != "direct":
        return "the settings are those of the policy gradient"
    return None
