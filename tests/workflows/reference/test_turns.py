"""Images that several ranks read in turns: the batches, features and refusals of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_rl.errors import ParallelError
from merge_rl.parallel.group import Group
from merge_rl.storage.files.image_source import ImageSource, open_images
from merge_rl.workflows.reference.moments import CollectPlan, collect, help_collect, kept_features
from tests.ranks import on_ranks
from tests.workflows.rollout.test_rollout import Pixels


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    """23 images of 4 x 4, the files of the sixth and of the last of which are broken."""
    from PIL import Image

    generator = np.random.default_rng(1)
    for i in range(23):
        file = tmp_path / "images" / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (4, 4), dtype=np.uint8)).save(file)
        if i in (5, 22):
            file.write_bytes(b"not an image")
    return open_images(tmp_path / "images")


def plan_of(source: ImageSource, batch: int) -> CollectPlan:
    count = len(source)
    parts = torch.arange(count) % 2
    return CollectPlan(torch.arange(count), parts, torch.ones(count, dtype=torch.bool), 2, batch)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_moments_do_not_depend_on_the_number_of_ranks(source: ImageSource, size: int) -> None:
    plan, counted = plan_of(source, 4), list[int]()
    options: dict[str, Any] = {"device": "cpu", "skip_broken": True}

    def read(group: Group, log: list[int]) -> Any:
        if group.leads:
            return collect(
                source, plan, Pixels(), None, on_images=log.append, group=group, **options
            )
        return help_collect(source, plan, Pixels(), group, **options)

    alone = on_ranks(1, lambda group: read(group, []))[0]
    found = on_ranks(size, lambda group: read(group, counted))
    together = found[0]
    assert found[1:] == [None] * (size - 1)
    assert not isinstance(alone, BaseException)
    assert not isinstance(together, BaseException)
    assert together.done == alone.done == 23
    assert together.broken == alone.broken
    assert len(alone.broken) == 2
    assert str(together.kind) == str(alone.kind) == "4x4 grey"
    for mine, theirs in zip(together.stats, alone.stats, strict=True):
        assert mine.count == theirs.count
        assert torch.equal(mine.mean, theirs.mean)
        assert torch.equal(mine.cov, theirs.cov)
    features: list[Tensor] = []
    for state in (together, alone):
        kept = kept_features(None, state)
        assert kept is not None
        features.append(kept[1])
    assert torch.equal(*features)
    assert sum(counted) == 23


def test_a_broken_image_is_refused_on_all(source: ImageSource) -> None:
    plan = plan_of(source, 3)
    options: dict[str, Any] = {"device": "cpu", "skip_broken": False}

    def read(group: Group) -> Any:
        if group.leads:
            return collect(
                source, plan, Pixels(), None, on_images=lambda _: None, group=group, **options
            )
        return help_collect(source, plan, Pixels(), group, **options)

    found = on_ranks(2, read)
    # Row 5 is in batch 1, which is rank 1's.
    assert type(found[0]) is ParallelError
    assert "rank 1: " in str(found[0])
    assert "05.png" in str(found[0])
