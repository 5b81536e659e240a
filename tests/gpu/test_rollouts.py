"""Sampling, decoding and features on a GPU: equal to the CPU's, on two streams, in what fits."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.errors import NonFiniteSamplesError
from merge_rl.rng import image_seeds
from merge_rl.storage.checkpoints import load_checkpoints, plan_merge
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.workflows.assembly.defaults import find_defaults, load_model
from merge_rl.workflows.assembly.extractors import build_extractor
from merge_rl.workflows.assembly.parts import network_rollout
from merge_rl.workflows.rollout import graphs
from merge_rl.workflows.rollout.execution import exact_products, matmul_precision, streams_of
from merge_rl.workflows.rollout.graphs import CapturedNetwork
from merge_rl.workflows.rollout.rollout import MergedRollout, Rollout, WorkItem

COUNT = 200
SEGMENT = 20 * 2**20  # what PyTorch takes at a time for tensors of 1 to 10 MiB


def newest(folder: Path) -> Path:
    return max(folder.glob("raw/*.safetensors"))


def rollout_of(folder: Path, device: str, batch: int = 64, **changes: object) -> Rollout:
    """The newest raw checkpoint of an embedded run, under the run's own sampler."""
    near = find_defaults(newest(folder))
    extractor, _ = build_extractor("digits", near.extractor_weights, device)
    sampler = dataclasses.replace(near.sampler or SamplerConfig(), **changes)  # type: ignore[arg-type]
    model = load_model(newest(folder)).to(device)
    return network_rollout(model, sampler, batch, device, Rollout, extractor=extractor)


def inputs(rollout: Rollout) -> tuple[Tensor, Tensor]:
    return rollout.noise(image_seeds(COUNT, 0, "test")), balanced_labels(COUNT, 10)


