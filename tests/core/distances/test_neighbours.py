"""Precision, recall, density, coverage: by hand, invariants, official numbers, memory, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from merge_rl.core.distances.kernels import squared_distances
from merge_rl.core.distances.neighbours import MAX_BYTES, block_rows, prdc
from merge_rl.errors import ConfigError, StatisticsError, TooFewSamplesError

PAIRS = ("real_a_fake_b", "real_b_fake_a", "real_a_fake_d", "real_a_fake_c")
SMALL = 2**17  # bytes: blocks of 40 rows in 64 dimensions


def sets_of(pair: str, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    _, real, _, fake = pair.split("_")
    return features[real], features[fake]


def line(*points: float) -> Tensor:
    return torch.tensor(points)[:, None]


def test_shares_by_hand() -> None:
    # k = 1. Real radii: 1, 1, 2, 1, 1, 4. Fake radii: 4.7, 4.7, 1, 1. Only the fake at 0.5 is in
    # real balls, those of 0 and 1; fake balls hold all reals but the one at 12.
    real, fake = line(0, 1, 3, 7, 8, 12), line(0.5, 5.2, 19, 20)
    found = prdc(real, fake, k=1)
    assert found == pytest.approx((1 / 4, 5 / 6, 2 / 4, 2 / 6))


def test_second_neighbours_by_hand() -> None:
    # k = 2. Real radii of 0, 1, 3, 10: 3, 2, 3, 9. Fake radii of 2, 5, 9, 30: 7, 4, 7, 25. The fake
    # at 2 is in the balls of 0, 1, 3 and 10; 5 in that of 3 (2 < 3) and 10; 9 in that of 10; 30 in
    # none. Fake balls hold every real.
    found = prdc(line(0, 1, 3, 10), line(2, 5, 9, 30), k=2)
    assert found == pytest.approx((3 / 4, 1, 7 / 8, 1))


def test_points_on_a_surface() -> None:
    # Real radii 2, 2: the fake at 4 is on the ball of 2. Fake radii 5, 5: 2 and 0 are inside.
    real, fake = line(0, 2), line(4, 9)
    assert prdc(real, fake, k=1) == (0, 1, 0, 0)
    assert prdc(real, fake, k=1, closed=True) == (0.5, 1, 0.5, 0.5)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("max_bytes", [MAX_BYTES, SMALL])
def test_shares_match_dgm_eval(
    features: dict[str, Tensor], official: dict[str, Any], pair: str, max_bytes: int
) -> None:
    real, fake = sets_of(pair, features)
    for k in (3, 5):
        expected = official["prdc"][pair][f"dgm_eval_k{k}"]
        found = prdc(real, fake, k, max_bytes=max_bytes)._asdict()
        assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-12)


@pytest.mark.parametrize("pair", PAIRS)
def test_shares_match_torch_fidelity(
    features: dict[str, Tensor], official: dict[str, Any], pair: str
) -> None:
    real, fake = sets_of(pair, features)
    for k in (3, 5):
        expected = official["prdc"][pair][f"torch_fidelity_k{k}"]
        found = prdc(real, fake, k, closed=True)
        assert found.precision == pytest.approx(expected["precision"], abs=1e-7)
        assert found.recall == pytest.approx(expected["recall"], abs=1e-7)


def test_shares_ignore_order_motion_and_scale(features: dict[str, Tensor]) -> None:
    real, fake = features["a"][:200].double(), features["b"][:150].double()
    rotation, _ = torch.linalg.qr(features["d"][:64].double())
    expected = prdc(real, fake)
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.flip(0), lambda x: x @ rotation, lambda x: x + 1e6, lambda x: 1e-3 * x,
    ]  # fmt: skip
    for change in changes:
        assert prdc(change(real), change(fake)) == expected


def test_recall_is_precision_with_the_sets_exchanged(features: dict[str, Tensor]) -> None:
    found, mirrored = (prdc(features[x], features[y], k=4) for x, y in (("a", "c"), ("c", "a")))
    assert (found.precision, found.recall) == (mirrored.recall, mirrored.precision)


@pytest.mark.parametrize("max_bytes", [MAX_BYTES, SMALL])
def test_copies_of_a_row_are_at_distance_zero(max_bytes: int, generator: torch.Generator) -> None:
    # Three copies of each row: with k = 2 all balls are points, and hold nothing, not even a copy.
    # Rounding errors of |x|² + |y|² − 2 x·y in place of the zeros would decide by chance.
    rows = torch.randn(40, 64, generator=generator)
    real, fake = rows.repeat(3, 1), rows[:10].repeat(4, 1)
    assert prdc(real, fake, k=2, max_bytes=max_bytes) == (0, 0, 0, 0)
    found = prdc(real, fake, k=2, closed=True, max_bytes=max_bytes)
    assert found == pytest.approx((1, 10 / 40, 3 / 2, 10 / 40))


def test_squared_distances_by_hand() -> None:
    x, y = torch.tensor([[0, 0], [3, 4]]), torch.tensor([[3, 4], [0, 1], [6, 8]])
    assert squared_distances(x, y).tolist() == [[25, 1, 100], [0, 18, 25]]


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_matrix_is_larger_than_a_block(generator: torch.Generator) -> None:
    real, fake = (torch.randn(n, 2, generator=generator) for n in (900, 1100))
    size = block_rows(2, SMALL)
    assert size < 100
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        prdc(real, fake, k=3, max_bytes=SMALL)
    assert largest.elements == size * size  # more than any copy of features or list of neighbours


@pytest.mark.parametrize("dim", [1, 64, 2048])
def test_blocks_fill_their_bytes(dim: int) -> None:
    for max_bytes in (2**20, 2**24, MAX_BYTES):
        size = block_rows(dim, max_bytes)
        assert 32 * (size * size + size * dim) <= max_bytes
        grown = size + 1
        assert size == 4096 or 32 * (grown * grown + grown * dim) > max_bytes


def test_features_without_neighbours_are_refused() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TooFewSamplesError, match="at least 6 feature rows, got 5"):
        prdc(x, x[:5])
    with pytest.raises(TooFewSamplesError, match="at least 6 feature rows, got 5"):
        prdc(x[:5], x)
    with pytest.raises(ConfigError, match="at least 1 neighbour, got 0"):
        prdc(x, x, 0)
    with pytest.raises(StatisticsError, match="got 4 and 3"):
        prdc(x, x[:, :3])
    with pytest.raises(StatisticsError, match="6 of 6 rows with NaN"):
        prdc(x, x / 0.0 * 0)
    with pytest.raises(ConfigError, match="at least 160 bytes for a block, got 100"):
        prdc(x, x, max_bytes=100)
