"""What every registered network goes through: build, save, load, merge, sample, search, export."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import merge_rl as mrl
from merge_rl import own_code
from merge_rl.config.sampler import SDE_SOLVERS, SOLVERS
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.registry import EXTRAS, MODELS, build_model
from merge_rl.storage.checkpoints import load_checkpoints, plan_merge
from merge_rl.storage.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointEntry,
    Manifest,
    SetDefaults,
    write_manifest,
)
from merge_rl.storage.checkpoints.model_file import save_checkpoint

# A small network of 8x8 images with one channel and ten classes, for every family.
CONFIGS: dict[str, dict[str, Any]] = {
    "edm2": {
        "model": "edm2", "img_resolution": 8, "img_channels": 1, "label_dim": 10,
        "use_fp16": False, "model_channels": 8, "channel_mult": [1], "num_blocks": 1,
        "attn_resolutions": [], "channels_per_head": 8, "logvar_channels": 8,
    },
    "sit": {
        "model": "sit", "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16,
        "depth": 2, "num_heads": 2, "num_classes": 10, "learn_sigma": False,
    },
    "dit": {
        "model": "dit", "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16,
        "depth": 2, "num_heads": 2, "num_classes": 10, "learn_sigma": True,
    },
    "repa": {
        "model": "repa", "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16,
        "depth": 2, "num_heads": 2, "num_classes": 10, "learn_sigma": False,
    },
    "jit": {
        "model": "jit", "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16,
        "depth": 2, "num_heads": 2, "num_classes": 10, "bottleneck_dim": 4, "in_context_len": 2,
        "in_context_start": 1,
    },
    "diffusers": {
        "model": "diffusers", "num_classes": 10, "scheduler": {"beta_schedule": "linear"},
        "network": {
            "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1,
            "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D"], "layers_per_block": 1,
            "norm_num_groups": 4, "num_class_embeds": 10, "add_attention": False,
        },
    },
}  # fmt: skip
OWN = "own"  # a network of the user's, as one writes it who has read the guide


class OwnNetwork(nn.Module):
    """Velocities of 8x8 images from the image, its label and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(10, 16)
        self.first = nn.Conv2d(2, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.last = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        times = t.reshape(-1, 1, 1, 1).expand(len(x), 1, 8, 8)
        hidden = self.first(torch.cat([x, times], 1)) + self.labels(labels)[:, :, None, None]
        out: Tensor = self.last(self.norm(hidden).relu())
        return out


def own_network() -> nn.Module:
    return mrl.describe(
        OwnNetwork(), prediction="velocity", time="up", path="linear", sample_shape=[1, 8, 8],
        label_dim=10,
    )  # fmt: skip


FACTORY = f"{__name__}:own_network"
CONFIGS[OWN] = {"model": FACTORY}
STEPS = 3
WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors"}  # of a model folder


def random_weights(config: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Every learned tensor random, so that each path through the network matters."""
    model = build_model(config)
    fixed = {name for name, _ in model.named_buffers()} | set(getattr(model, "fixed_names", ()))
    return {
        name: t.clone() if name in fixed else 0.3 * torch.randn(t.shape, generator=generator)
        for name, t in model.state_dict().items()
    }


def write_set(folder: Path, config: dict[str, Any], evaluation: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    base = random_weights(config, generator)
    entries = []
    for index in range(3):
        noise = random_weights(config, generator)
        same = {k: v for k, v in base.items() if torch.equal(v, noise[k])}
        weights = {k: base[k] + 0.2 * v for k, v in noise.items()} | same
        path = folder / f"run-{index}.safetensors"
        save_checkpoint(path, {name: t.half() for name, t in weights.items()})
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        entries.append(CheckpointEntry(file=path.name, nimg=1024 * (index + 1), sha256=digest))
    for file in ("extractor", "reference"):
        shutil.copy(evaluation / f"{file}.safetensors", folder / "evaluation")
    defaults = SetDefaults(
        extractor="digits", extractor_weights=Path("evaluation/extractor.safetensors"),
        reference=Path("evaluation/reference.safetensors"),
        sampler={"num_steps": STEPS, "sde_num_steps": STEPS},
    )  # fmt: skip
    manifest = Manifest(
        name="contract", licence="MIT", model=config, defaults=defaults, checkpoints=tuple(entries)
    )
    write_manifest(folder / MANIFEST_NAME, manifest)
    return folder


@pytest.fixture(params=[*sorted(MODELS), OWN])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == OWN:
        monkeypatch.setattr(own_code, "_allowed", {})
        own_code.allow(FACTORY)
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name][0])
    return name


def weights_file(family: str) -> str:
    return WEIGHTS.get(family, "model.safetensors")


@pytest.fixture(scope="module")
def set_of(shared_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> a set of three checkpoints: to read only."""

    @functools.cache
    def made(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family) / "set"
        (folder / "evaluation").mkdir(parents=True)
        return write_set(folder, CONFIGS[family], shared_tiny / "evaluation")

    return made


@pytest.fixture
def folder(family: str, set_of: Callable[[str], Path]) -> Path:
    return set_of(family)


def noise_and_labels(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(count, 1, 8, 8, generator=generator), balanced_labels(count, 10)


def test_every_family_has_a_case() -> None:
    assert set(CONFIGS) == {*MODELS, OWN}


@pytest.mark.numerics
def test_build_gives_what_the_rest_relies_on(family: str) -> None:
    model = mrl.build_model(CONFIGS[family])
    assert isinstance(model, nn.Module)
    assert not model.training
    assert model.sample_shape == (1, 8, 8)
    assert model.label_dim == 10
    assert model.prediction in ("denoised", "velocity")
    noise, labels = noise_and_labels(4)
    with torch.no_grad():
        out = model(noise, torch.full((4,), 0.5), labels)
        alone = model(noise[:1], torch.tensor(0.5), labels[:1])
    assert out.shape == noise.shape
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[:1], alone, rtol=1e-5, atol=1e-6)
    with torch.device("meta"):
        empty = mrl.build_model(CONFIGS[family])
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    assert {name: t.shape for name, t in empty.state_dict().items()} == shapes


@pytest.mark.numerics
def test_saved_weights_load_everywhere(family: str, folder: Path, tmp_path: Path) -> None:
    opened = mrl.open_checkpoints(folder)
    assert len(opened) == 3
    by_file = mrl.load_model(folder / "run-1.safetensors")
    saved = mrl.save_model(tmp_path / "saved", opened.read(1), opened.config)
    by_folder = mrl.load_model(saved)
    plain = mrl.build_model(CONFIGS[family])
    # As the official code does it: a state dict of the same names.
    plain.load_state_dict(load_file(saved / weights_file(family)))
    noise, labels = noise_and_labels(3)
    with torch.no_grad():
        outs = [m(noise, torch.tensor(0.7), labels) for m in (by_file, by_folder, plain)]
    assert float(outs[0].std()) > 0
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.numerics
def test_merges_live_saved_and_by_hand_agree(family: str, folder: Path, tmp_path: Path) -> None:
    opened = mrl.open_checkpoints(folder)
    row = [0.5, -0.25, 0.75]
    merged = mrl.merge(opened, row)
    sources = [opened.read(i) for i in range(3)]
    model = mrl.build_model(CONFIGS[family])
    plan = plan_merge(opened)
    for name, tensor in merged.items():
        if name in plan.carried:
            assert torch.equal(tensor, sources[2][name].float()), name
        else:
            by_hand = sum(c * s[name].double() for c, s in zip(row, sources, strict=True))
            torch.testing.assert_close(tensor.double(), by_hand, rtol=1e-5, atol=1e-6)
    live = LiveModel(model.requires_grad_(False), load_checkpoints(opened, plan))
    live.set_coefficients(torch.tensor(row))
    loaded = mrl.load_model(mrl.save_model(tmp_path / "out", merged, opened.config))
    noise, labels = noise_and_labels(3)
    with torch.no_grad():
        found, expected = (m(noise, torch.tensor(0.4), labels) for m in (live.model, loaded))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# How a solver steps depends on what a network predicts, which these three differ in; of the others
# one solver of an ODE and one of an SDE.
PAIRS = [
    (name, solver)
    for name in [*sorted(MODELS), OWN]
    for solver in (SOLVERS if name in ("dit", "edm2", "sit") else ("heun", "sde-euler"))
]


@pytest.mark.parametrize(("family", "solver"), PAIRS, indirect=["family"])
def test_every_solver_samples(family: str, solver: str, folder: Path) -> None:
    if solver == "dopri5":
        pytest.importorskip("torchdiffeq")
    # Random networks are stiff: how exact a solution is, is tried elsewhere.
    options: dict[str, Any] = {"num_steps": STEPS, "rtol": 0.1, "atol": 0.1}
    model = mrl.load_model(folder / "run-0.safetensors")
    noise, labels = noise_and_labels(4)
    samples = mrl.sample(model, noise, labels, solver=solver, **options)
    assert samples.shape == noise.shape
    assert bool(samples.isfinite().all())
    assert torch.equal(samples, mrl.sample(model, noise, labels, solver=solver, **options))
    other = mrl.sample(model, noise, labels.flip(0), solver=solver, **options)
    assert not torch.allclose(samples, other, atol=1e-4)
    if solver != "dopri5":  # whose steps depend on the whole batch
        part = mrl.sample(model, noise[2:], labels[2:], solver=solver, **options)
        large = float(samples.abs().max().clamp(min=1))  # a random DiT's samples are hundreds
        torch.testing.assert_close(samples[2:], part, rtol=1e-4, atol=1e-5 * large)
    if solver in SDE_SOLVERS:
        ode = mrl.sample(model, noise, labels, solver="heun", num_steps=STEPS)
        assert not torch.allclose(samples, ode, atol=1e-3)


def test_two_rounds_of_search_and_the_export(
    family: str, folder: Path, tiny_config: Callable[..., Any], mergerl: Callable[..., Any]
) -> None:
    config = tiny_config(folder, track=None, budget=40 + 2 * 50, evaluation={"num_images": 10})
    result = mrl.optimize(folder, out="run", config=config)
    assert result.images == 140
    assert result.coefficients.shape == (1, 3)
    assert float(result.coefficients.sum()) == pytest.approx(1)
    merged = Path("run/merged")
    by_coefficients = mrl.merge(mrl.open_checkpoints(folder), result.coefficients)
    exported = load_file(merged / weights_file(family))
    assert list(exported) == list(by_coefficients)
    assert all(torch.equal(exported[name], t) for name, t in by_coefficients.items())
    for command in (
        ("inspect", folder), ("inspect", merged), ("inspect", "run"),
        ("sample", merged, "--num-images", 4, "--out", "grid.png"),
        ("evaluate", merged, "--num-images", 4, "--repeats", 2),
        ("merge", folder, "again", "--recipe", merged / "merge.yaml"),
    ):  # fmt: skip
        ended = mergerl(*command)
        assert ended.code == 0, (command, ended.err)
    again = (Path("again") / weights_file(family)).read_bytes()
    assert again == (merged / weights_file(family)).read_bytes()
