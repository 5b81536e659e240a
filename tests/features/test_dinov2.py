"""DINOv2: preparation, position table and names, on a tiny random network of the same kind."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.features.dinov2 import (
    POSITIONS,
    RENAMED,
    VIT_L14,
    load_dinov2,
    load_dinov2_dgm,
    prepare_dgm,
    prepare_edm2,
    resample_positions,
)
from tests.quick import Late

transformers = Late("transformers")
pytestmark = transformers.needed()
TINY: dict[str, Any] = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Of a tiny network with a table of 5 x 5 positions; every tensor random."""
    generator = torch.Generator().manual_seed(3)
    shapes = transformers.Dinov2Model(
        transformers.Dinov2Config(**{**VIT_L14, **TINY}, image_size=70)
    ).state_dict()
    return {
        name: 0.4 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in shapes.items()
    }


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (3, 3, 32, 40), generator=generator).to(torch.uint8)


def test_features_are_the_class_token_of_the_prepared_image(
    weights: dict[str, Tensor], images: Tensor
) -> None:
    # The same steps written out, through the library's own forward pass.
    network = transformers.Dinov2Model(
        transformers.Dinov2Config(**{**VIT_L14, **TINY}, image_size=224)
    ).eval()
    network.load_state_dict({**weights, POSITIONS: resample_positions(weights[POSITIONS], 16)})
    resized = F.interpolate(images / 255.0, (224, 224), mode="bicubic", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        out = network((resized - mean[:, None, None]) / std[:, None, None])
    extractor = load_dinov2(weights, TINY)
    assert (extractor.name, extractor.dim) == ("dinov2", 12)
    found = extractor(images)
    torch.testing.assert_close(found, out.last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_published_names_load_too(weights: dict[str, Tensor], images: Tensor) -> None:
    published = {}
    for name, tensor in weights.items():
        for early, current in RENAMED.items():
            name = name.replace(current, early)
        published[name] = tensor
    del published["embeddings.mask_token"]
    one = images[:1]
    assert torch.equal(load_dinov2(published, TINY)(one), load_dinov2(weights, TINY)(one))


def test_the_default_network_is_the_published_one() -> None:
    # 1 217 522 888 bytes are published: these parameters in float32, and 48 kB of names.
    with torch.device("meta"):
        network = transformers.Dinov2Model(transformers.Dinov2Config(**VIT_L14, image_size=518))
    count = sum(tensor.numel() for tensor in network.state_dict().values())
    assert count == 304_368_640
    assert 0 < 1_217_522_888 - 4 * count < 60_000


def _cubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -3/4, which bicubic interpolation without antialiasing uses."""
    d, a = distance.abs(), -0.75
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return near * (d <= 1) + far * ((d > 1) & (d < 2))


def test_positions_are_read_where_the_published_network_reads_them(
    generator: torch.Generator,
) -> None:
    table = torch.randn(1, 1 + 37 * 37, 3, generator=generator)
    found = resample_positions(table, 16)
    assert found.shape == (1, 257, 3)
    assert torch.equal(found[:, 0], table[:, 0])
    # Row i reads at (i + 1/2) 37 / 16.1 - 1/2, and nowhere near the edge on this side of 15.
    source = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    read = _cubic(source[:, None] - torch.arange(37))[1:15]
    grid = table[0, 1:].reshape(37, 37, 3)
    expected = torch.einsum("ip,jq,pqd->ijd", read, read, grid)
    inner = found[0, 1:].reshape(16, 16, 3)[1:15, 1:15]
    torch.testing.assert_close(inner, expected, rtol=1e-4, atol=1e-4)
    assert resample_positions(found, 16) is found
    with pytest.raises(CheckpointError, match=r"shape \(1, 7, 3\) is no class token followed by a"):
        resample_positions(table[:, :7], 16)


def test_dgm_eval_rounds_the_resized_image(weights: dict[str, Tensor], images: Tensor) -> None:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def in_bytes(given: Tensor) -> tuple[Tensor, Tensor]:
        both = (prepare(given) * std[:, None, None] for prepare in (prepare_edm2, prepare_dgm))
        smooth, rounded = ((p + mean[:, None, None]) * 255 for p in both)
        return smooth, rounded

    smooth, rounded = in_bytes(images.float())
    torch.testing.assert_close(rounded, rounded.round(), rtol=0, atol=1e-3)
    # Noise overshoots: EDM2's way keeps that, bytes cannot.
    assert smooth.min() < -10
    assert rounded.min() >= -1e-3
    assert rounded.max() <= 255.001
    # Without overshoot the two differ by roundings alone, one of them blurred by the second pass.
    smooth, rounded = in_bytes(images.float() / 8 + 100)
    assert 0.4 < (smooth - rounded).abs().max() < 1.5
    extractor = load_dinov2_dgm(weights, TINY)
    assert extractor.name == "dinov2-dgm"
    assert extractor(images[:1, :1]).shape == (1, 12)


def test_refusals(weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = {name: t for name, t in weights.items() if name != "layernorm.bias"}
    with pytest.raises(CheckpointError, match=r"extractor 'dinov2': 1 tensors do not fit, first "
                       r"'layernorm.bias': found nothing, expected \(12,\)"):  # fmt: skip
        load_dinov2(fewer, TINY)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"'dinov2-dgm' needs the library transformers, which is "
                       r"not installed; pip install 'merge_rl\[dinov2\]'"):  # fmt: skip
        load_dinov2_dgm(weights, TINY)
