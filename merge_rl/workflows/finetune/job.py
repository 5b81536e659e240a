"""From the settings of a fine-tuning run to built objects, and what cannot work refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from merge_rl import registry
from merge_rl.config import FinetuneConfig, OptimizeConfig, SamplerConfig
from merge_rl.core.sampling.compatibility import require_reward_solver
from merge_rl.errors import ConfigError
from merge_rl.interfaces import FeatureExtractor
from merge_rl.models import add_adapters
from merge_rl.rng import stream
from merge_rl.storage.checkpoints import Origin, find_origin, model_sha256
from merge_rl.storage.files import absolute, sha256_file
from merge_rl.workflows.assembly import (
    Announce,
    Target,
    build_extractor,
    build_reward,
    check_reward,
    find_surroundings,
    is_public,
    load_autoencoder,
    load_guide,
    load_network,
    named_by_file,
    parse_reward,
    require_known,
    require_memory,
    require_parts,
)
from merge_rl.workflows.finetune.learner import trainable
from merge_rl.workflows.finetune.rollout import PolicyRollout
from merge_rl.workflows.reference import Reference, load_reference, reference_file
from merge_rl.workflows.rewards import RewardSum
from merge_rl.workflows.rollout import Rollout, cpu_workers


@dataclass(frozen=True, eq=False)
class FinetuneJob:
    """What a fine-tuning run works with."""

    config: FinetuneConfig
    network: nn.Module  # in training, evaluation mode, on the device
    reference: nn.Module | None  # the frozen start, where the loss has a KL to it
    rollout: PolicyRollout  # of the network, to the features that the reward reads
    scored: Rollout  # of the network, to those of the own extractor, which curves are scored by
    num_classes: int
    reward: RewardSum
    references: Mapping[str, Reference]
    origin: Origin
    hashes: Mapping[str, Any]


def resolve_finetune(config: FinetuneConfig) -> FinetuneConfig:
    """The settings with everything unsaid filled in from the model's set or run; absolute paths."""
    near = find_surroundings(config.model)
    extractor, reference = config.extractor, config.reference or near.reference
    if extractor is None and near.extractor is not None:
        extractor = named_by_file(near.extractor, f"the run or set of {config.model}")
    if extractor is None or reference is None:
        what = "an extractor" if extractor is None else "reference statistics"
        flag = "--extractor" if extractor is None else "--reference"
        raise ConfigError(f"no run or manifest near {config.model} names {what}; pass {flag}")
    own = extractor == near.extractor
    weights = config.extractor_weights or (near.extractor_weights if own else None)
    heldout = config.heldout or (None if config.reference else near.heldout)
    own = config.autoencoder in (None, near.autoencoder)
    decoder = config.autoencoder_weights or (near.autoencoder_weights if own else None)
    sampler = config.sampler or near.sampler or SamplerConfig()
    if sampler.guide is not None:
        sampler = dataclasses.replace(sampler, guide=_absolute(sampler.guide))
    return dataclasses.replace(
        config,
        model=_absolute(config.model),
        extractor=extractor,
        extractor_weights=_weights(weights) if weights else None,
        reference=_absolute(reference),
        heldout=_absolute(heldout) if heldout else None,
        extra_references={k: _absolute(v) for k, v in config.extra_references.items()},
        extra_weights={k: _weights(v) for k, v in config.extra_weights.items()},
        autoencoder=config.autoencoder or near.autoencoder,
        autoencoder_weights=_weights(decoder) if decoder else None,
        sampler=sampler,
    )


def check_names(config: FinetuneConfig) -> None:
    """Raise for names that are not known, of what settings say before the model is there."""
    parse_reward(config.reward.text)
    if config.extractor is not None:
        require_known(config.extractor)
    if config.autoencoder is not None:
        registry.resolve("autoencoder", registry.AUTOENCODERS, config.autoencoder)


def check_finetune(config: FinetuneConfig) -> None:
    """Raise before any work for names that are not known and samplers that cannot be used."""
    check_names(config)
    check_reward(with_reward(config.reward_settings(), config.credit))
    require_known(config.extractor or "")
    for sampler in config.curve_samplers().values():
        require_reward_solver(sampler)