def samples(rollout: Rollout, noise: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad(), matmul_precision(rollout.sampler):
        return rollout.latents(noise, labels)


@pytest.mark.parametrize("solver", ["heun", "sde-euler"])
@pytest.mark.parametrize("family", ["edm2", "sit"])
def test_images_and_features_are_those_of_the_cpu(demo: Path, family: str, solver: str) -> None:
    here = rollout_of(demo / family, "cpu", solver=solver)
    there = rollout_of(demo / family, "cuda", solver=solver)
    noise, labels = inputs(here)
    expected, found = (samples(r, noise, labels).cpu() for r in (here, there))
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    images, made = here.images(noise, labels).int(), there.images(noise, labels).int()
    # Rounding to bytes turns a tiny difference into 1 where a value lies between two bytes.
    assert int((images - made).abs().max()) <= 1
    assert float((images != made).double().mean()) < 0.01
    torch.testing.assert_close(
        there.features(noise, labels), here.features(noise, labels), rtol=1e-3, atol=2e-2
    )


def test_two_streams_change_no_bit(demo: Path) -> None:
    rollout = rollout_of(demo / "edm2", "cuda", batch=16)
    noise, labels = inputs(rollout)
    found = rollout.features(noise, labels)
    with torch.no_grad(), exact_products():
        alone = [
            rollout.extractor(rollout.autoencoder.decode(rollout.latents(x, y))).cpu()
            for x, y in zip(torch.split(noise, 16), torch.split(labels, 16), strict=True)
        ]
    assert torch.equal(found, torch.cat(alone))
    for _ in range(5):
        assert torch.equal(rollout.features(noise, labels), found)


def test_merges_wait_for_their_turn(demo: Path) -> None:
    opened = open_checkpoints(demo / "sit", track="raw")
    rollout = rollout_of(demo / "sit", "cuda", batch=16)
    checkpoints = load_checkpoints(opened, plan_merge(opened), "cuda")
    live = LiveModel(rollout.model.requires_grad_(False), checkpoints)  # type: ignore[attr-defined]
    merged = MergedRollout(live, rollout)
    rows = torch.eye(len(opened))[-3:]
    seeds, labels = image_seeds(40, 1, "test"), balanced_labels(40, 10)
    items = [WorkItem(row[None], seeds, labels) for row in rows]
    together = merged.features_of(items)
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(merged.features(row[None], rollout.noise(seeds), labels), found)
    assert not torch.equal(together[0], together[1])


def test_memory_does_not_grow_with_calls(demo: Path, gpu: torch.device) -> None:
    """Streams have blocks and work space of their own: new ones each time would add up."""
    assert streams_of(gpu) is streams_of(torch.device("cuda", torch.cuda.current_device()))
    rollout = rollout_of(demo / "edm2", "cuda", batch=16)
    noise, labels = inputs(rollout)
    for _ in range(4):  # until all is recorded that ever will be
        rollout.features(noise, labels)
    reserved = torch.cuda.memory_reserved(gpu)
    for _ in range(4):
        rollout.features(noise, labels)
    assert torch.cuda.memory_reserved(gpu) == reserved


def test_what_does_not_fit_is_halved(demo: Path, gpu: torch.device) -> None:
    """Real exhaustion, of a share of the GPU's memory that this process is held to."""
    rollout = rollout_of(demo / "edm2", "cuda", batch=40_000)
    rollout.graphs_below = 0  # which have memory of their own
    rollout._take_sampler(rollout.sampler)
    noise, labels = inputs(rollout)
    noise, labels = noise.repeat(200, 1, 1, 1), labels.repeat(200)
    expected = rollout.features(noise, labels)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(gpu)
    before = torch.cuda.memory_allocated(gpu)
    samples(rollout, noise[:20_000], labels[:20_000])
    needed = torch.cuda.max_memory_allocated(gpu) - before
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(gpu)
    # Half of what a block of 20,000 takes: it cannot fit, since less than the other half is free in
    # segments that are held (20 MiB each, for the smaller tensors of two streams). A block of 5,000
    # takes a quarter, and its features as much again.
    assert held - before < needed // 2
    assert needed // 4 > 2 * SEGMENT
    share = (held + needed // 2) / torch.cuda.get_device_properties(gpu).total_memory
    told: list[str] = []
    rollout._sampling.announce = told.append
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        found = rollout.features(noise, labels)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert told  # two blocks keep two streams busy
    assert told[0] == "out of memory with 20000 images at once: 10000 from now on"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("family", ["edm2", "sit"])
def test_fast_rollouts_are_close_and_follow_the_weights(demo: Path, family: str) -> None:
    exact = rollout_of(demo / family, "cuda")
    noise, labels = inputs(exact)
    for changes in ({"precision": "tf32"}, {"precision": "bfloat16", "compile": True}):
        fast = exact.with_sampler(dataclasses.replace(exact.sampler, **changes))
        expected, found = (samples(r, noise, labels) for r in (exact, fast))
        assert 0 < float((found - expected).norm() / expected.norm()) < 0.05
        with torch.no_grad():
            for weight in exact.model.parameters():  # type: ignore[attr-defined]
                weight.mul_(0.9)
        changed, again = (samples(r, noise, labels) for r in (exact, fast))
        assert float((again - changed).norm() / changed.norm()) < 0.05
        assert family == "edm2" or float((again - found).norm() / found.norm()) > 0.05


@pytest.mark.parametrize("solver", ["heun", "sde-euler"])
def test_the_step_at_which_samples_break_is_told(demo: Path, solver: str) -> None:
    rollout = rollout_of(demo / "sit", "cuda", solver=solver)
    noise, labels = inputs(rollout)
    noise[3] = torch.inf
    with pytest.raises(NonFiniteSamplesError, match="starting noise of image 3"):
        rollout.images(noise, labels)
    assert bool(rollout.features(noise, labels)[3].isnan().all())


def merged_rollout(folder: Path, batch: int, **changes: object) -> MergedRollout:
    """The merge of an embedded run's raw checkpoints on the GPU."""
    opened = open_checkpoints(folder, track="raw")
    rollout = rollout_of(folder, "cuda", batch=batch, **changes)
    checkpoints = load_checkpoints(opened, plan_merge(opened), "cuda")
    return MergedRollout(LiveModel(rollout.model.requires_grad_(False), checkpoints), rollout)  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["edm2", "sit"])
def test_graphs_change_no_bit(demo: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    count = 8
    merged = merged_rollout(demo / family, 40)
    merged.rollout._sampling.announce = told.append
    plain = copy.copy(merged.rollout)
    plain.graphs_below = 0
    plain._take_sampler(plain.sampler)
    merged.rollout._take_sampler(merged.rollout.sampler)
    assert isinstance(merged.rollout._network, CapturedNetwork)
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 2)
    noise, labels = merged.rollout.noise(image_seeds(100, 3, "test")), balanced_labels(100, 10)
    for row in torch.eye(count)[[-1, -2, -3, -1]]:  # two sizes of a batch, weights that come again
        merged.merge(row[None])
        assert torch.equal(merged.rollout.features(noise, labels), plain.features(noise, labels))
    assert len(merged.rollout._network._recorder._recordings) == 2
    assert told == []
