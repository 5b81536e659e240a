"""Images from folders, zips and arrays: order, batches, and what is odd among them."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from merge_rl.errors import CheckpointError, DataFileError, ImageError
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.storage.files.image_source import ImageStream, open_images


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


IMAGES = draw(12, 3, 5, 4)  # taller than wide: swapped axes would show


def picture(image: Tensor) -> Image.Image:
    pixels = image.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def write_folder(folder: Path, images: Tensor = IMAGES) -> Path:
    for i, image in enumerate(images):
        # Two subfolders, as the EDM2 data sets have them; img_10 comes after img_9.
        target = folder / f"{i // 6:05d}" / f"img_{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture(image).save(target)
    return folder


def write_zip(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def read_all(path: Path, size: int = 5, skip_broken: bool = False) -> tuple[Tensor, ImageStream]:
    source = open_images(path)
    with ImageStream(source, skip_broken) as stream:
        batches = list(stream.batches(range(len(source)), size))
    kept = [images for _, images in batches if len(images)]
    return torch.cat(kept), stream


@pytest.mark.parametrize("size", [1, 5, 12, 100])
@pytest.mark.parametrize("kind", ["folder", "zip", "npz", "npz channels first", "safetensors"])
def test_every_source_gives_the_same_images(kind: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / "images"
    if kind in ("folder", "zip"):
        write_folder(path)
    if kind == "zip":
        path = write_zip(tmp_path / "a.zip", path)
    if kind.startswith("npz"):
        path = tmp_path / "a.npz"
        last = IMAGES if "first" in kind else IMAGES.permute(0, 2, 3, 1)
        np.savez(path, arr_0=last.numpy())
    if kind == "safetensors":
        path = tmp_path / "a.safetensors"
        save_tensors(path, {"images": IMAGES})
    images, stream = read_all(path, size)
    assert images.dtype == torch.uint8
    assert torch.equal(images, IMAGES)
    assert str(stream.kind) == "4x5 RGB"
    rows = list(ImageStream(open_images(path)).batches([1, 7, 8], 2))
    assert [r.tolist() for r, _ in rows] == [[1, 7], [8]]
    assert torch.equal(torch.cat([x for _, x in rows]), IMAGES[[1, 7, 8]])


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    grey = draw(4, 1, 6, 3)
    assert torch.equal(read_all(write_folder(tmp_path / "g", grey))[0], grey)
    np.savez(tmp_path / "a.npz", images=grey[:, 0].numpy())
    images, stream = read_all(tmp_path / "a.npz")
    assert torch.equal(images, grey)
    assert str(stream.kind) == "3x6 grey"


def test_other_files_and_hidden_ones_are_left_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    for name in ("notes.txt", ".hidden.png", ".cache/a.png", "__MACOSX/._a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"?")
    assert len(open_images(folder)) == 12
    assert len(open_images(write_zip(tmp_path / "a.zip", folder))) == 12


def test_lossy_formats_are_read(tmp_path: Path) -> None:
    image = picture(torch.full((3, 8, 8), 100, dtype=torch.uint8))
    for suffix in ("jpg", "webp", "bmp", "JPEG"):
        image.save(tmp_path / f"a.{suffix}")
    images, _ = read_all(tmp_path)
    assert images.shape == (4, 3, 8, 8)
    assert bool(((images.int() - 100).abs() <= 2).all())


def test_labels_of_a_data_set(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    pairs = [[f"{i // 6:05d}/img_{i}.png", i % 3] for i in reversed(range(12))]
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    for path in (folder, write_zip(tmp_path / "a.zip", folder)):
        labels = open_images(path).labels
        assert labels is not None
        assert labels.tolist() == [0, 1, 2] * 4
    (folder / "dataset.json").write_text(json.dumps({"labels": None}))
    assert open_images(folder).labels is None
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs[2:]}))
    with pytest.raises(ImageError, match=r"00001/img_10.png and 1 more have no label"):
        open_images(folder)
    (folder / "dataset.json").write_text(json.dumps({"labels": [3, 4]}))
    with pytest.raises(ImageError, match=r"expected labels as a list of \[name, label\]"):
        open_images(folder)
    vectors = [[name, [0.5, 1.0]] for name, _ in pairs]
    (folder / "dataset.json").write_text(json.dumps({"labels": vectors}))
    assert open_images(folder).labels is None
    (folder / "dataset.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"dataset\.json: not readable JSON"):
        open_images(folder)


def test_labels_of_arrays(tmp_path: Path) -> None:
    last = IMAGES.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", arr_0=last, arr_1=np.arange(12))
    save_tensors(tmp_path / "a.safetensors", {"images": IMAGES, "labels": torch.arange(12)})
    for name in ("a.npz", "a.safetensors"):
        labels = open_images(tmp_path / name).labels
        assert labels is not None
        assert labels.tolist() == list(range(12))
    np.savez(tmp_path / "b.npz", arr_0=last, labels=np.ones((12, 2)), arr_1=np.ones(12))
    assert open_images(tmp_path / "b.npz").labels is None


# --------------------------------------------------------------------------------- what is refused


def test_the_first_odd_image_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    picture(draw(3, 4, 5)).save(folder / "00001/img_7.png")
    picture(draw(1, 5, 4)).save(folder / "00001/img_9.png")
    message = r"00001/img_7\.png is 5x4 RGB, expected 4x5 RGB as 00000/img_0\.png"
    with pytest.raises(ImageError, match=message):
        read_all(folder)
    picture(IMAGES[7]).save(folder / "00001/img_7.png")
    with pytest.raises(ImageError, match=r"img_9\.png is 4x5 grey, expected 4x5 RGB as"):
        read_all(folder, skip_broken=True)


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "1", "I;16", "LA"])
def test_modes_without_one_meaning_are_refused(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    with pytest.raises(ImageError, match=rf"a\.\w+ is of mode {mode}, expected RGB or grey"):
        read_all(tmp_path)


def test_broken_images_are_named_or_counted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    for i, data in ((2, b""), (6, b"\x89PNG\r\n\x1a\nnonsense")):
        (folder / f"{i // 6:05d}" / f"img_{i}.png").write_bytes(data)
    whole = folder / "00001/img_11.png"
    whole.write_bytes(whole.read_bytes()[:-30])
    for path in (folder, write_zip(tmp_path / "a.zip", folder)):
        with pytest.raises(
            ImageError, match=r"00000/img_2\.png is broken: no image, expected one of PNG"
        ):
            read_all(path)
        images, stream = read_all(path, skip_broken=True)
        assert torch.equal(images, IMAGES[[0, 1, 3, 4, 5, 7, 8, 9, 10]])
        assert [reason.split(" ")[0] for reason in stream.broken] == [
            "00000/img_2.png", "00001/img_6.png", "00001/img_11.png",
        ]  # fmt: skip


def test_a_batch_of_broken_images_is_empty(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    for i in (4, 5):
        (folder / f"00000/img_{i}.png").write_bytes(b"x")
    stream = ImageStream(open_images(folder), skip_broken=True)
    sizes = [(len(rows), len(images)) for rows, images in stream.batches(range(12), 2)]
    assert sizes == [(2, 2), (2, 2), (0, 0), (2, 2), (2, 2), (2, 2)]


def test_huge_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_rl.storage.files.images.MAX_PIXELS", 19)
    with pytest.raises(ImageError, match=r"img_0\.png is 4x5, at most 19 pixels are read"):
        read_all(write_folder(tmp_path / "images"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # beyond twice that, Pillow refuses
    with pytest.raises(ImageError, match=r"img_0\.png is broken: Image size \(20 pixels\)"):
        read_all(tmp_path / "images")


def test_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_rl.storage.files.images.ImageFiles._bytes.__defaults__", (30,))
    with pytest.raises(ImageError, match=r"img_0\.png: larger than 30 bytes"):
        read_all(write_folder(tmp_path / "images"))


def test_damaged_zip_members_are_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", write_folder(tmp_path / "images"))
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("00000/img_3.png")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(info.filename) + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"00000/img_3\.png: cannot be read: Bad CRC-32"):
        read_all(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "no such file or folder"),
        ("a.zip", b"PK", "not a readable zip file"),
        ("a.png", b"x", "expected a folder, a .zip, a .npz .* found a file with the ending '.png'"),
        ("a.npz", b"PK", "not a readable .npz file"),
    ],
)
def test_sources_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFileError, match=message):
        open_images(tmp_path / name)


def test_empty_folders_and_zips_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match=r"empty: expected images \(.png, .jpg, .*found none"):
        open_images(tmp_path / "empty")
    with pytest.raises(ImageError, match="found none"):
        open_images(write_zip(tmp_path / "a.zip", tmp_path / "empty"))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 5, 5, 3), np.float32), r"found \(4, 5, 5, 3\) of type float32"),
        (np.zeros((4, 5, 5, 2), np.uint8), r"found \(4, 5, 5, 2\) of type uint8"),
        (np.zeros((4, 5), np.uint8), r"found \(4, 5\)"),
        (np.zeros((0, 5, 5, 3), np.uint8), r"found \(0, 5, 5, 3\)"),
    ],
)
def test_arrays_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(ImageError, match=message):
        open_images(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", other=array)
    with pytest.raises(ImageError, match="expected images as 'images' or 'arr_0', found 'other'"):
        open_images(tmp_path / "a.npz")


def test_fingerprints_change_with_the_images(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    first = open_images(folder).fingerprint
    assert open_images(folder).fingerprint == first
    target = folder / "00000/img_0.png"
    os.utime(target, ns=(0, 0))
    assert open_images(folder).fingerprint != first
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=IMAGES.permute(0, 2, 3, 1).numpy())
        found = open_images(tmp_path / "a.npz").fingerprint
        assert found != first
        first = found
