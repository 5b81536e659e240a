"""Saved features: what is read, in whatever file and dress, and what a path is taken for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_rl.errors import MergeRLError, RunError, StatisticsError
from merge_rl.storage.files import save_tensors
from merge_rl.workflows.reference import kind_of, load_features, load_reference
from merge_rl.workflows.reference.features import FeatureStore, weights_digest


def draw() -> Tensor:
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(3))


FEATURES = draw()


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", ">f8", "longdouble", "f2"])
@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_features_in_every_dress(kind: str, suffix: str, tmp_path: Path) -> None:
    path, array = tmp_path / f"a.{suffix}", FEATURES.numpy().astype(kind)
    if suffix == "npz":
        np.savez(path, reps=array, labels=np.array([str(i) for i in range(7)]))
    else:
        np.save(path, array)
    found = load_features(path)
    expected = FEATURES.half().float() if kind == "f2" else FEATURES
    assert found.features.dtype == torch.float32
    assert torch.equal(found.features, expected)
    assert (found.labels is None) == (suffix == "npy")
    if found.labels is not None:
        assert found.labels.tolist() == [*range(7)]
    assert kind_of(path) == "features"
    assert load_reference(path).count == 7


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pt"])
def test_features_under_two_names_are_refused(suffix: str, tmp_path: Path) -> None:
    path, both = tmp_path / f"a.{suffix}", {"features": FEATURES, "reps": FEATURES + 1}
    if suffix == "npz":
        np.savez(path, **{name: value.numpy() for name, value in both.items()})  # type: ignore[arg-type]
    elif suffix == "pt":
        torch.save(both, path)
    else:
        save_tensors(path, both)
    for read in (load_features, load_reference):
        with pytest.raises(StatisticsError, match=r"a\.\w+: expected .* or 'reps', found both$"):
            read(path)


def test_one_matrix_alone_needs_no_name(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, FEATURES.numpy())  # as arr_0
    assert torch.equal(load_features(path).features, FEATURES)
    np.savez(path, x=FEATURES.numpy())
    assert torch.equal(load_features(path).features, FEATURES)
    assert kind_of(path) == "features"
    assert load_reference(path).count == 7
    np.savez(path, FEATURES.numpy(), np.arange(7))  # labels as arr_1
    listed = load_features(path)
    assert torch.equal(listed.features, FEATURES)
    assert listed.labels is not None
    assert listed.labels.tolist() == [*range(7)]
    for others, found in (({"x": np.zeros(3)}, "'x'"), ({"mu": 1, "sigma": 2}, "'mu', 'sigma'")):
        np.savez(path, **others)
        with pytest.raises(StatisticsError, match=f"as 'features' or 'reps', found {found}$"):
            load_features(path)
    (tmp_path / "a.PKL").touch()
    with pytest.raises(StatisticsError, match=r"a file of .safetensors, .npz, .*, found .pkl$"):
        load_features(tmp_path / "a.PKL")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_features_that_torch_saved(named: bool, legacy: bool, tmp_path: Path) -> None:
    path, labels = tmp_path / "a.pt", torch.arange(7)
    value = {"features": FEATURES, "labels": labels} if named else FEATURES
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    found = load_features(path)
    assert torch.equal(found.features, FEATURES)
    assert (None if found.labels is None else found.labels.tolist()) == (
        [*range(7)] if named else None
    )
    assert kind_of(path) == "features"
    assert load_reference(path).dim == 3
    torch.save({"features": FEATURES, "labels": labels.tolist()}, path)
    listed = load_features(path).labels
    assert listed is not None
    assert listed.tolist() == [*range(7)]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.zeros(3, 2).int(), r"<tensor int32 \[3, 2\]>"),
        ({"features": torch.zeros(3)}, "a mapping of 'features'"),
        (dict.fromkeys("abcde", torch.zeros(3, 2)), "a mapping of 'a', 'b', 'c', 'd', ..."),
        ([torch.zeros(3, 2)], "'list'"),
        (None, "nothing"),
    ],
)
def test_what_torch_saved_is_called_what_it_is(value: object, found: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "a.pt")
    expected = r"\(N, D\) of a floating type, alone or as 'features' or 'reps', found "
    with pytest.raises(StatisticsError, match=rf"{expected}{found}$"):
        load_reference(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "labels",
    [
        np.array([None] * 7), np.array(["cat"] * 7), np.arange(3), np.arange(7) + 0.5,
        np.zeros((7, 2)), np.zeros(7, "M8[s]"),
    ],
)  # fmt: skip
def test_features_do_not_need_labels(labels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", features=FEATURES.numpy(), labels=labels)
    found = load_features(tmp_path / "a.npz")
    assert found.labels is None
    assert torch.equal(found.features, FEATURES)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([["a"]]), "'reps' is of type <U1, expected numbers"),
        (np.array([[None]]), "'reps' is of type object, expected numbers"),
        (np.zeros((2, 3), int), r"expected features \(N, D\) of a floating type, found \(2, 3\)"),
        (np.zeros((2, 3), complex), "of a floating type, found .* of type complex128"),
        (np.zeros(3), r"of a floating type, found \(3,\)"),
        (np.zeros((2, 3), "M8[s]"), "of type datetime64.s., expected numbers"),
        (np.zeros((2, 3), bool), "of type bool"),
    ],
)
def test_what_features_cannot_be(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", reps=array)
    with pytest.raises(MergeRLError, match=message):
        load_features(tmp_path / "a.npz")


def test_what_a_file_of_arrays_is_taken_for(tmp_path: Path) -> None:
    path, images = tmp_path / "a.npz", np.zeros((4, 8, 8, 3), np.uint8)
    for arrays, kind in (
        ({"arr_0": images}, "images"),
        ({"x_test": images, "y_test": np.arange(4)}, "images"),
        ({"reps": FEATURES.numpy(), "arr_0": images}, "features"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "arr_0": images}, "reference"),
    ):
        np.savez(path, **arrays)
        assert kind_of(path) == kind
    np.savez(path, weights=np.zeros((2, 2)), one=images, two=images)
    message = (
        r"expected images \('images' or 'arr_0'\), features \('features' or 'reps'\) or statistics "
        r"\('mu' and 'sigma'\), found 'weights' \(2, 2\) of type float64, 'one' \(4, 8, 8, 3\)"
    )
    with pytest.raises(StatisticsError, match=message):
        kind_of(path)
    torch.save({"net": torch.zeros(2, 2)}, tmp_path / "a.pt")
    assert kind_of(tmp_path / "a.pt") == "model"
    big = FEATURES.numpy().astype(">f8")
    for value in (big, {"reps": big, "labels": np.arange(len(big), dtype=">i4")}):
        torch.save(value, tmp_path / "a.pt")
        assert kind_of(tmp_path / "a.pt") == "features"
        torch.testing.assert_close(load_reference(tmp_path / "a.pt").features, FEATURES)
    for odd, found in ((list(FEATURES), "'list'"), (torch.ones(2, 2).long(), "int64")):
        torch.save(odd, tmp_path / "a.pt")
        with pytest.raises(StatisticsError, match=f"alone or by name, or weights, found .*{found}"):
            kind_of(tmp_path / "a.pt")
    # Whoever saved them.
    save_tensors(tmp_path / "f.safetensors", {"features": FEATURES})
    torch.testing.assert_close(load_reference(tmp_path / "f.safetensors").features, FEATURES)


def test_blocks_are_those_of_one_evaluation(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "kept", extractor="mine", sha256="ab", key={"model": "m"})
    rows = torch.randn(3, 2)
    assert store.load("block", {"steps": 4}) is None
    store.save("block", {"steps": 4}, rows, torch.arange(3))
    found = store.load("block", {"steps": 4})
    assert found is not None
    assert torch.equal(found, rows)
    saved = load_features(store.file("block"))
    assert (saved.extractor, saved.extractor_sha256) == ("mine", "ab")
    assert saved.labels is not None
    assert saved.labels.tolist() == [0, 1, 2]
    with pytest.raises(RunError, match="another evaluation: its steps is 4, expected 5; choose an"):
        store.load("block", {"steps": 5})
    other = FeatureStore(tmp_path / "kept", extractor="mine", sha256=None, key={"model": "n"})
    with pytest.raises(RunError, match="its (model is m, expected n|extractor_sha256 is ab)"):
        other.load("block", {"steps": 4})
    other.save("new", {}, rows)
    assert load_features(other.file("new")).extractor_sha256 is None


def test_weights_have_a_hash_of_names_shapes_and_values() -> None:
    first, second = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    assert weights_digest(first) != weights_digest(second)
    second.load_state_dict(first.state_dict())
    assert weights_digest(first) == weights_digest(second)
    assert weights_digest(3) == weights_digest(4) != weights_digest("text")
