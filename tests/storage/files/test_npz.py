"""NumPy archives: bounded, without pickles, row by row."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from merge_rl.errors import DataFileError
from merge_rl.storage.files.images import parse_labels
from merge_rl.storage.files.npz import npz_arrays, npz_labels, read_array, read_npy, read_rows


def npy(shape: tuple[int, ...], data: bytes, version: int = 1) -> bytes:
    """A .npy member whose header may promise anything."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2, "little") + header + data


def pack(path: Path, method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def test_arrays_are_listed_and_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    whole = np.arange(24, dtype=np.int16).reshape(4, 3, 2)
    np.savez(path, whole=whole, fortran=np.asfortranarray(whole[0]), scalar=np.float32(7))
    arrays = npz_arrays(path)
    assert {name: info.shape for name, info in arrays.items()} == {
        "whole": (4, 3, 2), "fortran": (3, 2), "scalar": (),
    }  # fmt: skip
    assert arrays["whole"].nbytes == 48
    for name, expected in (("whole", whole), ("fortran", whole[0]), ("scalar", np.float32(7))):
        assert np.array_equal(read_array(path, name), expected)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_come_one_at_a_time(save: object, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    whole = np.arange(60, dtype=np.uint8).reshape(10, 2, 3)
    assert callable(save)
    save(path, x=whole)
    assert np.array_equal(list(read_rows(path, "x", [0, 1, 4, 9])), whole[[0, 1, 4, 9]])
    assert list(read_rows(path, "x", [])) == []


def test_pickles_are_never_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, reps=np.ones((3, 2)), hparams=np.array({"a": 1}, dtype=object))
    assert npz_arrays(path)["reps"].shape == (3, 2)  # beside them, arrays can be read
    with pytest.raises(DataFileError, match="'hparams' is of type object, expected numbers"):
        read_array(path, "hparams")


def test_what_a_header_promises_is_compared_with_the_file(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.npz", mu=npy((10**12,), b"\0" * 80))
    with pytest.raises(DataFileError, match=r"shape \(1000000000000,\) .* needs 8000000000000 by"):
        npz_arrays(path)


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_rl.storage.files.npz.FREE_BYTES", 1000)
    path = pack(tmp_path / "a.npz", sigma=npy((100_000,), bytes(800_000)))
    with pytest.raises(DataFileError, match=r"'sigma' would expand from \d+ to 800128 bytes"):
        read_array(path, "sigma")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a readable .npz file: no table of contents"),
        (b"PK\x03\x04" + bytes(50), "not a readable .npz file: "),
    ],
)
def test_other_files_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(data)
    with pytest.raises(DataFileError, match=message):
        npz_arrays(path)


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"none\.npz: no such file"):
        npz_arrays(tmp_path / "none.npz")
    with pytest.raises(DataFileError, match="version .3, 0., expected 1 or 2"):
        npz_arrays(pack(tmp_path / "v.npz", x=npy((1,), bytes(8), version=3)))
    with pytest.raises(DataFileError, match="expected a .npz file of arrays, found none"):
        npz_arrays(pack(tmp_path / "e.npz"))
    path = tmp_path / "a.npz"
    np.savez(path, x=np.arange(1000.0))
    data = bytearray(path.read_bytes())
    data[3000] ^= 1  # the check sum of the member no longer holds
    path.write_bytes(data)
    with pytest.raises(DataFileError, match="not a readable .npz file: Bad CRC"):
        read_array(path, "x")
    np.savez(path, x=np.asfortranarray(np.ones((3, 2))))
    with pytest.raises(DataFileError, match="in Fortran order, expected C order"):
        list(read_rows(path, "x", [0]))


def test_structured_arrays_are_refused(tmp_path: Path) -> None:
    path, buffer = tmp_path / "a.npz", io.BytesIO()
    np.save(buffer, np.zeros(2, dtype=[("a", "<f4")]))
    pack(path, x=buffer.getvalue())
    with pytest.raises(DataFileError, match="expected numbers"):
        read_array(path, "x")


# ------------------------------------------------------------------------------- types of numbers


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i2", "u4", "i8", "c8"])
def test_byte_orders_make_no_difference(order: str, kind: str, tmp_path: Path) -> None:
    whole = np.arange(6).reshape(2, 3)
    np.savez(tmp_path / "a.npz", x=whole.astype(order + kind))
    np.save(tmp_path / "a.npy", np.asfortranarray(whole.astype(order + kind)))
    for found in (
        read_array(tmp_path / "a.npz", "x"), read_npy(tmp_path / "a.npy"),
        np.stack(list(read_rows(tmp_path / "a.npz", "x", [0, 1]))),
    ):  # fmt: skip
        assert found.dtype == np.dtype(kind)
        assert found.dtype.isnative
        assert np.array_equal(found, whole)


