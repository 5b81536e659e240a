"""From the text of a reward to the objects: extractors, their references, the weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from merge_rl import own_code, registry
from merge_rl.config import OptimizeConfig, RewardConfig, RewardTerm
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.interfaces import FeatureExtractor, Reward
from merge_rl.registry import REWARDS
from merge_rl.storage.files import reference_file, sha256_file
from merge_rl.workflows.assembly.extractors import (
    build_extractor,
    encoder_spans,
    encoders,
    own_weights,
    require_known,
)
from merge_rl.workflows.assembly.networks import Announce
from merge_rl.workflows.assembly.references import Opened, fit_reference, open_comparable
from merge_rl.workflows.reference import Reference
from merge_rl.workflows.rewards import (
    CombinedExtractor,
    Pool,
    RewardSource,
    RewardSum,
    WeightedReward,
)


@dataclass(frozen=True, kw_only=True)
class ExtractorReference:
    """An extractor and the statistics of real data that its features are compared with."""

    extractor: FeatureExtractor
    reference: Reference
    path: str
    heldout: Reference | None = None


@dataclass(frozen=True)
class BuiltReward:
    """A reward, the extractor of the features it reads, and hashes of the files it adds."""

    reward: RewardSum
    extractor: FeatureExtractor
    hashes: Mapping[str, str | None]


def known_terms(reward: RewardConfig) -> tuple[RewardTerm, ...]:
    """The terms; UnknownNameError for one whose reward or extractor is not registered."""
    for term in reward.terms:
        if own_code.is_own(term.base):
            own_code.require_readable(term.base, "reward")
        elif term.base not in REWARDS:
            raise UnknownNameError("reward", term.name, REWARDS)
        if term.extractor:
            require_known(term.extractor)
    return reward.terms


def check_reward(config: OptimizeConfig) -> None:
    """Raise before any work for a reward that is not known, or that lacks statistics."""
    terms = known_terms(config.reward)
    for name in _others(terms, config.extractor):
        if name not in config.extra_references:
            raise ConfigError(
                f"the reward {config.reward.text!r} compares features of {name!r}: it needs "
                f"statistics of real data, --reference {name}=PATH"
            )
    used = set(_others(terms, config.extractor))
    several = encoders(config.extractor or "")
    for given in (config.extra_references, config.extra_weights):
        spare = sorted(set(given) - used - set(several if len(several) > 1 else ()))
        if spare:
            raise ConfigError(
                f"the reward {config.reward.text!r} has no use for a file of {spare[0]!r}, "
                f"expected files of {', '.join(sorted(used)) or 'no other extractor'}"
            )
    full = [term.name for term in terms if term.base.endswith("-full")]
    if full and config.reward.images_per_candidate < 2:
        raise ConfigError(f"{full[0]} needs at least 2 images a candidate, got 1")


def open_targets(config: OptimizeConfig) -> Opened:
    """The statistics that a reward compares with; raises for those of another extractor.

    No weights are read or fetched. The config is resolved, and `check_reward` has seen it.
    """
    own = (config.reference, config.heldout)
    found = open_comparable(config.extractor or "", own_weights(config), own)
    for name in _others(known_terms(config.reward), config.extractor):
        weights, path = config.extra_weights.get(name), config.extra_references[name]
        found |= open_comparable(name, weights, [path])
    return found


def build_reward(
    config: OptimizeConfig, own: ExtractorReference, announce: Announce, opened: Opened
) -> BuiltReward:
    """The reward of a resolved config; `own` is what the checkpoint set's extractor compares.

    `announce` hears of downloads; statistics that are `opened` are not read again.
    """
    terms = known_terms(config.reward)
    targets: dict[str | None, ExtractorReference] = {}
    hashes: dict[str, str | None] = {}
    for name in dict.fromkeys(_extractor_of(term, config.extractor) for term in terms):
        if name is None:
            targets[name] = own
        else:
            targets[name], digest = _load_target(config, name, announce, opened)
            hashes[f"extractor_weights {name}"] = digest
            hashes[f"reference {name}"] = sha256_file(reference_file(targets[name].path)[0])
    starts, dim = {}, 0
    for name, target in targets.items():
        starts[name], dim = dim, dim + target.extractor.dim
    weighted = []
    for term in terms:
        name = _extractor_of(term, config.extractor)
        start, stop = starts[name], starts[name] + targets[name].extractor.dim
        reward = _make(term, targets[name], config.device)
        weighted.append(WeightedReward(term.name, term.weight, reward, start, stop))
    extractors = [target.extractor for target in targets.values()]
    combined = extractors[0] if len(extractors) == 1 else CombinedExtractor(extractors)
    return BuiltReward(RewardSum(weighted), combined, hashes)


def _make(term: RewardTerm, target: ExtractorReference, device: str) -> Reward[Pool]:
    # Moments are in float64, which Apple's GPUs do not have.
    place = "cpu" if torch.device(device).type == "mps" else device
    source = RewardSource(
        name=term.name, reference=target.reference, path=target.path, device=place,
        heldout=target.heldout, spans=encoder_spans(target.extractor.name, target.extractor.dim),
    )  # fmt: skip
    if own_code.is_own(term.base):
        return OwnReward(own_code.call(term.base, "reward", [source], "its source"), term.base)
    factory: Callable[[RewardSource], Reward[Pool]] = registry.resolve(
        "reward", registry.REWARDS, term.base
    )
    return factory(source)


def _load_target(
    config: OptimizeConfig, name: str, announce: Announce, opened: Opened
) -> tuple[ExtractorReference, str | None]:
    weights = config.extra_weights.get(name)
    extractor, digest = build_extractor(name, weights, config.device, announce)
    path = config.extra_references[name]
    reference = fit_reference(path, extractor, digest, name, opened)
    return ExtractorReference(extractor=extractor, reference=reference, path=path), digest


def _extractor_of(term: RewardTerm, own: str | None) -> str | None:
    """None for the checkpoint set's extractor, also where it is named."""
    return None if term.extractor in (None, own) else term.extractor


