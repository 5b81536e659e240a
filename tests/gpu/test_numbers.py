"""A GPU gives the official numbers too, and those of the CPU to rounding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from merge_rl.core.distances.frechet_pool import FrechetPool, Influence, ReferenceFactor
from merge_rl.core.distances.statistics import FeatureStats, feature_stats, replace_rows
from merge_rl.core.merging import buffers as sums
from merge_rl.core.merging.buffers import weighted_sum
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.features.inception import (
    Inception,
    load_inception,
    load_inception_clean,
    load_inception_tf1,
)
from merge_rl.models.edm2 import EDM2
from merge_rl.models.sit import SiT
from merge_rl.registry import build_model
from merge_rl.storage.checkpoints import load_checkpoints, plan_merge
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.workflows.assembly.defaults import load_model
from merge_rl.workflows.rollout.execution import exact_products


def relative(found: Tensor, expected: Tensor) -> float:
    found = found.to(expected)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ["cond", "cond_b", "guide", "uncond", "odd", "nohead"])
def test_edm2_equals_the_official_one(golden: Path, gpu: torch.device, name: str) -> None:
    config = json.loads((golden / "edm2/tiny/configs.json").read_text())[name]["config"]
    model = EDM2(**{**config, "use_fp16": False}).eval()
    model.load_state_dict(load_file(golden / f"edm2/tiny/{name}.weights.safetensors"))
    model.to(gpu)
    io = {k: v.to(gpu) for k, v in load_file(golden / f"edm2/tiny/{name}.io.safetensors").items()}
    with torch.no_grad(), exact_products():
        found = model(io["x"], io["sigma"], io.get("class_labels"))
    assert relative(found, io["D_x"]) < 2e-5


@pytest.mark.parametrize("name", ["a", "b"])
def test_sit_equals_the_official_one(golden: Path, gpu: torch.device, name: str) -> None:
    config = json.loads((golden / "sit/tiny/configs.json").read_text())[name]["config"]
    model = SiT(**config).eval()
    model.load_state_dict(load_file(golden / f"sit/tiny/{name}.weights.safetensors"))
    model.to(gpu)
    io = {k: v.to(gpu) for k, v in load_file(golden / f"sit/tiny/{name}.io.safetensors").items()}
    with torch.no_grad(), exact_products():
        found = model(io["x"], io["t"], io["y"])
    torch.testing.assert_close(found, io["output"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("load", [load_inception, load_inception_tf1, load_inception_clean])
def test_inception_features_are_those_of_the_cpu(golden: Path, gpu: torch.device, load) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    extractor = load(network.state_dict())
    with np.load(golden / "inception/expected.npz") as stored:
        images = torch.from_numpy(stored["images"])
    with torch.no_grad(), exact_products():
        expected = extractor(images)
        found = extractor.to(gpu)(images.to(gpu)).cpu()
    assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("sent", [2**28, 2**20])
def test_sums_have_the_bits_of_the_cpu(
    gpu: torch.device, generator: torch.Generator, sent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = pytest.importorskip("merge_rl.core.merging.fused_sum")
    monkeypatch.setattr(fused, "SENT_BYTES", sent)  # of sources elsewhere, at a time
    rows = torch.randn(5, 300_001, generator=generator)
    factors = [0.3, -1.7, 0.0, 2.5, 1e-3]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        sources = [row.to(dtype) for row in rows]
        expected = weighted_sum(sources, factors, torch.empty(300_001))
        for device in ("cpu", gpu):  # where the checkpoints lie
            moved = [s.to(device) for s in sources]
            out = torch.full((300_001,), torch.nan, device=gpu)
            assert torch.equal(weighted_sum(moved, factors, out).cpu(), expected), (dtype, device)
            # Parts of no round length and place, as groups of tensors have them.
            part = torch.full((99_991,), torch.nan, device=gpu)
            weighted_sum([s[7:99_998] for s in moved], factors, part)
            assert torch.equal(part.cpu(), expected[7:99_998]), (dtype, device)


def test_sums_are_made_in_one_pass(gpu: torch.device) -> None:
    fused = pytest.importorskip("merge_rl.core.merging.fused_sum")
    sources = [torch.ones(8, device=gpu) for _ in range(3)]
    out = torch.empty(8, device=gpu)
    assert sums._one_pass(gpu)
    assert fused.can_fuse(sources)
    assert not fused.can_fuse([*sources, torch.ones(8, device=gpu).half()])
    assert not fused.can_fuse([torch.ones(16, device=gpu)[::2]])
    # Whoever keeps something that follows from the weights looks at the version counter.
    version = out._version
    weighted_sum([source[2:6] for source in sources], [1.0, 2.0, 0.5], out[2:6])
    assert out[2:6].tolist() == [3.5] * 4
    assert out._version > version


@pytest.mark.parametrize("family", ["edm2", "sit"])
def test_live_merges_have_the_bits_of_the_cpu(demo: Path, gpu: torch.device, family: str) -> None:
    opened = open_checkpoints(demo / family, track="raw")
    plan = plan_merge(opened)
    model = load_model(demo / family / opened.entries[-1].file).to(gpu).requires_grad_(False)
    row = torch.linspace(-0.4, 0.9, len(opened))
    expected = load_checkpoints(opened, plan).weights(row)
    alone = build_model(opened.config or {}).to(gpu).requires_grad_(False)
    alone.load_state_dict(expected)
    x, labels = torch.ones(4, 1, 8, 8, device=gpu), torch.arange(4, device=gpu)
    t = torch.tensor(0.5, device=gpu)
    for device in ("cpu", "cuda", "disk"):
        live = LiveModel(model, load_checkpoints(opened, plan, device, network="cuda"))
        for other in (row.flip(0), row):
            live.set_coefficients(other)
            found = live.model(x, t, labels)
        # The network sees the last merge, whatever it has kept of the one before.
        assert torch.equal(found, alone(x, t, labels))
        state = live.model.state_dict()
        assert all(torch.equal(state[name].cpu(), expected[name]) for name in plan.merged)


def pools(device: torch.device | str) -> tuple[FrechetPool, FeatureStats, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    spread = torch.linspace(1, 0.05, 600)
    real = torch.randn(2000, 600, generator=generator) * spread
    made = torch.randn(1500, 600, generator=generator) * spread * 1.1 + 0.05
    fresh = torch.randn(6, 20, 600, generator=generator) * spread
    stats = feature_stats(made.to(device))
    pool = ReferenceFactor.from_stats(feature_stats(real.to(device))).pool(stats)
    return pool, stats, made[:20].to(device), fresh.to(device)


def test_frechet_distances_are_those_of_the_cpu(gpu: torch.device) -> None:
    pool, stats, removed, fresh = pools("cpu")
    there, stats_there, removed_there, fresh_there = pools(gpu)
    assert there.distance == pytest.approx(pool.distance, rel=1e-9)
    changed = replace_rows(stats_there, removed_there, fresh_there[0])
    expected = replace_rows(stats, removed, fresh[0])
    torch.testing.assert_close(changed.cov.cpu(), expected.cov, rtol=1e-9, atol=1e-12)
    exact = pool.distances_with(removed, fresh, by_eigenvalues=True)
    for slow in (False, True):
        found = there.distances_with(removed_there, fresh_there, by_eigenvalues=slow)
        torch.testing.assert_close(found.cpu(), exact, rtol=1e-6, atol=0)
    shares = Influence.of(pool).shares(removed, fresh)
    found = Influence.of(there).shares(removed_there, fresh_there).cpu()
    torch.testing.assert_close(found, shares, rtol=1e-6, atol=1e-9)
