"""Encoders that transformers builds: tiny ones of random weights against the library's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merge_rl.errors import CheckpointError
from merge_rl.features.encoders import ENCODERS, load_encoder, prepare
from merge_rl.workflows.assembly.extractors import DIMS, REPOSITORIES, weights_source
from tests.quick import Late

transformers = Late("transformers")
pytestmark = transformers.needed()

TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "convnextv2": {"depths": [1, 1, 1, 1], "hidden_sizes": [4, 8, 8, 16]},
    "mae": TINY,
    "siglip": TINY,
    "clip": {**TINY, "projection_dim": 6},
    "dinov3": {**TINY, "num_register_tokens": 2},
}


def published(name: str) -> nn.Module:
    """What the repository's file holds: the whole model, of which the encoder is a part."""
    torch.manual_seed(3)
    given = OPTIONS[name]
    text = {**TINY, "vocab_size": 50, "projection_size": 16}
    if name == "clip":
        text = {**text, "projection_dim": 6}
        config = transformers.CLIPConfig(vision_config=given, text_config=text, projection_dim=6)
        return transformers.CLIPModel(config)  # type: ignore[no-any-return]
    if name == "siglip":
        config = transformers.SiglipConfig(vision_config=given, text_config=text)
        return transformers.SiglipModel(config)  # type: ignore[no-any-return]
    kinds = {
        "mae": ("ViTMAEForPreTraining", "ViTMAEConfig"),
        "convnextv2": ("ConvNextV2ForImageClassification", "ConvNextV2Config"),
        "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig"),
    }
    model, config = (getattr(transformers, part) for part in kinds[name])
    return model(config(**given))  # type: ignore[no-any-return]


def expected(name: str, whole: Any, x: Tensor) -> Tensor:
    """The features, by the library's own means."""
    found: Tensor
    if name in ("clip", "siglip"):
        out = whole.get_image_features(pixel_values=x)
        found = getattr(out, "pooler_output", out)
    elif name == "mae":
        whole.config.mask_ratio = whole.vit.embeddings.config.mask_ratio = 0.0
        order = torch.rand(len(x), 16)  # any order: the class token does not depend on it
        found = whole.vit(pixel_values=x, noise=order).last_hidden_state[:, 0]
    elif name == "convnextv2":
        found = whole.convnextv2(pixel_values=x).pooler_output
    else:
        found = whole(pixel_values=x).pooler_output
    return found


@pytest.mark.numerics
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_features_are_the_librarys(name: str) -> None:
    whole = published(name).eval()
    for weight in whole.parameters():
        weight.add_(0.05 * torch.randn(weight.shape))  # what begins at 0 or 1 counts too
    extractor = load_encoder(name, whole.state_dict(), OPTIONS[name])
    images = torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8)
    size = OPTIONS[name].get("image_size", 224)
    wanted = expected(name, whole, prepare(images.float(), ENCODERS[name], size))
    found = extractor(images)
    assert found.shape == (3, extractor.dim)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    pixels = images[:1].float().requires_grad_()
    with torch.enable_grad():
        extractor(pixels).sum().backward()
    assert pixels.grad is not None
    assert bool(pixels.grad.abs().sum() > 0)


EARLY = {  # what published files call the parts of MAE's layers
    "vit.layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}  # fmt: skip


@torch.no_grad()
def test_names_of_early_files_are_known() -> None:
    now = published("mae").state_dict()
    early = {}
    for key, tensor in now.items():
        if not key.startswith("decoder."):
            for current, former in EARLY.items():
                key = key.replace(current, former)
            early[key] = tensor
    assert early.keys() != now.keys()
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    found, wanted = (load_encoder("mae", state, TINY)(images) for state in (early, now))
    assert torch.equal(found, wanted)


def test_preparation_by_hand() -> None:
    grey = torch.full((1, 1, 10, 10), 127.5)
    for name, encoder in ENCODERS.items():
        found = prepare(grey, encoder)
        assert found.shape == (1, 3, 224, 224), name
        row = [(0.5 - m) / s for m, s in zip(encoder.mean, encoder.std, strict=True)]
        torch.testing.assert_close(found[0, :, 7, 9], torch.tensor(row))
    # ConvNeXt's processor cuts the middle 224 of 256 out.
    ramp = torch.arange(256.0).expand(1, 1, 256, 256)
    middle = prepare(ramp, ENCODERS["convnextv2"])[0, 0, 0]
    assert float(middle[0] * 0.229 + 0.485) == pytest.approx(16 / 255, abs=1e-6)
    assert float(middle[-1] * 0.229 + 0.485) == pytest.approx(239 / 255, abs=1e-6)


def test_weights_that_do_not_fit_are_refused() -> None:
    weights = published("dinov3").state_dict()
    first = next(iter(weights))
    with pytest.raises(CheckpointError, match=f"extractor 'dinov3': 1 tensors .*{first!r}"):
        load_encoder("dinov3", {k: v for k, v in weights.items() if k != first}, OPTIONS["dinov3"])
    with pytest.raises(CheckpointError, match="1 tensors are missing or not its own, first 'odd'"):
        load_encoder("dinov3", {**weights, "odd": torch.zeros(1)}, OPTIONS["dinov3"])
    with pytest.raises(CheckpointError, match="not its weights"):
        load_encoder("dinov3", {**weights, first: torch.zeros(1)}, OPTIONS["dinov3"])


def test_published_sizes_and_places() -> None:
    assert ENCODERS.keys() == REPOSITORIES.keys()
    assert all(DIMS[name] == encoder.dim for name, encoder in ENCODERS.items())
    assert weights_source("clip", None) == "openai/clip-vit-large-patch14"
    assert weights_source("clip", "a.safetensors") == "a.safetensors"
