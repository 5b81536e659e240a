"""Which autoencoder a network gets, from options, run, manifest or its channels."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from merge_rl.config.optimize import OptimizeConfig
from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.distances.statistics import feature_stats
from merge_rl.errors import CheckpointError, ConfigError, RunError, UnknownNameError
from merge_rl.models.autoencoder import SD_VAE, LatentDecoder, PixelEncoder
from merge_rl.registry import AUTOENCODERS, build_model
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.storage.checkpoints.manifest import (
    CheckpointEntry,
    Manifest,
    SetDefaults,
    write_manifest,
)
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.storage.files.documents import sha256_file
from merge_rl.storage.files.safetensors_file import read_file
from merge_rl.workflows.assembly.defaults import find_defaults
from merge_rl.workflows.assembly.job import build_job
from merge_rl.workflows.assembly.networks import DEFAULT_WEIGHTS, load_autoencoder
from merge_rl.workflows.assembly.parts import network_rollout
from merge_rl.workflows.assembly.published import PUBLIC_FILES
from merge_rl.workflows.assembly.resolve import resolve_config
from merge_rl.workflows.evaluate.run import evaluate
from merge_rl.workflows.optimize.run import optimize, resume
from merge_rl.workflows.reference.file import save_reference
from merge_rl.workflows.rollout.rollout import Rollout

TinyConfig = Callable[..., OptimizeConfig]
LATENT: dict[str, Any] = {
    "model": "edm2", "img_resolution": 4, "img_channels": 4, "label_dim": 0, "model_channels": 8,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random VAE, as diffusers writes one."""
    diffusers = pytest.importorskip("diffusers")

    config = {
        **SD_VAE, "block_out_channels": [4, 4, 4, 4], "layers_per_block": 1, "norm_num_groups": 2,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(6)
    weights = {
        name: 0.5 * torch.randn(t.shape, generator=generator)
        for name, t in diffusers.AutoencoderKL(**config).state_dict().items()
    }
    folder = tmp_path_factory.mktemp("vae")
    save_tensors(folder / "diffusion_pytorch_model.safetensors", weights, {})
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    return folder


class _Means:
    """Mean and spread of every channel."""

    name, dim = "means", 6

    def __call__(self, images: Tensor) -> Tensor:
        values = images.float().flatten(2)
        return torch.cat([values.mean(2), values.std(2)], 1)


def test_a_folder_and_its_file(vae: Path) -> None:
    file = vae / "diffusion_pytorch_model.safetensors"
    for weights in (vae, file):
        built, digest = load_autoencoder("sd-vae-edm2", str(weights), shape=(4, 4, 4))
        assert isinstance(built, LatentDecoder)
        assert digest == sha256_file(file)
        assert built.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 32, 32)
    halved, _ = load_autoencoder("sd-vae-sit", str(vae), shape=(4, 2, 2), dtype="bfloat16")
    assert isinstance(halved, LatentDecoder)
    assert halved.dtype == torch.bfloat16


@pytest.mark.parametrize("channels", [1, 3])
def test_images_need_none(channels: int) -> None:
    built, digest = load_autoencoder(None, shape=(channels, 8, 8))
    assert isinstance(built, PixelEncoder)
    assert digest is None


def test_the_defaults_are_public_files() -> None:
    assert set(DEFAULT_WEIGHTS) == set(AUTOENCODERS) - {"pixel", "samples"}
    assert set(DEFAULT_WEIGHTS.values()) <= set(PUBLIC_FILES)


def test_refusals(vae: Path, shared_tiny: Path) -> None:
    message = (
        r"samples have 4 channels, so they are latents, not images; say what decodes them with "
        r"--autoencoder \(samples, sd-vae-edm2, sd-vae-sit\)"
    )
    with pytest.raises(ConfigError, match=message):
        load_autoencoder(None, shape=(4, 8, 8))
    with pytest.raises(ConfigError, match="'sd-vae-sit' takes samples of 4 channels, but .* 3"):
        load_autoencoder("sd-vae-sit", str(vae), shape=(3, 8, 8))
    with pytest.raises(ConfigError, match="'pixel' takes samples of 1 or 3 channels, but .* 4"):
        load_autoencoder("pixel", shape=(4, 8, 8))
    with pytest.raises(ConfigError, match="'pixel' has no weights"):
        load_autoencoder("pixel", str(vae), shape=(3, 8, 8))
    with pytest.raises(UnknownNameError, match="unknown autoencoder 'vae'"):
        load_autoencoder("vae", shape=(4, 8, 8))
    other = shared_tiny / "evaluation/extractor.safetensors"
    with pytest.raises(CheckpointError, match="extractor.safetensors: not weights of Stability's"):
        load_autoencoder("sd-vae-sit", str(other), shape=(4, 8, 8))


def test_a_latent_network_is_scored_through_its_decoder(vae: Path) -> None:
    torch.manual_seed(0)
    network = build_model(LATENT)
    real = torch.randint(0, 256, (50, 3, 8, 8)).to(torch.uint8)
    given: dict[str, Any] = {
        "reference": feature_stats(_Means()(real)), "extractor": _Means(), "num_images": 6,
        "repeats": 2, "sampler": SamplerConfig(num_steps=2),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="so they are latents, not images"):
        evaluate(network, **given)
    decoder, _ = load_autoencoder("sd-vae-edm2", str(vae), shape=network.sample_shape)
    found = evaluate(network, autoencoder=decoder, **given)
    assert found["fid"]["reference"]["mean"] > 0
    sampler = SamplerConfig(num_steps=2)
    rollout = network_rollout(network, sampler, 4, "cpu", Rollout, autoencoder=decoder)
    images = rollout.images(rollout.noise(range(6)), torch.zeros(6, dtype=torch.int64))
    assert images.shape == (6, 3, 32, 32)
    assert images.dtype == torch.uint8


