"""The reward alone: values from whole recomputed pools, the gradient of its loss, refusals."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.errors import ConfigError, StatisticsError, UnknownNameError


def draw(count: int, shift: float, generator: torch.Generator) -> Tensor:
    return shift + torch.randn(count, 3, generator=generator) * torch.tensor([1.0, 2.0, 0.5])


def test_a_reward_is_minus_the_distance_of_the_pool_with_the_rows_replaced(
    generator: torch.Generator,
) -> None:
    real, pool = draw(300, 0.0, generator), draw(80, 0.4, generator)
    images = torch.stack([draw(6, 0.0, generator), draw(6, 2.0, generator)])
    rows = torch.tensor([3, 17, 22, 41, 60, 79])
    for name, distance in (("fid-subset", _fid), ("kid-subset", mrl.kernel_distance)):
        reward = mrl.SubsetReward(real, pool, name=name)
        assert reward.distance == pytest.approx(distance(pool, real), rel=1e-6)
        found = reward(images, rows)
        for value, added in zip(found.tolist(), images, strict=True):
            replaced = pool.index_copy(0, rows, added)
            assert value == pytest.approx(-distance(replaced, real), rel=1e-5)
        assert float(reward(images[0], rows)) == pytest.approx(float(found[0]), rel=1e-12)


def _fid(a: Tensor, b: Tensor) -> float:
    return mrl.frechet_distance(mrl.feature_stats(a), mrl.feature_stats(b))


def test_candidates_of_one_call_share_rows_that_the_seed_fixes(generator: torch.Generator) -> None:
    real, pool = draw(300, 0.0, generator), draw(80, 0.4, generator)
    images = draw(6, 0.0, generator)
    first, again = (mrl.SubsetReward(real, pool, seed=5) for _ in range(2))
    pair = first(torch.stack([images, images]))
    assert pair[0] == pair[1]
    assert torch.equal(again(torch.stack([images, images])), pair)
    assert again(images) != pair[0]  # other rows


def test_a_copy_in_another_process_goes_on_alike(generator: torch.Generator) -> None:
    reward = mrl.SubsetReward(draw(300, 0.0, generator), draw(80, 0.4, generator), seed=5)
    reward.renew(draw(6, 0.0, generator))
    images = draw(6, 0.0, generator)
    reward(images)
    other = pickle.loads(pickle.dumps(reward))
    assert (other.distance, other.cursor) == (reward.distance, 6)
    assert other(images) == reward(images)  # of the rows that are next
    assert other.loss(images) == reward.loss(images)


def test_the_loss_leads_images_to_the_real_data(generator: torch.Generator) -> None:
    # A shift of the model is learnt: its images, drawn around it, are all that the loss sees.
    real, shift = draw(2000, 1.0, generator), torch.zeros(3, requires_grad=True)
    spread = torch.tensor([1.0, 2.0, 0.5])
    reward = mrl.SubsetReward(real, draw(1000, 0.0, generator))
    optimiser = torch.optim.Adam([shift], lr=0.1)
    start = reward.distance
    for _ in range(60):
        made = shift + torch.randn(200, 3, generator=generator) * spread
        optimiser.zero_grad()
        reward.loss(made).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        reward.renew(made)
    assert start == pytest.approx(3.0, abs=0.5)
    assert reward.distance < 0.1 * start
    torch.testing.assert_close(shift.detach(), torch.ones(3), atol=0.25, rtol=0)


def test_the_oldest_rows_are_renewed_in_turn(generator: torch.Generator) -> None:
    real, pool = draw(300, 0.0, generator), draw(10, 0.4, generator)
    reward = mrl.SubsetReward(real, pool)
    new = [draw(4, 5.0 + i, generator) for i in range(3)]
    for rows in new:
        reward.renew(rows)
    expected = torch.cat([new[2][2:], new[0][2:], new[1], new[2][:2]])
    torch.testing.assert_close(reward.pool.features, expected)
    assert reward.distance == pytest.approx(_fid(expected, real), rel=1e-6)


def test_failures_are_nan_and_bad_input_is_refused(generator: torch.Generator) -> None:
    real, pool = draw(300, 0.0, generator), draw(80, 0.4, generator)
    reward = mrl.SubsetReward(mrl.feature_stats(real), pool)
    broken = draw(6, 0.0, generator).index_fill(0, torch.tensor([2]), torch.nan)
    assert bool(reward(broken).isnan())
    with pytest.raises(ConfigError, match=r"expected features \(n, 3\) or \(P, n, 3\), got \(6, 2"):
        reward(broken[:, :2])
    no_path: Any = "real.pt"
    no_labels: Any = ["cat"] * 80
    no_name: Any = 3
    bytes_of = (10 * pool).byte()  # images, not features
    for call, found in (
        (lambda: reward(bytes_of), r"\(P, n, 3\), got uint8 \(80, 3\)"),
        (lambda: reward.loss(pool[:, :2]), r"\(n, 3\), one at least, got \(80, 2\)"),
        (lambda: reward.loss(pool[:0]), r"one at least, got \(0, 3\)"),
        (lambda: reward.renew(real), "at most the 80 rows of the pool, got 300"),
        (lambda: mrl.SubsetReward(real, bytes_of), r"\(N, D\), got uint8"),
        (lambda: mrl.SubsetReward(no_path, pool), r"\(M, D\), or statistics, got str"),
        (lambda: mrl.SubsetReward(real, pool, labels=no_labels), "80 labels, one a row, got list"),
        (lambda: mrl.SubsetReward(real, pool, name=no_name), "a reward by its name, got int"),
    ):
        with pytest.raises(ConfigError, match=found):
            call()
    with pytest.raises(StatisticsError, match="1 of 6 rows with NaN"):
        reward.renew(broken)
    assert torch.equal(reward.pool.features, pool)
    kinds = [part.double().requires_grad_() for part in (real, pool)]
    other = mrl.SubsetReward(*(part.detach().numpy() for part in kinds))
    assert (
        other.distance == mrl.SubsetReward(*kinds).distance == mrl.SubsetReward(real, pool).distance
    )
    assert torch.equal(other(pool[:6].numpy()), mrl.SubsetReward(real, pool)(pool[:6]))
    for odd in (">f4", "g"):  # of other byte orders and widths
        given = [part.detach().numpy().astype(odd) for part in kinds]
        assert mrl.SubsetReward(*given).distance == other.distance
    with pytest.raises(StatisticsError, match="features"):
        mrl.SubsetReward(mrl.feature_stats(real), pool, name="kid-subset")
    with pytest.raises(StatisticsError, match="dimension"):
        mrl.SubsetReward(real[:, :2], pool)
    with pytest.raises(ConfigError, match="fid-full scores images by themselves.*fid-subset"):
        mrl.SubsetReward(real, pool, name="fid-full")
    with pytest.raises(UnknownNameError, match="unknown reward 'fid-subse'"):
        mrl.SubsetReward(real, pool, name="fid-subse")
    for rows in ([0, 1], [0, 1, 80], [-1, 0, 1], [0, 1, 1], [0.0, 1.0, 2.0]):
        with pytest.raises(ConfigError, match=r"expected 3 rows of the pool, each once, in 0..79"):
            reward(real[:3], rows=torch.tensor(rows))
    for labels in (torch.zeros(80), "0" * 80):
        said: Any = labels
        with pytest.raises(ConfigError, match="expected 80 labels, one a row, got (float32|str)$"):
            mrl.SubsetReward(real, pool, labels=said)
    with pytest.raises(ConfigError, match="expected 80 labels"):
        mrl.SubsetReward(real, pool, labels=torch.zeros(79, dtype=torch.int64))
