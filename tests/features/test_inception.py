"""The Inception-v3 of FID against pytorch-fid, torch-fidelity and clean-fid.

Their numbers come from stand-in weights, which a rule fixes to the last bit.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from merge_rl.errors import CheckpointError, StatisticsError
from merge_rl.features.inception import (
    Inception,
    load_inception,
    load_inception_clean,
    load_inception_tf1,
)
from merge_rl.features.preparation import ImageFeatures

Load = Callable[..., ImageFeatures]


def _stand_in(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The rule's tensor of that name: a random stream of its own, scaled by what it is."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        values = 0.6 + 0.8 * random.random_sample(shape)
    elif name.endswith("bn.weight"):
        values = 0.8 + 0.6 * random.random_sample(shape)
    else:
        scales = {"running_mean": 0.10, "bn.bias": 0.15, "fc.bias": 0.10}
        kernel = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 1.0
        found = [scale for ending, scale in scales.items() if name.endswith(ending)]
        values = (found[0] if found else kernel) * random.standard_normal(shape)
    return np.asarray(values, dtype=np.float32)


@pytest.fixture(scope="module")
def layout(golden: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the public state dict, in its order."""
    rows = json.loads((golden / "inception/state_dict.json").read_text())["pytorch_fid"]
    return {name: tuple(shape) for name, shape, _dtype, _is_buffer in rows}


@pytest.fixture(scope="module")
def weights(layout: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {
        name: torch.tensor(0)
        if name.endswith("num_batches_tracked")
        else torch.from_numpy(_stand_in(name, shape))
        for name, shape in layout.items()
    }


@pytest.fixture(scope="module")
def expected(golden: Path) -> dict[str, Tensor]:
    with np.load(golden / "inception/expected.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def test_the_stand_in_weights_are_the_rules(golden: Path, weights: dict[str, Tensor]) -> None:
    recorded = json.loads((golden / "inception/weights_checksums.json").read_text())
    assert list(recorded) == list(weights)
    for name, numbers in recorded.items():
        flat = weights[name].double().flatten()
        found = [flat.sum().item(), flat.abs().sum().item(), flat[0].item(), flat[-1].item()]
        # Sums may cancel: they are known to rounding of their largest partial sum.
        assert found == pytest.approx(numbers, rel=1e-12, abs=1e-9), name


def test_names_and_shapes_are_the_public_files(layout: dict[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        network = Inception()
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert list(own.items()) == list(layout.items())
    assert sum(p.numel() for p in network.state_dict().values()) == 23_885_392 + 94


@pytest.mark.parametrize(
    ("load", "name", "images", "features"),
    [
        (load_inception, "inception", "images", "pytorch_fid_2048"),
        (load_inception_tf1, "inception-tf1", "images", "torch_fidelity_2048"),
        (load_inception_clean, "inception-clean", "images", "clean_fid_resize_2048"),
        (load_inception, "inception", "big_image", "big_pytorch_fid_2048"),
        (load_inception_tf1, "inception-tf1", "big_image", "big_torch_fidelity_2048"),
    ],
)
def test_features_are_the_public_implementations(
    load: Load,
    name: str,
    images: str,
    features: str,
    weights: dict[str, Tensor],
    expected: dict[str, Tensor],
) -> None:
    before = torch.get_rng_state()
    extractor = load(weights)
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn that is loaded then
    assert (extractor.name, extractor.dim) == (name, 2048)
    found = extractor(expected[images][:2])
    torch.testing.assert_close(found, expected[features][:2], rtol=1e-4, atol=1e-3)


def test_the_classifier_is_the_public_one(
    weights: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    network = load_inception_tf1(weights).network
    assert isinstance(network, Inception)
    logits = network.fc(expected["torch_fidelity_2048"])
    torch.testing.assert_close(logits, expected["torch_fidelity_logits"], rtol=1e-4, atol=1e-3)
    unbiased = logits - network.fc.bias
    biasless = expected["torch_fidelity_logits_unbiased"]
    torch.testing.assert_close(unbiased, biasless, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tap", ["64", "192", "768"])
def test_earlier_taps(tap: str, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for load, source in ((load_inception, "pytorch_fid"), (load_inception_tf1, "torch_fidelity")):
        extractor = load(weights, tap=tap)
        assert extractor.name == {
            "pytorch_fid": f"inception-{tap}", "torch_fidelity": f"inception-tf1-{tap}",
        }[source]  # fmt: skip
        assert extractor.dim == int(tap)
        found = extractor(expected["images"][:1])
        pooled = expected[f"{source}_{tap}_pooled"][:1]
        torch.testing.assert_close(found, pooled, rtol=1e-4, atol=1e-4)


def test_neither_chunks_nor_repeated_grey_change_a_feature(
    weights: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    extractor = load_inception(weights, tap="64")
    grey = expected["images"][:, :1, :40]
    together = extractor(grey.expand(-1, 3, -1, -1))
    extractor.chunk = 2
    torch.testing.assert_close(extractor(grey), together)
    assert extractor(grey[:0]).shape == (0, 64)
    assert not together.requires_grad


def test_public_files_differ_in_what_does_not_matter(weights: dict[str, Tensor]) -> None:
    counters = {name for name in weights if name.endswith("num_batches_tracked")}
    other = {name: t for name, t in weights.items() if name not in counters}
    other["AuxLogits.conv0.conv.weight"] = torch.ones(3)
    loaded = load_inception(other).network.state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": None}, r"extractor 'inception': 1 tensors do not fit, first 'fc.weight': "
         r"found nothing, expected \(1008, 2048\)"),
        ({"fc.bias": torch.ones(1000)}, r"'fc.bias': found \(1000,\), expected \(1008,\)"),
        ({"Mixed_8.weight": torch.ones(2)}, r"'Mixed_8.weight': found \(2,\), expected nothing"),
        ({"Conv2d_1a_3x3.bn.num_batches_tracked": torch.ones(2)}, r"found \(2,\), expected \(\)"),
    ],
)  # fmt: skip
def test_other_weights_are_refused(
    change: dict[str, Tensor | None], message: str, weights: dict[str, Tensor]
) -> None:
    changed = {**weights, **change}
    with pytest.raises(CheckpointError, match=message):
        load_inception({name: t for name, t in changed.items() if t is not None})


def test_a_refusal_counts_what_is_odd(weights: dict[str, Tensor]) -> None:
    # 566 tensors, of which 94 counters need not be there and one is.
    with pytest.raises(CheckpointError, match="472 tensors do not fit, first 'Conv2d_1a_3x3.bn.b"):
        load_inception({"fc.bias": weights["fc.bias"], "x": torch.ones(1)})


def test_an_unknown_tap_is_refused(weights: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="expected a tap of 64, 192, 768, 2048, got '1024'"):
        load_inception(weights, tap="1024")


class _Sums(nn.Module):
    """Stands in for a network: sums by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3))


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(2, 3, 4, 4), r"float32 \(2, 3, 4, 4\)"),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), r"uint8 \(2, 2, 4, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"uint8 \(3, 4, 4\)"),
    ],
)
def test_what_is_no_image_is_refused(images: Tensor, found: str) -> None:
    extractor = ImageFeatures(_Sums(), lambda x: x, name="sums", dim=3, chunk=2)
    good = torch.full((5, 1, 2, 2), 7, dtype=torch.uint8)
    assert extractor(good).tolist() == [[28.0] * 3] * 5
    message = rf"extractor 'sums': expected uint8 images \(B, 1 or 3, H, W\), got {found}"
    with pytest.raises(StatisticsError, match=message):
        extractor(images)
