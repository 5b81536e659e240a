"""Safetensors files: broken ones get one sentence that names the file, whoever opens them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.storage.checkpoints.model_file import open_model_file
from merge_rl.storage.files.atomic import save_tensors

FOUR = b"\0\0\x80\x3f"


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with this header, well-formed or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor_entry(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [begin, end], **changes}


def test_files_of_the_library_are_read_even_when_unaligned(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(3, 2).half(), "gain": torch.tensor(2.5), "n": torch.tensor([1])}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"x": "y"})
    # A header of odd length puts every tensor on an odd address.
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    header = json.dumps({"a": tensor_entry(0, 8, shape=[2])}).encode()
    (tmp_path / "odd").mkdir()
    raw_file(tmp_path / "odd/b.safetensors", header + b" " * (1 - len(header) % 2), data)
    found, odd = open_checkpoints(tmp_path).read(0), open_checkpoints(tmp_path / "odd").read(0)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
    assert odd["a"].tolist() == [1.5, -2.0]
    # Where a file keeps its values must not decide how sums of them round.
    for tensor in (*found.values(), *odd.values()):
        assert tensor.data_ptr() % 64 == torch.empty(tensor.numel()).data_ptr() % 64 == 0


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 50, 0.5, 0.9, -9, -1])
def test_truncated_files(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"w": torch.ones(3, 2), "steps": torch.tensor([3])})
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else int(kept)])
    message = r"a\.safetensors: (the file is truncated|not a valid safetensors file)"
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoints(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=message):
        open_model_file(path)


BROKEN: dict[str, tuple[object, bytes, str]] = {
    "garbage": (bytes(range(200, 240)), b"", "its header is not JSON"),
    "a list": ([1], b"", "its header is not a JSON object"),
    "nested": (b"[" * 200_000, b"", "its header is not JSON"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, FOUR, "lacks dtype, shape or data_off"),
    "no dict": ({"a": 3}, FOUR, "lacks dtype, shape or data_offsets"),
    "unknown type": (
        {"a": tensor_entry(0, 4, dtype="Q3")},
        FOUR,
        "has dtype 'Q3', expected one of",
    ),
    "dtype of no text": ({"a": tensor_entry(0, 4, dtype=[])}, FOUR, r"has dtype \[\]"),
    "negative shape": ({"a": tensor_entry(0, 4, shape=[-1])}, FOUR, r"has shape \[-1\]"),
    "fractional shape": ({"a": tensor_entry(0, 4, shape=[1.0])}, FOUR, r"has shape \[1.0\]"),
    "flag as shape": ({"a": tensor_entry(0, 4, shape=[True])}, FOUR, r"has shape \[True\]"),
    "impossible shape": (
        {"a": tensor_entry(0, 0, shape=[0, 2**40, 2**40])},
        b"",
        "has the impossible shape",
    ),
    "three offsets": ({"a": tensor_entry(0, 4, data_offsets=[0, 4, 8])}, FOUR, "and offsets"),
    "backward offsets": ({"a": tensor_entry(4, 0)}, FOUR, "needs 4 bytes, its offsets span -4"),
    "wrong span": ({"a": tensor_entry(0, 8)}, FOUR * 2, "needs 4 bytes, its offsets span 8"),
    "overlap": (
        {"a": tensor_entry(0, 4), "b": tensor_entry(2, 6)},
        FOUR * 2,
        "tensor 'b' at offset 2 overlaps the one before it, expected 4",
    ),
    "same place": ({"a": tensor_entry(0, 4), "b": tensor_entry(0, 4)}, FOUR, "overlaps the one"),
    "gap": ({"a": tensor_entry(4, 8)}, FOUR * 2, "leaves a gap before it"),
    "beyond the end": ({"a": tensor_entry(0, 4)}, FOUR[:3], "truncated: its tensors take 4 bytes"),
    "bytes left": ({"a": tensor_entry(0, 4)}, FOUR * 2, "4 bytes follow the last tensor"),
    "metadata": ({"__metadata__": {"a": 1}, "a": tensor_entry(0, 4)}, FOUR, "map text to text"),
    "name twice": (
        b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": 1}',
        FOUR,
        "a name appears twice",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers(tmp_path: Path, case: str) -> None:
    header, data, message = BROKEN[case]
    path = raw_file(tmp_path / "a.safetensors", header, data)
    for opener in (open_checkpoints, open_model_file):
        with pytest.raises(CheckpointError, match=message) as caught:
            opener(tmp_path)
        assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(
        CheckpointError, match=f"header would take {length} bytes, at most 100000000"
    ):
        open_checkpoints(tmp_path)


def test_a_pickle_under_the_wrong_name_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        open_checkpoints(tmp_path)
