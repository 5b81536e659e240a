"""Code of the user's that settings name: allowed where the user says so, and held to contracts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge_rl import own_code, registry
from merge_rl.config import OptimizeConfig
from merge_rl.errors import ConfigError
from merge_rl.workflows.rewards import Pool


class Named(NamedTuple):
    """Code that settings name: what it is, and the option that allows it."""

    name: str
    kind: str
    flag: str


def names_in(config: OptimizeConfig) -> Iterator[Named]:
    """Every name of code in the settings of a search, but for the function that generates."""
    plain = (
        ("network", config.network), ("autoencoder", config.autoencoder),
        ("extractor", config.extractor),
    )  # fmt: skip
    for kind, name in plain:
        if name is not None and own_code.is_own(name):
            yield Named(name, kind, f"--{kind}")
    if registry.own_searcher(config.search.name):
        yield Named(config.search.name, "searcher", "--searcher")
    for term in config.reward.terms:
        if own_code.is_own(term.base):
            yield Named(term.base, "reward", "--reward")
        if term.extractor is not None and own_code.is_own(term.extractor):
            yield Named(term.extractor, "extractor", "--extractor")


def allow_named(config: OptimizeConfig) -> None:
    """Allow the code that settings of the user's name."""
    for found in names_in(config):
        own_code.allow(found.name)


def require_all_allowed(config: OptimizeConfig, where: str) -> None:
    """Raise ConfigError for code that settings in a file name and the user does not."""
    for name, kind, flag in names_in(config):
        own_code.require_allowed(name, kind, flag, where)


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
        return float(self.inner.pool_distance(pool))

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
