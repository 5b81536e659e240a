"""From latents to images: the official constants and roundings, and a tiny VAE of the real kind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from merge_rl.core.sampling.sampler import signed_levels, unit_levels
from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.models.autoencoder import (
    RENAMED,
    SD_VAE,
    LatentDecoder,
    PixelEncoder,
    load_edm2_vae,
    load_sit_vae,
    stability_vae,
)
from merge_rl.registry import AUTOENCODERS, build_autoencoder

TINY: dict[str, Any] = {
    **SD_VAE,
    "block_out_channels": [4, 4, 4, 4],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "_class_name": "AutoencoderKL",  # as a published config.json has it
}


@pytest.fixture(scope="module")
def numbers(golden: Path) -> dict[str, Tensor]:
    with np.load(golden / "edm2/encoders.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Of a tiny VAE with its encoder; every tensor random."""
    diffusers = pytest.importorskip("diffusers")

    generator = torch.Generator().manual_seed(5)
    options = {key: value for key, value in TINY.items() if not key.startswith("_")}
    shapes = diffusers.AutoencoderKL(**options).state_dict()
    return {name: 0.5 * torch.randn(t.shape, generator=generator) for name, t in shapes.items()}


class _Recorded:
    """Stands in for a VAE: keeps what it is given, returns what it was made with."""

    def __init__(self, output: Tensor) -> None:
        self.output, self.given = output, list[Tensor]()

    def decode(self, latents: Tensor, /) -> Tensor:
        start = sum(len(part) for part in self.given)
        self.given.append(latents)
        return self.output[start : start + len(latents)]


def _with_stand_in(decoder: LatentDecoder, vae: _Recorded) -> LatentDecoder:
    """The same convention in front of another VAE."""
    return LatentDecoder(
        vae,
        scale=decoder.scale.flatten().tolist(),
        bias=decoder.bias.flatten().tolist(),
        to_levels=decoder.to_levels,
        chunk=1,
    )


# ------------------------------------------------------------------------------------- pixels


def test_pixels_are_rounded_as_the_official_encoder_rounds(numbers: dict[str, Tensor]) -> None:
    encoder = PixelEncoder()
    assert torch.equal(encoder.decode(numbers["rgb_float"]), numbers["rgb_decoded_uint8"])
    every_byte = torch.arange(256, dtype=torch.uint8)
    encoded = encoder.encode(every_byte)
    assert torch.equal(encoded, numbers["rgb_encoded_of_0_255"])
    assert torch.equal(encoder.decode(encoded), every_byte)


@pytest.mark.parametrize(
    ("to_levels", "values", "expected"),
    [
        # 127.5 x + 128, down: -1 -> 0.5, 0 -> 128, 1 -> 255.5; beyond that clipped.
        (signed_levels, [-9.0, -1.0, 0.0, 0.007, 1.0, 9.0], [0, 0, 128, 128, 255, 255]),
        # 255 x, down: 1/2 -> 127.5.
        (unit_levels, [-9.0, 0.0, 0.5, 0.999, 1.0, 9.0], [0, 0, 127, 254, 255, 255]),
    ],
)
def test_bytes_by_hand(
    to_levels: Callable[[Tensor], Tensor], values: list[float], expected: list[int]
) -> None:
    assert to_levels(torch.tensor(values)).tolist() == expected
    odd = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert to_levels(odd).tolist() == [0, 255, 0]


# ------------------------------------------------------------------------------------ latents


def test_edm2_constants_and_affine_map(
    golden: Path, numbers: dict[str, Tensor], weights: dict[str, Tensor]
) -> None:
    facts = json.loads((golden / "edm2/facts.json").read_text())["vae_encoder"]
    decoder = load_edm2_vae(weights, TINY)
    assert decoder.scale.flatten().tolist() == facts["scale_float32"]
    assert decoder.bias.flatten().tolist() == facts["bias_float32"]
    assert {"scale", "bias"} <= set(decoder.state_dict())  # a digest tells conventions apart
    raw = decoder.raw(numbers["latents"])
    given = numbers["raw_latents_given_to_vae_decoder"]
    torch.testing.assert_close(raw, given, rtol=0, atol=1e-5)
    mean, std = numbers["raw_latents_8ch"].chunk(2, dim=1)
    latents = (mean + std * numbers["randn"]) * decoder.scale + decoder.bias
    torch.testing.assert_close(latents, numbers["final_latents"], rtol=0, atol=1e-5)


def test_edm2_decoding_is_the_official_one(
    numbers: dict[str, Tensor], weights: dict[str, Tensor]
) -> None:
    vae = _Recorded(numbers["vae_decoder_output"])
    decoder = _with_stand_in(load_edm2_vae(weights, TINY), vae)
    assert torch.equal(decoder.decode(numbers["latents"]), numbers["decoded_uint8"])
    given = torch.cat(vae.given)
    expected = numbers["raw_latents_given_to_vae_decoder"]
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)
    assert [len(part) for part in vae.given] == [1, 1]


def test_sit_divides_by_its_constant_and_works_in_minus_one_to_one(
    weights: dict[str, Tensor], generator: torch.Generator
) -> None:
    latents = torch.randn(2, 4, 3, 5, generator=generator)
    vae = _Recorded(torch.tensor([-1.0, 0.25]).view(2, 1, 1, 1).expand(2, 3, 2, 2))
    decoder = _with_stand_in(load_sit_vae(weights, TINY), vae)
    images = decoder.decode(latents)
    # 127.5 / 4 + 128 = 159.875, down.
    assert images[:, 0, 0, 0].tolist() == [0, 159]
    assert all(bool((image == image[0, 0, 0]).all()) for image in images)
    torch.testing.assert_close(torch.cat(vae.given), latents / 0.18215)


