"""From a config to built objects: set, flat buffers, network, guide, what is searched, rewards."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl import own_code, registry
from merge_rl.config import (
    COEFFICIENTS,
    GUIDANCE,
    GUIDE,
    MergeConfig,
    OptimizeConfig,
    SamplerConfig,
)
from merge_rl.core.merging.buffers import Checkpoints
from merge_rl.core.merging.groups import grouping
from merge_rl.core.merging.linear_maps import weight_gram
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.merging.maps import BoundedMap, CoefficientMap, initial_coefficients, make_map
from merge_rl.core.merging.tuned_map import GuidanceCoordinates, TunedMap
from merge_rl.core.sampling.guidance import grid_of, guidance_of
from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints import (
    CheckpointSet,
    base_index,
    load_checkpoints,
    plan_merge,
)
from merge_rl.storage.files import absolute
from merge_rl.storage.hub import local_set
from merge_rl.storage.runs import find_set
from merge_rl.workflows.assembly.defaults import find_model
from merge_rl.workflows.assembly.functions import Given, GivenParts
from merge_rl.workflows.assembly.networks import Announce
from merge_rl.workflows.assembly.parts import OfParts, Parts, blank_network, set_hashes
from merge_rl.workflows.rollout import MergedRollout, Rollout, TunedRollout, place_weights

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
        """Coefficients (G', K') that the guide starts with."""
        return self.map(torch.zeros(self.map.dim, dtype=torch.float64))


def load_guide_set(parts: Parts, config: OptimizeConfig) -> GuideSet | None:
    """The set of a guide, read, with the guide's network as its merge; None where it stays.

    Groups and map are of the kinds that the network's own are; a map of profiles becomes affine.
    """
    opened, network = parts.guide_set, parts.guide
    if opened is None or network is None:
        return None
    merge = config.merge
    groups = grouping(config.grouping, tuple(opened.tensors))
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


def build_map(
    checkpoints: CheckpointSet, merge: MergeConfig, num_groups: int, gram: Tensor | None = None
) -> CoefficientMap:
    """The map from theta to coefficients for this set; "whitened" needs its `gram` (G, K, K)."""
    if len(checkpoints) < 2 and checkpoints.duplicates:
        raise ConfigError(f"{checkpoints.notes[0]}; expected 2 checkpoints, at least, that differ")
    base = base_index(checkpoints, merge.start)
    named = merge.start in checkpoints.names
    start = "newest" if named or merge.start == "auto" else merge.start
    init = initial_coefficients(start, num_checkpoints=len(checkpoints), base=base)
    nimg = checkpoints.nimg
    made = make_map(
        merge.map,
        num_checkpoints=len(checkpoints),
        num_groups=num_groups,
        base=base,
        scale=merge.unit,
        init=init,
        nimg=None if any(n is None for n in nimg) else [int(n or 0) for n in nimg],
        ema_std=checkpoints.ema_std,
        profiles=checkpoints.profiles() if merge.map == "ema" else None,
        gram=gram,
    )
    return made if merge.max_abs is None else BoundedMap(made, merge.max_abs)


def unweighed_map(
    checkpoints: CheckpointSet, merge: MergeConfig, num_groups: int
) -> CoefficientMap:
    """The map where no weights are at hand: coefficients that whitened ones reach, affine ones do.

    Its theta has as many values, and other units.
    """
    plain = "affine" if merge.map == "whitened" else merge.map
    return build_map(checkpoints, dataclasses.replace(merge, map=plain), num_groups)


@dataclass(frozen=True, eq=False)
class Job(OfParts):
    """The objects that a search or a comparison is made of."""

    parts: Parts
    checkpoints: CheckpointSet
    flat: Checkpoints
    map: CoefficientMap
    group_names: tuple[str, ...]
    guide: GuideSet | None  # where the guide's coefficients are searched
    rollout: MergedRollout  # to the features that the reward reads
    final_rollout: MergedRollout  # to those of the set's extractor: the comparison's
    hashes: dict[str, Any]

    def with_reward(self, config: OptimizeConfig) -> Job:
        """The same job with the reward of another config, fresh."""
        parts, final = self.parts.with_reward(config), self.final_rollout
        # Those of a reward's files have a name behind the kind.
        hashes = {kind: value for kind, value in self.hashes.items() if " " not in kind}
        return dataclasses.replace(
            self,
            parts=parts,
            rollout=_to_reward(parts, final),
            hashes={**hashes, **parts.reward.hashes},
        )

    def coefficients(self, index: int | None) -> Tensor:
        """(G, K): checkpoint `index` alone, or the uniform average for None."""
        count, groups = len(self.checkpoints), self.map.num_groups
        row = torch.full((count,), 1 / count, dtype=torch.float64)
        if index is not None:
            row = torch.eye(count, dtype=torch.float64)[index]
        return row.expand(groups, count).clone()


def build_job(
    config: OptimizeConfig,
    checkpoints: CheckpointSet,
    announce: Announce = lambda _text: None,
    given: Given | None = None,
) -> Job:
    """Build everything a resolved config names; `announce` hears of downloads.

    With a function of the user's (`given`) that takes the place of what the config does not name.
    """
    parts: Parts
    if given is None and config.generate is not None:
        given = Given(own_code.find(config.generate, "function"))
    if given is None:
        model = blank_network(checkpoints, config.device)
        parts = Parts(config, model, announce)
    else:
        model = given.network(checkpoints, config.device)
        parts = GivenParts(config, model, announce, given)
    merge = config.merge
    plan = plan_merge(
        checkpoints, groups=merge.groups, base=merge.start, freeze=merge.freeze, model=model
    )
    parts.require_fit([parts.sampler])
    # Before the checkpoints: what is free then is for them.
    hashes = {k: v for k, v in parts.hashes().items() if v or k != "autoencoder_weights"}
    place = place_weights(checkpoints.total_bytes, config.device, config.weights_device)
    flat = load_checkpoints(checkpoints, plan, place, network=config.device)
    live = LiveModel(model, flat)
    whitened = config.merge.map == "whitened"
    gram = weight_gram(flat, torch.device(config.device)) if whitened else None
    inner = build_map(checkpoints, config.merge, len(plan.groups.names), gram)
    guide = load_guide_set(parts, config)
    whole = tuned_map(inner, None if guide is None else guide.map, config, model)
    final = _merged(live, parts.rollout(Rollout, own=True), whole, guide)
    return Job(
        parts=parts,
        checkpoints=checkpoints,
        flat=flat,
        map=whole,
        group_names=plan.groups.names,
        guide=guide,
        rollout=_to_reward(parts, final),
        final_rollout=final,
        hashes={"checkpoints": set_hashes(checkpoints), **hashes},
    )


def _merged(
    live: LiveModel, rollout: Rollout, coefficients: CoefficientMap, guide: GuideSet | None
) -> MergedRollout:
    """The rollout of what the map gives, to the features of the comparison."""
    if not isinstance(coefficients, TunedMap):
        return MergedRollout(live, rollout, name="final")
    return TunedRollout(
        live, rollout, name="final", layout=coefficients.layout,
        guide=None if guide is None else guide.live,
        guide_start=None if guide is None else guide.start,
    )  # fmt: skip


def _to_reward(parts: Parts, final: MergedRollout) -> MergedRollout:
    other = copy.copy(final)
    other.rollout = final.rollout.with_extractor(parts.reward.extractor)
    other.name, other.spread, other.processes, other.seconds = "reward", None, 1, 0.0
    return other
