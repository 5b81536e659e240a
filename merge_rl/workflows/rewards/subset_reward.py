"""The subset-replace reward by itself, and its gradient, for a training loop of one's own.

The influence function IF of a distance says what an image changes the pool's distance by, to first
order; for the gradient of the distance of the policy's own distribution first order is exact:

    d distance / d theta = E[d IF(features(theta)) / d theta],    IF held at the pool
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_rl import registry
from merge_rl.config import RewardTerm, parse_reward
from merge_rl.core.distances.statistics import FeatureStats, check_features, feature_stats
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.rng import draw_subset, stream
from merge_rl.workflows.reference import Reference
from merge_rl.workflows.rewards.frechet import Pool, RewardSource
from merge_rl.workflows.rewards.sum import RewardSum, WeightedReward
from merge_rl.workflows.rollout import as_tensor, is_plain, written

Features = Tensor | NDArray[Any]
Influence = Callable[[Tensor], Tensor]
"""Features (n, D) -> (n,) float64, differentiable."""


@runtime_checkable
class Differentiable(Protocol):
    """A reward with a derivative."""

    device: str

    def pool_distance(self, pool: Pool, /) -> float:
        """Distance of the pool to the real data."""
        ...

    def influence(self, pool: Pool, /) -> Influence:
        """What an image changes the pool's distance by, times N, to first order."""
        ...

    def distance_of(self, features: Tensor, /) -> float:
        """Distance of features (n, D) on their own."""
        ...


