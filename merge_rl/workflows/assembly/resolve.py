"""Settings completed from the checkpoint set, and the code of the user's that they name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from merge_rl import own_code, registry
from merge_rl.config import (
    FIRST_RULES,
    SUBSET_SIZE,
    FinetuneConfig,
    MergeConfig,
    OptimizeConfig,
    RewardConfig,
    SamplerConfig,
)
from merge_rl.core.merging.groups import ENDS, assign_groups, grouping
from merge_rl.errors import ConfigError
from merge_rl.searchers import SMALL_DIM, scaled_to
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.files import absolute
from merge_rl.storage.runs import is_finetune_run
from merge_rl.workflows.assembly.defaults import (
    ModelDefaults,
    find_defaults,
    of_set,
    require_parts_of,
)
from merge_rl.workflows.assembly.gradients import tried_in_vain, why_no_gradient
from merge_rl.workflows.assembly.job import meant_guide, tuned_dim, unweighed_map
from merge_rl.workflows.assembly.published import is_public
from merge_rl.workflows.assembly.references import resolve_evaluation

LEAST_IMAGES, LOOKS = 250, 200  # of a candidate that is scored on its own images alone
GRADIENTS = (100, 250)  # images of a round that takes gradients, from small budgets to large ones
STEPS = 360  # such rounds a budget would pay for, if it paid for nothing else and they cost 1
LEAST_POOL, POOLS = 400, 20  # smallest pool, and parts of the budget that it is one of at most
AUTO_SEARCHER = "auto"


Settings = TypeVar("Settings", OptimizeConfig, FinetuneConfig)


def _completed(config: Settings, defaults: ModelDefaults, nothing: str) -> Settings:
    """The inputs that settings leave open from the defaults; absolute paths.

    Weights go with the part they are of, held-out statistics with the reference: a default stands
    only where its companion is the default too. `nothing` begins the sentence of a refusal.
    """
    extractor = config.extractor or defaults.extractor
    reference = config.reference or defaults.reference
    itself = isinstance(config, OptimizeConfig) and config.generate is not None
    lacking = extractor is None and not itself  # a function may give features by itself
    if lacking or reference is None:
        what = "an extractor" if lacking else "reference statistics"
        flag = "--extractor" if lacking else "--reference"
        raise ConfigError(f"{nothing} {what}; pass {flag}")
    own = extractor == defaults.extractor
    weights = config.extractor_weights or (defaults.extractor_weights if own else None)
    heldout = config.heldout or (None if config.reference else defaults.heldout)
    own = config.autoencoder in (None, defaults.autoencoder)
    decoder = config.autoencoder_weights or (defaults.autoencoder_weights if own else None)
    sampler = config.sampler or defaults.sampler or SamplerConfig()
    tuned = config.search.tune if isinstance(config, OptimizeConfig) else ()
    sampler = meant_guide(sampler, tuned)
    return dataclasses.replace(
        config,
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


def _near(path: str | Path, config: Settings) -> ModelDefaults:
    """What the set or run of a path says; refuses to run code that it alone names."""
    parts = ("extractor", "extractor_weights", "autoencoder", "autoencoder_weights", "reference",
             "heldout")  # fmt: skip
    require_parts_of(path, [part for part in parts if getattr(config, part) is None])
    return find_defaults(path)


def resolve_finetune(config: FinetuneConfig) -> FinetuneConfig:
    """The settings with everything unsaid filled in from the model's set or run; absolute paths."""
    near = _near(config.model, config)
    resolved = _completed(config, near, f"no run or manifest near {config.model} names")
    return dataclasses.replace(resolved, model=_absolute(config.model))


def resolve_config(config: OptimizeConfig, checkpoints: CheckpointSet) -> OptimizeConfig:
    """The config with everything unsaid filled in from the set's manifest, and absolute paths.

    Of a folder without one, from that of the set or run that it lies in.

    Of a search with a function of the user's nothing is: the set's network has no part in it.
    """
    folder = checkpoints.folder
    if config.generate is not None:
        defaults = ModelDefaults()
    elif checkpoints.manifest is not None and not is_finetune_run(folder):
        defaults = of_set(checkpoints.defaults, folder)
    else:
        defaults = _near(folder, config)
    config = _completed(config, defaults, "the checkpoint set names no default for")
    config = dataclasses.replace(config, evaluation=resolve_evaluation(config, checkpoints))
    config = resolve_search(config, checkpoints)
    config = dataclasses.replace(config, merge=resolve_merge(config, checkpoints))
    config = _scaled(config, checkpoints)
    return dataclasses.replace(
        config,
        reward=resolve_reward(config),
        checkpoints=_absolute(config.checkpoints),
    )


def resolve_search(config: OptimizeConfig, checkpoints: CheckpointSet) -> OptimizeConfig:
    """The config with a searcher for "auto", and what the searcher has no use for left out.

    The incumbents of one that takes gradients are its own best means, by either metric.
    """
    search = config.search
    if search.name == AUTO_SEARCHER:
        why = why_no_gradient(config) or tried_in_vain(config, checkpoints)
        name = "policy-gradient" if why else "pathwise"
        search = dataclasses.replace(search, name=name)
    if search.takes_gradients:
        search = dataclasses.replace(search, incumbents=min(search.incumbents, 2))
    return dataclasses.replace(config, search=search)


