"""What torch.save writes, as references to tensors: exact, within bounds, nothing executed."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merge_rl.errors import CheckpointError
from merge_rl.storage.files.safetensors_header import TensorInfo
from merge_rl.storage.pickles.reading import Alike, read_data, read_pickle
from merge_rl.storage.pickles.tensors import TensorRef

DTYPES = [
    torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip
BASE = torch.arange(1, 61).reshape(3, 4, 5)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x,
    "empty": lambda x: x[:0],
    "scalar": lambda x: x[1, 2, 3],
    "transposed": lambda x: x.transpose(0, 2),
    "channels last": lambda x: x.reshape(1, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "rows of another": lambda x: x[1:],
    "columns of another": lambda x: x[:, 1:3],
    "every second": lambda x: x[..., ::2],
    "one axis": lambda x: x.reshape(-1, 1, 1).transpose(0, 2),
}


def saved(value: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def stored(ref: TensorRef, size: int = 7) -> bytes:
    return b"".join(ref.pieces(size * ref.info.itemsize))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["archive", "older", "pickle"])
def test_tensors_equal_what_was_saved(form: str, dtype: torch.dtype) -> None:
    base = BASE.to(dtype)
    value = {name: layout(base) for name, layout in LAYOUTS.items()}
    data = pickle.dumps(value, 4) if form == "pickle" else saved(value, legacy=form == "older")
    found: Any = read_data(data)
    assert list(found) == list(value)
    for name, tensor in value.items():
        ref = found[name]
        assert ref.info == TensorInfo.of(tuple(tensor.shape), dtype)
        assert torch.equal(ref.load(), tensor), name
        flat = tensor.contiguous().reshape(-1)
        assert stored(ref) == flat.view(torch.uint8).numpy().tobytes(), name
        assert ref.nbytes == flat.numel() * dtype.itemsize


@pytest.mark.parametrize("form", ["archive", "older", "pickle"])
@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint64], ids=str
)
def test_tensors_of_types_without_storages_of_their_own(form: str, dtype: torch.dtype) -> None:
    base = torch.arange(12).reshape(3, 4).to(dtype)
    value = {"all": base, "rows": base[1:], "turned": base.T}
    data = pickle.dumps(value, 4) if form == "pickle" else saved(value, legacy=form == "older")
    found: Any = read_data(data)
    for name, tensor in value.items():
        ref = found[name]
        assert ref.info == TensorInfo.of(tuple(tensor.shape), dtype)
        assert ref.load().double().equal(tensor.double())
        flat = tensor.contiguous().reshape(-1)
        assert stored(ref) == flat.view(torch.uint8).numpy().tobytes(), name


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.ones(2, dtype=torch.complex64).conj(), "the conjugate or the negative of what is"),
        (torch.ones(2, dtype=torch.complex64).conj().imag, "the conjugate or the negative of"),
        (torch.ones(2).to_sparse(), "x: holds sparse tensors, expected tensors of plain numbers"),
        (torch.ones(2, device="meta"), "x: holds tensors without content"),
        (torch.ones(2, dtype=torch.complex128), "x: holds complex numbers of double precision"),
        (nn.Linear(1, 1), "x: holds a network, not its weights alone"),
    ],
)
def test_what_has_no_plain_numbers_is_called_by_what_it_is(value: Any, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        read_data(saved({"w": value}), "x")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><html>", "found a page of the web"),
        (b'{"error": "gone"}', "found a JSON document"),
        (b"Entry not found at all", "found text"),
        ((2).to_bytes(8, "little") + b"{}", "found a safetensors file"),
    ],
)
def test_what_torch_never_wrote_is_called_by_what_it_is(content: bytes, told: str) -> None:
    with pytest.raises(CheckpointError, match=f"x: expected what torch.save .* writes, {told}"):
        read_data(content, "x")


@pytest.mark.parametrize("legacy", [False, True])
def test_parameters_state_dicts_and_options(legacy: bool, tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    value = {"state": layer.state_dict(), "p": layer.weight, "size": layer.weight.shape}
    value |= {"device": torch.device("cpu"), "dtype": torch.float32}
    path = tmp_path / "saved.pt"
    path.write_bytes(saved(value, legacy=legacy))
    found: Any = read_data(path)
    assert torch.equal(found["state"]["weight"].load(), layer.weight)
    assert torch.equal(found["p"].load(), layer.weight)
    assert found["size"] == (2, 3)
    assert (found["device"], found["dtype"].name) == ("cpu", "torch.float32")


def test_tensors_that_share_memory_share_their_bytes() -> None:
    base = torch.arange(10.0)
    found: Any = read_data(saved([base, base[5:]]))
    assert found[0].storage is found[1].storage
    assert torch.equal(found[1].load(), base[5:])


# ---------------------------------------------------------------------------- damaged archives


def rezipped(data: bytes, change: Callable[[str, bytes], bytes | None], **options: Any) -> bytes:
    """The archive with every entry changed; None leaves one out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", **options) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return out.getvalue()


def replaced(ending: str, content: bytes | None) -> Callable[[str, bytes], bytes | None]:
    return lambda name, old: content if name.endswith(ending) else old


