"""Reference statistics: written, read, and refused where they do not belong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from merge_rl.core.distances.statistics import FeatureStats, feature_stats
from merge_rl.errors import CheckpointError, NonFiniteWeightsError, StatisticsError
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.workflows.reference.file import FORMAT, load_reference, save_reference

SHA = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4


@pytest.fixture
def stats(generator: torch.Generator) -> FeatureStats:
    return feature_stats(1000 + 1e-3 * torch.randn(50, 3, generator=generator, dtype=torch.float64))


def test_round_trip_is_exact(stats: FeatureStats, tmp_path: Path) -> None:
    path = tmp_path / "new/reference.safetensors"
    save_reference(
        path, stats, extractor="digits", extractor_sha256=SHA, resolution=8, source="train, 3 of 4"
    )
    found = load_reference(path)
    assert found.stats.count == 50
    assert torch.equal(found.stats.mean, stats.mean)
    assert torch.equal(found.stats.cov, stats.cov)
    assert (found.extractor, found.extractor_sha256) == ("digits", SHA)
    assert (found.resolution, found.source) == (8, "train, 3 of 4")


def test_what_is_not_known_stays_unknown(stats: FeatureStats, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    save_reference(path, stats, extractor="digits")
    found = load_reference(path)
    assert (found.extractor_sha256, found.resolution, found.source) == (None, None, "")


def test_features_of_another_extractor_are_refused(stats: FeatureStats, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    save_reference(path, stats, extractor="inception", extractor_sha256=SHA)
    found = load_reference(path)
    found.require_extractor("inception", SHA, path)
    found.require_extractor("inception", None, path)  # weights unknown: the name has to do
    with pytest.raises(StatisticsError, match="of extractor 'inception', expected 'dinov2'"):
        found.require_extractor("dinov2", SHA, path)
    with pytest.raises(StatisticsError, match="weights 0123456789ab…, expected fedcba987654…"):
        found.require_extractor("inception", OTHER, path)
    save_reference(path, stats, extractor="inception")
    load_reference(path).require_extractor("inception", OTHER, path)


def write(path: Path, **changes: object) -> Path:
    """A good file, but for `changes` of its tensors and metadata."""
    values: dict[str, object] = {
        "mu": torch.zeros(2, dtype=torch.float64),
        "sigma": torch.eye(2, dtype=torch.float64),
        "format": FORMAT,
        "count": "9",
        "extractor": "digits",
    } | changes
    tensors = {k: v for k, v in values.items() if isinstance(v, torch.Tensor)}
    save_tensors(path, tensors, {k: v for k, v in values.items() if isinstance(v, str)})
    return path


def test_narrow_types_are_widened(tmp_path: Path) -> None:
    # 2049 is the first whole number that float16 cannot hold; 2048 it can.
    mu = torch.tensor([2048.0, -0.5], dtype=torch.float16)
    path = write(tmp_path / "a.safetensors", mu=mu, resolution="x")
    found = load_reference(path)
    assert found.stats.mean.dtype == found.stats.cov.dtype == torch.float64
    assert found.stats.mean.tolist() == [2048.0, -0.5]
    assert found.resolution is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format": "merge_rl.reference.v9"},
            "format 'merge_rl.reference.v1', found 'merge_rl.refe",
        ),
        ({"extra": torch.ones(1)}, "expected reference statistics, found other tensors"),
        ({"sigma": torch.eye(3)}, r"a covariance \(D, D\), got shapes \(2,\) and \(3, 3\)"),
        ({"mu": torch.zeros(1, 2)}, r"a mean \(D,\) and a covariance .*, got shapes \(1, 2\)"),
        ({"mu": torch.tensor(1.0)}, r"a mean \(D,\) and a covariance .*, got shapes \(\)"),
        ({"mu": torch.zeros(2).short()}, "expected moments of a floating type, got int16"),
        ({"sigma": torch.eye(2) > 0}, "expected moments of a floating type, got bool"),
        ({"count": ""}, "expected the number of images, found count ''"),
        ({"count": "-4"}, "expected the number of images, found count '-4'"),
        ({"count": "²"}, "expected the number of images, found count '²'"),
        ({"count": "0"}, "moments of at least 1 sample, got 0"),
    ],
)
def test_files_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", **changes)
    with pytest.raises(StatisticsError, match=message):
        load_reference(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_reference(tmp_path / "none.safetensors")
    path = write(tmp_path / "a.safetensors", sigma=torch.full((2, 2), math.nan))
    with pytest.raises(NonFiniteWeightsError, match="tensor 'sigma' holds NaN"):
        load_reference(path)


def test_features_lie_beside_moments_with_labels_or_without(
    stats: FeatureStats, tmp_path: Path
) -> None:
    path, rows = tmp_path / "r.safetensors", torch.randn(4, stats.dim)
    save_reference(path, stats, extractor="mine", features=rows)
    found = load_reference(path)
    assert found.features is not None
    assert torch.equal(found.features, rows)
    assert found.labels is None
    save_reference(path, stats, extractor="mine", labels=torch.arange(4))  # those of nothing
    assert load_reference(path).labels is None
    save_reference(path, stats, extractor="mine", features=torch.randn(4, stats.dim + 1))
    with pytest.raises(StatisticsError, match=rf"expected features \(M, {stats.dim}\), got \(4, "):
        load_reference(path)
