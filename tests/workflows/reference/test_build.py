"""Reference statistics from images: right, resumable to the last bit, in disjoint halves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_rl.core.distances.statistics import extend_stats, feature_stats
from merge_rl.errors import ConfigError, ImageError, RunError, StatisticsError, TooFewSamplesError
from merge_rl.features.digits import DigitsNet, load_digits_extractor
from merge_rl.storage.checkpoints.model_file import open_model_file
from merge_rl.storage.files.images import write_png
from merge_rl.workflows.reference import moments as collecting
from merge_rl.workflows.reference.build import build_reference
from merge_rl.workflows.reference.file import load_reference

COUNT = 50


def draw() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (COUNT, 1, 8, 8), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images img_0 ... img_49 of classes 0, 0, 0, 0, 0, 1, ...: in the order of their classes."""
    path = tmp_path_factory.mktemp("images")
    for i, image in enumerate(draw()):
        write_png(path / f"img_{i}.png", image)
    pairs = [[f"img_{i}.png", i // 5] for i in range(COUNT)]
    (path / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return path


@pytest.fixture(scope="module")
def extractor(shared_tiny: Path) -> DigitsNet:
    path = shared_tiny / "evaluation/extractor.safetensors"
    return load_digits_extractor(open_model_file(path).weights)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "BLOCK_ROWS", 8)


class Interrupted:
    """An extractor that is stopped at its n-th batch, as by Ctrl-C or by a crash."""

    def __init__(self, extractor: DigitsNet, at: int, error: type[BaseException]) -> None:
        self.extractor, self.left, self.error = extractor, at, error
        self.name, self.dim = extractor.name, extractor.dim

    def __call__(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        found: Tensor = self.extractor(images)
        return found


class Notes:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int]] = []
        self.done = 0
        self.texts: list[str] = []

    def phase(self, name: str, total: int) -> None:
        self.phases.append((name, total))

    def advance(self, count: int) -> None:
        self.done += count

    def event(self, event: Mapping[str, Any]) -> None:
        self.texts.append(event["text"])


def features_of(extractor: DigitsNet, rows: list[int]) -> Tensor:
    with torch.no_grad():
        features: Tensor = extractor(draw()[rows])
    return features


@pytest.mark.parametrize("batch", [1, 3, 8, 100])
def test_moments_are_those_of_all_images(
    batch: int, folder: Path, extractor: DigitsNet, tmp_path: Path
) -> None:
    out, notes = tmp_path / "new/ref.safetensors", Notes()
    document = build_reference(
        folder, out, extractor=extractor, extractor_sha256="a" * 64, batch=batch, tracker=notes
    )
    found, expected = load_reference(out), feature_stats(features_of(extractor, [*range(COUNT)]))
    torch.testing.assert_close(found.stats.mean, expected.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.stats.cov, expected.cov, rtol=1e-5, atol=1e-6)
    assert (found.count, found.extractor, found.extractor_sha256) == (COUNT, "digits", "a" * 64)
    assert (found.resolution, found.source, found.features) == (8, folder.name, None)
    assert document["files"] == [{"out": str(out), "images": COUNT, "features_kept": 0}]
    assert document["broken"] == 0
    assert notes.phases == [("reference", COUNT)]
    assert notes.done == COUNT
    assert [path.name for path in out.parent.iterdir()] == ["ref.safetensors"]
    assert "50 images for 64 features: the covariance is singular" in notes.texts[0]


def test_one_more_row_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 100 + 0.01 * torch.randn(9, 3, generator=generator)
    stats = None
    for part in (rows[:1], rows[:0], rows[1:2], rows[2:6], rows[6:7], rows[7:]):
        stats = extend_stats(stats, part)
    assert stats is not None
    torch.testing.assert_close(stats.cov, torch.cov(rows.double().T))
    assert extend_stats(None, rows[:0]) is None
    with pytest.raises(StatisticsError, match="finite features"):
        extend_stats(stats, torch.full((1, 3), torch.nan))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [0, 1, 5, 12])
