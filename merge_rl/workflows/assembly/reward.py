"""From the text of a reward to the objects: extractors, their references, the weighted sum."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

import torch

from merge_rl import registry
from merge_rl.config import OptimizeConfig
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.interfaces import FeatureExtractor, Reward
from merge_rl.registry import REWARDS
from merge_rl.storage.files import sha256_file
from merge_rl.workflows.assembly.extractors import build_extractor, require_known
from merge_rl.workflows.assembly.networks import Announce
from merge_rl.workflows.assembly.references import require_comparable
from merge_rl.workflows.reference import Reference, load_reference, reference_file
from merge_rl.workflows.rewards import (
    CombinedExtractor,
    Pool,
    RewardSource,
    RewardSum,
    WeightedReward,
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """An extractor and the statistics of real data that its features are compared with."""

    extractor: FeatureExtractor
    reference: Reference
    path: str


@dataclass(frozen=True)
class BuiltReward:
    """A reward, the extractor of the features it reads, and hashes of the files it adds."""

    reward: RewardSum
    extractor: FeatureExtractor
    hashes: Mapping[str, str | None]


def check_reward(config: OptimizeConfig) -> None:
    """Raise before any work for a reward that is not known, or that lacks statistics."""
    terms = parse_reward(config.reward.text)
    for name in _others(terms, config.extractor):
        if name not in config.extra_references:
            raise ConfigError(
                f"the reward {config.reward.text!r} compares features of {name!r}: it needs "
                f"statistics of real data, --reference {name}=PATH"
            )
    used = set(_others(terms, config.extractor))
    for given in (config.extra_references, config.extra_weights):
        spare = sorted(set(given) - used)
        if spare:
            raise ConfigError(
                f"the reward {config.reward.text!r} has no use for a file of {spare[0]!r}, "
                f"expected files of {', '.join(sorted(used)) or 'no other extractor'}"
            )
    full = [term.name for term in terms if term.base.endswith("-full")]
    if full and config.reward.images_per_candidate < 2:
        raise ConfigError(f"{full[0]} needs at least 2 images a candidate, got 1")


def require_targets(config: OptimizeConfig) -> None:
    """Raise for statistics of another extractor than they are to be compared with.

    No weights are read or fetched. The config is resolved, and `check_reward` has seen it.
    """
    own = (config.reference, config.heldout)
    require_comparable(config.extractor or "", config.extractor_weights, own)
    for name in _others(parse_reward(config.reward.text), config.extractor):
        require_comparable(name, config.extra_weights.get(name), [config.extra_references[name]])


def build_reward(
    config: OptimizeConfig, own: Target, announce: Announce = lambda _text: None
) -> BuiltReward:
    """The reward of a resolved config; `own` is what the checkpoint set's extractor compares.

    `announce` hears of downloads.
    """
    terms = parse_reward(config.reward.text)
    targets: dict[str | None, Target] = {}
    hashes: dict[str, str | None] = {}
    for name in dict.fromkeys(_extractor_of(term, config.extractor) for term in terms):
        if name is None:
            targets[name] = own
        else:
            targets[name], digest = _load_target(config, name, announce)
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


def _make(term: RewardTerm, target: Target, device: str) -> Reward[Pool]:
    # Moments are in float64, which Apple's GPUs do not have.
    place = "cpu" if torch.device(device).type == "mps" else device
    factory: Callable[[RewardSource], Reward[Pool]] = registry.resolve(
        "reward", registry.REWARDS, term.base
    )
    source = RewardSource(
        name=term.name, reference=target.reference, path=target.path, device=place
    )
    return factory(source)


def _load_target(
    config: OptimizeConfig, name: str, announce: Announce
) -> tuple[Target, str | None]:
    weights = config.extra_weights.get(name)
    extractor, digest = build_extractor(name, weights, config.device, announce)
    path = config.extra_references[name]
    reference = load_reference(path, extractor=extractor.name, sha256=digest, dim=extractor.dim)
    return Target(extractor=extractor, reference=reference, path=path), digest


def _extractor_of(term: RewardTerm, own: str | None) -> str | None:
    """None for the checkpoint set's extractor, also where it is named."""
    return None if term.extractor in (None, own) else term.extractor


def _others(terms: tuple[RewardTerm, ...], own: str | None) -> list[str]:
    names = (_extractor_of(term, own) for term in terms)
    return [name for name in dict.fromkeys(names) if name is not None]


_NUMBER: Final = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_NAME: Final = r"[A-Za-z](?:[\w.:-]*\w)?"
_TERM: Final = re.compile(rf"\s*(?:({_NUMBER})\s*\*\s*)?({_NAME})\s*")


@dataclass(frozen=True)
class RewardTerm:
    """One term of a reward."""

    name: str  # as written
    base: str  # the registered reward
    extractor: str | None  # None: the checkpoint set's
    weight: float = 1.0


def parse_reward(text: str) -> tuple[RewardTerm, ...]:
    """The terms of a reward, in order.

    Raises UnknownNameError for a reward or extractor that is not registered, ConfigError for what
    is no sum of terms, for weights that are not above 0, and for a term that comes twice.
    """
    terms, position = [], 0
    while True:
        found = _TERM.match(text, position)
        if found is None:
            _refuse(text, position)
        weight = float(found[1]) if found[1] else 1.0
        if not 0 < weight < math.inf:
            raise ConfigError(f"reward {text!r}: expected weights above 0, got {found[1]}")
        terms.append(_named(found[2], weight))
        position = found.end()
        if position == len(text):
            break
        if text[position] != "+":
            _refuse(text, position)
        position += 1
    seen = [(term.base, term.extractor) for term in terms]
    twice = [term.name for term, key in zip(terms, seen, strict=True) if seen.count(key) > 1]
    if twice:
        raise ConfigError(f"reward {text!r}: {twice[0]!r} comes twice; give it one weight")
    return tuple(terms)


def _named(name: str, weight: float) -> RewardTerm:
    metric, _, rest = name.partition("-")
    extractor, _, form = rest.rpartition("-")
    base = f"{'fid' if metric == 'fd' else metric}-{form}"
    if base not in REWARDS:
        raise UnknownNameError("reward", name, REWARDS)
    if extractor:
        require_known(extractor)
    return RewardTerm(name, base, extractor or None, weight)


def _refuse(text: str, position: int) -> NoReturn:
    found = repr(text[position:].strip()) if text[position:].strip() else "nothing"
    raise ConfigError(
        f"reward {text!r}: expected NAME or NUMBER * NAME, joined by +, found {found} "
        f"after {text[:position].strip()!r}"
    )
