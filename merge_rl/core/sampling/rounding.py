"""Images as whole numbers on 0..255, with a derivative."""

from __future__ import annotations

from torch import Tensor


def signed_levels(x: Tensor) -> Tensor:
    """Images in [-1, 1] -> whole numbers on 0..255, float32: 127.5 x + 128, clipped, rounded down.

    Rounding down after adding 128 makes encoding followed by decoding the identity. NaN is mapped
    to 0: what yields it is caught where it is made, not here. The derivative is that of the
    clipping: see `rounded_down`.
    """
    return rounded_down((x.float() * 127.5 + 128).nan_to_num().clip(0, 255))


def unit_levels(x: Tensor) -> Tensor:
    """Images in [0, 1] -> whole numbers on 0..255, float32: 255 x, as `signed_levels`."""
    return rounded_down(x.float().nan_to_num().clip(0, 1) * 255)


def rounded_down(x: Tensor) -> Tensor:
    """floor(x), with the derivative of x: straight through (Bengio et al., 2013, arXiv:1308.3432).

    A step's own derivative is 0 wherever there is one; over a batch of images the rounding is noise
    of half a level, which the mean of the distribution hardly sees. Exact for |x| < 2^23: the
    difference of a number and its floor has no rounding.
    """
    if not x.requires_grad:
        return x.floor()
    return x + (x.floor() - x).detach()
