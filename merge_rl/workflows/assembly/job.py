"""From a config to built objects: checkpoints, flat buffers, network, extractor, references."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_rl import own_code
from merge_rl.config import MergeConfig, OptimizeConfig
from merge_rl.core.merging.buffers import Checkpoints
from merge_rl.core.merging.linear_maps import weight_gram
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.merging.maps import BoundedMap, CoefficientMap, initial_coefficients, make_map
from merge_rl.core.merging.tuned_map import Setup, TunedMap, setup_of
from merge_rl.storage.checkpoints import (
    CheckpointSet,
    base_index,
    load_checkpoints,
    plan_merge,
)
from merge_rl.workflows.assembly.given import Given, GivenParts
from merge_rl.workflows.assembly.networks import Announce
from merge_rl.workflows.assembly.parts import OfParts, Parts, blank_network, set_hashes
from merge_rl.workflows.assembly.tuning import GuideSet, load_guide_set, tuned_map
from merge_rl.workflows.rollout import MergedRollout, Rollout, TunedRollout, place_weights


def build_map(
    checkpoints: CheckpointSet, merge: MergeConfig, num_groups: int, gram: Tensor | None = None
) -> CoefficientMap:
    """The map from theta to coefficients for this set; "whitened" needs its `gram` (G, K, K)."""
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
    """What a search or a comparison works with."""

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

    def setup(self, theta: Tensor) -> Setup:
        """What theta (D,) stands for."""
        return setup_of(self.map, self.map(theta))

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
