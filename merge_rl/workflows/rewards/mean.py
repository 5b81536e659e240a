"""Several encoders in one number: distances in units of what real images are apart.

Whatever a single encoder looks at can be fooled by images that please it alone (Yang et al., 2026,
arXiv:2604.28190). Of E encoders, each with its columns of the features,

    fd-mean = (1 / E) sum_e FD_e(generated, reference) / FD_e(held-out, reference)

so that 1 is as far from the reference as held-out real images are, and no encoder counts for more
because its features are larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from merge_rl.core.distances.frechet import frechet_distance
from merge_rl.core.distances.statistics import FeatureStats, feature_stats
from merge_rl.errors import StatisticsError
from merge_rl.rng import stream
from merge_rl.workflows.reference import Reference
from merge_rl.workflows.rewards.frechet import Pool, PoolCache, RewardSource, Subset, SubsetFrechet

LEAST: Final = 4  # kept features of real images, where these are cut into two halves
Span = tuple[int, int]
"""First column of an encoder's features, and the one after its last."""


class MeanFrechet:
    """R = - fd-mean of the pool with a candidate's images in it; exact, with a derivative."""

    def __init__(self, source: RewardSource) -> None:
        self.device = source.device
        reference = source.reference
        spans = source.spans or ((0, reference.stats.dim),)
        apart = real_distances(reference, source.heldout, spans, source.path)
        self.parts = [
            (1 / (len(spans) * distance), span, SubsetFrechet(replace(source, reference=own)))
            for distance, span in zip(apart, spans, strict=True)
            for own in [Reference(stats=columns(reference.stats, span))]
        ]
        self._views = PoolCache(self._split)

    def _split(self, pool: Pool) -> list[Pool]:
        return [pool.columns(*span) for _, span, _ in self.parts]

    def pool_distance(self, pool: Pool) -> float:
        """fd-mean of the pool itself."""
        views = self._views(pool)
        parts = zip(self.parts, views, strict=True)
        return sum(weight * part.pool_distance(view) for (weight, _, part), view in parts)

    def distance_of(self, features: Tensor) -> float:
        """fd-mean of features (n, D) on their own."""
        return sum(
            weight * part.distance_of(features[:, first:stop])
            for weight, (first, stop), part in self.parts
        )

    def rewards(self, pool: Pool, draws: Sequence[Subset]) -> Tensor:
        """(P,) float64 on the CPU; NaN where a feature is not finite."""
        found = []
        for (weight, (first, stop), part), view in zip(self.parts, self._views(pool), strict=True):
            own = [(rows, features[..., first:stop]) for rows, features in draws]
            found.append(weight * part.rewards(view, own))
        return torch.stack(found).sum(0)

    def influence(self, pool: Pool) -> Callable[[Tensor], Tensor]:
        """Features (n, D) -> what each changes fd-mean by, times N, to first order."""
        held = [
            (weight, span, part.influence(view))
            for (weight, span, part), view in zip(self.parts, self._views(pool), strict=True)
        ]

        def of(features: Tensor) -> Tensor:
            parts = [weight * own(features[:, first:stop]) for weight, (first, stop), own in held]
            return torch.stack(parts).sum(0)

        return of

    def state_dict(self, _pool: Pool) -> dict[str, Tensor]:
        """Nothing: all follows from the pool's moments."""
        return {}

    def load_state_dict(self, _pool: Pool, _state: Mapping[str, Tensor]) -> None:
        """Nothing to do."""


def columns(stats: FeatureStats, span: Span) -> FeatureStats:
    """The moments of some of the features."""
    block = slice(*span)
    cov = stats.cov[block, block].contiguous()
    return FeatureStats(stats.count, stats.mean[block].contiguous(), cov)


def real_distances(
    reference: Reference, heldout: Reference | None, spans: Sequence[Span], path: str
) -> list[float]:
    """Distance of held-out real images to the reference, for each encoder.

    Without held-out statistics, that of two random halves of the features which the reference
    keeps. A distance of fewer images is larger by itself: compare numbers of one set of real
    images. Raises StatisticsError where there is neither, and where real images are not apart.
    """
    first, second = (reference.stats, heldout.stats) if heldout else _halves(reference, path)
    found = []
    for span in spans:
        apart = float(frechet_distance(columns(first, span), columns(second, span)))
        if not apart > 0:
            raise StatisticsError(
                f"{path}: its features {span[0]}..{span[1] - 1} are those of the held-out images; "
                "expected two sets of real images"
            )
        found.append(apart)
    return found


def _halves(reference: Reference, path: str) -> tuple[FeatureStats, FeatureStats]:
    kept = reference.features
    if kept is None or len(kept) < LEAST:
        raise StatisticsError(
            f"{path}: fd-mean measures in units of what real images are apart; expected held-out "
            "statistics (--heldout) or kept features (mergerl reference --keep-features)"
        )
    order = torch.randperm(len(kept), generator=stream(0, "halves"))
    half = len(kept) // 2
    return feature_stats(kept[order[:half]]), feature_stats(kept[order[half:]])