def _scaled(config: OptimizeConfig, checkpoints: CheckpointSet) -> OptimizeConfig:
    """Population, step and exploration of the natural gradient for its number of dimensions.

    What the settings say stays, and what suits few dimensions is left unsaid.
    """
    search, merge = config.search, config.merge
    natural = search.update == "natural" or (search.update is None and search.policy == "direct")
    if search.name != "policy-gradient" or not natural or config.rules == FIRST_RULES:
        return config
    groups = len(assign_groups(tuple(checkpoints.tensors), merge.groups).names)
    own = unweighed_map(checkpoints, merge, groups).dim
    dim = tuned_dim(config, own)
    found = scaled_to(dim, max(1, own // groups), search.population)
    if search.population is None and dim > SMALL_DIM:
        search = dataclasses.replace(search, population=found.population)
    if search.learning_rate is None and 0 < found.step < 1:  # 0: too few, refused later
        search = dataclasses.replace(search, learning_rate=found.step)
    if merge.scale is None and found.exploration < 1:
        merge = dataclasses.replace(merge, scale=merge.unit * found.exploration)
    return dataclasses.replace(config, search=search, merge=merge)


def resolve_merge(config: OptimizeConfig, checkpoints: CheckpointSet) -> MergeConfig:
    """The map's settings with the groups of their grouping; UnknownNameError for another grouping.

    Searchers that choose among merges without a search give every tensor the same coefficients.
    """
    merge = config.merge
    patterns = grouping(config.grouping, tuple(checkpoints.tensors))
    if config.rules == FIRST_RULES:  # which left all of these to the group "rest"
        patterns = {name: pattern for name, pattern in patterns.items() if name not in ENDS}
    if merge.groups or registry.chooses_itself(config.search.name):
        return merge
    return dataclasses.replace(merge, grouping=config.grouping, groups=patterns)


def resolve_reward(config: OptimizeConfig) -> RewardConfig:
    """The reward with name and size filled in: those that suit the searcher and the budget.

    A candidate that is scored on its own images alone needs more of them than one that replaces
    part of a pool: a two-hundredth of the budget, which leaves about as many looks.
    """
    name, budget = config.reward.name, config.search_budget
    name = name or registry.default_reward(config.search.name)
    reward = dataclasses.replace(config.reward, name=name)
    if config.search.takes_gradients:
        return _for_gradients(reward, budget)
    if reward.subset_size is not None:
        return reward
    own = max(LEAST_IMAGES, budget // LOOKS)
    return dataclasses.replace(reward, subset_size=SUBSET_SIZE if reward.pooled else own)


def _for_gradients(reward: RewardConfig, budget: int) -> RewardConfig:
    """A pool that ten rounds renew at most: one that lags behind leads the search astray."""
    low, high = GRADIENTS
    own = min(max(low, min(high, budget // STEPS)), reward.pool_size)
    count = reward.subset_size or own
    size = max(LEAST_POOL, min(10 * count, budget // POOLS), count)
    return dataclasses.replace(
        reward, subset_size=count, pool_size=min(reward.pool_size, size), refresh="rolling"
    )


def _absolute(path: str | Path) -> str:
    return str(absolute(path))


def _weights(source: str | Path) -> str:
    """An absolute path, or the name of public weights as it is; each of NAME=WEIGHTS,..."""
    parts = str(source).split(",")
    if all("=" in part for part in parts) and not Path(source).exists():  # of several extractors
        named = (part.partition("=") for part in parts)
        return ",".join(f"{name}={_weights(one)}" for name, _, one in named)
    return str(source) if is_public(str(source)) else _absolute(source)


class Named(NamedTuple):
    """Code that settings name: what it is, and the option that allows it."""

    name: str
    kind: str
    flag: str


def names_in(config: OptimizeConfig | FinetuneConfig) -> Iterator[Named]:
    """Every name of code in the settings of a run, but for the function that generates."""
    plain = (
        ("network", config.network), ("autoencoder", config.autoencoder),
        ("extractor", config.extractor),
    )  # fmt: skip
    for kind, name in plain:
        if name is not None and own_code.is_own(name):
            yield Named(name, kind, f"--{kind}")
    if config.sampler is not None and config.sampler.guide_network is not None:
        yield Named(config.sampler.guide_network, "network", "--guide-network")
    if isinstance(config, OptimizeConfig) and registry.own_searcher(config.search.name):
        yield Named(config.search.name, "searcher", "--searcher")
    for term in config.reward.terms:
        if own_code.is_own(term.base):
            yield Named(term.base, "reward", "--reward")
        if term.extractor is not None and own_code.is_own(term.extractor):
            yield Named(term.extractor, "extractor", "--extractor")


def allow_named(config: OptimizeConfig | FinetuneConfig) -> None:
    """Allow the code that settings of the user's name."""
    for found in names_in(config):
        own_code.allow(found.name)


def require_all_allowed(config: OptimizeConfig | FinetuneConfig, where: str) -> None:
    """Raise ConfigError for code that settings in a file name and the user does not."""
    own_code.require_all_allowed(names_in(config), where)
