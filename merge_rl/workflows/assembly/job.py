"""From a config to built objects: checkpoints, flat buffers, network, extractor, references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_rl import registry
from merge_rl.config import MergeConfig, OptimizeConfig, SamplerConfig
from merge_rl.core.merging.buffers import Checkpoints
from merge_rl.core.merging.linear_maps import weight_gram
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.merging.maps import BoundedMap, CoefficientMap, initial_coefficients, make_map
from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints import (
    CheckpointSet,
    base_index,
    load_checkpoints,
    model_sha256,
    plan_merge,
)
from merge_rl.storage.files import sha256_file
from merge_rl.workflows.assembly.extractors import build_extractor
from merge_rl.workflows.assembly.networks import Announce, load_autoencoder, load_guide
from merge_rl.workflows.assembly.references import load_references
from merge_rl.workflows.assembly.reward import Target, build_reward, require_parts
from merge_rl.workflows.reference import Reference, reference_file
from merge_rl.workflows.rewards import RewardSum
from merge_rl.workflows.rollout import MergedRollout, Rollout, cpu_workers, place_weights


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
        gram=gram,
    )
    return made if merge.max_abs is None else BoundedMap(made, merge.max_abs)


@dataclass(frozen=True, eq=False)
class Job:
    """What a search or a comparison works with."""

    checkpoints: CheckpointSet
    flat: Checkpoints
    map: CoefficientMap
    group_names: tuple[str, ...]
    rollout: MergedRollout  # to the features that the reward reads
    final_rollout: MergedRollout  # to those of the set's extractor: the comparison's
    num_classes: int
    reward: RewardSum
    references: dict[str, Reference]
    hashes: dict[str, Any]

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
) -> Job:
    """Build everything a resolved config names; `announce` hears of downloads."""
    if checkpoints.config is None:
        raise CheckpointError(
            f"{checkpoints.folder}: the model config is not known; "
            "expected a manifest or config.json"
        )
    sampler = config.sampler or SamplerConfig()
    model = registry.build_model(checkpoints.config).to(config.device).requires_grad_(False)
    plan = plan_merge(checkpoints, groups=config.merge.groups, base=config.merge.start, model=model)
    guide = load_guide(sampler, config.device)
    require_parts(config, model, guide, [sampler])
    autoencoder, decoder_digest = load_autoencoder(
        config.autoencoder, config.autoencoder_weights, shape=model.sample_shape,
        dtype=config.autoencoder_dtype, device=config.device, announce=announce,
    )  # fmt: skip
    extractor, digest = build_extractor(
        config.extractor or "", config.extractor_weights, config.device, announce
    )
    place = place_weights(checkpoints.total_bytes, config.device, config.weights_device)
    flat = load_checkpoints(checkpoints, plan, place, network=config.device)
    references = load_references(config, extractor, digest)
    own = Target(
        extractor=extractor, reference=references["reference"], path=config.reference or ""
    )
    built = build_reward(config, own, announce)
    live = LiveModel(model, flat)
    whitened = config.merge.map == "whitened"
    gram = weight_gram(flat, torch.device(config.device)) if whitened else None
    rollout = Rollout(
        model,
        model.sample_shape,
        sampler=sampler,
        autoencoder=autoencoder,
        extractor=extractor,
        batch=config.batch,
        device=config.device,
        guide=guide,
        workers=cpu_workers(config.device),
    )
    return Job(
        checkpoints=checkpoints,
        flat=flat,
        map=build_map(checkpoints, config.merge, len(plan.groups.names), gram),
        group_names=plan.groups.names,
        rollout=MergedRollout(live, rollout.with_extractor(built.extractor), name="reward"),
        final_rollout=MergedRollout(live, rollout, name="final"),
        num_classes=int(getattr(model, "label_dim", 0)),
        reward=built.reward,
        references=references,
        hashes={**_hashes(config, checkpoints, digest, decoder_digest), **built.hashes},
    )


def _hashes(
    config: OptimizeConfig, checkpoints: CheckpointSet, digest: str | None, decoder: str | None
) -> dict[str, Any]:
    guide = config.sampler.guide if config.sampler else None
    named = {"reference": config.reference, "heldout": config.heldout}
    files = {k: reference_file(path)[0] if path else None for k, path in named.items()}
    return {
        "checkpoints": {name: checkpoints.sha256(i) for i, name in enumerate(checkpoints.names)},
        "extractor_weights": digest,
        **({"autoencoder_weights": decoder} if decoder else {}),
        "guide": model_sha256(guide) if guide else None,
        **{name: sha256_file(path) if path else None for name, path in files.items()},
    }
