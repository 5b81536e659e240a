"""Images without finite features: how many, and whose doing it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Failures:
    """Images without finite features, and whose doing it is.

    A rollout's row is NaN where the sample is not finite, and infinite where the sample is and the
    extractor's answer is not.
    """

    samples: int
    features: int
    count: int  # of all images

    @classmethod
    def of(cls, features: Tensor) -> Failures:
        """Those of the rows (N, D) of a rollout."""
        samples = int(features.isnan().all(1).sum())
        return cls(samples, int((~features.isfinite().all(1)).sum()) - samples, len(features))

    def __bool__(self) -> bool:
        return self.samples + self.features > 0

    def said(self, extractor: str) -> str:
        """A clause for a message."""
        parts = {
            "the model makes samples that are not finite": self.samples,
            f"the extractor {extractor} gives features that are not finite": self.features,
        }
        said = [f"{text} for {n:,} of {self.count:,} images" for text, n in parts.items() if n]
        return "; ".join(said)