def test_interrupted_work_goes_on_bit_for_bit(
    at: int, error: type[BaseException], folder: Path, extractor: DigitsNet, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings: dict[str, Any] = {"batch": 4, "keep_features": 11, "split": True, "seed": 2}
    build_reference(folder, tmp_path / "whole/r.safetensors", extractor=extractor, **settings)
    monkeypatch.setattr(collecting, "SAVE_SECONDS", 0)
    stopped = Interrupted(extractor, at, error)
    out = tmp_path / "cut/r.safetensors"
    with pytest.raises(error):
        build_reference(folder, out, extractor=stopped, **settings)
    # Blocks are two batches of 4; what was not saved is done again.
    again = Interrupted(extractor, 13 - at // 2 * 2, KeyboardInterrupt)
    notes = Notes()
    build_reference(folder, out, extractor=again, tracker=notes, **settings)
    assert notes.done == COUNT
    for name in ("r-a.safetensors", "r-b.safetensors"):
        whole, cut = (tmp_path / where / name for where in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "r-a.safetensors", "r-b.safetensors",
    ]  # fmt: skip


def test_other_settings_start_again(
    folder: Path, extractor: DigitsNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "SAVE_SECONDS", 0)
    out = tmp_path / "r.safetensors"
    with pytest.raises(KeyboardInterrupt):
        build_reference(
            folder, out, extractor=Interrupted(extractor, 6, KeyboardInterrupt), batch=4
        )
    assert (tmp_path / ".r.safetensors.partial").is_dir()
    build_reference(folder, out, extractor=extractor, batch=4, limit=20)
    assert load_reference(out).count == 20
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]


def test_halves_are_disjoint_and_whole(folder: Path, extractor: DigitsNet, tmp_path: Path) -> None:
    document = build_reference(
        folder, tmp_path / "r.safetensors", extractor=extractor, split=True, keep_features=100
    )
    halves = [load_reference(file["out"]) for file in document["files"]]
    assert [half.source for half in halves] == [f"{folder.name}, half a", f"{folder.name}, half b"]
    expected = features_of(extractor, [*range(COUNT)])
    kept = []
    for half in halves:
        assert half.features is not None
        assert half.count == len(half.features) == COUNT // 2
        torch.testing.assert_close(half.stats.cov, feature_stats(half.features).cov)
        assert half.labels is not None
        # Each class of five gives two or three to either half.
        assert set(half.labels.bincount().tolist()) <= {2, 3}
        kept.append(half.features)
    together = torch.cat(kept)
    order = torch.cdist(together, expected).argmin(1)
    assert sorted(order.tolist()) == [*range(COUNT)]
    other = build_reference(
        folder, tmp_path / "s.safetensors", extractor=extractor, split=True, seed=1
    )
    assert not torch.equal(
        load_reference(other["files"][0]["out"]).stats.mean, halves[0].stats.mean
    )


@pytest.mark.parametrize("keep", [1, 7, 49, 50])
def test_kept_features_are_spread_evenly(
    keep: int, folder: Path, extractor: DigitsNet, tmp_path: Path
) -> None:
    out = tmp_path / "r.safetensors"
    build_reference(folder, out, extractor=extractor, keep_features=keep, batch=7)
    found = load_reference(out)
    assert found.features is not None
    assert found.labels is not None
    expected = [i for i in range(COUNT) if (i + 1) * keep // COUNT > i * keep // COUNT]
    assert len(expected) == keep
    torch.testing.assert_close(found.features, features_of(extractor, expected))
    assert found.labels.tolist() == [i // 5 for i in expected]
    assert found.count == COUNT


def test_subsets(folder: Path, extractor: DigitsNet, tmp_path: Path) -> None:
    def labels(name: str, **settings: Any) -> Tensor:
        out = tmp_path / f"{name}.safetensors"
        build_reference(folder, out, extractor=extractor, keep_features=99, **settings)
        found = load_reference(out)
        assert found.labels is not None
        assert found.count == len(found.labels)
        return found.labels.bincount(minlength=10)

    assert labels("a", limit=20).tolist() == [2] * 10  # shares of the classes are kept
    assert labels("b", limit=25, balanced=True).tolist() == [2] * 10
    assert labels("c", balanced=True).tolist() == [5] * 10
    assert int(labels("d", limit=500).sum()) == COUNT


def test_broken_images_are_named_or_counted(
    folder: Path, extractor: DigitsNet, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        (images / f"img_{i}.png").write_bytes((folder / f"img_{i}.png").read_bytes())
    for i in (3, 12):
        (images / f"img_{i}.png").write_bytes(b"broken")
    out, notes = tmp_path / "r.safetensors", Notes()
    with pytest.raises(ImageError, match=r"img_3\.png is broken: no image, expected one of PNG"):
        build_reference(images, out, extractor=extractor, batch=4)
    assert not out.exists()
    settings: dict[str, Any] = {"skip_broken": True, "batch": 4, "keep_features": 20}
    document = build_reference(images, out, extractor=extractor, tracker=notes, **settings)
    assert document["broken"] == 2
    assert [reason[:10] for reason in document["first_broken"]] == ["img_3.png ", "img_12.png"]
    assert notes.texts[0].startswith("2 broken images skipped; first: img_3.png is broken")
    found, good = load_reference(out), [i for i in range(20) if i not in (3, 12)]
    assert found.count == 18
    assert found.features is not None
    torch.testing.assert_close(found.features, features_of(extractor, good))


def test_arrays_give_the_same_as_files(folder: Path, extractor: DigitsNet, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=draw().permute(0, 2, 3, 1).numpy())
    for images, name in ((folder, "a"), (tmp_path / "a.npz", "b")):
        build_reference(images, tmp_path / f"{name}.safetensors", extractor=extractor)
    found = [load_reference(tmp_path / f"{name}.safetensors").stats for name in "ab"]
    assert torch.equal(found[0].cov, found[1].cov)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch": 0}, ConfigError, "expected batch >= 1"),
        ({"limit": 1}, ConfigError, "expected a limit of at least 2 images, got 1"),
        ({"limit": 3, "split": True}, TooFewSamplesError, "at least 4 images, found 3"),
        ({"limit": 4, "balanced": True}, TooFewSamplesError, "at least 10 images, one of each cla"),
        ({"out": "r.npz"}, ConfigError, "an output that ends in .safetensors, got 'r.npz'"),
        ({"images": "nowhere"}, ImageError, "nowhere: no such file or folder"),
    ],
)
def test_what_cannot_be_built(
    changes: dict[str, Any], error: type[Exception], message: str, folder: Path,
    extractor: DigitsNet, tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / changes.pop("out", "r.safetensors")
    with pytest.raises(error, match=message):
        build_reference(changes.pop("images", folder), out, extractor=extractor, **changes)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_not_touched(
    folder: Path, extractor: DigitsNet, tmp_path: Path
) -> None:
    (tmp_path / "r-b.safetensors").touch()
    with pytest.raises(RunError, match=r"r-b\.safetensors exists already"):
        build_reference(folder, tmp_path / "r.safetensors", extractor=extractor, split=True)


def test_balanced_subsets_need_labels(extractor: DigitsNet, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=draw().permute(0, 2, 3, 1).numpy())
    with pytest.raises(ImageError, match="class-balanced subsets need labels; expected a dataset"):
        build_reference(
            tmp_path / "a.npz", tmp_path / "r.safetensors", extractor=extractor, balanced=True
        )


def test_what_is_not_used_is_told(folder: Path, extractor: DigitsNet, tmp_path: Path) -> None:
    images, notes = tmp_path / "images", Notes()
    images.mkdir()
    for i in range(3):
        (images / f"img_{i}.png").write_bytes((folder / f"img_{i}.png").read_bytes())
    (images / "notes.txt").write_text("no image")
    pairs = [["img_0.png", 0], ["img_1.png", 1], ["img_2.png", None]]
    (images / "dataset.json").write_text(json.dumps({"labels": pairs}))
    out = tmp_path / "r.safetensors"
    document = build_reference(images, out, extractor=extractor, tracker=notes)
    left_out = f"1 left out of {images}: 1 no images (.txt)"
    problem = "the label of img_2.png is nothing, expected a whole number from 0 to 2147483647"
    assert document["left_out"] == left_out
    assert notes.texts[:2] == [left_out, f"labels left aside: {problem}"]
    assert load_reference(out).count == 3
    with pytest.raises(ImageError, match=f"class-balanced subsets need labels; {problem}"):
        build_reference(images, tmp_path / "s.safetensors", extractor=extractor, balanced=True)


def test_failures_are_no_statistics(folder: Path, extractor: DigitsNet, tmp_path: Path) -> None:
    class Bad(Interrupted):
        """Gives NaN for one image, as half precision may."""

        def __call__(self, images: Tensor) -> Tensor:
            return super().__call__(images).index_fill(0, torch.tensor([1]), torch.nan)

    out = tmp_path / "r.safetensors"
    told = f"{folder}: the extractor digits gives features that are not finite for 1 of 50 images, "
    with pytest.raises(StatisticsError, match=f"{told}the first of them img_1.png"):
        build_reference(folder, out, extractor=Bad(extractor, 99, KeyboardInterrupt))
    np.savez(tmp_path / "rgb.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    with pytest.raises(StatisticsError, match=r"'digits'.*\(3, 8, 8\)|'digits'.*\(5, 3, 8, 8\)"):
        build_reference(tmp_path / "rgb.npz", out, extractor=extractor)
    assert not out.exists()