def build_finetune(
    config: FinetuneConfig, announce: Announce = lambda _text: None, processes: int = 1
) -> FinetuneJob:
    """Everything that a resolved config names, loaded and brought together, for one process."""
    device = config.device
    network = load_network(config.model)
    require_memory(config, sum(p.numel() for p in network.parameters()), processes)
    settings = with_reward(config.reward_settings(), config.credit)
    guide = load_guide(config.rollout_sampler(), device)
    require_parts(settings, network, guide, config.curve_samplers().values())
    network.to(device)
    anchored = config.algorithm == "pg" and config.update.kl_weight > 0
    reference = copy.deepcopy(network) if anchored else None
    trainable(network)
    if config.lora.rank:
        lora = config.lora
        add_adapters(
            network, rank=lora.rank, alpha=lora.alpha or 2.0 * lora.rank, targets=lora.targets,
            generator=stream(config.seed, "lora"),
        )  # fmt: skip
    elif hasattr(network, "normalize_weights"):
        network.normalize_weights()  # type: ignore[operator]
    extractor, digest = build_extractor(
        config.extractor or "", config.extractor_weights, device, announce
    )
    references = _references(config, extractor, digest)
    own = Target(
        extractor=extractor, reference=references["reference"], path=config.reference or ""
    )
    built = build_reward(settings, own, announce)
    shape = network.sample_shape
    decoder, decoder_digest = load_autoencoder(
        config.autoencoder, config.autoencoder_weights, shape=shape,
        dtype=config.autoencoder_dtype, device=device, announce=announce,
    )  # fmt: skip
    sampler = config.rollout_sampler()
    rollout = PolicyRollout(
        network, shape, sampler=sampler, autoencoder=decoder, extractor=built.extractor,
        batch=config.batch, device=device, workers=cpu_workers(device), guide=guide,
    )  # fmt: skip
    scored = Rollout(
        network, shape, sampler=sampler, autoencoder=decoder, extractor=extractor,
        batch=config.batch, device=device, workers=cpu_workers(device), guide=guide,
    )  # fmt: skip
    return FinetuneJob(
        config=config,
        network=network,
        reference=reference,
        rollout=rollout,
        scored=scored,
        num_classes=int(getattr(network, "label_dim", 0)),
        reward=built.reward,
        references=references,
        origin=find_origin(config.model),
        hashes={**_hashes(config, digest, decoder_digest), **built.hashes},
    )


def _references(
    config: FinetuneConfig, extractor: FeatureExtractor, digest: str | None
) -> dict[str, Reference]:
    named = {"reference": config.reference, "heldout": config.heldout}
    return {
        name: load_reference(path, extractor=extractor.name, sha256=digest, dim=extractor.dim)
        for name, path in named.items()
        if path is not None
    }


def _hashes(config: FinetuneConfig, digest: str | None, decoder: str | None) -> dict[str, Any]:
    guide = config.sampler.guide if config.sampler else None
    files = {"reference": config.reference, "heldout": config.heldout}
    return {
        "model": model_sha256(config.model),
        "extractor_weights": digest,
        "autoencoder_weights": decoder,
        "guide": model_sha256(guide) if guide else None,
        **{k: sha256_file(reference_file(path)[0]) if path else None for k, path in files.items()},
    }


def _absolute(path: str | Path) -> str:
    return str(absolute(path))


def _weights(source: str | Path) -> str:
    """An absolute path, or the name of public weights as it is."""
    return str(source) if is_public(str(source)) else _absolute(source)


def influence_name(name: str) -> str:
    """The first-order form of a reward, which has a reward for every image.

    "fid-subset + 0.2 * fd-dinov2-subset" -> "fid-influence + 0.2 * fd-dinov2-influence".
    Raises ConfigError for a term that has no such form.
    """
    parts = []
    for term in parse_reward(name):
        if term.base not in ("fid-subset", "fid-influence"):
            raise ConfigError(
                f"the reward {term.name} has none for single images; expected terms of "
                "fid-subset or fid-influence for per-image credit"
            )
        first_order = term.name.rpartition("-")[0] + "-influence"
        parts.append(first_order if term.weight == 1 else f"{term.weight!r} * {first_order}")
    return " + ".join(parts)


def with_reward(settings: OptimizeConfig, credit: str) -> OptimizeConfig:
    """The settings with the form of the reward that the credit needs."""
    if credit == "set":
        return settings
    named = dataclasses.replace(settings.reward, name=influence_name(settings.reward.text))
    return dataclasses.replace(settings, reward=named)