@pytest.mark.parametrize(
    ("name", "finish"), [("sd-vae-edm2", unit_levels), ("sd-vae-sit", signed_levels)]
)
def test_decoding_is_diffusers_own(
    name: str,
    finish: Callable[[Tensor], Tensor],
    weights: dict[str, Tensor],
    generator: torch.Generator,
) -> None:
    diffusers = pytest.importorskip("diffusers")

    whole = diffusers.AutoencoderKL(
        **{k: v for k, v in TINY.items() if not k.startswith("_")}
    ).eval()
    whole.load_state_dict(weights)
    decoder = build_autoencoder(name, weights, TINY, chunk=2)
    assert isinstance(decoder, LatentDecoder)
    latents = torch.randn(5, 4, 4, 3, generator=generator)
    with torch.no_grad():
        images = torch.cat([whole.decode(z).sample for z in torch.split(decoder.raw(latents), 2)])
    found = decoder.decode(latents)
    assert found.shape == (5, 3, 32, 24)
    assert torch.equal(found, finish(images))
    assert found.float().std() > 20


def test_bfloat16_decodes_the_same_picture(
    weights: dict[str, Tensor], generator: torch.Generator
) -> None:
    exact = load_sit_vae(weights, TINY)
    rough = load_sit_vae(weights, TINY, dtype="bfloat16")
    assert {p.dtype for p in rough.parameters()} == {torch.bfloat16}
    assert rough.scale.dtype == torch.float32
    latents = 0.1 * torch.randn(2, 4, 4, 4, generator=generator)
    away = (exact.decode(latents).float() - rough.decode(latents).float()).abs()
    assert 0 < away.mean() < 3


def test_the_default_architecture_is_the_published_one() -> None:
    # 334 643 276 bytes are published: 83 653 863 parameters in float32 and a header.
    diffusers = pytest.importorskip("diffusers")

    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**SD_VAE)
    assert len(vae.state_dict()) == 248
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


def test_published_names_load_too(weights: dict[str, Tensor], generator: torch.Generator) -> None:
    published = {}
    for name, tensor in weights.items():
        for early, current in RENAMED.items():
            name = name.replace(current, early)
        published[name] = tensor
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in published
    latents = torch.randn(1, 4, 4, 4, generator=generator)
    one, other = (load_sit_vae(given, TINY).decode(latents) for given in (weights, published))
    assert torch.equal(one, other)
    # The encoder's weights need not be there, and are not kept.
    decoding = {k: v for k, v in weights.items() if k.startswith(("decoder.", "post_quant"))}
    vae: nn.Module = stability_vae(decoding, TINY)
    assert set(vae.state_dict()) == set(decoding)


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", sorted(AUTOENCODERS.keys() - {"samples"}))
def test_every_registered_autoencoder_makes_bytes(name: str, weights: dict[str, Tensor]) -> None:
    pixels = name == "pixel"
    built = build_autoencoder(name) if pixels else build_autoencoder(name, weights, TINY)
    images = built.decode(torch.zeros(2, 3 if pixels else 4, 4, 4))
    assert images.dtype == torch.uint8
    assert images.shape == ((2, 3, 4, 4) if pixels else (2, 3, 32, 32))


def test_samples_are_left_as_they_are() -> None:
    points = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(build_autoencoder("samples").decode(points), points)


def test_weights_only_where_there_are_any(weights: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError, match="autoencoder 'pixel' has no weights, got some"):
        build_autoencoder("pixel", weights)
    with pytest.raises(ConfigError, match="autoencoder 'sd-vae-sit' needs weights, got none"):
        build_autoencoder("sd-vae-sit")


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (4, 4, 4)])
def test_other_latents_are_refused(shape: tuple[int, ...], weights: dict[str, Tensor]) -> None:
    decoder = load_sit_vae(weights, TINY)
    with pytest.raises(ConfigError, match=r"expected latents \(B, 4, h, w\), got \("):
        decoder.decode(torch.zeros(shape))


def test_other_weights_configs_and_dtypes_are_refused(weights: dict[str, Tensor]) -> None:
    fewer = {k: v for k, v in weights.items() if k != "decoder.conv_out.bias"}
    message = (
        r"not weights of Stability's VAE: 1 tensors do not fit, first 'decoder.conv_out.bias': "
        r"found nothing, expected \(3,\)"
    )
    with pytest.raises(CheckpointError, match=message):
        load_sit_vae(fewer, TINY)
    with pytest.raises(CheckpointError, match=r"first 'decoder.conv_in.bias': found \(4,\), exp"):
        load_edm2_vae(weights)  # of another architecture than the default
    with pytest.raises(ConfigError, match="the VAE does not take this config: .*'depth'"):
        load_sit_vae(weights, {**TINY, "depth": 3})
    with pytest.raises(ConfigError, match="dtype of float32, bfloat16, got 'float16'"):
        load_sit_vae(weights, TINY, dtype="float16")


def test_without_diffusers_the_extra_is_named(
    weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"needs the library diffusers, which is not installed; "
                       r"pip install 'merge_rl\[latent\]'"):  # fmt: skip
        load_edm2_vae(weights, TINY)
