"""Statistics of other projects: read, checked, told apart; what files do not say is said."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merge_rl.core.distances.frechet import frechet_distance
from merge_rl.core.distances.statistics import feature_stats
from merge_rl.errors import DataFileError, MergeRLError, StatisticsError, TooFewSamplesError
from merge_rl.storage.checkpoints import open_tensors
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.workflows.reference.features import SavedFeatures, save_features
from merge_rl.workflows.reference.file import (
    kind_of,
    load_all_references,
    load_reference,
    save_reference,
)
from merge_rl.workflows.reference.formats import few_images

FAMILY = ("inception", "inception-tf1", "inception-clean")


@pytest.fixture
def edm2(golden: Path) -> Path:
    return golden / "edm2/dataset_ref"


def draw(count: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return 5 + torch.randn(count, dim, generator=generator) @ torch.randn(
        dim, dim, generator=generator
    )


# ------------------------------------------------------------------------------------------ EDM2


@pytest.mark.parametrize("name", ["tiny_ref.pkl", "tiny_ref_legacy_names.pkl"])
@pytest.mark.parametrize(("entry", "extractor"), [("fid", FAMILY[1]), ("fd_dinov2", "dinov2")])
def test_edm2_pickles(edm2: Path, name: str, entry: str, extractor: str) -> None:
    inputs, expected = np.load(edm2 / "tiny_ref_inputs.npz"), edm2 / "expected.json"
    generated = torch.from_numpy(inputs[f"gen_features_{entry}"])
    for found in (
        load_reference(edm2 / name, entry=entry),
        load_reference(f"{edm2 / name}#{entry}"),
        load_reference(edm2 / name, extractor=extractor),
        load_reference(edm2 / name, dim=generated.shape[1]),
    ):
        assert (found.count, found.extractor) == (100, extractor)
        assert "not recorded" in found.assumed
        assert found.stats.mean.numpy() == pytest.approx(inputs[f"ref_mu_{entry}"], rel=1e-12)
        assert found.stats.cov.numpy() == pytest.approx(inputs[f"ref_sigma_{entry}"], rel=1e-9)
        distance = frechet_distance(feature_stats(generated), found.stats)
        value = json.loads(expected.read_text())["metrics"][entry]
        assert distance == pytest.approx(value, rel=1e-9)
    assert list(load_all_references(edm2 / name)) == ["fid", "fd_dinov2"]
    assert list(load_all_references(f"{edm2 / name}#fid")) == ["fid"]


@pytest.mark.parametrize("count", [100.0, "100", "1e2", np.int64(100)])
def test_a_number_of_images_may_be_written_in_any_way(count: object, tmp_path: Path) -> None:
    moments = {"mu": np.zeros(2), "sigma": np.eye(2)}
    content = {"num_images": count, "fid": moments, "other": {"mu": [1, [2]], "sigma": 1}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    assert load_reference(tmp_path / "a.pkl", dim=2).count == 100


def test_the_entry_has_to_be_clear(edm2: Path) -> None:
    path = edm2 / "tiny_ref.pkl"
    with pytest.raises(StatisticsError, match=r"holds 'fid' and 'fd_dinov2'; choose one as tiny_r"):
        load_reference(path)
    with pytest.raises(StatisticsError, match="has no entry 'kid', it holds 'fid' and 'fd_dinov2'"):
        load_reference(f"{path}#kid")
    # EDM2 resizes as the original graph does: features of another resize are others.
    with pytest.raises(StatisticsError, match="'inception-tf1', expected 'inception-clean'"):
        load_reference(path, entry="fid", extractor="inception-clean")
    with pytest.raises(StatisticsError, match="of 8 dimensions, expected the 2048 of extractor"):
        load_reference(path, extractor="inception-tf1", dim=2048)
    with pytest.raises(StatisticsError, match="of extractor 'dinov2', expected 'dinov2-dgm'"):
        load_reference(path, entry="fd_dinov2", extractor="dinov2-dgm")


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a mapping of statistics, found other data"),
        ({"num_images": 5}, "expected entries with 'mu' and 'sigma', found none"),
        ({"num_images": 9, "fid": Evil()}, "print"),
        ({"num_images": 9, "fid": {"mu": [0.0], "sigma": [[1.0]]}}, "expected 'mu' as an array"),
        ({"fid": {"mu": np.zeros(2), "sigma": np.eye(2)}}, "num_images as a whole number, found N"),
        ({"num_images": 1, "fid": {"mu": np.zeros(2), "sigma": np.eye(2)}}, "2 samples .*, got 1"),
        ({"num_images": 9, "fid": {"mu": np.zeros(2), "sigma": np.eye(3)}}, r"a covariance \(D, D"),
    ],
)
def test_pickles_refused(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(MergeRLError, match=message):
        load_reference(path)
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------- npz


def test_pytorch_fid_files_do_not_say_how_many_images(tmp_path: Path) -> None:
    stats = feature_stats(draw(50, 4))
    np.savez(tmp_path / "a.npz", mu=stats.mean.numpy(), sigma=stats.cov.float().numpy())
    found = load_reference(tmp_path / "a.npz", extractor="digits", dim=4)
    assert found.count is None
    assert found.stats.count >= 2
    assert torch.equal(found.stats.mean, stats.mean)
    assert torch.equal(found.stats.cov, found.stats.cov.T)  # single precision left it askew
    torch.testing.assert_close(found.stats.cov, stats.cov, rtol=1e-6, atol=1e-6)
    assert "number of images is not recorded" in found.assumed
    with pytest.raises(StatisticsError, match="of 4 dimensions, expected the 64 of extractor 'dig"):
        load_reference(tmp_path / "a.npz", extractor="digits", dim=64)


def test_2048_dimensions_are_taken_for_inception(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    found = load_reference(tmp_path / "a.npz")
    assert "assumed to be of Inception" in found.assumed
    for name in FAMILY:
        found.require_extractor(name, None)
    for name in ("dinov2", "inceptions"):
        with pytest.raises(StatisticsError, match=f"'inception', expected '{name}'"):
            found.require_extractor(name, None)


def test_adm_files(tmp_path: Path) -> None:
    images = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(
        tmp_path / "a.npz", mu=np.ones(3), sigma=np.eye(3), mu_s=np.ones(5), sigma_s=np.eye(5),
        arr_0=images,
    )  # fmt: skip
    found = load_reference(tmp_path / "a.npz")
    assert found.dim == 3
    assert "mu_s, sigma_s, arr_0 left aside" in found.assumed
    assert kind_of(tmp_path / "a.npz") == "reference"


@pytest.mark.parametrize("dress", ["npz", "safetensors", "pt", "numpy.pt", "pkl"])
def test_moments_by_their_names_are_read_from_any_file(dress: str, tmp_path: Path) -> None:
    stats, path = feature_stats(draw(40, 3)), tmp_path / f"a.{dress}"
    tensors = {"mu": stats.mean, "sigma": stats.cov, "extra": torch.ones(2)}
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    if dress == "npz":
        np.savez(path, **arrays)
    elif dress == "safetensors":
        save_tensors(path, tensors, {"made": "elsewhere"})
    elif dress == "pkl":
        path.write_bytes(pickle.dumps(arrays))
    else:
        torch.save(tensors if dress == "pt" else arrays, path)
    found = load_reference(path, extractor="digits", dim=3)
    assert "its extractor is not recorded, it is compared with any that has 3 f" in found.assumed
    assert torch.equal(found.stats.mean, stats.mean)
    assert torch.equal(found.stats.cov, stats.cov)
    assert (found.count, list(load_all_references(path))) == (None, [""])
    assert found.assumed.endswith("extra left aside")
    assert dress == "pkl" or kind_of(path) == "reference"


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pt"])
def test_features_beside_moments_are_kept(suffix: str, tmp_path: Path) -> None:
    features, path = draw(40, 3), tmp_path / f"a.{suffix}"
    stats = feature_stats(features)
    labels = torch.arange(len(features[:9]))
    tensors = {"mu": stats.mean, "sigma": stats.cov, "features": features[:9], "labels": labels}
    if suffix == "npz":
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        np.savez(path, **arrays)
    elif suffix == "pt":
        torch.save(tensors, path)
    else:
        save_tensors(path, tensors)
    found = load_reference(path)
    assert torch.equal(found.stats.cov, stats.cov)  # of all images, not of the nine that are kept
    assert torch.equal(found.require_features("kid"), features[:9])
    assert found.labels is not None
    assert torch.equal(found.labels, labels)
    assert "left aside" not in found.assumed


def test_dgm_eval_files_hold_features(tmp_path: Path) -> None:
    features = draw(40, 4)
    options = np.array({"model": "dinov2"}, dtype=object)
    np.savez(tmp_path / "a.npz", reps=features.numpy(), hparams=options)
    found = load_reference(tmp_path / "a.npz")
    expected = feature_stats(features)
    assert found.count == 40
    assert found.features is not None
    assert torch.equal(found.features, features)
    assert torch.equal(found.stats.cov, expected.cov)


def test_our_own_features_serve_as_a_reference(tmp_path: Path) -> None:
    features = draw(40, 4)
    saved = SavedFeatures(features=features, extractor="digits", extractor_sha256="a" * 64)
    save_features(tmp_path / "a.safetensors", saved)
    found = load_reference(tmp_path / "a.safetensors", extractor="digits", sha256="a" * 64)
    assert (found.count, found.assumed) == (40, "")
    with pytest.raises(StatisticsError, match="of extractor 'digits', expected 'inception'"):
        load_reference(tmp_path / "a.safetensors", extractor="inception")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.array([0, math.nan]), "sigma": np.eye(2)}, "finite moments, got 1 entries"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), math.inf)}, "finite moments, got 4 entries"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0, 1]])}, "a symmetric covariance"),
        ({"mu": np.zeros(2), "sigma": np.diag([1.0, -0.1])}, "variances of at least 0, got -0.1"),
        ({"mu": np.zeros(2), "sigma": np.ones((2, 3))}, r"\(D, D\), got shapes \(2,\) and \(2, 3"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"\(D, D\), got shapes \(2,\) and \(3, 3\)"),
        ({"mu": np.zeros((2, 1)), "sigma": np.eye(2)}, r"a mean \(D,\) .* shapes \(2, 1\)"),
        ({"mu": np.zeros(2, complex), "sigma": np.eye(2)}, "'mu' .* a floating type, found type c"),
        ({"mu": np.zeros(2), "sigma": np.eye(2, dtype=int)}, "'sigma' .* type, found type int64"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "reps": np.ones((9, 3))}, r"\(M, 2\), got \(9, 3"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "at least 1 dimension"),
        ({"mu": np.zeros(20_000), "sigma": np.eye(2)}, "of 20000 dimensions, at most 16384"),
        ({"other": np.zeros(2)}, "expected 'mu' and 'sigma', or 'reps', found 'other'"),
        ({"reps": np.ones((1, 4))}, "at least 2 feature rows, got 1"),
        ({"reps": np.full((3, 4), math.nan)}, "finite features, got 3 of 3 rows"),
        ({"reps": np.ones((3, 4), np.int64)}, r"features \(N, D\) of a floating type, found"),
        ({"reps": np.ones(3)}, r"features \(N, D\) of a floating type, found \(3,\)"),
    ],
)
def test_npz_files_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(StatisticsError, match=rf"a\.npz: {message}|a\.npz: .*{message}"):
        load_reference(tmp_path / "a.npz")


def test_npz_pickles_are_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.array([Evil()], dtype=object), sigma=np.eye(1))
    with pytest.raises(DataFileError, match="'mu' is of type object, expected numbers"):
        load_reference(tmp_path / "a.npz")


# ----------------------------------------------------------------------------------------- ours


def test_features_and_labels_are_kept(tmp_path: Path) -> None:
    features, labels = draw(30, 4), torch.arange(30) % 3
    stats = feature_stats(features)
    path = tmp_path / "a.safetensors"
    save_reference(
        path, stats, extractor="digits", preprocessing="none", features=features[::3],
        labels=labels[::3],
    )  # fmt: skip
    found = load_reference(path)
    assert found.features is not None
    assert found.labels is not None
    assert torch.equal(found.features, features[::3])
    assert torch.equal(found.labels, labels[::3])
    assert (found.count, found.preprocessing, found.assumed) == (30, "none", "")
    assert torch.equal(found.require_features("kid"), features[::3])
    save_reference(path, stats, extractor="digits", labels=labels)  # of what, without features?
    assert load_reference(path).labels is None
    message = r"a: kid compares .* hold moments alone; .* `mergerl reference --keep-features`"
    with pytest.raises(StatisticsError, match=message):
        load_reference(path).require_features("kid", "a")


def test_features_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stats, path = feature_stats(draw(30, 4)), tmp_path / "a.safetensors"
    save_reference(path, stats, extractor="digits", features=draw(30, 5))
    with pytest.raises(StatisticsError, match=r"expected features \(M, 4\), got \(30, 5\)"):
        load_reference(path)
    save_reference(path, stats, extractor="digits", features=draw(9, 4), labels=torch.arange(8))
    with pytest.raises(StatisticsError, match="the label, for each row of features"):
        load_reference(path)
    save_reference(path, stats, extractor="digits", features=draw(9, 4))
    found = open_tensors(path)
    halves = {**found.weights, "labels": torch.full((9,), 1.5)}
    save_tensors(path, halves, found.metadata)
    with pytest.raises(StatisticsError, match="expected a whole number, the label, for each row"):
        load_reference(path)


def test_moments_of_one_image_are_refused(tmp_path: Path) -> None:
    stats, path = feature_stats(draw(30, 4)), tmp_path / "a.safetensors"
    one = type(stats)(1, stats.mean, stats.cov)
    save_reference(path, one, extractor="digits")
    with pytest.raises(TooFewSamplesError, match="a.safetensors: .* at least 2 samples .*, got 1"):
        load_reference(path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a.zip", r"a file with the ending '\.zip'; `mergerl reference` makes them of images"),
        ("a.csv", r"a file with the ending '\.csv'$"),
        ("pictures", r"images \(1 \.png\); `mergerl reference` makes them of images"),
        ("nothing", "nothing$"),
    ],
)
def test_what_holds_no_statistics_is_called_what_it_is(
    name: str, told: str, tmp_path: Path
) -> None:
    for folder in ("pictures", "nothing"):
        (tmp_path / folder).mkdir()
    for file in ("a.zip", "a.csv", "pictures/a.png"):
        (tmp_path / file).write_bytes(b"a")
    message = r"expected statistics or features as a file of \.safetensors, .*\.pth, found " + told
    with pytest.raises(StatisticsError, match=message):
        load_reference(tmp_path / name)


def test_kinds(tmp_path: Path, edm2: Path, shared_tiny: Path) -> None:
    for name in ("folder", "zip.zip"):
        (tmp_path / name).mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a.safetensors").touch()
    np.savez(tmp_path / "f.npz", reps=np.ones((2, 2)))
    np.savez(tmp_path / "i.npz", arr_0=np.ones((2, 2, 2, 3), np.uint8))
    np.savez(tmp_path / "arr.npz", np.ones((2, 2)))
    save_features(tmp_path / "f.safetensors", SavedFeatures(features=draw(3, 2)))
    expected: dict[str | Path, str] = {
        tmp_path / "folder": "images",
        tmp_path / "missing.zip": "images",
        tmp_path / "i.npz": "images",
        tmp_path / "model": "model",
        tmp_path / "missing": "model",
        shared_tiny / "raw/tiny-0000100.safetensors": "model",
        tmp_path / "f.npz": "features",
        tmp_path / "arr.npz": "features",
        tmp_path / "f.safetensors": "features",
        shared_tiny / "evaluation/reference.safetensors": "reference",
        f"{edm2}/tiny_ref.pkl#fid": "reference",
    }
    assert {path: kind_of(path) for path in expected} == expected
    (tmp_path / "folder/a.pt").touch()
    with pytest.raises(StatisticsError, match=r"found 1 \.pt; `mergerl convert` makes them from"):
        kind_of(tmp_path / "folder")


@pytest.mark.parametrize(("count", "singular"), [(1, True), (5, True), (6, False)])
def test_as_many_images_as_features_are_too_few(count: int, singular: bool) -> None:
    said = f"{count} images for 5 features: the covariance is singular, and a Fréchet distance "
    assert few_images(count, 5) == ([f"{said}says little"] if singular else [])
