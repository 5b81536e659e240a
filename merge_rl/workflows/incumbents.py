"""The best candidates of a search so far, to be looked at again at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Incumbents:
    """At most `limit` candidates with the best scores, best first.

    A score is what a candidate's reward says of its own distance, to first order: where its images
    replaced a share s of a pool of distance d,

        score = - (d + (-R - d) / s)

    and R itself for rewards of a candidate's own images. A score is a single look, and the best of
    many are mostly lucky: they are entries for the final choice, not results.
    """

    thetas: Tensor  # (M, D) float64
    scores: Tensor  # (M,) float64
    limit: int

    @classmethod
    def empty(cls, dim: int, limit: int) -> Incumbents:
        """None yet."""
        return cls(torch.zeros(0, dim, dtype=torch.float64), torch.zeros(0).double(), limit)

    def with_round(
        self, thetas: Tensor, rewards: Tensor, pool_distance: float | None, share: float
    ) -> Incumbents:
        """After a round of thetas (P, D) with rewards (P,); failed ones (NaN) never enter."""
        level = 0.0 if pool_distance is None else pool_distance
        scores = -(level + (-rewards - level) / share)
        sound = scores.isfinite()
        merged = torch.cat([self.thetas, thetas[sound]])
        values = torch.cat([self.scores, scores[sound]])
        order = torch.argsort(values, descending=True, stable=True)[: self.limit]
        return Incumbents(merged[order], values[order], self.limit)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return {"incumbents.thetas": self.thetas, "incumbents.scores": self.scores}

    def restored(self, tensors: Mapping[str, Tensor]) -> Incumbents:
        """Those of a saved state."""
        return Incumbents(tensors["incumbents.thetas"], tensors["incumbents.scores"], self.limit)
