"""From a config to built objects: checkpoints, flat buffers, network, extractor, references."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge_rl import registry
from merge_rl.config import (
    MergeConfig,
    OptimizeConfig,
    RewardConfig,
    SamplerConfig,
    from_mapping,
)
from merge_rl.config.search import SUBSET_SIZE
from merge_rl.core.coefficients import (
    BoundedMap,
    CoefficientMap,
    initial_coefficients,
    make_map,
)
from merge_rl.core.live_model import LiveModel
from merge_rl.core.merging import Checkpoints
from merge_rl.core.stages import grouping
from merge_rl.core.whitening import weight_gram
from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.interfaces import FeatureExtractor
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.hashing import sha256_file
from merge_rl.storage.model_file import model_sha256, open_model_file
from merge_rl.storage.reference import Reference, load_reference, reference_file
from merge_rl.workflows.autoencoders import load_autoencoder
from merge_rl.workflows.extractors import build_extractor
from merge_rl.workflows.merging import base_index, load_checkpoints, plan_merge
from merge_rl.workflows.placement import place_weights
from merge_rl.workflows.reward_assembly import Target, build_reward, require_parts
from merge_rl.workflows.reward_sum import RewardSum
from merge_rl.workflows.rollout import MergedRollout, Rollout
from merge_rl.workflows.weights import Announce, is_public

LEAST_IMAGES, LOOKS = 250, 200  # of a candidate that is scored on its own images alone


def resolve_config(config: OptimizeConfig, checkpoints: CheckpointSet) -> OptimizeConfig:
    """The config with everything unsaid filled in from the set's manifest, and absolute paths."""
    defaults = checkpoints.defaults
    sampler = config.sampler
    if sampler is None:
        where = f"{checkpoints.folder.name} manifest, defaults.sampler"
        sampler = from_mapping(SamplerConfig, dict(defaults.sampler), where)
    if sampler.guide is not None:
        sampler = dataclasses.replace(sampler, guide=_absolute(sampler.guide))
    extractor = config.extractor or defaults.extractor
    reference = config.reference or defaults.reference
    if extractor is None or reference is None:
        what = "an extractor" if extractor is None else "reference statistics"
        flag = "--extractor" if extractor is None else "--reference"
        raise ConfigError(f"the checkpoint set names no default for {what}; pass {flag}")
    own = config.extractor is None or config.extractor == defaults.extractor
    weights = config.extractor_weights or (defaults.extractor_weights if own else None)
    heldout = config.heldout or (None if config.reference else defaults.heldout)
    own = config.autoencoder in (None, defaults.autoencoder)
    decoder = config.autoencoder_weights or (defaults.autoencoder_weights if own else None)
    return dataclasses.replace(
        config,
        merge=resolve_merge(config, checkpoints),
        reward=resolve_reward(config),
        checkpoints=_absolute(config.checkpoints),
        sampler=sampler,
        extractor=extractor,
        extractor_weights=_weights(weights) if weights else None,
        reference=_absolute(reference),
        heldout=_absolute(heldout) if heldout else None,
        extra_references={k: _absolute(v) for k, v in config.extra_references.items()},
        extra_weights={k: _weights(v) for k, v in config.extra_weights.items()},
        autoencoder=config.autoencoder or defaults.autoencoder,
        autoencoder_weights=_weights(decoder) if decoder else None,
    )


def resolve_merge(config: OptimizeConfig, checkpoints: CheckpointSet) -> MergeConfig:
    """The map's settings with the groups of their grouping; UnknownNameError for another grouping.

    Searchers that choose among merges without a search give every tensor the same coefficients.
    """
    merge = config.merge
    patterns = grouping(merge.grouping, tuple(checkpoints.tensors))
    if merge.groups or registry.chooses_itself(config.search.name):
        return merge
    return dataclasses.replace(merge, groups=patterns)


def resolve_reward(config: OptimizeConfig) -> RewardConfig:
    """The reward with name and size filled in: those that suit the searcher and the budget.

    A candidate that is scored on its own images alone needs more of them than one that replaces
    part of a pool: a two-hundredth of the budget, which leaves about as many looks.
    """
    name = config.reward.name or registry.default_reward(config.search.name)
    reward = dataclasses.replace(config.reward, name=name)
    if reward.subset_size is not None:
        return reward
    own = max(LEAST_IMAGES, config.budget // LOOKS)
    return dataclasses.replace(reward, subset_size=SUBSET_SIZE if reward.pooled else own)


def _absolute(path: str | Path) -> str:
    return str(Path(path).resolve())


def _weights(source: str | Path) -> str:
    """An absolute path, or the name of public weights as it is."""
    return str(source) if is_public(str(source)) else _absolute(source)


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


def cpu_workers(device: str) -> int:
    """Batches to make side by side: one a core on the CPU, one on an accelerator."""
    return torch.get_num_threads() if device == "cpu" else 1


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

    @property
    def map_origin(self) -> Tensor:
        """Theta (D,) of the starting point: 0."""
        return torch.zeros(self.map.dim, dtype=torch.float64)

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


def load_references(
    config: OptimizeConfig, extractor: FeatureExtractor, digest: str | None
) -> dict[str, Reference]:
    """The statistics of real data that a config names: "reference" and, if any, "heldout"."""
    named = {"reference": config.reference, "heldout": config.heldout}
    references = {}
    for name, path in named.items():
        if path is not None:
            references[name] = load_reference(
                path, extractor=extractor.name, sha256=digest, dim=extractor.dim
            )
    return references


def load_guide(sampler: SamplerConfig, device: str) -> nn.Module | None:
    """The weaker network that the sampler names, on a device; None without guidance."""
    return load_network(sampler.guide).to(device) if sampler.guide else None


def load_network(path: str | Path) -> nn.Module:
    """A network with the weights of a file or folder, float32, in evaluation mode."""
    file = open_model_file(path)
    if file.config is None:
        raise CheckpointError(f"{path}: the model config is not known; expected a config.json")
    model: nn.Module = registry.build_model(file.config)
    try:
        model.load_state_dict(file.weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{path}: does not fit its model config: {lines[-1]}") from None
    return model.float().eval().requires_grad_(False)


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