def _others(terms: tuple[RewardTerm, ...], own: str | None) -> list[str]:
    names = (_extractor_of(term, own) for term in terms)
    return [name for name in dict.fromkeys(names) if name is not None]


class OwnReward:
    """A reward of the user's, whose every result is checked; without a state of its own."""

    def __init__(self, inner: Any, name: str) -> None:
        missing = [what for what in ("rewards", "pool_distance") if not hasattr(inner, what)]
        if missing:
            found = type(inner).__name__
            raise ConfigError(f"reward {name!r}: {found} lacks {', '.join(missing)}")
        self.inner, self.name = inner, name

    def pool_distance(self, pool: Pool) -> float:
        """Distance of the pool to the real data."""
        found: object = self.inner.pool_distance(pool)
        if isinstance(found, Tensor) and found.numel() == 1:
            found = found.item()
        if not isinstance(found, Real):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"reward {self.name!r} returned {got}, expected a distance, a number")
        return float(found)

    def rewards(self, pool: Pool, draws: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Rewards (P,) float64 on the CPU; ConfigError for another shape."""
        count = len(draws[0][1])
        found: object = self.inner.rewards(pool, draws)
        if not isinstance(found, Tensor) or tuple(found.shape) != (count,):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"reward {self.name!r} returned {got}, expected a tensor ({count},)")
        return found.detach().to("cpu", torch.float64)

    def state_dict(self, pool: Pool) -> Mapping[str, Tensor]:
        """The user's, if there is one."""
        save = getattr(self.inner, "state_dict", None)
        return save(pool) if save is not None else {}

    def load_state_dict(self, pool: Pool, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved state."""
        if state:
            self.inner.load_state_dict(pool, state)
