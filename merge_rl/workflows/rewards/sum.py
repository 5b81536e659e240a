"""Weighted sums of rewards over one feature matrix, and the watch on first-order ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from merge_rl.config import without_nan
from merge_rl.interfaces import FeatureExtractor, Reward
from merge_rl.workflows.rewards.frechet import InfluenceFrechet, Pool, PoolCache, Subset


@dataclass(frozen=True, eq=False)
class WeightedReward:
    """A term of a sum: a reward, its weight, and the columns start..stop-1 that it reads."""

    name: str
    weight: float
    reward: Reward[Pool]
    start: int
    stop: int


class RewardScores(NamedTuple):
    """Rewards (P,) float64 of candidates, and the terms (P,) they are the weighted sum of.

    `first_order` is the ratio of `merge_rl.workflows.rewards.sum`, where terms are to first order.
    """

    rewards: Tensor
    terms: Mapping[str, Tensor]
    first_order: float | None = None


def term_means(terms: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Mean of each term over the candidates that did not fail, None if all did."""
    return {name: without_nan(float(values.nanmean())) for name, values in terms.items()}


class RewardSum:
    """R = Σ weight_t R_t; every term on the features of its own extractor.

    The terms are summed as they are, in their own units: an FID is in the tens, a KID below 1, and
    a weight is what one unit of a term is worth.
    """

    def __init__(self, terms: Sequence[WeightedReward]) -> None:
        self.terms = tuple(terms)
        self.has_first_order = any(isinstance(t.reward, InfluenceFrechet) for t in self.terms)
        spans = {(term.start, term.stop) for term in self.terms}
        # Terms of one extractor are given one object, which they recognise.
        self._views = PoolCache(lambda pool: {span: pool.columns(*span) for span in spans})

    def view(self, pool: Pool | None, term: WeightedReward) -> Pool:
        """The pool with the features alone that a term reads."""
        if pool is None:
            # Rewards of a candidate's own images do not look at it.
            return None  # type: ignore[return-value]
        return self._views(pool)[term.start, term.stop]

    def pool_distance(self, pool: Pool) -> float:
        """Σ weight_t times the distance of the pool in term t."""
        return sum(
            term.weight * term.reward.pool_distance(self.view(pool, term)) for term in self.terms
        )

    def scores(self, pool: Pool | None, draws: Sequence[Subset]) -> RewardScores:
        """Rewards of candidates, NaN where a term is, and the terms by name before weighting.

        Without a pool every term must be one that scores a candidate's own images.
        """
        terms = {}
        for term in self.terms:
            own = [(rows, features[..., term.start : term.stop]) for rows, features in draws]
            terms[term.name] = term.reward.rewards(self.view(pool, term), own)
        weighted = [term.weight * terms[term.name] for term in self.terms]
        ratio = self._first_order(pool, draws, terms) if pool is not None else None
        return RewardScores(torch.stack(weighted).sum(0), terms, ratio)

    def _first_order(
        self, pool: Pool, draws: Sequence[Subset], terms: Mapping[str, Tensor]
    ) -> float | None:
        """Exact against first-order differences, over the terms that are to first order."""
        near = [(t, t.reward) for t in self.terms if isinstance(t.reward, InfluenceFrechet)]
        if not near:
            return None

        def exact(pair: Tensor) -> Tensor:
            parts = []
            for term, reward in near:
                own = [(rows, made[pair, :, term.start : term.stop]) for rows, made in draws]
                parts.append(term.weight * reward.exact(self.view(pool, term), own))
            return torch.stack(parts).sum(0)

        found = torch.stack([term.weight * terms[term.name] for term, _ in near]).sum(0)
        return first_order_ratio(found, exact)

    def rewards(self, pool: Pool, draws: Sequence[Subset]) -> Tensor:
        """The sum alone: (P,) float64 on the CPU."""
        return self.scores(pool, draws).rewards

    def state_dict(self, pool: Pool) -> dict[str, Tensor]:
        """What the terms need to go on exactly, by the number of the term."""
        states = (term.reward.state_dict(self.view(pool, term)) for term in self.terms)
        return {f"{i}.{key}": v for i, state in enumerate(states) for key, v in state.items()}

    def load_state_dict(self, pool: Pool, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved state."""
        for i, term in enumerate(self.terms):
            own = {k.removeprefix(f"{i}."): v for k, v in state.items() if k.startswith(f"{i}.")}
            term.reward.load_state_dict(self.view(pool, term), own)


class CombinedExtractor:
    """Several extractors as one: their features side by side, in their order."""

    def __init__(self, extractors: Sequence[FeatureExtractor]) -> None:
        self.extractors = tuple(extractors)
        self.name = "+".join(extractor.name for extractor in self.extractors)
        self.dim = sum(extractor.dim for extractor in self.extractors)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) uint8 -> features (B, dim) float32."""
        return torch.cat([extractor(images).float() for extractor in self.extractors], 1)


KEY: Final = "first_order"  # of a round's event
MEMORY: Final = 5  # rounds, whose median is looked at
LOW, HIGH = 0.5, 2.0  # ratios between which first-order rewards are taken to do


def first_order_ratio(found: Tensor, exact: Callable[[Tensor], Tensor]) -> float | None:
    """(exact reward of the best candidate - of the worst) / (the same to first order).

    `found` (P,) are rewards to first order, which say who is best and worst; `exact` gives exact
    rewards (2,) of two candidates by their numbers. 1: candidates are told apart as exact rewards
    would; below 0: the wrong way round. None with fewer than two candidates that did not fail, or
    where none is better than another.
    """
    finite = found.isfinite().nonzero()[:, 0]
    if len(finite) < 2:
        return None
    values = found[finite]
    pair = finite[torch.stack([values.argmax(), values.argmin()])]
    near = float(found[pair[0]] - found[pair[1]])
    if near == 0:
        return None
    best, worst = exact(pair).tolist()
    ratio = (best - worst) / near
    return ratio if math.isfinite(ratio) else None


class FirstOrderWatch:
    """Follows the ratios of a run, and speaks up once."""

    def __init__(self) -> None:
        self.ratios: list[float] = []
        self.told = False

    def add(self, ratio: float | None) -> str | None:
        """A warning, when the median of the last `MEMORY` ratios first leaves [0.5, 2]."""
        if ratio is None:
            return None
        self.ratios.append(ratio)
        middle = statistics.median(self.ratios[-MEMORY:])
        if self.told or len(self.ratios) < MEMORY or LOW <= middle <= HIGH:
            return None
        self.told = True
        return (
            f"exact rewards differ by {middle:.2g} times what first-order ones say (median of "
            f"{MEMORY} rounds), expected {LOW:g} to {HIGH:g}: lower reward.subset_size, raise "
            f"reward.pool_size, or name the exact form in reward.name (fid-subset)"
        )


def first_order_warnings(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a run that had these events warned of, in their order: one sentence, or none."""
    watch = FirstOrderWatch()
    said = [watch.add(event.get(KEY)) for event in events]
    return [text for text in said if text is not None]


def first_order_line(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a run's rounds found, as a line of its report; none where nothing was measured."""
    ratios = [event[KEY] for event in events if event.get(KEY) is not None]
    if not ratios:
        return []
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    return [
        f"exact differences between candidates over first-order ones: median {middle:.2f} "
        f"[{low:.2f}, {high:.2f}] of {len(ratios)} rounds"
    ]
