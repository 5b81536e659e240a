"""Safetensors files piece by piece: what is read, hashed, counted and written, to the byte."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merge_rl.errors import CheckpointError, NonFiniteWeightsError
from merge_rl.storage.files import safetensors_file as files
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.storage.files.safetensors_header import Header, TensorInfo, code_of, read_header
from tests.storage.files.test_safetensors_file import raw_file, tensor_entry

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Header]:
    """Ten bytes of `w`, after a header."""
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"w": torch.arange(1, 11, dtype=torch.uint8)})
    return path, read_header(path)


class Failing(io.BytesIO):
    """A disk that fails while it is read."""

    def read(self, _size: int | None = -1, /) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    def fileno(self) -> int:
        return 0


def test_the_hash_is_that_of_the_file_where_it_is_asked_for(
    stored: tuple[Path, Header], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, header = stored
    monkeypatch.setattr(files, "CHUNK_BYTES", 4)  # of which ten bytes are no multiple
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    found, tensors, digest = files.read_file(path, hashed=True)
    assert (found, digest) == (header, expected)
    assert tensors["w"].tolist() == list(range(1, 11))
    assert files.read_file(path, hashed=False)[2] is None
    assert files.check_file(path, header) == (expected, None)


def test_a_disk_that_fails_is_told_in_the_systems_words(
    stored: tuple[Path, Header], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, header = stored
    message = r"a\.safetensors: cannot be read: "
    with pytest.raises(CheckpointError, match=message + "No such file or directory$"):
        files.TensorReader(path.parent / "no/a.safetensors", header)
    reader = files.TensorReader(path, header)
    reader.__exit__()
    with pytest.raises(ValueError, match="closed file"):
        reader.fill(memoryview(bytearray(1)), 0)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, files.TensorReader(path, header) as reader:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match=message + "Input/output error$"):
            reader.fill(memoryview(bytearray(1)), 0)
    monkeypatch.setattr(files, "open_file", lambda _path: Failing())
    monkeypatch.setattr(files, "_stamp", lambda _status: (0, 0, 0, 0))
    for read in (
        lambda: files.read_file(path, hashed=True),
        lambda: files.check_file(path, header),
    ):
        with pytest.raises(CheckpointError, match=message + "Input/output error$"):
            read()


def test_parts_are_filled_by_reads_that_may_be_short(
    stored: tuple[Path, Header], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, header = stored
    calls, read = list[int](), os.preadv

    def three_at_most(file: int, targets: list[memoryview], begin: int) -> int:
        calls.append(begin)
        assert len(calls) < 9  # else it would go on for ever
        return read(file, [targets[0][:3]], begin)

    monkeypatch.setattr(os, "preadv", three_at_most)
    target = bytearray(7)
    with files.TensorReader(path, header) as reader:
        begin = header.begins["w"] + 2
        reader.fill(memoryview(target), begin)
        assert list(target) == [3, 4, 5, 6, 7, 8, 9]
        assert calls == [begin, begin + 3, begin + 6]
        with pytest.raises(CheckpointError, match="became shorter since it was opened"):
            reader.fill(memoryview(target), begin + 2)


def test_pieces_follow_one_another_and_a_short_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 4)
    targets = [memoryview(bytearray(size)) for size in (6, 0, 4)]
    found = [bytes(p) for p in files._pieces(io.BytesIO(b"abcdefghij"), targets, tmp_path)]
    assert found == [b"abcd", b"ef", b"ghij"]
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        list(files._pieces(io.BytesIO(b"abcde"), targets, tmp_path))
    sizes = [len(part) for part in files._slices(memoryview(bytearray(4)), 10)]
    assert sizes == [4, 4, 2]


def test_mapped_tensors_are_views_where_their_place_allows_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])})
    before, views = path.read_bytes(), files.map_file(path, read_header(path))
    assert views["b"].data_ptr() - views["a"].data_ptr() == 8  # bytes of `a`
    views["a"][0] = 5.0
    assert path.read_bytes() == before
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    for spaces in range(4):  # of which three begin the tensor within an element
        odd = raw_file(tmp_path / "b.safetensors", header + b" " * spaces, struct.pack("<f", 1.5))
        assert files.map_file(odd, read_header(odd))["a"].tolist() == [1.5]


# By hand: what each type calls infinite or NaN, beside its largest number.
PATTERNS: dict[str, tuple[int, list[int], list[int]]] = {
    "F16": (2, [0x7C00, 0xFC00, 0x7FFF], [0x7BFF, 0xFBFF, 0x8000]),
    "BF16": (2, [0x7F80, 0xFF80, 0x7FFF], [0x7F7F, 0xFF7F]),
    "F32": (4, [0x7F800000, 0xFF800000, 0x7FFFFFFF], [0x7F7FFFFF, 0xFF7FFFFF]),
    "C64": (4, [0x7F800000, 0xFFC00000], [0x7F7FFFFF, 0x80000000]),
    "F64": (8, [0x7FF0 << 48, 0xFFF0 << 48, 2**63 - 1], [(0x7FF0 << 48) - 1, 1 << 63]),
    "F8_E4M3": (1, [0x7F, 0xFF], [0x7E, 0xFE]),
    "F8_E5M2": (1, [0x7C, 0xFC, 0x7F], [0x7B, 0xFB]),
    "F8_E8M0": (1, [0xFF], [0xFE, 0x80]),
    "F8_E4M3FNUZ": (1, [0x80], [0x7F, 0x81, 0xFF]),
    "F8_E5M2FNUZ": (1, [0x80], [0x7F, 0x81, 0xFF]),
}


@pytest.mark.parametrize("code", PATTERNS)
def test_what_is_not_finite_is_counted_by_its_bits(code: str) -> None:
    size, odd, fine = PATTERNS[code]
    data = [number.to_bytes(size, "little") for number in [*odd, *fine]]
    assert files.count_nonfinite(b"".join(data), code) == len(odd)
    assert files.count_nonfinite(b"".join(data[len(odd) :]), code) == 0
    assert files.count_nonfinite(data[0], code) == 1
    assert files.count_nonfinite(b"", code) == 0


def test_whole_numbers_are_finite_and_the_first_odd_tensor_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files.count_nonfinite(b"\xff" * 8, "I64") == 0
    path = tmp_path / "a.safetensors"
    tensors = {"a": [1.0, 2.0], "b": [NAN, 1.0, INF], "c": [INF, 1.0], "d": [1.0]}
    save_tensors(path, {name: torch.tensor(values) for name, values in tensors.items()})
    monkeypatch.setattr(files, "CHUNK_BYTES", 4)
    digest, problem = files.check_file(path, read_header(path))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(problem) == f"{path}: tensor 'b' holds NaN or infinity in 2 of 3 values"


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (torch.tensor([NAN, 1.0, INF]), "in 2 of 3 values"),
        (torch.tensor([1.0, complex(1, INF)]), "in 1 of 2 values"),
        (torch.tensor([NAN, 1.0, 2.0]).to(torch.float8_e4m3fn), "in 1 of 3 values"),
        (torch.tensor([1.0, -INF]).half(), "in 1 of 2 values"),
        (torch.tensor([3e38, 3e38]), ""),  # whose sum is infinite
        (torch.tensor([60_000.0, 60_000.0]).half(), ""),
        (torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn), ""),
        (torch.tensor([2**62, 2**62]), ""),
        (torch.tensor([True]), ""),
    ],
)
def test_only_what_is_not_finite_is_refused(
    tensor: torch.Tensor, told: str, tmp_path: Path
) -> None:
    if not told:
        files.require_finite(tmp_path, "w", tensor)
        return
    with pytest.raises(NonFiniteWeightsError, match=f"tensor 'w' holds NaN or infinity {told}$"):
        files.require_finite(tmp_path, "w", tensor)


@pytest.mark.parametrize("name", ["", "é", "xx", "xxx", "xxxx", "xxxxx", "xxxxxx", "xxxxxxx"])
def test_headers_are_padded_to_eight_bytes_and_no_further(name: str) -> None:
    # Of two tensors the wider is the first, so that both begin at multiples of their size.
    infos = {name: TensorInfo((3,), "U8"), "wide": TensorInfo((2, 1), "F32")}
    text = (
        '{"__metadata__":{"a":"1","b":"2"},"wide":{"dtype":"F32","shape":[2,1],'
        f'"data_offsets":[0,8]}},"{name}":{{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}}}'
    ).encode()
    file = io.BytesIO()
    assert files.write_header(file, infos, {"b": "2", "a": "1"}) == ["wide", name]
    length = next(n for n in range(len(text), len(text) + 8) if n % 8 == 0)
    assert file.getvalue() == struct.pack("<Q", length) + text.ljust(length)


@pytest.mark.parametrize(
    ("name", "info", "told"),
    [
        ("__metadata__", TensorInfo((1,), "F32"), "'__metadata__' of torch.float32"),
        ("w", TensorInfo.of((1,), torch.complex128), "'w' of torch.complex128"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(name: str, info: TensorInfo, told: str) -> None:
    with pytest.raises(CheckpointError, match=f"tensor {told} cannot be stored"):
        files.write_header(io.BytesIO(), {name: info}, {})


@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: x.T, lambda x: x[:, ::2], lambda x: x[:0], lambda x: x[1, 2]]
)
def test_bytes_are_row_by_row_and_a_copy_only_where_they_must(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    tensor = change(torch.arange(12, dtype=torch.int16).reshape(3, 4))
    found = files.tensor_bytes(tensor)
    assert bytes(found) == tensor.numpy().tobytes()
    if tensor.numel() and tensor.is_contiguous():
        assert np.frombuffer(found, np.uint8).ctypes.data == tensor.data_ptr()


def test_types_and_shapes() -> None:
    half, whole = TensorInfo((2, 3), "F16"), TensorInfo((2, 3), "I32")
    assert (half.nbytes, whole.nbytes, TensorInfo((), "BOOL").nbytes) == (12, 24, 1)
    assert (half.cast("BF16"), whole.cast("BF16")) == (TensorInfo((2, 3), "BF16"), whole)
    assert not TensorInfo((), "C64").is_floating
    strange = TensorInfo((2,), code_of(torch.complex128))
    assert (strange.code, strange.itemsize, strange.nbytes) == ("complex128", 0, 0)
    assert (str(half), str(strange)) == ("float16 [2, 3]", "complex128 [2]")
    with pytest.raises(CheckpointError, match="a type that torch has, found 'Q3'"):
        _ = TensorInfo((), "Q3").dtype


@pytest.mark.parametrize(("width", "read"), [(2**30, True), (2**30 + 1, False)])
def test_empty_tensors_have_possible_shapes(width: int, read: bool, tmp_path: Path) -> None:
    entry: dict[str, Any] = tensor_entry(0, 0, shape=[0, 2**30, width])
    path = raw_file(tmp_path / "a.safetensors", {"a": entry})
    if read:
        assert read_header(path).tensors["a"].shape == (0, 2**30, 2**30)
        return
    with pytest.raises(CheckpointError, match="tensor 'a' has the impossible shape"):
        read_header(path)
