"""One seed in, independent named streams out; one generator for each image.

All draws are made on the CPU and then moved, so that a number depends on its seed alone: not on
the device, the batch it falls in, or what was drawn before it elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_rl.config import FIRST_RULES, RULES
from merge_rl.errors import ConfigError

SEED_BITS = 62  # below the sign bit of int64 everywhere


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^62) for the stream called `names`, a hash of both (SHA-256)."""
    text = "/".join([str(int(seed)), *map(str, names)])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


def stream(seed: int, *names: str | int) -> torch.Generator:
    """CPU generator of the stream called `names`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


OFFICIAL = 1 << 32  # image seeds below it give the noise of torch's generator


def image_seeds(count: int, seed: int, *names: str | int, rules: int = RULES) -> list[int]:
    """`count` image seeds of a stream; the first n do not depend on how many are asked for.

    All lie in [2^62, 2^63), so that no stream shares an image with another (but for one pair of
    images in 2^62), nor with the seeds below 2^32 that a user counts from. By the first rules of a
    run they are the low 32 bits of the same hash, which is all that torch's generator looks at:
    290,000 of them hold about 10 equal pairs.
    """
    hashes = [derive_seed(seed, *names, i) for i in range(count)]
    if rules == FIRST_RULES:
        return [value % OFFICIAL for value in hashes]
    return [value | 1 << SEED_BITS for value in hashes]


class _TorchNoise:
    """Draws of torch's generator, as the official samplers make them; it takes 32 bits of seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def randn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def randint(self, high: int) -> Tensor:
        return torch.randint(high, [], generator=self._generator)


class _KeyedNoise:
    """Draws of a counter-based generator, to which every bit of the seed is a bit of the key.

    Philox (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=seed))

    def randn(self, shape: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._generator.standard_normal(tuple(shape), dtype=np.float32))

    def randint(self, high: int) -> Tensor:
        return torch.tensor(int(self._generator.integers(high)))


class ImageStreams:
    """One CPU generator for each image; every draw of image i comes from seeds[i] alone.

    Seeds below 2^32 give the official noise, others use all of their 63 bits. The order of draws is
    that of the official EDM2 sampler: initial noise, then the label, then the noise of churned
    steps.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        whole = [int(seed) % (1 << 63) for seed in seeds]
        self._draws = [_TorchNoise(s) if s < OFFICIAL else _KeyedNoise(s) for s in whole]

    @classmethod
    def following(cls, noise: Tensor) -> ImageStreams:
        """Streams for what is drawn after the starting noise (B, ...): row i's from noise[i] alone.

        An image that an SDE makes thus stays a function of its starting noise, whatever carries
        the noise around. The seed is a hash of the first 16 values, rounded to sixteenths: their
        last bits, in which processors differ, must not decide what comes after. Of the hash 32 bits
        count: two images in 10^5 that share them still begin with noise of their own.
        """
        rows = (noise.detach().flatten(1)[:, :16].cpu().double() * 16).round().long().tolist()
        return cls([derive_seed(0, "following", *row) % OFFICIAL for row in rows])

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Unit normal noise (B, *shape) float32."""
        return torch.stack([draws.randn(shape) for draws in self._draws])

    def randint(self, high: int) -> Tensor:
        """One integer in [0, high) for each image, (B,) int64."""
        return torch.stack([draws.randint(high) for draws in self._draws])


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Unit normal noise (N, *shape) float32, row i a function of seeds[i] alone.

    >>> import merge_rl as mrl
    >>> one, two = mrl.seeded_noise([7, 9], [3]), mrl.seeded_noise([9], [3])
    >>> bool((one[1] == two[0]).all())
    True

    Raises ConfigError for what are no whole numbers below 2^63.
    """
    whole = [_whole(seed) for seed in seeds]
    return ImageStreams(whole).randn(shape) if whole else torch.empty(0, *shape)


def _whole(seed: Any) -> int:
    """A seed that is its own: another one would give the noise of a number that it rounds to."""
    found = seed.tolist() if hasattr(seed, "tolist") else seed  # of NumPy or torch
    if not isinstance(found, int) or found >= 1 << 63:
        raise ConfigError(f"expected seeds as whole numbers below 2^63, got {found!r:.40}")
    return found


def draw_subset(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Row indices (size,) of a random subset with the class proportions of labels (N,).

    Systematic sampling: rows are lined up class by class, shuffled within, and every (N / size)-th
    is taken from a random phase on. Every row is as likely as any other, and a class of share p
    gives p * size rows, rounded up or down.
    """
    count = len(labels)
    if not 0 < size <= count:
        raise ConfigError(f"expected a subset of 1..{count} rows, got {size}")
    line = torch.randperm(count, generator=generator)
    line = line[labels[line].argsort(stable=True)]
    phase = torch.rand([], generator=generator, dtype=torch.float64)
    picked = ((torch.arange(size) + phase) * (count / size)).long().clamp(max=count - 1)
    return line[picked].sort().values