class RewardGradient:
    """A sum of rewards with derivatives, at one pool.

    Raises ConfigError for a term without a derivative, by its name.
    """

    def __init__(self, reward: RewardSum, pool: Pool) -> None:
        self.pool = pool
        require_gradient(reward)
        self._terms = [
            (term, term.reward, reward.view(pool, term))
            for term in reward.terms
            if isinstance(term.reward, Differentiable)
        ]

    def influence(self, features: Tensor) -> Tensor:
        """Σ weight_t IF_t of features (n, D): (n,) float64 on the CPU, differentiable."""
        total = torch.zeros(len(features), dtype=torch.float64)
        for term, reward, view in self._terms:
            own = features[:, term.start : term.stop].to(reward.device)
            total = total + term.weight * reward.influence(view)(own).cpu()
        return total

    def cotangents(self, features: Tensor) -> Tensor:
        """The gradient of the mean influence of features (n, D) by each of them, (n, D)."""
        with torch.enable_grad():
            leaf = features.detach().clone().requires_grad_(True)
            (found,) = torch.autograd.grad(self.influence(leaf).mean(), leaf)
        return found

    def level(self, generator: torch.Generator, oldest: int = 0) -> Level:
        """The distance of the pool, and from two random halves what is wrong with it.

        A bias that falls as 1 / N is as large as what the halves' mean lies above the whole; for
        an unbiased distance both agree but for chance. Rows count as newer from `oldest` on.
        """
        count = len(self.pool)
        drawn = draw_subset(self.pool.labels, count // 2, generator)
        half = torch.zeros(count, dtype=torch.bool).index_fill(0, drawn, True)
        older = (torch.arange(count) - oldest) % count < count // 2
        whole = sum(term.weight * reward.pool_distance(view) for term, reward, view in self._terms)
        first, second = self._distance(half), self._distance(~half)
        return Level(
            distance=whole,
            bias=(first + second) / 2 - whole,
            noise=abs(first - second) / 2,
            trend=self._distance(older) - self._distance(~older),
        )

    def _distance(self, rows: Tensor) -> float:
        """Of those rows (N,) bool of the pool on their own."""
        return sum(
            term.weight * r.distance_of(view.features[rows]) for term, r, view in self._terms
        )


@dataclass(frozen=True)
class Level:
    """A distance of a pool, and what its halves tell of it."""

    distance: float
    bias: float  # about how much too large it is
    noise: float  # about how much of it is chance
    trend: float = 0.0  # what the newer half is better by than the older one

    @property
    def unbiased(self) -> float:
        """The distance without its bias."""
        return self.distance - self.bias


def require_gradient(
    reward: RewardSum,
    who: str = "the searcher pathwise",
    instead: str = "the searcher auto, which does without",
) -> None:
    """Raise ConfigError for a term without a derivative, by its name."""
    for term in reward.terms:
        if not isinstance(term.reward, Differentiable):
            raise ConfigError(
                f"{who} needs rewards with a derivative, got {term.name!r}; "
                f"expected fid-subset, kid-subset or mmd-subset, or {instead}"
            )


class SubsetReward:
    """How images change the distance of a pool of generated ones to real data; higher is better.

        R(x) = - d[(pool without n of its rows) + x, real]

    (arXiv:2607.02291, equation 4). A few images are enough to tell candidates apart, as all of
    them share the rest of the pool.

        >>> import torch, merge_rl as mrl
        >>> draw = torch.Generator().manual_seed(0)
        >>> real = torch.randn(2000, 4, generator=draw)
        >>> reward = mrl.SubsetReward(real, pool=1 + torch.randn(1000, 4, generator=draw))
        >>> round(reward.distance)  # four means, each off by 1
        4
        >>> near, far = torch.randn(100, 4, generator=draw), 2 + torch.randn(100, 4, generator=draw)
        >>> bool(reward(near) > reward(far))
        True

    Args:
        real: features (M, D) of real images, or their statistics; those alone are not enough for
            `kid-subset` and `mmd-subset`.
        pool: features (N, D) of images that the model makes now.
        name: "fid-subset", "fid-influence", "kid-subset", "mmd-subset", or a weighted sum of them.
        labels: (N,) int64 class ids of the pool; replaced rows have its shares of classes.
        seed: fixes which rows are replaced.

    Features are floating, torch's or NumPy's. Raises StatisticsError for features that are not
    finite, or of different dimensions, and ConfigError for what are no features, and for a reward
    that does not replace a part of a pool.
    """

    def __init__(
        self,
        real: Features | FeatureStats | Reference,
        pool: Features,
        *,
        name: str = "fid-subset",
        labels: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        own = _kept(_rows(pool, "(N, D)"))
        classes = torch.zeros(len(own), dtype=torch.int64)
        if labels is not None:
            classes = _whole(labels, f"{len(own)} labels, one a row")
        if classes.shape != own.shape[:1]:
            raise ConfigError(f"expected {len(own)} labels, one a row, got {tuple(classes.shape)}")
        self.pool = Pool.of(own, classes)
        self.seed, self.calls, self.cursor = seed, 0, 0
        source = RewardSource(name=name, reference=_reference(real), path="real")
        terms = [_weighted(term, source, self.pool.stats.dim) for term in parse_reward(name)]
        self.reward = RewardSum(terms)
        self.reward.pool_distance(self.pool)  # refuses what cannot be compared

    @property
    def distance(self) -> float:
        """Of the pool to the real data; lower is closer."""
        return self.reward.pool_distance(self.pool)

    def __call__(self, features: Features, rows: Tensor | None = None) -> Tensor:
        """Rewards (P,) float64 of P candidates' features (P, n, D), or () of (n, D); no gradient.

        `rows` (n,) int64 are those of the pool that the images stand for, each once; drawn anew at
        every call if None. Candidates of one call share them, and so can be compared. NaN for a
        candidate with a feature that is not finite.
        """
        dim = self.pool.stats.dim
        given = _kept(_rows(features, f"(n, {dim}) or (P, n, {dim})", dim, most=3))
        added = given if given.ndim == 3 else given[None]
        chosen = self._draw(added.shape[1]) if rows is None else self._given(rows, added.shape[1])
        found = self.reward.rewards(self.pool, [(chosen, added)])
        return found if given.ndim == 3 else found[0]

    def loss(self, features: Features) -> Tensor:
        """What images (n, D) change the distance by, to first order: () float64, differentiable.

        The mean of the distance's influence function over the images, held at the pool. For the
        gradient of the distance of the model's own distribution first order is exact:

            d distance / d theta = E[d influence(features(theta)) / d theta]

        Raises ConfigError for a reward without a derivative, and for no images.
        """
        dim = self.pool.stats.dim
        given = _rows(features, f"(n, {dim}), one at least", dim, least=1)
        return RewardGradient(self.reward, self.pool).influence(given).mean()

    def renew(self, features: Features) -> None:
        """Replace the oldest rows of the pool by features (n, D) of what the model makes now.

        n is at most N. StatisticsError for features that are not finite, with the pool as it was.
        """
        count, dim = len(self.pool), self.pool.stats.dim
        given = _kept(_rows(features, f"(n, {dim}) with n <= {count}", dim))
        if len(given) > count:
            raise ConfigError(f"expected at most the {count} rows of the pool, got {len(given)}")
        check_features(given, at_least=0)
        rows = (torch.arange(len(given)) + self.cursor) % count
        self.pool = self.pool.replaced(rows, given)
        self.cursor = (self.cursor + len(given)) % count

    def _given(self, rows: Tensor, size: int) -> Tensor:
        expected = f"{size} rows of the pool, each once, in 0..{len(self.pool) - 1}"
        found = _whole(rows, expected)
        known = torch.unique(found)
        if found.shape != (size,) or len(known) != size:
            raise ConfigError(f"expected {expected}, got {len(known)} in {tuple(found.shape)}")
        if size and not (int(known[0]) >= 0 and int(known[-1]) < len(self.pool)):
            raise ConfigError(f"expected {expected}, got {int(known[0])}..{int(known[-1])}")
        return found

    def _draw(self, size: int) -> Tensor:
        self.calls += 1
        return draw_subset(self.pool.labels, size, stream(self.seed, "subset", self.calls))


def _reference(real: Features | FeatureStats | Reference) -> Reference:
    if isinstance(real, Reference):
        return real
    if isinstance(real, FeatureStats):
        return Reference(stats=real)
    features = _kept(_rows(real, "(M, D), or statistics"))
    return Reference(stats=feature_stats(features), features=features)


def _rows(
    features: object, expected: str, dim: int | None = None, *, least: int = 0, most: int = 2
) -> Tensor:
    """Floating features of `dim` columns, from NumPy too; ConfigError for anything else."""
    given: Tensor = as_tensor(features)
    plain = isinstance(given, Tensor) and is_plain(given) and given.is_floating_point()
    shape = tuple(given.shape) if plain else ()
    if not (2 <= len(shape) <= most and dim in (None, shape[-1]) and shape[0] >= least):
        raise ConfigError(f"expected features {expected}, got {shape if plain else written(given)}")
    return given


def _whole(values: object, expected: str) -> Tensor:
    """Whole numbers as int64 on the CPU; ConfigError for anything else."""
    if isinstance(values, (list, tuple)):
        with suppress(ValueError, TypeError, RuntimeError):  # texts, rows of several lengths
            values = torch.tensor(values)
    given = as_tensor(values)
    if not isinstance(given, Tensor) or given.is_floating_point():
        found = str(given.dtype) if isinstance(given, Tensor) else type(given).__name__
        raise ConfigError(f"expected {expected}, got {found.removeprefix('torch.')}")
    return given.to("cpu", torch.int64)


def _kept(features: Tensor) -> Tensor:
    return features.detach().float().cpu()


def _weighted(term: RewardTerm, source: RewardSource, dim: int) -> WeightedReward:
    if term.extractor is not None or term.base not in registry.REWARDS:
        raise UnknownNameError("reward", term.name, registry.REWARDS)
    if term.base.endswith("-full"):
        raise ConfigError(
            f"{term.name} scores images by themselves, without a pool; expected "
            f"{term.base.replace('full', 'subset')}"
        )
    made = registry.resolve("reward", registry.REWARDS, term.base)(source)
    return WeightedReward(term.name, term.weight, made, 0, dim)
