"""Git LFS pointers: whoever opens one is told what it is and what to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import merge_rl as mrl
from merge_rl.errors import MergeRLError
from merge_rl.storage.checkpoints.model_file import open_model_file
from merge_rl.storage.convert.run import convert
from merge_rl.storage.files.image_source import ImageStream, open_images
from merge_rl.storage.files.npz import npz_arrays
from merge_rl.storage.pickles.reading import read_data
from merge_rl.untrusted import load_yaml
from merge_rl.workflows.assembly.networks import load_weights
from merge_rl.workflows.reference import load_reference

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 334643276\n"
)


def read_image(path: Path) -> None:
    source = open_images(path.parent)
    list(ImageStream(source).batches(range(len(source)), 1))


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "set": ("a.safetensors", lambda path: mrl.open_checkpoints(path.parent)),
    "model": ("a.safetensors", open_model_file),
    "safetensors to convert": ("a.safetensors", lambda path: convert(path, path.parent / "out")),
    "snapshot": ("a.pkl", lambda path: convert(path, path.parent / "out")),
    "torch file": ("a.pt", read_data),
    "weights of an extractor": ("a.pth", lambda path: load_weights(str(path))),
    "statistics": ("a.npz", load_reference),
    "old statistics": ("a.pkl", load_reference),
    "arrays": ("a.npz", npz_arrays),
    "pictures in an archive": ("a.zip", open_images),
    "a picture": ("a.png", read_image),
    "a document": ("a.yaml", load_yaml),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pointer_is_called_one(tmp_path: Path, reader: str) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(MergeRLError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path)) or reader == "a picture"
    assert str(caught.value).endswith(
        "a Git LFS pointer to a file of 334,643,276 bytes, which was not fetched; "
        "run `git lfs pull` in its repository"
    )
    assert not (tmp_path / "out").exists()


def test_content_that_only_resembles_a_pointer_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", version=np.frombuffer(POINTER, np.uint8))
    assert npz_arrays(tmp_path / "a.npz")["version"].shape == (len(POINTER),)
    (tmp_path / "a.yaml").write_text("note: version https://git-lfs.github.com/spec/v1\n")
    assert load_yaml(tmp_path / "a.yaml") == {"note": "version https://git-lfs.github.com/spec/v1"}