def tensor_pickle(count: int, offset: int, shape: str, stride: str, kind: str = "Float") -> bytes:
    """data.pkl of one tensor with any numbers in it; shape and strides as instructions."""
    storage = (
        f"(X\x07\x00\x00\x00storagectorch\n{kind}Storage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    call = (
        f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I{count}\ntQI{offset}\n{shape}{stride}\x89Nt"
    )
    return b"\x80\x02" + call.encode("latin1") + b"R."


ONE = saved(torch.arange(6.0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rezipped(ONE, replaced("data.pkl", None)), "expected one 'data.pkl' in a folder, found 0"),
        (rezipped(ONE, replaced("data/0", None)), "lacks '(archive|.*)/data/0'"),
        (rezipped(ONE, replaced("data/0", bytes(20))), "is not of 24 bytes"),
        (rezipped(ONE, replaced("data/0", bytes(28))), "is not of 24 bytes"),
        (rezipped(ONE, replaced("byteorder", b"big")), "little-endian"),
        (
            rezipped(ONE, lambda _, old: old, compression=zipfile.ZIP_DEFLATED),
            "is compressed, expected as torch.save stores it",
        ),
        (ONE[:-1], "cut short|truncated"),
        (ONE[:-30], "truncated|not where|cut short"),
        (
            ONE[: len(ONE) // 2],
            "no table of contents at its end: another kind of file, or truncated",
        ),
        (ONE[100:], "not readable as data"),
        (b"PK\x03\x04", "truncated|no table of contents"),
        (b"PK\x03\x04" + b"PK\x05\x06" + b"\xff" * 18, "not a readable archive: "),
        (b"PK\x03\x04" + bytes(40) + b"PK\x05\x06" + b"\xfe" * 18, "not a readable archive: "),
    ],
)
def test_damaged_archives_say_why(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_data(data, "a.pt")


def test_encrypted_and_moved_entries_are_refused() -> None:
    at = ONE.rfind(b"PK\x01\x02", 0, ONE.rfind(b"/data/0"))
    encrypted = ONE[: at + 8] + b"\x01" + ONE[at + 9 :]
    with pytest.raises(CheckpointError, match="is encrypted"):
        read_data(encrypted)
    for offset in (0xFFFFFFF0, len(ONE) - 40, 1):
        moved = ONE[: at + 42] + struct.pack("<L", offset) + ONE[at + 46 :]
        with pytest.raises(CheckpointError, match="truncated|not where the table"):
            read_data(moved)


def test_entries_that_overlap_or_repeat_are_refused() -> None:
    # A few stored bytes that stand for many tensors, and names that readers would disagree on.
    first = ONE.index(b"PK\x01\x02")
    second = ONE.index(b"PK\x01\x02", first + 4)
    same = ONE[: second + 42] + ONE[first + 42 : first + 46] + ONE[second + 46 :]
    with pytest.raises(CheckpointError, match="is not where the table of contents says"):
        read_data(same)
    # One entry that reaches into the next by what only its own header tells.
    member = next(m for m in zipfile.ZipFile(io.BytesIO(ONE)).infolist() if "data/0" in m.filename)
    at = member.header_offset + 28
    longer = ONE[:at] + b"\xff\xff" + ONE[at + 2 :]
    with pytest.raises(CheckpointError, match="'[^']*/data/0' is not where the table of contents"):
        read_data(longer)
    name = first + 46
    nul = ONE[:name] + b"\0" + ONE[name + 1 :]
    with pytest.raises(CheckpointError, match="an entry has the impossible name"):
        read_data(nul)
    twice = io.BytesIO(ONE)
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"N.")
    with pytest.raises(CheckpointError, match="the entry '.*' is there twice"):
        read_data(twice.getvalue())


def test_a_table_of_contents_is_no_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_rl.storage.pickles.reading._MAX_DIRECTORY", 100)
    with pytest.raises(
        CheckpointError, match=r"its table of contents takes \d+ bytes, at most 100"
    ):
        read_data(ONE)


