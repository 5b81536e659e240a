"""Hashes of a set's files: found once, compared with what is known; and which files are equal."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from merge_rl.errors import HashMismatchError
from merge_rl.storage.checkpoints import hashes
from merge_rl.storage.checkpoints.hashes import FileHashes, find_duplicates, without
from merge_rl.storage.checkpoints.listing import Listing, list_folder, read_headers
from merge_rl.storage.checkpoints.manifest import CheckpointEntry
from merge_rl.storage.files import StoredWeights, open_weights, save_tensors

Read = tuple[Listing, list[StoredWeights]]


def save(folder: Path, **values: Sequence[float]) -> Read:
    """Files of one tensor each, by name, opened."""
    for name, numbers in values.items():
        save_tensors(folder / f"{name}.safetensors", {"w": torch.tensor(numbers)})
    listing = list_folder(folder)
    return listing, read_headers(listing)[0]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_hash_is_known_until_the_file_changes(tmp_path: Path) -> None:
    listing, headers = save(tmp_path, a=[1.0], b=[2.0])
    paths = [listing.path(0), listing.path(1)]
    found = FileHashes(paths, headers, [None, digest(paths[1])])
    assert (found.known(0), found.to_compare(), found.missing()) == (None, [1], [0, 1])
    assert [found.get(0), found.known(0)] == [digest(paths[0])] * 2
    assert (found.to_compare(), found.missing()) == ([1], [1])
    found.compare()
    assert (found.known(1), found.to_compare(), found.missing()) == (digest(paths[1]), [], [])
    found.forget(1)
    assert (found.known(1), found.missing()) == (None, [1])
    os.utime(paths[0], ns=(1, 1))
    assert (found.known(0), found.missing()) == (None, [0, 1])
    assert found.get(0) == digest(paths[0])


def test_another_hash_than_is_recorded_or_demanded_is_refused(tmp_path: Path) -> None:
    listing, headers = save(tmp_path, a=[1.0], b=[2.0])
    paths = [listing.path(0), listing.path(1)]
    right = digest(paths[0])
    found = FileHashes(paths, headers, [None, "0" * 64])
    with pytest.raises(HashMismatchError, match=rf"b.safetensors: .*{digest(paths[1])}"):
        found.compare()
    found.demand(0, right, lambda other: f"not {other}")
    assert found.to_compare() == [0, 1]
    found.learn(0, found.stamp(0))
    assert (found.to_compare(), found.known(0)) == ([1], right)
    found.demand(0, "f" * 64, lambda other: f"demanded, found {other}")
    assert found.to_compare() == [0, 1]
    with pytest.raises(HashMismatchError, match=f"^demanded, found {right}$"):
        found.learn(0, found.stamp(0))
    with pytest.raises(HashMismatchError, match="^demanded, found abc$"):  # as it is given
        found.learn(0, found.stamp(0), "abc")


def test_of_equal_files_the_one_stays_whose_name_tells_most(tmp_path: Path) -> None:
    listing, headers = save(
        tmp_path, alike=[1.0, 2.0], b=[1.0, 3.0], same=[1.0, 2.0], step_7=[1.0, 2.0]
    )
    names = listing.names
    assert names == ("alike", "b", "same", "step_7")
    found = find_duplicates(listing, headers)
    assert found == {0: 3, 2: 3}
    kept, left = without(listing, headers, found)
    assert (kept.names, [h.path.stem for h in left]) == (("b", "step_7"), ["b", "step_7"])
    assert [entry.file for entry in kept.entries] == ["b.safetensors", "step_7.safetensors"]
    (tmp_path / "one").mkdir()
    assert find_duplicates(*save(tmp_path / "one", a=[1.0])) == {}


def test_what_a_manifest_records_otherwise_repeats_nothing(tmp_path: Path) -> None:
    _, headers = save(tmp_path, a=[1.0], b=[1.0])
    right = digest(tmp_path / "a.safetensors")

    def repeated(*recorded: str | None) -> dict[int, int]:
        files = zip(("a.safetensors", "b.safetensors"), recorded, strict=True)
        entries = tuple(CheckpointEntry(file=file, sha256=sha256) for file, sha256 in files)
        listing = Listing(folder=tmp_path, manifest=None, entries=entries, names=("a", "b"))
        return find_duplicates(listing, headers)

    for recorded in ((None, None), (right, None), (None, right), (right, right), ("0" * 64, right)):
        assert repeated(*recorded) == {1: 0}
    assert repeated(right, "0" * 64) == {}


@pytest.mark.parametrize("place", range(7))
def test_samples_and_bytes_tell_files_apart(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two tensors of three and four numbers; samples and pieces smaller than a tensor.
    for name, changed in (("a", None), ("b", place)):
        numbers = torch.arange(7.0)
        if changed is not None:
            numbers[changed] += 0.5
        save_tensors(tmp_path / name, {"v": numbers[:3], "w": numbers[3:]})
    one, other = (
        open_weights((tmp_path / name).rename(tmp_path / f"{name}.safetensors")) for name in "ab"
    )
    monkeypatch.setattr(hashes, "CHUNK", 8)
    assert not hashes._same_bytes(one, other)
    assert hashes._same_bytes(one, one)
    monkeypatch.setattr(hashes, "SAMPLES", 7)  # one a number
    monkeypatch.setattr(hashes, "SAMPLE_BYTES", 4)
    assert hashes._digest(one, ["v", "w"]) != hashes._digest(other, ["v", "w"])
    whole = torch.arange(7.0).numpy().tobytes()
    assert hashes._digest(one, ["v", "w"]) == hashlib.sha256(whole).hexdigest()
    monkeypatch.setattr(hashes, "SAMPLE_BYTES", 8)  # which end with their tensor
    spread = [whole[4 * i : min(4 * i + 8, 12 if i < 3 else 28)] for i in range(7)]
    assert hashes._digest(one, ["v", "w"]) == hashlib.sha256(b"".join(spread)).hexdigest()
