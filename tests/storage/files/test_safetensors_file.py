"""Safetensors files: broken ones get one sentence that names the file, whoever opens them."""

from __future__ import annotations

import hashlib
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
from merge_rl.storage.files.safetensors_file import map_file, read_file
from merge_rl.storage.files.safetensors_header import CODES, Header, TensorInfo, read_header

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
    message = rf"a\.safetensors: not a valid .*truncated \(it has {path.stat().st_size} bytes\)"
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoints(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=message):
        open_model_file(path)


BROKEN: dict[str, tuple[object, bytes, str]] = {
    "garbage": (bytes(range(200, 240)), b"", "header"),
    "a list": ([1], b"", "invalid JSON in header"),
    "nested": (b"[" * 200_000, b"", "invalid JSON in header"),
    "half a character": (b'{"__metadata__":{"a":"\\ud800"}}', b"", "invalid JSON in header"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, FOUR, "missing field"),
    "no dict": ({"a": 3}, FOUR, "invalid JSON in header"),
    "unknown type": ({"a": tensor_entry(0, 4, dtype="Q3")}, FOUR, "unknown variant `Q3`"),
    "type without tensors": (
        {"a": tensor_entry(0, 3, dtype="F6_E2M3", shape=[4])},
        FOUR[:3],
        "tensor 'a' has dtype 'F6_E2M3', expected one that torch has",
    ),
    "dtype of no text": ({"a": tensor_entry(0, 4, dtype=[])}, FOUR, "invalid JSON in header"),
    "negative shape": ({"a": tensor_entry(0, 4, shape=[-1])}, FOUR, "invalid JSON in header"),
    "fractional shape": ({"a": tensor_entry(0, 4, shape=[1.0])}, FOUR, "invalid JSON in header"),
    "flag as shape": ({"a": tensor_entry(0, 4, shape=[True])}, FOUR, "invalid JSON in header"),
    "impossible shape": (
        {"a": tensor_entry(0, 0, shape=[0, 2**40, 2**40])},
        b"",
        "has the impossible shape",
    ),
    "three offsets": ({"a": tensor_entry(0, 4, data_offsets=[0, 4, 8])}, FOUR, "invalid JSON"),
    "backward offsets": ({"a": tensor_entry(4, 0)}, FOUR, "invalid offset for tensor `a`"),
    "wrong span": ({"a": tensor_entry(0, 8)}, FOUR * 2, "invalid"),
    "overlap": (
        {"a": tensor_entry(0, 4), "b": tensor_entry(2, 6)},
        FOUR * 2,
        "offset for tensor `b`",
    ),
    "same place": (
        {"a": tensor_entry(0, 4), "b": tensor_entry(0, 4)},
        FOUR,
        "offset for tensor `[ab]`",
    ),
    "gap": ({"a": tensor_entry(4, 8)}, FOUR * 2, "invalid offset for tensor `a`"),
    "beyond the end": ({"a": tensor_entry(0, 4)}, FOUR[:3], "truncated .*file not fully covered"),
    "bytes left": ({"a": tensor_entry(0, 4)}, FOUR * 2, "file not fully covered"),
    "metadata": ({"__metadata__": {"a": 1}, "a": tensor_entry(0, 4)}, FOUR, "expected a string"),
    "metadata twice": (
        b'{"__metadata__":{}, "a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}, '
        b'"__metadata__":{}}',
        FOUR,
        "duplicate field",
    ),
}
ENTRY = json.dumps(tensor_entry(0, 4))
READ: dict[str, tuple[object, dict[str, str]]] = {
    "no metadata": ({"__metadata__": None, "a": tensor_entry(0, 4)}, {}),
    "more about a tensor": ({"a": tensor_entry(0, 4, layout="rows")}, {}),
    "a tensor as a list": ({"a": ["F32", [1], [0, 4]]}, {}),
    "spaces around": (f'  {{ "a": {ENTRY} }}  '.encode(), {}),
    "name twice": (
        f'{{"a": {ENTRY}, "__metadata__": {{"x": "y"}}, "a": {ENTRY}}}'.encode(),
        {"x": "y"},
    ),
}


@pytest.mark.parametrize("case", READ)
def test_what_the_library_reads_is_read(tmp_path: Path, case: str) -> None:
    header, metadata = READ[case]
    path = raw_file(tmp_path / "a.safetensors", header, FOUR)
    assert safetensors.torch.load_file(path)["a"].tolist() == [1.0]
    opened = open_checkpoints(tmp_path)
    assert opened.read(0)["a"].tolist() == [1.0]
    assert opened.read_tensor(0, "a").tolist() == [1.0]
    assert opened.metadata(0) == open_model_file(path).metadata == metadata


@pytest.mark.parametrize("name", CODES)
def test_every_type_of_torch_is_read_as_the_library_reads_it(tmp_path: Path, name: str) -> None:
    size = TensorInfo((), name).itemsize
    # Small numbers, neither NaN nor infinite in any type.
    data = bytes(1 if i % size == size - 1 else 0 for i in range(3 * size))
    header = {"a": tensor_entry(0, 3 * size, dtype=name, shape=[3])}
    path = raw_file(tmp_path / "a.safetensors", header, data)
    if name == "F8_E8M0" and not hasattr(torch, "float8_e8m0fnu"):
        with pytest.raises(
            CheckpointError, match="expected a type that torch has, found 'F8_E8M0'"
        ):
            open_model_file(path)
        return
    try:
        expected = safetensors.torch.load_file(path)["a"]
    except safetensors.SafetensorError:  # a version that does not know it yet
        with pytest.raises(CheckpointError, match=f"unknown variant `{name}`"):
            open_model_file(path)
        return
    found = open_model_file(path).weights["a"]
    assert found.dtype == expected.dtype == TensorInfo((), name).dtype
    assert size == expected.dtype.itemsize
    assert TensorInfo.of((3,), expected.dtype) == TensorInfo((3,), name)
    assert TensorInfo((), name).is_floating == expected.dtype.is_floating_point
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert (
        open_checkpoints(tmp_path).verify().__next__().sha256
        == hashlib.sha256(path.read_bytes()).hexdigest()
    )


def test_a_file_that_is_replaced_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is hashed must be what is returned: the header and the values are of one file.
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"w": torch.ones(2)})

    def replaced(where: Path) -> Header:
        header = read_header(where)
        save_tensors(where, {"w": torch.zeros(2)})
        return header

    monkeypatch.setattr("merge_rl.storage.files.safetensors_file.read_header", replaced)
    with pytest.raises(CheckpointError, match="a.safetensors: the file was replaced while it was"):
        read_file(path, hashed=True)


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
    with pytest.raises(CheckpointError, match=r"it has 10 bytes\): header too large"):
        open_checkpoints(tmp_path)


def test_a_pickle_under_the_wrong_name_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        open_checkpoints(tmp_path)


def test_metadata_is_written_where_there_is_some(tmp_path: Path) -> None:
    for name, metadata in (("a", {"b": "2", "a": "1"}), ("b", {})):
        save_tensors(tmp_path / f"{name}.safetensors", {"x": torch.ones(2)}, metadata)
        header = read_header(tmp_path / f"{name}.safetensors")
        assert header.metadata == metadata
        text = (tmp_path / f"{name}.safetensors").read_bytes()
        assert (b"__metadata__" in text) == bool(metadata)


def test_a_file_that_is_gone_is_not_mapped(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    header = read_header(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be mapped into memory: "):
        map_file(tmp_path / "a.safetensors", header)
