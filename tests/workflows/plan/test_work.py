"""What a search will make and how long it takes, by hand."""

from __future__ import annotations

import pytest

from merge_rl.workflows.optimize import SDE, Workload, WorkStage
from merge_rl.workflows.plan.work import (
    Speeds,
    estimate,
    filling_batch,
    stage_time,
)

SPEEDS = Speeds(
    block=0.5, image=0.1, sde=4.0, merge=0.25, request=0.125, byte=0.001, reward=2.0, score=1.5,
    start=3.0,
)  # fmt: skip


def test_a_stage_ends_with_the_busiest_device() -> None:
    # 3 items of 20 images at most 10 at once: 6 blocks. On 4 devices the middles of the blocks,
    # 1/12, 3/12, ..., 11/12, fall to devices 0, 1, 1, 2, 3, 3: two blocks at most, of one item or
    # of two. 2 (0.5 + 1) s and at most two merges: blocks 1 and 2 are of items 0 and 1.
    stage = WorkStage("candidates", 5, 3, 20)
    found = stage_time(stage, 4, 10, SPEEDS, 2)
    assert found.making == pytest.approx(5 * 3.0)
    assert found.merging == pytest.approx(5 * 2 * 0.25)
    assert found.gathering == pytest.approx(5 * (0.125 + 50 * 2 * 0.001))
    alone = stage_time(stage, 1, 10, SPEEDS, 2)
    assert alone.total == pytest.approx(5 * (6 * 1.5 + 3 * 0.25))
    slow = stage_time(WorkStage("x", 1, 1, 10, SDE), 1, 10, SPEEDS, 2)
    assert slow.making == pytest.approx(4 * 1.5)


def test_efficiency_and_what_limits_it() -> None:
    even = Workload((WorkStage("candidates", 10, 8, 10),), 10, 0)
    quick = Speeds(
        block=0.0, image=1.0, sde=1.0, merge=0.0, request=0.0, byte=0.0, reward=0.0, score=0.0,
        start=0.0,
    )  # fmt: skip
    found = estimate(even, (1, 8, 16), 10, quick, 4)
    assert [e.seconds for e in found] == pytest.approx([800.0, 100.0, 100.0])
    assert [e.efficiency for e in found] == pytest.approx([1.0, 1.0, 0.5])
    assert found[2].limit == "blocks that do not fill the devices"
    serial = Speeds(**{**vars(quick), "reward": 5.0})
    (with_rewards,) = estimate(even, (8,), 10, serial, 4)
    assert with_rewards.seconds == pytest.approx(150.0)
    assert with_rewards.efficiency == pytest.approx(850 / (8 * 150))
    assert with_rewards.limit == "rewards, scores and files on rank 0"


def test_the_batch_that_fills_the_devices() -> None:
    # 16 items of 512 images: 64 blocks of 128, so that 64 devices have one each.
    assert filling_batch(16, 512, 64, 250) == 128
    assert filling_batch(16, 512, 16, 512) == 256  # two blocks an item at least
    assert filling_batch(1, 10, 64, 250) is None