def test_archives_whose_sizes_need_64_bits() -> None:
    # All that is known of sizes and places is in the second table of contents.
    end = ONE.rfind(b"PK\x05\x06")
    wide = ONE[: end + 8] + b"\xff" * 12 + ONE[end + 20 :]
    found: Any = read_data(wide)
    assert torch.equal(found.load(), torch.arange(6.0))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor_pickle(6, 1, "(I6\nt", "(I1\nt"), r"shape \[6\] from element 1 of 6"),
        (tensor_pickle(6, -1, "(I1\nt", "(I1\nt"), "from element -1"),
        (tensor_pickle(6, 0, "(I2\nI3\nt", "(I4\nI1\nt"), "of 6"),
        (tensor_pickle(6, 0, "(I999999999\nt", "(I0\nt"), "of 6"),  # a stride of 0: no bytes
        (tensor_pickle(6, 0, "(I-2\nt", "(I1\nt"), "a few whole numbers"),
        (tensor_pickle(6, 5, "(I2\nt", "(I-1\nt"), "a few whole numbers"),
        (tensor_pickle(6, 0, "(I2\nt", "("  "t"), "a few whole numbers"),
        (tensor_pickle(6, 0, "(" + "I2\n" * 64 + "t", "(" + "I1\n" * 64 + "t"), "whole numbers"),
        (tensor_pickle(6, 0, f"(I0\nI{2**60}\nt", "(I1\nI1\nt"), "whole numbers"),
        (tensor_pickle(6, 0, "N", "N"), "a few whole numbers"),
        (tensor_pickle(7, 0, "(I6\nt", "(I1\nt"), "is not of 28 bytes"),
        (tensor_pickle(-6, 0, "(I6\nt", "(I1\nt"), "not one of numbers"),
        (tensor_pickle(3, 0, "(I3\nt", "(I1\nt", "Double"), None),
        (tensor_pickle(6, 0, "(I6\nt", "(I1\nt", "Quint8"), "refers to 'torch.Quint8Storage'"),
    ],
)  # fmt: skip
def test_tensors_stay_within_their_storage(pickled: bytes, message: str | None) -> None:
    data = rezipped(ONE, replaced("data.pkl", pickled))
    if message is None:
        assert read_data(data).shape == (3,)  # type: ignore[attr-defined]
        return
    with pytest.raises(CheckpointError, match=message):
        read_data(data)


def test_thinly_spread_tensors_are_refused_when_read() -> None:
    # Thousands of them would each read the whole file.
    found: Any = read_data(saved(torch.zeros(100_000)[::50_000]))
    with pytest.raises(CheckpointError, match="spread over 50001 elements"):
        found.load()


# ------------------------------------------------------------------------------ older blocks


def block_of(storage: bytes) -> bytes:
    """A pickle that loads an older block."""
    return (
        b"ctorch.storage\n_load_from_bytes\n(B" + len(storage).to_bytes(4, "little") + storage
        + b"tR."
    )  # fmt: skip


def inner_block(tensor: Tensor) -> bytes:
    """The block that torch puts into the pickle of a tensor."""
    operations = pickletools.genops(pickle.dumps(tensor, 4))
    (block,) = (value for opcode, value, _ in operations if opcode.name == "BINBYTES")
    assert isinstance(block, bytes)
    return block


def test_older_blocks_are_checked() -> None:
    block = inner_block(torch.arange(4.0))
    assert read_pickle(block_of(block)).count == 4  # type: ignore[attr-defined]
    changes = [
        (block[:-1], "truncated"),
        (block + b"x", "1 bytes follow the last storage"),
        (block.replace(b"\xfc\x9c", b"\xfc\x9d"), "not a block written by torch.save"),
        (block.replace(b"M\xe9\x03.", b"M\xe8\x03."), "not a block written by torch.save"),
        (block.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"), "little-endian"),
        (block[:-24] + b"\x05" + block[-23:], "holds 5 elements, expected 4"),
        (block.replace(b"K\x04Nt", b"K\x05Nt"), "holds 4 elements, expected 5"),
        (block.replace(b"FloatStorage", b"DoubleStorage"), "truncated"),
        (block.replace(b"FloatStorage", b"EvilxStorage"), "refers to 'torch.EvilxStorage'"),
        (block.replace(b"cpuq", b"cpuQ"), "stored elsewhere"),
        (saved(torch.arange(4.0), legacy=True), "refers to 'torch._utils._rebuild_tensor_v2'"),
        (saved([1], legacy=True), "block holds 'list', expected a storage"),
        (b"", "truncated"),
    ]
    for changed, message in changes:
        with pytest.raises(CheckpointError, match=message):
            read_pickle(block_of(changed))


def test_a_block_within_a_block_is_refused() -> None:
    name, deeper = b"ctorch\nFloatStorage\n", b"ctorch.storage\n_load_from_bytes\n"
    nested = inner_block(torch.arange(4.0)).replace(name, deeper)
    with pytest.raises(CheckpointError, match="refers to 'torch.storage._load_from_bytes'"):
        read_pickle(block_of(nested))


def test_archives_that_are_alike_hold_each_its_own() -> None:
    alike: Alike = {}
    first, second = torch.arange(12.0).reshape(3, 4), torch.arange(12.0, 24.0).reshape(3, 4)
    # The last is the transpose: of equal shape and of other strides.
    tensors = [first, second, second.reshape(4, 3).T, second[:2], first.long()]
    for tensor in tensors:
        found: Any = read_data(saved(tensor), alike=alike)
        assert torch.equal(found.load(), tensor)
    assert len(alike) == 4  # of the second nothing new was said

    shorter = rezipped(saved(first), replaced("data/0", bytes(44)))
    with pytest.raises(CheckpointError, match="storage 0 is not of 48 bytes of F32"):
        read_data(shorter, alike=alike)
    with pytest.raises(CheckpointError, match="the archive lacks"):
        read_data(rezipped(saved(first), replaced("data/0", None)), alike=alike)
    # A list of tensors is no tensor, and is read each time.
    both: Any = [read_data(saved([first]), alike=alike) for _ in range(2)]
    assert len(alike) == 4
    assert all(torch.equal(found.load(), first) for (found,) in both)
