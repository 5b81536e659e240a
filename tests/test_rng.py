"""Named streams of one seed, and one generator an image."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch

from merge_rl.errors import ConfigError
from merge_rl.rng import (
    SEED_BITS,
    ImageStreams,
    derive_seed,
    image_seeds,
    seeded_noise,
    stream,
)

pytestmark = pytest.mark.numerics


def test_derived_seed_is_the_documented_hash() -> None:
    # First 8 bytes of SHA-256 of "7/round/3", big endian, without the lowest two bits.
    digest = hashlib.sha256(b"7/round/3").digest()
    assert derive_seed(7, "round", 3) == int.from_bytes(digest[:8], "big") // 4


def test_seeds_lie_in_62_bits() -> None:
    seeds = [derive_seed(seed, "x", i) for seed in (0, 1, -5, 2**63) for i in range(500)]
    assert min(seeds) >= 0
    # 2,000 uniform draws: the largest one misses the top per cent with probability 2e-9.
    assert 0.99 * 2**SEED_BITS < max(seeds) < 2**SEED_BITS
    assert len(set(seeds)) == len(seeds)


def test_streams_differ_by_seed_and_by_name() -> None:
    names: list[tuple[str | int, ...]] = [
        (), ("pool",), ("pool", 0), ("pool", 1), ("pool", 0, 1), ("round", 0), (0,), (1, 0), (10,),
    ]  # fmt: skip
    draws = {
        tuple(torch.randn(4, generator=stream(seed, *name)).tolist())
        for seed in (0, 1)
        for name in names
    }
    assert len(draws) == 2 * len(names)


def test_streams_do_not_disturb_each_other() -> None:
    a, b = stream(3, "a"), stream(3, "b")
    before = torch.random.get_rng_state()
    mixed = [(torch.randn([], generator=a), torch.randn([], generator=b)) for _ in range(5)]
    assert torch.equal(torch.random.get_rng_state(), before)
    again = stream(3, "a")
    assert [x for x, _ in mixed] == [torch.randn([], generator=again) for _ in range(5)]


def test_streams_are_uncorrelated() -> None:
    # 10,000 products of independent unit normals: mean 0, standard error 0.01.
    a, b = (torch.randn(10_000, generator=stream(0, "ask", i)) for i in (0, 1))
    assert float((a * b).mean()) == pytest.approx(0, abs=0.05)


def test_image_seeds_are_a_prefix_of_a_longer_list() -> None:
    long = image_seeds(20, 5, "round", 2)
    assert image_seeds(7, 5, "round", 2) == long[:7]
    assert len(set(long)) == 20
    assert not set(long) & set(image_seeds(20, 5, "round", 3))
    assert image_seeds(0, 5) == []


def test_named_streams_use_every_bit_of_their_seeds() -> None:
    seeds = image_seeds(64, 0, "fresh", 1)
    # Outside of the seeds that a user counts from, and within what fits a signed integer.
    assert all(2**62 <= seed < 2**63 for seed in seeds)
    noise = ImageStreams(seeds).randn((2, 3))
    for bit in range(62):
        other = ImageStreams([seeds[bit] ^ (1 << bit)]).randn((2, 3))
        assert not torch.equal(other[0], noise[bit])
    # 64 draws of 16,384 unit normals: mean 0 and variance 1 to 5 standard errors.
    values = ImageStreams(seeds).randn((4, 64, 64)).double()
    assert abs(float(values.mean())) < 5 / values.numel() ** 0.5
    assert abs(float(values.var()) - 1) < 5 * (2 / values.numel()) ** 0.5


def test_seeds_below_2_to_32_give_torchs_noise() -> None:
    for seed in (0, 2**32 - 1):
        expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(ImageStreams([seed]).randn((2, 3))[0], expected)
    # Above it torch would make the noise of the low 32 bits again.
    assert not torch.equal(
        ImageStreams([7]).randn((2, 3)), ImageStreams([7 + (1 << 32)]).randn((2, 3))
    )


def test_runs_of_the_first_rules_keep_their_noise() -> None:
    seeds = image_seeds(5, 3, "pool", rules=1)
    for index, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(derive_seed(3, "pool", index))
        before = torch.randn(2, 3, generator=generator)
        assert torch.equal(ImageStreams([seed]).randn((2, 3))[0], before)
    assert seeds == [seed % 2**32 for seed in image_seeds(5, 3, "pool")]


def test_an_image_depends_on_its_own_seed_alone() -> None:
    seeds = [11, 2**62 - 1, 0, 2**63 + 4]
    together = ImageStreams(seeds)
    noise, labels, churn = together.randn((2, 3)), together.randint(1000), together.randn((2, 3))
    assert noise.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert 0 <= int(labels.min()) <= int(labels.max()) < 1000
    for i in (3, 0, 2, 1):
        alone = ImageStreams([seeds[i]])
        assert torch.equal(alone.randn((2, 3))[0], noise[i])
        assert torch.equal(alone.randint(1000)[0], labels[i])
        assert torch.equal(alone.randn((2, 3))[0], churn[i])
    assert not torch.equal(noise, churn)


def test_what_follows_the_noise_of_an_image_depends_on_that_noise_alone() -> None:
    noise = ImageStreams(range(4)).randn((3, 4, 4))
    together = ImageStreams.following(noise)
    first, second = together.randn((3, 4, 4)), together.randn((3, 4, 4))
    for i in (2, 0, 3, 1):
        alone = ImageStreams.following(noise[i : i + 1])
        assert torch.equal(alone.randn((3, 4, 4))[0], first[i])
        assert torch.equal(alone.randn((3, 4, 4))[0], second[i])
    # Nothing is drawn twice: neither the starting noise, nor the noise of another image or step.
    rows = torch.cat([noise, first, second]).flatten(1)
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.6
    # Processors differ in the last bits of the noise, and half precision in more of them.
    moved = noise * (1 + 1e-6)
    assert torch.equal(ImageStreams.following(moved).randn((3, 4, 4)), first)
    assert not torch.equal(ImageStreams.following(-noise).randn((3, 4, 4)), first)


def test_seeds_of_noise_are_whole_numbers_of_their_own() -> None:
    given: list[Any] = [3, np.int64(3), torch.tensor(3)]
    assert len({tuple(row.tolist()) for row in seeded_noise(given, [4])}) == 1
    assert seeded_noise([], [4]).shape == (0, 4)
    odd: list[Any] = [1.5, 2.0, 1 << 63, "3"]
    for seed in odd:
        with pytest.raises(ConfigError, match=r"expected seeds as whole numbers below 2\^63, got"):
            seeded_noise([seed], [4])
