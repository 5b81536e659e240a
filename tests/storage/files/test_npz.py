"""NumPy archives: bounded, without pickles, row by row."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from merge_rl.errors import DataFileError
from merge_rl.storage.files.npz import npz_arrays, read_array, read_rows


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
        (b"", "not a readable .npz file: File is not a zip file"),
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
