"""Scores of images and of saved features: blocks, resumption, and who made what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.core.distances.frechet import frechet_distance
from merge_rl.core.distances.statistics import feature_stats
from merge_rl.errors import ConfigError, ImageError, RunError, StatisticsError, TooFewSamplesError
from merge_rl.features.digits import DigitsNet, load_digits_extractor
from merge_rl.rng import stream
from merge_rl.storage.checkpoints.model_file import open_model_file
from merge_rl.storage.files.images import write_png
from merge_rl.workflows.reference import moments as collecting
from merge_rl.workflows.reference.features import SavedFeatures, load_features, save_features
from merge_rl.workflows.reference.file import load_reference, save_reference

COUNT = 30


def draw() -> Tensor:
    generator = torch.Generator().manual_seed(12)
    return torch.randint(0, 256, (COUNT, 1, 8, 8), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    for i, image in enumerate(draw()):
        write_png(path / f"img_{i}.png", image)
    return path


@pytest.fixture(scope="module")
def extractor(shared_tiny: Path) -> DigitsNet:
    path = shared_tiny / "evaluation/extractor.safetensors"
    return load_digits_extractor(open_model_file(path).weights)


@pytest.fixture(scope="module")
def features(extractor: DigitsNet) -> Tensor:
    with torch.no_grad():
        found: Tensor = extractor(draw())
    return found


@pytest.fixture(scope="module")
def reference(shared_tiny: Path) -> Path:
    return shared_tiny / "evaluation/reference.safetensors"


def score(features: Tensor, reference: Path) -> float:
    return frechet_distance(feature_stats(features), load_reference(reference).stats)


def test_all_images_are_one_block(
    folder: Path, extractor: DigitsNet, features: Tensor, reference: Path
) -> None:
    found = mrl.evaluate(folder, reference=reference, extractor=extractor, batch=7)
    assert (found["kind"], found["num_images"], found["repeats"]) == ("images", COUNT, 1)
    summary = found["fid"]["reference"]
    assert summary["mean"] == summary["min"] == pytest.approx(score(features, reference), rel=1e-5)
    assert summary["low"] is summary["high"] is None
    assert found["broken"] == 0


def test_blocks_of_images_are_disjoint_and_drawn(
    folder: Path, extractor: DigitsNet, features: Tensor, reference: Path
) -> None:
    settings: dict[str, Any] = {"reference": reference, "extractor": extractor, "num_images": 10}
    found = mrl.evaluate(folder, repeats=9, seed=4, **settings)
    assert (found["num_images"], found["repeats"], found["available"]) == (10, 3, COUNT)
    order = torch.randperm(COUNT, generator=stream(4, "blocks"))
    expected = [score(features[order[i : i + 10]], reference) for i in (0, 10, 20)]
    assert found["fid"]["reference"]["values"] == pytest.approx(expected, rel=1e-5)
    assert found["fid"]["reference"]["low"] < found["fid"]["reference"]["mean"]
    assert mrl.evaluate(folder, repeats=2, seed=4, **settings)["repeats"] == 2
    message = "expected at least 31 images, as --num-images says, found 30"
    with pytest.raises(TooFewSamplesError, match=message):
        mrl.evaluate(folder, **{**settings, "num_images": 31})


def test_features_are_kept_and_taken_up_again(
    folder: Path, extractor: DigitsNet, reference: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Stopped(DigitsNet):
        left = 99

        def forward(self, images: Tensor) -> Tensor:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().forward(images)

    net = Stopped()
    net.load_state_dict(extractor.state_dict())
    monkeypatch.setattr(collecting, "BLOCK_ROWS", 4)
    settings: dict[str, Any] = {"reference": reference, "extractor": net.eval(), "batch": 4}
    whole = mrl.evaluate(folder, **settings)
    net.left = 5
    kept = tmp_path / "features"
    with pytest.raises(KeyboardInterrupt):
        mrl.evaluate(folder, save_features=kept, **settings)
    assert [path.name for path in kept.iterdir()] == [".images.safetensors.partial"]
    net.left = 3  # 8 batches in all
    assert mrl.evaluate(folder, save_features=kept, **settings) == whole
    assert [path.name for path in kept.iterdir()] == ["images.safetensors"]
    net.left = 0
    assert mrl.evaluate(folder, save_features=kept, **settings) == whole
    saved = load_features(kept / "images.safetensors")
    assert (saved.extractor, len(saved.features)) == ("digits", COUNT)
    write_png(tmp_path / "other/a.png", draw()[0])
    with pytest.raises(RunError, match="belongs to another evaluation: its images is"):
        mrl.evaluate(tmp_path / "other", save_features=kept, **settings)


def test_broken_images(
    folder: Path, extractor: DigitsNet, features: Tensor, reference: Path, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "img_4.png").write_bytes(b"?")
    (tmp_path / "notes.txt").write_bytes(b"?")
    settings: dict[str, Any] = {"reference": reference, "extractor": extractor}
    with pytest.raises(ImageError, match=r"img_4\.png is broken"):
        mrl.evaluate(tmp_path, **settings)
    found = mrl.evaluate(tmp_path, skip_broken=True, **settings)
    assert (found["broken"], found["num_images"]) == (1, COUNT - 1)
    left_out = f"1 left out of {tmp_path}: 1 no images (.txt)"
    assert found["notes"] == [left_out, singular(COUNT - 1)]
    good = [i for i in range(COUNT) if i != 4]
    expected = pytest.approx(score(features[good], reference), rel=1e-5)
    assert found["fid"]["reference"]["mean"] == expected


def singular(count: int) -> str:
    return (
        f"{count} images for 64 features: the covariance is singular, and a Fréchet distance says "
        "little"
    )


def test_doubts_are_noted(
    folder: Path, extractor: DigitsNet, features: Tensor, reference: Path, tmp_path: Path
) -> None:
    moments = load_reference(reference)
    other, many = tmp_path / "other.safetensors", tmp_path / "many"
    save_reference(other, moments.stats, extractor="digits", resolution=32)
    for i in range(65):
        write_png(many / f"{i}.png", draw()[i % COUNT])
    found = mrl.evaluate(folder, reference=other, heldout=reference, extractor=extractor)
    resolution = f"{other}: statistics of images of 32 x 32, compared with images of 8 x 8"
    assert found["notes"] == [resolution, singular(COUNT)]
    assert mrl.evaluate(many, reference=other, extractor=extractor)["notes"] == [resolution]
    assert "notes" not in mrl.evaluate(many, reference=reference, extractor=extractor)
    save_features(tmp_path / "a.safetensors", SavedFeatures(features=features, extractor="digits"))
    found = mrl.evaluate(tmp_path / "a.safetensors", reference=reference, num_images=15)
    assert found["notes"] == [singular(15)]


# -------------------------------------------------------------------------------- saved features


def test_saved_features_need_no_extractor(
    features: Tensor, reference: Path, tmp_path: Path
) -> None:
    digest = load_reference(reference).extractor_sha256
    saved = SavedFeatures(features=features, extractor="digits", extractor_sha256=digest)
    save_features(tmp_path / "a.safetensors", saved)
    found = mrl.evaluate(tmp_path / "a.safetensors", reference=reference)
    assert found["kind"] == "features"
    expected = pytest.approx(score(features, reference), rel=1e-6)
    assert found["fid"]["reference"]["mean"] == expected
    assert found["notes"] == [singular(COUNT)]
    np.savez(tmp_path / "a.npz", reps=features.numpy())
    found = mrl.evaluate(tmp_path / "a.npz", reference=reference)
    assert found["fid"]["reference"]["mean"] == expected
    assert found["notes"] == ["the features do not say which extractor made them", singular(COUNT)]
    named = mrl.evaluate(tmp_path / "a.npz", reference=reference, extractor="digits")
    assert named["notes"] == [singular(COUNT)]


def test_features_of_others_are_refused(features: Tensor, reference: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_features(path, SavedFeatures(features=features, extractor="dinov2"))
    with pytest.raises(StatisticsError, match="of extractor 'digits', expected 'dinov2'"):
        mrl.evaluate(path, reference=reference)
    other = SavedFeatures(features=features, extractor="digits", extractor_sha256="f" * 64)
    save_features(path, other)
    with pytest.raises(StatisticsError, match="made with digits weights .*, expected ffffffffff"):
        mrl.evaluate(path, reference=reference)
    save_features(path, SavedFeatures(features=features[:, :5]))
    with pytest.raises(StatisticsError, match="of 64 dimensions, expected the 5 of extractor"):
        mrl.evaluate(path, reference=reference)
    save_features(path, SavedFeatures(features=features[:1], extractor="digits"))
    with pytest.raises(TooFewSamplesError, match=f"{path}: .* at least 2 feature rows, got 1"):
        mrl.evaluate(path, reference=reference)
    save_features(path, SavedFeatures(features=features / 0, extractor="digits"))
    with pytest.raises(StatisticsError, match=f"{path}: expected finite features, got "):
        mrl.evaluate(path, reference=reference)
    with pytest.raises(StatisticsError, match="holds statistics; expected a model, images, or fe"):
        mrl.evaluate(reference, reference=reference)


def test_a_covariance_that_none_can_have_is_told_by_its_file(tmp_path: Path) -> None:
    # Variances of 1 with a correlation of 3: eigenvalues 4 and -2.
    indefinite = np.array([[1.0, 3.0], [3.0, 1.0]])
    for name, cov in (("good", np.eye(2)), ("bad", indefinite)):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(2), sigma=cov)
    np.savez(tmp_path / "features.npz", np.random.default_rng(0).normal(size=(9, 2)))
    with pytest.raises(StatisticsError, match=r"bad\.npz: .* eigenvalues, got -2 beside .* of 4$"):
        mrl.evaluate(
            tmp_path / "features.npz",
            reference=tmp_path / "good.npz",
            heldout=tmp_path / "bad.npz",
        )


def test_edm2_statistics_choose_by_dimension(golden: Path, tmp_path: Path) -> None:
    folder = golden / "edm2/dataset_ref"
    inputs = np.load(folder / "tiny_ref_inputs.npz")
    np.savez(tmp_path / "a.npz", reps=inputs["gen_features_fd_dinov2"])
    found = mrl.evaluate(tmp_path / "a.npz", reference=folder / "tiny_ref.pkl")
    assert found["fid"]["reference"]["mean"] == pytest.approx(0.13760788524782766, rel=1e-9)
    assert "weights of dinov2 not recorded" in found["notes"][0]


# ----------------------------------------------------------------------------------- extractors


def test_the_extractor_is_that_of_the_reference(
    folder: Path, extractor: DigitsNet, reference: Path, shared_tiny: Path
) -> None:
    weights = str(shared_tiny / "evaluation/extractor.safetensors")
    expected = mrl.evaluate(folder, reference=reference, extractor=extractor)
    for name in (None, "digits"):
        found = mrl.evaluate(folder, reference=reference, extractor=name, extractor_weights=weights)
        assert found == expected
    stats = load_reference(reference).stats
    with pytest.raises(ConfigError, match="the reference does not name its extractor"):
        mrl.evaluate(folder, reference=stats)


def test_weights_of_another_hash_are_refused(
    folder: Path, extractor: DigitsNet, reference: Path
) -> None:
    message = r"reference\.safetensors: made with digits weights .*, expected 000000000000"
    with pytest.raises(StatisticsError, match=message):
        mrl.evaluate(folder, reference=reference, extractor=extractor, extractor_sha256="0" * 64)
