"""Finds the step at which samples stop being finite, without waiting for the device at each."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_rl.errors import NonFiniteSamplesError


class NormWatch:
    """Norms of all images after every step, kept on the device and looked at once.

    Use as the `on_step` of a solver; `check` raises at the end.
    """

    def __init__(self, start: Tensor) -> None:
        self._norms = [_norms(start)]

    def __call__(self, _index: int, x: Tensor) -> None:
        """Note the norms (B,) of x (B, ...)."""
        self._norms.append(_norms(x))

    def check(self) -> None:
        """Raise NonFiniteSamplesError with the first step, the image and its norms."""
        norms = torch.stack(self._norms).cpu()  # (steps + 1, B)
        odd = ~norms.isfinite()
        if not bool(odd.any()):
            return
        step, image = (int(i) for i in odd.nonzero()[0])
        if step == 0:
            raise NonFiniteSamplesError(
                f"the starting noise of image {image} of the batch is not finite"
            )
        before, after = float(norms[step - 1, image]), float(norms[step, image])
        raise NonFiniteSamplesError(
            f"samples are not finite after step {step} of {len(norms) - 1}: the norm of image "
            f"{image} of the batch went from {before:g} to {after:g}"
        )


def _norms(x: Tensor) -> Tensor:
    # In float64 where x is, so that a large but finite image is not taken for an infinite one.
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms
