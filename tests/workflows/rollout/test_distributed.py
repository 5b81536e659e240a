"""Ranks that share rollouts: the same bits as one alone, whatever their number."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.merging.buffers import FlatCheckpoints, FlatLayout
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.errors import ParallelError, StoppedError
from merge_rl.models.edm2 import EDM2
from merge_rl.parallel.group import Group
from merge_rl.workflows.rollout.derivatives import Room
from merge_rl.workflows.rollout.differentiable import DifferentiableRollout, Differentiated
from merge_rl.workflows.rollout.distributed import (
    DistributedRollout,
    read_items,
    require_agreement,
    write_items,
)
from merge_rl.workflows.rollout.rollout import MergedRollout, Rollout, WorkItem
from tests.ranks import on_ranks
from tests.workflows.rollout.test_differentiable import HEUN, LABELS, merged, weighing
from tests.workflows.rollout.test_differentiable import item as five_images
from tests.workflows.rollout.test_rollout import Bytes, Pixels

pytestmark = pytest.mark.numerics

COEFFICIENTS = [torch.tensor([[0.3, 0.7]]), torch.tensor([[1.5, -0.5]]), torch.tensor([[0.1, 0.9]])]


def make_rollout(batch: int = 4) -> MergedRollout:
    """A small EDM2 whose weights are a merge of two random ones; the same in every thread."""
    model = EDM2(
        img_resolution=8, img_channels=1, label_dim=3, use_fp16=False, model_channels=8,
        channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8, logvar_channels=8,
    ).requires_grad_(False)  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    buffers = {name for name, _ in model.named_buffers()}
    names = [name for name in model.state_dict() if name not in buffers]
    state = model.state_dict()
    layout = FlatLayout.of({name: state[name].shape for name in names})
    matrix = torch.randn(2, layout.size, generator=generator)
    fixed = {n: torch.randn(state[n].shape, generator=generator) for n in sorted(buffers)}
    live = LiveModel(model, FlatCheckpoints(layout, matrix, fixed))
    rollout = Rollout(
        model, model.sample_shape, sampler=SamplerConfig(num_steps=2), autoencoder=Bytes(),
        extractor=Pixels(), batch=batch,
    )  # fmt: skip
    return MergedRollout(live, rollout, name="reward")


def items() -> list[WorkItem]:
    seeds = list(range(100, 111))
    labels = torch.arange(11) % 3
    return [WorkItem(c, seeds, labels) for c in COEFFICIENTS]


@pytest.mark.parametrize("size", [2, 5])
def test_features_do_not_depend_on_the_number_of_ranks(size: int) -> None:
    alone = make_rollout()
    expected = alone.features_of(items())
    assert not torch.equal(expected[0], expected[1])
    other = SamplerConfig(num_steps=3)
    under_other = alone.with_sampler(other).features_of(items()[:1])

    def work(group: Group) -> Any:
        rollout = make_rollout()
        ranks = DistributedRollout(group, [rollout])
        if not group.leads:
            return ranks.follow()
        first = rollout.features_of(items(), "round 0")
        second = rollout.with_sampler(other).features_of(items()[:1], "end")
        ranks.end({"coefficients": [0.1, 1 / 3]})
        return first, second

    found = on_ranks(size, work)
    assert not isinstance(found[0], BaseException)
    first, second = found[0]
    assert all(torch.equal(a, b) for a, b in zip(first, expected, strict=True))
    assert torch.equal(second[0], under_other[0])
    assert found[1:] == [{"coefficients": [0.1, 1 / 3]}] * (size - 1)


def test_idle_ranks_are_told_once_and_images_counted() -> None:
    told: list[str] = []
    counted: list[int] = []

    def work(group: Group) -> Any:
        rollout = make_rollout()
        rollout.rollout.on_images = counted.append if group.leads else lambda _count: None
        ranks = DistributedRollout(group, [rollout], told.append)
        if not group.leads:
            return ranks.follow()
        for _ in range(2):
            rollout.features_of([WorkItem(None, [1, 2, 3], torch.zeros(3, dtype=torch.int64))])
        return ranks.end()

    assert on_ranks(3, work) == [None] * 3
    assert told == [
        "2 of 3 ranks are idle at times: the work has 1 blocks of up to 3 images; a smaller "
        "--batch makes more of them"
    ]
    assert sum(counted) == 6


def test_items_survive_the_journey() -> None:
    sent = [*items(), WorkItem(None, [(1 << 62) - 1], torch.tensor([2]))]
    document = json.loads(json.dumps(write_items(sent)))
    assert len(document["seeds"]) == 2  # what candidates share is sent once
    for found, item in zip(read_items(document), sent, strict=True):
        assert list(found.seeds) == list(item.seeds)
        assert torch.equal(found.labels, item.labels)
        if item.coefficients is None:
            assert found.coefficients is None
        else:
            assert found.coefficients is not None
            assert torch.equal(found.coefficients, item.coefficients.double())


def test_a_rank_that_fails_in_a_round_ends_all() -> None:
    def work(group: Group) -> Any:
        rollout = make_rollout()
        ranks = DistributedRollout(group, [rollout])
        if group.leads:
            return rollout.features_of(items(), "round 2")
        if group.rank == 2:
            rollout.rollout.extractor = Broken()
        return ranks.follow()

    found = on_ranks(3, work)
    assert type(found[0]) is ParallelError
    assert str(found[0]) == "rank 2: the card fell out"
    assert isinstance(found[1], StoppedError)


class Broken(Pixels):
    def __call__(self, images: Tensor) -> Tensor:
        raise RuntimeError("the card fell out")


def facts_of(group: Group, **other: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "version": "1.2", "hashes of": {"checkpoints": {"a": "00", "b": "11"}},
        "device": {"name": "cpu", "threads": 1},
    }  # fmt: skip
    return {**facts, **other} if group.rank == 1 else facts


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"version": "1.3"}, "the ranks differ in version: rank 0 has 1.2, rank 1 has 1.3"),
        (
            {"hashes of": {"checkpoints": {"a": "00", "b": "22"}}},
            "the ranks differ in hashes of checkpoints b: rank 0 has 11, rank 1 has 22",
        ),
        (
            {"device": {"name": "cpu", "threads": 4}},
            "the ranks differ in device threads: rank 0 has 1, rank 1 has 4",
        ),
    ],
)
def test_ranks_that_differ_are_refused(other: dict[str, Any], text: str) -> None:
    def work(group: Group) -> None:
        require_agreement(group, facts_of(group, **other))

    found = on_ranks(3, work)
    assert all(isinstance(error, ParallelError) for error in found)
    assert str(found[0]) == f"{text}; expected the same on all"


def test_equal_ranks_agree() -> None:
    work: Callable[[Group], None] = lambda group: require_agreement(group, facts_of(group))  # noqa: E731
    assert on_ranks(3, work) == [None] * 3


def differentiated(size: int, told: list[str], *, spoilt: bool = False) -> Any:
    """What each of `size` ranks has of the gradient of five images, two at a time."""

    rollouts = []
    for _ in range(size):
        with torch.random.fork_rng():  # networks draw what no checkpoint holds
            torch.manual_seed(0)
            rollouts.append(merged("edm2", HEUN, exact=False, spoilt=spoilt))

    def work(group: Group) -> Any:
        rollout = rollouts[group.rank]
        rollout.name = "reward"
        ranks = DistributedRollout(group, [rollout])
        if not group.leads:
            return ranks.follow()
        maker = DifferentiableRollout(rollout, room=Room(2, 0), announce=told.append)
        found = maker(five_images(), weighing)
        ranks.end("over")
        return found

    found, *others = on_ranks(size, work)
    assert isinstance(found, Differentiated), found
    assert others == ["over"] * (size - 1)
    return found


# Two of five ranks have no block of theirs; that an image is spoilt changes nothing for the others.
@pytest.mark.parametrize(("size", "spoilt"), [(2, False), (5, True)])
def test_ranks_share_the_images_of_a_gradient(size: int, spoilt: bool) -> None:
    expected, found = (differentiated(n, [], spoilt=spoilt) for n in (1, size))
    assert found.features.shape == (5, 3)
    assert found.dropped == expected.dropped
    assert len(found.dropped) == (int((LABELS == 2).sum()) if spoilt else 0)
    assert torch.equal(found.features.nan_to_num(), expected.features.nan_to_num())
    # A sum over five images and 16 positions each, in another order.
    allowed = 80 * 2**-24 * float(expected.gradient.abs().max()) * 10
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=0, atol=allowed)
    assert torch.equal(differentiated(size, [], spoilt=spoilt).gradient, found.gradient)


def test_a_rank_without_room_halves_the_images_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, told = differentiated(1, []), list[str]()
    latents = DifferentiableRollout.latents

    def limited(self: DifferentiableRollout, noise: Tensor, *rest: Any) -> Tensor:
        if len(noise) > 1 and self.merged.spread is None:
            raise torch.OutOfMemoryError("no room on a rank that follows")
        return latents(self, noise, *rest)

    monkeypatch.setattr(DifferentiableRollout, "latents", limited)
    found = differentiated(2, told)
    assert told == ["out of memory with the gradients of 2 images: 1 now"]
    # Batches of another size may round otherwise.
    torch.testing.assert_close(found.features, expected.features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-4, atol=1e-5)