def test_the_set_says_what_decodes_it(
    tiny: Path, vae: Path, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    manifest = tiny / "checkpoints_manifest.yaml"
    document = yaml.safe_load(manifest.read_text())
    (tiny / "vae").symlink_to(vae)
    document["defaults"] |= {"autoencoder": "sd-vae-sit", "autoencoder_weights": "vae"}
    manifest.write_text(yaml.safe_dump(document))
    opened = open_checkpoints(tiny)
    folder = str(tiny / "vae")
    resolved = resolve_config(tiny_config(tiny), opened)
    assert (resolved.autoencoder, resolved.autoencoder_weights) == ("sd-vae-sit", folder)
    near = find_defaults(tiny / "raw")
    assert (near.autoencoder, near.autoencoder_weights) == ("sd-vae-sit", folder)
    # Another autoencoder does not take the weights of the set's own; public names stay names.
    changed = resolve_config(tiny_config(tiny, autoencoder="pixel"), opened)
    assert (changed.autoencoder, changed.autoencoder_weights) == ("pixel", None)
    public = "stabilityai/sd-vae-ft-mse"
    named = resolve_config(tiny_config(tiny, autoencoder_weights=public), opened)
    assert named.autoencoder_weights == public
    with pytest.raises(ConfigError, match="takes samples of 4 channels, but the network makes 1"):
        build_job(tiny_config(tiny, autoencoder="sd-vae-sit", autoencoder_weights=str(vae)), opened)


def test_dtypes_are_checked_with_the_config(tiny_config: TinyConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown autoencoder_dtype .float16."):
        tiny_config(tmp_path, autoencoder_dtype="float16")


MODULE = """
import torch

class Means:
    name, dim = "means", 6

    def __call__(self, images):
        values = images.float().flatten(2)
        return torch.cat([values.mean(2), values.std(2)], 1)
"""


@pytest.fixture
def latent_set(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set of three checkpoints on latents with its VAE, statistics of "means", and a module
    `latent_features` in the current folder that makes such features."""
    generator = torch.Generator().manual_seed(7)
    folder = tmp_path / "set"
    entries = []
    base = build_model(LATENT).state_dict()
    for index in range(3):
        moved = {
            name: tensor if "fourier" in name else torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.items()
        }
        save_tensors(folder / f"{index}.safetensors", moved, {})
        entries.append(CheckpointEntry(file=f"{index}.safetensors", nimg=1024 * (index + 1)))
    shutil.copytree(vae, folder / "vae")
    real = torch.randint(0, 256, (60, 3, 8, 8), generator=generator).to(torch.uint8)
    save_reference(folder / "real/r.safetensors", feature_stats(_Means()(real)), extractor="means")
    defaults = SetDefaults(
        autoencoder="sd-vae-edm2", autoencoder_weights=Path("vae"),
        reference=Path("real/r.safetensors"), sampler={"num_steps": 2},
    )  # fmt: skip
    manifest = Manifest(model=LATENT, checkpoints=tuple(entries), defaults=defaults)
    write_manifest(folder / "checkpoints_manifest.yaml", manifest)
    (tmp_path / "latent_features.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "latent_features", raising=False)
    return folder


def test_a_search_on_latents_with_an_extractor_of_the_users(
    latent_set: Path, tiny_config: TinyConfig, tmp_path: Path, mergerl: Callable[..., Any]
) -> None:
    extractor = "latent_features:Means"
    config = tiny_config(latent_set, track=None, extractor=extractor)
    result = optimize(latent_set, out=tmp_path / "run", config=config)
    assert result.coefficients.shape == (1, 3)
    hashes = json.loads((tmp_path / "run/inputs.json").read_text())["hashes"]
    file = latent_set / "vae/diffusion_pytorch_model.safetensors"
    assert hashes["autoencoder_weights"] == sha256_file(file)
    assert resume(tmp_path / "run").final == result.final
    # The run says what decodes its samples; its word alone imports no module.
    merged = tmp_path / "run/merged"
    drawn = mergerl("sample", merged, "--num-images", 4, "--out", "a.png")
    assert (drawn.code, drawn.err) == (0, "sample (4 images)\n")
    refused = mergerl("evaluate", merged, "--num-images", 4, "--repeats", 2)
    assert refused.code == 1
    assert f"--extractor {extractor}" in " ".join(refused.err.split())
    given = ("--extractor", extractor, "--num-images", 4, "--repeats", 2)
    scored = mergerl("evaluate", merged, *given, "--json")
    assert json.loads(scored.out)["fid"]["reference"]["mean"] > 0
    again = mergerl("evaluate", merged, *given, "--autoencoder", "pixel")
    assert "'pixel' takes samples of 1 or 3 channels, but" in " ".join(again.err.split())
    # Another VAE is another input: such a run does not go on.
    save_tensors(
        file, {**read_file(file, hashed=False)[1], "decoder.conv_out.bias": torch.ones(3)}, {}
    )
    with pytest.raises(RunError, match=r"inputs have changed since it began: autoencoder_weights"):
        resume(tmp_path / "run")
