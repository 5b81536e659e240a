"""Weighted sums of rewards over one feature matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from merge_rl.config import without_nan
from merge_rl.interfaces import FeatureExtractor, Reward
from merge_rl.storage.files import below
from merge_rl.workflows.rewards.first_order import first_order_ratio
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

    `first_order` is the ratio of `first_order_ratio`, where terms are to first order.
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
        self._views = PoolCache(self._split)

    def _split(self, pool: Pool) -> dict[tuple[int, int], Pool]:
        # Terms of one extractor are given one object, which they recognise.
        spans = {(term.start, term.stop) for term in self.terms}
        return {span: pool.columns(*span) for span in spans}

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
            term.reward.load_state_dict(self.view(pool, term), below(state, f"{i}."))


class CombinedExtractor:
    """Several extractors as one: their features side by side, in their order."""

    def __init__(self, extractors: Sequence[FeatureExtractor]) -> None:
        self.extractors = tuple(extractors)
        self.name = "+".join(extractor.name for extractor in self.extractors)
        self.dim = sum(extractor.dim for extractor in self.extractors)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) uint8 -> features (B, dim) float32."""
        return torch.cat([extractor(images).float() for extractor in self.extractors], 1)
