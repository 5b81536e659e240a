"""What a search tunes beside coefficients: guidance, and the coefficients of a guide."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from merge_rl import registry
from merge_rl.config import (
    COEFFICIENTS,
    GUIDANCE,
    GUIDE,
    OptimizeConfig,
    SamplerConfig,
)
from merge_rl.core.merging.buffers import Checkpoints
from merge_rl.core.merging.groups import grouping
from merge_rl.core.merging.linear_maps import weight_gram
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.merging.maps import CoefficientMap, initial_coefficients, make_map
from merge_rl.core.merging.tuned_map import GuidanceCoordinates, TunedMap
from merge_rl.core.sampling.guidance import grid_of, guidance_of
from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints import CheckpointSet, load_checkpoints, plan_merge
from merge_rl.storage.files import absolute
from merge_rl.storage.hub import local_set
from merge_rl.storage.runs import find_set
from merge_rl.workflows.assembly.defaults import find_model
from merge_rl.workflows.assembly.parts import Parts

ALONE: Final = ("lcsc", "lr-cma")  # searchers whose steps are made for coefficients


def require_tuning(config: OptimizeConfig) -> None:
    """Raise ConfigError for what cannot be tuned together, or by the searcher."""
    tuned, sampler = config.search.tune, config.sampler or SamplerConfig()
    if tuned == (COEFFICIENTS,):
        return
    what, name = f"tune {','.join(tuned)}", config.search.name
    if config.generate is not None:
        raise ConfigError(f"{what} needs a network that is sampled here, got generate")
    if registry.chooses_itself(name) or name in ALONE:
        raise ConfigError(
            f"the searcher {name} knows coefficients alone, got {what}; expected tune "
            "coefficients, or a searcher such as pathwise or policy-gradient"
        )
    if GUIDE in tuned and sampler.guide is None:
        raise ConfigError(f"{what} needs a guide that is a set of checkpoints; pass --guide SET")
    if GUIDANCE not in tuned and sampler.guidance == 1 and GUIDE in tuned:
        raise ConfigError(
            f"{what} changes nothing with guidance 1; pass --guidance, or tune it too"
        )


def meant_guide(sampler: SamplerConfig, tuned: tuple[str, ...]) -> SamplerConfig:
    """The sampler with the absolute path of its guide: a set where its coefficients are tuned."""
    if sampler.guide is None:
        return sampler
    found = find_set(local_set(sampler.guide)) if GUIDE in tuned else find_model(sampler.guide)
    return dataclasses.replace(sampler, guide=str(absolute(found.path)))


@dataclass(frozen=True, eq=False)
class GuideSet:
    """A guide that is a merge of checkpoints of its own, changed in place; the newest at first."""

    checkpoints: CheckpointSet
    groups: Mapping[str, str]
    group_names: tuple[str, ...]
    flat: Checkpoints
    live: LiveModel
    map: CoefficientMap

    @property
    def start(self) -> Tensor:
        """Its coefficients (G', K') where nothing is said."""
        return self.map(torch.zeros(self.map.dim, dtype=torch.float64))


def load_guide_set(parts: Parts, config: OptimizeConfig) -> GuideSet | None:
    """The set of a guide, read, with the guide's network as its merge; None where it stays.

    Groups and map are of the kinds that the network's own are; a map of profiles becomes affine.
    """
    opened, network = parts.guide_set, parts.guide
    if opened is None or network is None:
        return None
    merge = config.merge
    groups = grouping(merge.grouping, tuple(opened.tensors))
    plan = plan_merge(opened, groups=groups, base="newest", model=network)
    flat = load_checkpoints(opened, plan, config.device, network=config.device)
    whitened = merge.map == "whitened"
    count, base = len(opened), opened.newest
    found = make_map(
        "affine" if merge.map == "ema" else merge.map, num_checkpoints=count,
        num_groups=len(plan.groups.names), base=base, scale=merge.unit,
        init=initial_coefficients("newest", num_checkpoints=count, base=base),
        gram=weight_gram(flat, torch.device(config.device)) if whitened else None,
    )  # fmt: skip
    made = GuideSet(opened, groups, plan.groups.names, flat, LiveModel(network, flat), found)
    made.live.set_coefficients(made.start)
    return made


def tuned_map(
    inner: CoefficientMap, guide: CoefficientMap | None, config: OptimizeConfig, network: object
) -> CoefficientMap:
    """The map from theta to all that is searched; `inner` itself for coefficients alone.

    Coefficients that are not searched are those of the map's start.
    """
    tuned, sampler = config.search.tune, config.sampler or SamplerConfig()
    if tuned == (COEFFICIENTS,):
        return inner
    origin = inner(torch.zeros(inner.dim, dtype=torch.float64))
    grid, coordinates = grid_of(sampler, network), None
    if config.tunes_guidance and grid is not None:
        coordinates = GuidanceCoordinates(guidance_of(sampler, None).values, grid)
    return TunedMap(
        inner=inner, fixed=None if COEFFICIENTS in tuned else origin, guidance=coordinates,
        guide=guide,
    )  # fmt: skip


def tuned_dim(config: OptimizeConfig, inner: int) -> int:
    """Length of theta where coefficients have so many, as far as settings tell."""
    own = inner if COEFFICIENTS in config.search.tune else 0
    return own + (3 if config.tunes_guidance else 0)