def test_numbers_wider_than_64_bits_are_rounded(tmp_path: Path) -> None:
    third = np.longdouble(1) / 3
    np.savez(tmp_path / "a.npz", x=np.array([third, np.longdouble("1e400")]))
    found = read_array(tmp_path / "a.npz", "x")
    assert found.dtype == np.float64
    assert found.tolist() == [1 / 3, np.inf]

    np.savez(tmp_path / "b.npz", x=np.array([1 + 2j], np.clongdouble), labels=np.array(["12345"]))
    complex_ones = read_array(tmp_path / "b.npz", "x")
    assert complex_ones.dtype == np.complex128
    assert complex_ones.tolist() == [1 + 2j]
    # Words are no numbers, however wide: 20 bytes here.
    labels = npz_labels(tmp_path / "b.npz", npz_arrays(tmp_path / "b.npz"), 1)
    assert labels == parse_labels(["12345"], str)


@pytest.mark.parametrize("kind", ["U4", "S4", "M8[s]", "m8[s]", "V3"])
def test_what_is_no_number_is_refused(kind: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3, kind))
    with pytest.raises(DataFileError, match="array 'x' is of type .*, expected numbers"):
        read_array(tmp_path / "a.npz", "x")


# ------------------------------------------------------------------------------ made to do harm


def raw_npy(header: bytes, length: int | None = None, version: int = 1) -> bytes:
    size = (len(header) if length is None else length).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header


def test_only_what_unpacks_in_pieces_is_unpacked(tmp_path: Path) -> None:
    # bzip2 makes gigabytes out of a kilobyte, in one piece.
    data = npy((1000,), bytes(8000))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = pack(tmp_path / "a.npz", method, x=data)
        with pytest.raises(
            DataFileError, match=r"'x\.npy' is packed by method \d+, expected stored"
        ):
            npz_arrays(path)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (raw_npy(b"", 2**31, version=2), "a header of 2147483648 bytes, at most 10000"),
        (raw_npy(b"[" * 5000), "an unreadable header: "),
        (
            raw_npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }\n"),
            r"\(-1,\) and t",
        ),
        (
            raw_npy(b"{'descr': 5, 'fortran_order': False, 'shape': (1,), }\n"),
            "an unreadable header",
        ),
        (
            raw_npy(b"{'descr': '<f8', 'fortran_order': 1, 'shape': (0,), }\n"),
            "an unreadable header",
        ),
        (raw_npy(b"{[]: 1}\n"), "an unreadable header: "),
        (b"\x93NUMPY\x01", "not a readable"),
        (b"", "not a readable"),
    ],
)
def test_hostile_headers(member: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=message):
        npz_arrays(pack(tmp_path / "a.npz", x=member))
    (tmp_path / "a.npy").write_bytes(member)
    with pytest.raises(DataFileError, match=message):
        read_npy(tmp_path / "a.npy")


def test_archives_that_readers_would_disagree_on(tmp_path: Path) -> None:
    path, data = tmp_path / "a.npz", npy((1,), bytes(8))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", data)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("x.npy", npy((1,), b"12345678"))
    with pytest.raises(
        DataFileError, match=r"not a readable .npz file: the entry 'x.npy' is there tw"
    ):
        npz_arrays(path)
    pack(path, zipfile.ZIP_STORED, xyz=data, zyx=data)
    whole = path.read_bytes()
    at = whole.index(b"PK\x01\x02")
    second = whole.index(b"PK\x01\x02", at + 4)
    nul = whole[:at] + whole[at:].replace(b"xyz.npy", b"\0yz.npy")
    newer = whole[: at + 6] + b"\xff" + whole[at + 7 :]  # the version that is needed to extract
    same = whole[: second + 42] + bytes(4) + whole[second + 46 :]  # both at the same place
    large = whole[: at + 20] + b"\xff\xff\0\0" * 2 + whole[at + 28 :]
    for changed, message in (
        (nul, r"an entry has the impossible name '\\x00yz.npy'"),
        (newer, "zip file version 25.5"),
        (same, "the entry 'xyz.npy' is not where the table|the entry 'zyx.npy' is not where"),
        (large, "the entry 'xyz.npy' is not where the table of contents says"),
        (whole[:-1], "no table of contents at its end: another kind of file, or truncated"),
    ):
        path.write_bytes(changed)
        with pytest.raises(DataFileError, match=message):
            npz_arrays(path)


@pytest.mark.parametrize("seed", range(3))
def test_mutated_archives_are_read_or_refused(seed: int, tmp_path: Path) -> None:
    rng, path = random.Random(seed), tmp_path / "a.npz"
    save = np.savez if seed % 2 else np.savez_compressed
    save(
        path,
        x=np.arange(40.0).reshape(8, 5),
        labels=np.array(["1"] * 8),
        y=np.arange(3, dtype=">i2"),
    )
    whole, refusals = path.read_bytes(), []
    for _ in range(400):
        data, at = bytearray(whole), rng.randrange(len(whole))
        width = rng.choice([1, 1, 2, 4])
        data[at : at + width] = rng.choice(
            [rng.randbytes(width), b"", b"\xff" * width, bytes(width)]
        )
        path.write_bytes(data)
        try:
            arrays = npz_arrays(path)
            for name in arrays:
                read_array(path, name, "biufcUS")
            npz_labels(path, arrays, 8)
            if "x" in arrays and arrays["x"].shape:
                list(read_rows(path, "x", [0, 1]))
        except DataFileError as error:
            refusals.append(str(error))
    assert 100 < len(refusals) < 400
    assert all(why.startswith(str(path)) and len(why) < 1000 for why in refusals)
