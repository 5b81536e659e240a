"""From the settings of a fine-tuning run to built objects, and what cannot work refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from merge_rl.config import FIRST_RULES, FinetuneConfig, OptimizeConfig, RewardConfig
from merge_rl.core.sampling.compatibility import require_reward_solver
from merge_rl.errors import ConfigError, OutOfMemoryError
from merge_rl.models import add_adapters
from merge_rl.rng import stream
from merge_rl.storage.checkpoints import Origin, find_origin, model_sha256
from merge_rl.workflows.assembly import (
    Announce,
    OfParts,
    Parts,
    check_reward,
    gib,
    known_terms,
    load_network,
    require_known,
    require_known_autoencoder,
)
from merge_rl.workflows.finetune.learner import trainable
from merge_rl.workflows.finetune.rollouts import PolicyRollout
from merge_rl.workflows.rewards import require_gradient
from merge_rl.workflows.rollout import Rollout, free_on, require_derivative


@dataclass(frozen=True, eq=False)
class FinetuneJob(OfParts):
    """The objects that a fine-tuning run is made of."""

    config: FinetuneConfig
    parts: Parts
    reference: nn.Module | None  # the frozen start, where the loss has a KL to it
    rollout: PolicyRollout  # of the network, to the features that the reward reads
    scored: Rollout  # of the network, to those of the own extractor, which curves are scored by
    origin: Origin
    hashes: Mapping[str, Any]
    follows: bool = False  # updates take the derivative of the reward by images

    @property
    def network(self) -> nn.Module:
        """The network in training, in evaluation mode, on the device."""
        return self.parts.network


def check_names(config: FinetuneConfig) -> None:
    """Raise for names that are not known, of what settings say before the model is there."""
    known_terms(config.reward)
    if config.extractor is not None:
        require_known(config.extractor)
    if config.autoencoder is not None:
        require_known_autoencoder(config.autoencoder)


def check_finetune(config: FinetuneConfig) -> None:
    """Raise before any work for names that are not known and samplers that cannot be used."""
    check_names(config)
    check_reward(with_reward(config.part_settings(), config.credit))
    require_known(config.extractor or "")
    for sampler in config.curve_samplers().values():
        require_reward_solver(sampler)


FLOAT_BYTES = 4


def training_bytes(config: FinetuneConfig, num_weights: int, processes: int = 1) -> int:
    """Bytes of all copies of the weights: network, gradients, Adam's two moments, average, start.

    Adapters need moments and gradients of themselves alone, which are small beside the network.
    Of several processes each holds the network, which samples, and the start; with `ddp` buckets
    of gradients too, with `fsdp` a share of all else and of the weights in training.
    """
    update, full = config.update, config.lora.rank == 0
    whole, rest = 1 + (update.kl_weight > 0), (3 if full else 0) + (update.ema_decay > 0)
    if processes == 1:
        return FLOAT_BYTES * num_weights * (whole + rest)
    if config.parallel == "fsdp":
        return FLOAT_BYTES * (num_weights * whole + -(-num_weights * (1 + rest) // processes))
    return FLOAT_BYTES * num_weights * (whole + rest + full)


def require_memory(config: FinetuneConfig, num_weights: int, processes: int = 1) -> None:
    """Raise OutOfMemoryError if the copies of the weights alone exceed what is free.

    Of one process, of so many: those of one machine share its memory where they are on the CPU.
    """
    needed = training_bytes(config, num_weights, processes)
    free = free_on(config.device)
    if free is None or needed <= free:
        return
    hints = ["--lora-rank 8 (adapters in place of all weights)"] if config.lora.rank == 0 else []
    hints += ["--ema 0 (no moving average)"] if config.update.ema_decay else []
    if processes > 1 and config.parallel == "ddp":
        hints += ["--parallel fsdp (shards in place of copies)"]
    hints += ["--kl 0 (no frozen reference)"] if config.update.kl_weight else []
    raise OutOfMemoryError(
        f"training {num_weights:,} weights takes {gib(needed)} for weights, gradients and "
        f"averages, but {gib(free)} are free on {config.device}; lower it with "
        f"{' or '.join(hints) or 'a smaller network'}"
    )


def build_finetune(
    config: FinetuneConfig, announce: Announce = lambda _text: None, processes: int = 1
) -> FinetuneJob:
    """Everything that a resolved config names, loaded and brought together, for one process."""
    network = load_network(config.model, config.network)
    require_memory(config, sum(p.numel() for p in network.parameters()), processes)
    parts = Parts(with_reward(config.part_settings(), config.credit), network, announce)
    parts.require_fit(config.curve_samplers().values())
    network.to(config.device)
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
    rollout = parts.rollout(PolicyRollout)
    return FinetuneJob(
        config=config,
        parts=parts,
        reference=reference,
        rollout=rollout,
        scored=parts.rollout(Rollout, own=True),
        origin=find_origin(config.model, config.network),
        hashes={"model": model_sha256(config.model), **parts.hashes()},
        follows=_follows(config, parts, rollout, announce),
    )


def _follows(
    config: FinetuneConfig, parts: Parts, rollout: PolicyRollout, announce: Announce
) -> bool:
    """Whether the reward's derivative is taken: by pathwise, and through steps that draw nothing.

    Raises ConfigError where pathwise has none; policy gradients do without, and why is said.
    """
    if config.algorithm == "pathwise":
        require_gradient(parts.reward.reward, "the algorithm pathwise", "one that does without")
        require_derivative(rollout, "the algorithm pg")
        return True
    if config.algorithm != "pg" or not config.update.still_steps or config.rules == FIRST_RULES:
        return False
    try:
        require_gradient(parts.reward.reward, "their gradient", "one that does without")
        require_derivative(rollout)
    except ConfigError as error:
        why = str(error).partition(";")[0]
        announce(f"steps that draw nothing, the last one among them, are not learnt from: {why}")
        return False
    return True


def influence_name(reward: RewardConfig) -> str:
    """The first-order form of a reward, which has a reward for every image.

    "fid-subset + 0.2 * fd-dinov2-subset" -> "fid-influence + 0.2 * fd-dinov2-influence".
    Raises ConfigError for a term that has no such form.
    """
    parts = []
    for term in reward.terms:
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
    named = dataclasses.replace(settings.reward, name=influence_name(settings.reward))
    return dataclasses.replace(settings, reward=named)
