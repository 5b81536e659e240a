"""Images from folders, zips and arrays: order, batches, and what is odd among them."""

from __future__ import annotations

import json
import os
import random
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from merge_rl.errors import CheckpointError, DataFileError, ImageError
from merge_rl.storage.files import image_files, image_source, images
from merge_rl.storage.files.image_files import ImageFiles
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
@pytest.mark.parametrize(
    "kind", ["folder", "zip", "npz", "npz channels first", "npz under another name"]
)
def test_every_source_gives_the_same_images(kind: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / "images"
    if kind in ("folder", "zip"):
        write_folder(path)
    if kind == "zip":
        path = write_zip(tmp_path / "a.zip", path)
    if kind.startswith("npz"):
        path = tmp_path / "a.npz"
        last = IMAGES if "first" in kind else IMAGES.permute(0, 2, 3, 1)
        if "another" in kind:
            np.savez(path, x_test=last.numpy(), more=np.zeros((12, 5, 4, 3)))
        else:
            np.savez(path, arr_0=last.numpy())
    images, stream = read_all(path, size)
    assert images.dtype == torch.uint8
    assert torch.equal(images, IMAGES)
    assert str(stream.kind) == "4x5 RGB"
    rows = list(ImageStream(open_images(path)).batches([1, 7, 8], 2))
    assert [r.tolist() for r, _ in rows] == [[1, 7], [8]]
    assert torch.equal(torch.cat([x for _, x in rows]), IMAGES[[1, 7, 8]])


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    grey = draw(4, 1, 6, 5)
    assert torch.equal(read_all(write_folder(tmp_path / "g", grey))[0], grey)
    np.savez(tmp_path / "a.npz", images=grey[:, 0].numpy())
    images, stream = read_all(tmp_path / "a.npz")
    assert torch.equal(images, grey)
    assert str(stream.kind) == "5x6 grey"


def test_other_files_and_hidden_ones_are_left_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    for name in ("notes.txt", ".hidden.png", ".cache/a.png", "__MACOSX/._a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"?")
    assert len(open_images(folder)) == 12
    assert len(open_images(write_zip(tmp_path / "a.zip", folder))) == 12


def test_content_tells_what_names_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    written = {
        "a": "PNG", "b.data": "JPEG", "c.gif": "GIF", "d.TIFF": "TIFF", "e.jfif": "JPEG",
        "f.bin": "WEBP", "g.tif": "TIFF", "h.ppm": "PPM", "i.png": "TIFF",
    }  # fmt: skip
    for name, kind in written.items():
        picture(torch.full((3, 8, 8), 100, dtype=torch.uint8)).save(folder / name, kind)
    for name in ("notes.txt", "more.TXT", "Python", "P6", "BM.doc", ".DS_Store"):
        (folder / name).write_text("Python is no portable pixmap")
    for path in (folder, write_zip(tmp_path / "a.zip", folder)):
        source = open_images(path)
        assert [source.name(row) for row in range(len(source))] == list(written)
        images, _ = read_all(path)
        assert bool(((images.int() - 100).abs() <= 2).all())
        text = source.left_out_text
        assert text.startswith(f"6 left out of {path}: 2 no images (")
        for part in ("2 no images (.txt)", "2 no images (without ending)", "1 hidden"):
            assert part in text
        assert "1 no images (.doc)" in text
    for name in written:
        (folder / name).unlink()
    with pytest.raises(ImageError, match=r"found none; 6 left out of .*2 no images \(.txt\)"):
        open_images(folder)


def test_links_to_folders_are_followed_once_each(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set/images", IMAGES[:3])
    write_folder(tmp_path / "elsewhere/deep", IMAGES[3:5])
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "elsewhere")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "twice").symlink_to(tmp_path / "elsewhere/deep")
    (folder / "here").symlink_to(folder)
    (folder / "above").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "nothing").symlink_to(tmp_path / "nowhere")
    source = open_images(folder)
    assert [source.name(row) for row in range(len(source))] == [
        "00000/img_0.png", "00000/img_1.png", "00000/img_2.png",
        "link/deep/00000/img_0.png", "link/deep/00000/img_1.png",
    ]  # fmt: skip
    assert torch.equal(read_all(folder)[0], IMAGES[:5])
    assert source.left_out_text == (
        f"6 left out of {folder}: 4 links to folders that are read already, 2 links to nothing"
    )
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read: No such file"):
        open_images(folder)


def test_pipes_are_left_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "other")
    source = open_images(folder)
    assert len(source) == 12
    assert source.left_out_text.endswith(": 2 no files (pipes, sockets, devices)")


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
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs[1:]}))
    with pytest.raises(ImageError, match=r"00001/img_11.png has no label"):
        open_images(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"dataset\.json: not readable JSON"):
        open_images(folder)


@pytest.mark.parametrize("folder", ["", "imgs/"])
@pytest.mark.parametrize("names", ["", "imgs/", "./", "imgs\\"])
@pytest.mark.parametrize("file", ["dataset.json", "Dataset.JSON"])
@pytest.mark.parametrize("as_written", [int, float, str, lambda label: f"{label}.0"])
def test_labels_in_any_dress_and_place(
    folder: str, names: str, file: str, as_written: Callable[[int], object], tmp_path: Path
) -> None:
    write_folder(tmp_path / "set/imgs")
    names = names if folder or "imgs" in names else f"{names}imgs/"  # to the file, or to the top
    pairs = [[f"{names}{i // 6:05d}/img_{i}.png", as_written(i % 3)] for i in range(12)]
    (tmp_path / "set" / folder / file).write_text(json.dumps({"labels": pairs}))
    for path in (tmp_path / "set", write_zip(tmp_path / "a.zip", tmp_path / "set")):
        labels = open_images(path).labels
        assert labels is not None
        assert labels.tolist() == [0, 1, 2] * 4


def test_every_folder_may_have_labels_of_its_own(tmp_path: Path) -> None:
    for folder, label in (("a", 1), ("b", 2)):
        write_folder(tmp_path / folder, IMAGES[:2])
        pairs = [[f"00000/img_{i}.png", label] for i in range(2)]
        (tmp_path / folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    labels = open_images(tmp_path).labels
    assert labels is not None
    assert labels.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("odd", "problem"),
    [
        (None, "the label of img_1.png is nothing, expected a whole number from 0"),
        ("dog", "the label of img_1.png is the text 'dog'"),
        (True, "the label of img_1.png is True"),
        (1.5, "the label of img_1.png is 1.5"),
        (-1, "the label of img_1.png is -1"),
        ([0.5, 1.0], "the label of img_1.png is a list of 2"),
    ],
)
def test_why_labels_are_left_aside(odd: object, problem: str, tmp_path: Path) -> None:
    for i in range(2):
        picture(IMAGES[i]).save(tmp_path / f"img_{i}.png")
    pairs = [["img_0.png", 0], ["img_1.png", odd]]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": pairs}))
    found = open_images(tmp_path)
    assert found.labels is None
    assert found.label_problem.startswith(problem)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": []}))
    assert open_images(tmp_path).label_problem.endswith("dataset.json holds no labels")
    twice = [*pairs[:1], ["./img_0.png", 4]]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": twice}))
    with pytest.raises(ImageError, match=r"dataset\.json: img_0\.png has two labels, 0 and 4"):
        open_images(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": {"img_0.png": NaN, "img_1.png": 3}}')
    assert open_images(tmp_path).label_problem.startswith("the label of img_0.png is nan")


@pytest.mark.parametrize("entry", ["ab", {"file": "a", "label": 1}, ["a", 1, 2], 3])
def test_labels_are_pairs(entry: object, tmp_path: Path) -> None:
    picture(IMAGES[0]).save(tmp_path / "a.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [entry]}))
    with pytest.raises(ImageError, match=r"dataset\.json: expected labels as a list of \[name, la"):
        open_images(tmp_path)


def test_a_pointer_in_a_zip_is_called_one(tmp_path: Path) -> None:
    picture(IMAGES[0]).save(tmp_path / "a.png")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1234\n"
    for name in ("dataset.json", "b.png"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            file.write(tmp_path / "a.png", "a.png")
            file.writestr(name, pointer)
        with pytest.raises(ImageError, match=rf"{name}: a Git LFS pointer to a file of 1,234 byt"):
            read_all(tmp_path / "a.zip")


def test_labels_by_name_and_pictures_of_other_kinds(tmp_path: Path) -> None:
    for i in range(2):
        picture(IMAGES[i]).save(tmp_path / f"img_{i}.png")
    picture(IMAGES[2]).save(tmp_path / "img_2.tga")
    (tmp_path / "dataset.json").write_text('{"labels": {"img_1.png": "3e0", "img_0.png": 4}}')
    found = open_images(tmp_path)
    assert found.labels is not None
    assert found.labels.tolist() == [4, 3]
    assert found.left_out_text.endswith(": 1 images of a kind that is not read (.tga)")


def test_labels_of_arrays(tmp_path: Path) -> None:
    last, path = IMAGES.permute(0, 2, 3, 1).numpy(), tmp_path / "a.npz"
    for kind in ("<i8", ">i4", "u1", "<f4", ">f8", "U3", "S3"):
        np.savez(path, arr_0=last, arr_1=np.arange(12).astype(kind))
        labels = open_images(path).labels
        assert labels is not None
        assert labels.tolist() == list(range(12))
    np.savez(path, arr_0=last, labels=np.ones((12, 2)), arr_1=np.arange(12))
    assert open_images(path).labels is not None


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (np.arange(12) + 0.5, "the label of row 0 is 0.5, expected a whole number from 0"),
        (np.array([0] * 11 + [np.nan]), "the label of row 11 is nan"),
        (np.array(["cat"] * 12), "the label of row 0 is the text 'cat'"),
        (np.arange(12) - 1, "the label of row 0 is -1"),
        (np.full(12, 2**40), "the label of row 0 is 1099511627776"),
        (np.array([None] * 12), "'labels' is of type object, expected whole numbers"),
        (np.zeros((12, 2)), r"'labels' is (12, 2) of type float64, expected (12,)"),
    ],
)
def test_why_labels_of_arrays_are_left_aside(
    labels: np.ndarray, problem: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", arr_0=IMAGES.permute(0, 2, 3, 1).numpy(), labels=labels)
    found = open_images(tmp_path / "a.npz")
    assert found.labels is None
    assert found.label_problem.startswith(problem)


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


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "1", "I;16", "LA"])
def test_modes_without_one_meaning_are_refused(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    found = "I(;16)?" if mode == "I;16" else mode  # which older versions of Pillow call I
    with pytest.raises(ImageError, match=rf"a\.\w+ is of mode {found}, expected RGB or grey"):
        read_all(tmp_path)


def test_palettes_are_looked_up_unless_something_shines_through(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 250, 120, 7])
    palette.putdata([1, 0])
    for name in ("a.png", "b.gif", "c.tif"):
        palette.save(tmp_path / name)
    images, _ = read_all(tmp_path)
    assert images.tolist() == [[[[250, 1]], [[120, 2]], [[7, 3]]]] * 3
    palette.save(tmp_path / "d.png", transparency=0)
    with pytest.raises(ImageError, match=r"d\.png is of mode P with transparency, expected RGB"):
        read_all(tmp_path)


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_a_colour_that_is_transparent_is_no_colour(mode: str, colour: Any, tmp_path: Path) -> None:
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png", transparency=colour)
    with pytest.raises(ImageError, match=rf"a\.png is of mode {mode} with transparency, expected"):
        read_all(tmp_path)


def test_colours_in_16_bits_are_not_cut_to_8(tmp_path: Path) -> None:
    # Pillow writes none: a PNG by hand, one row of two pixels.
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head, rows = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), zlib.compress(bytes(13))
    content = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(ImageError, match=r"a\.png is of mode RGB in 16 bits, expected RGB"):
        read_all(tmp_path)


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_several_frames_are_no_single_image(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 5), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=rf"a\.{suffix} has 2 frames, expected a single image"):
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
    monkeypatch.setattr("merge_rl.storage.files.image_files.ImageFiles._bytes.__defaults__", (30,))
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
        (
            "a.png",
            b"x",
            "expected a folder, a .zip or a .npz .* found a file with the ending '.png'",
        ),
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
        (np.zeros((8, 8, 3), np.uint8), r"'arr_0' \(8, 8, 3\) may be one image or 8 grey ones"),
        (np.zeros((3, 8, 8), np.uint8), r"'arr_0' \(3, 8, 8\) may be one image or 3 grey ones"),
    ],
)
def test_arrays_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(ImageError, match=message):
        open_images(tmp_path / "a.npz")


def test_arrays_that_may_all_be_images_are_refused(tmp_path: Path) -> None:
    array = np.zeros((4, 5, 5, 3), np.uint8)
    np.savez(tmp_path / "a.npz", one=array, two=array)
    message = "expected images as 'images' or 'arr_0', or one array of images alone, found 'one' "
    with pytest.raises(ImageError, match=message):
        open_images(tmp_path / "a.npz")


def test_images_in_two_arrays_are_refused_and_others_left(tmp_path: Path) -> None:
    images, file = np.zeros((4, 5, 5, 3), np.uint8), tmp_path / "a.npz"
    for first in ("arr_0", "images"):
        arrays: dict[str, Any] = {first: images, "arr_1": images[:2]}
        np.savez(file, **arrays)
        both = rf"'{first}' \(4, 5, 5, 3\) of type uint8 and 'arr_1' \(2, 5, 5, 3\) .*images both"
        with pytest.raises(ImageError, match=both):
            open_images(file)
    # Masks, features and latents of the same images are none of them.
    mask, latents = images[..., :1], images.astype(np.float32)
    np.savez(file, arr_0=images, mask=mask, reps=np.zeros((4, 5)), z=latents)
    assert len(open_images(file)) == 4


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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata
def test_mutated_zips_of_images_are_read_or_refused(seed: int, tmp_path: Path) -> None:
    folder, rng, refusals = tmp_path / "images", random.Random(seed), []
    folder.mkdir()
    for i, kind in enumerate(["PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG"]):
        picture(IMAGES[i]).save(folder / (f"{i}.{kind.lower()}" if i % 2 else str(i)), kind)
    whole = write_zip(tmp_path / "a.zip", folder).read_bytes()
    for _ in range(100):
        data, at, width = bytearray(whole), rng.randrange(len(whole)), rng.choice([1, 2, 4])
        data[at : at + width] = rng.choice([rng.randbytes(width), b"", b"\xff" * width])
        (tmp_path / "a.zip").write_bytes(data)
        try:
            read_all(tmp_path / "a.zip")
        except DataFileError as error:
            refusals.append(str(error))
    assert 10 < len(refusals) < 100
    assert all(len(why) < 1000 for why in refusals)


def test_a_stream_that_is_left_decodes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_source, "WORKERS", 2)
    source = open_images(write_folder(tmp_path / "a"))
    begun, real = list[int](), ImageFiles.decode

    def decode(self: ImageFiles, row: int) -> object:
        begun.append(row)
        if row == 0:
            raise ImageError("broken")
        time.sleep(0.02)
        return real(self, row)

    monkeypatch.setattr(ImageFiles, "decode", decode)
    before = threading.active_count()
    stream = ImageStream(source)
    with pytest.raises(ImageError, match="^broken$"), stream:
        next(stream.batches(range(12), 12))
    assert threading.active_count() == before
    assert len(begun) < 12
    assert stream._pool is None
    assert next(ImageStream(source).batches([1, 2], 1))[0].tolist() == [1]  # without a pool


def test_empty_batches_are_of_three_axes_and_none(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", IMAGES[:2])
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    stream = ImageStream(open_images(folder), skip_broken=True)
    assert [tuple(images.shape) for _, images in stream.batches(range(2), 2)] == [(0, 3, 1, 1)]


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_of_arrays_come_last_where_both_would_do(channels: int, tmp_path: Path) -> None:
    pixels = draw(4, 3, 5, channels)
    np.savez(tmp_path / "a.npz", images=pixels.numpy())
    assert torch.equal(read_all(tmp_path / "a.npz")[0], pixels.permute(0, 3, 1, 2))


def test_content_is_looked_at_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    picture(IMAGES[0]).save(folder / "unnamed", "PNG")
    size = (folder / "unnamed").stat().st_size
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", size)
    assert len(open_images(folder)) == 1
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", size - 1)
    with pytest.raises(ImageError, match=r"found none; 1 left out of .*: 1 no images \(without"):
        open_images(folder)
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.write(folder / "unnamed", "unnamed")
    with pytest.raises(ImageError, match=r"found none; 1 left out of .*: 1 no images \(without"):
        open_images(tmp_path / "a.zip")


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "a")

    def refused(self: Path) -> object:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(folder), "iterdir", refused)
    with pytest.raises(ImageError, match="a: cannot be read: Permission denied$"):
        ImageFiles(folder)


def test_bounds_are_what_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_images(write_folder(tmp_path / "a", IMAGES[:1]))
    assert isinstance(source, ImageFiles)
    (file,) = source._files
    assert len(source._bytes(file, file.size)) == file.size
    with pytest.raises(ImageError, match=f"larger than {file.size - 1} bytes, the most that is"):
        source._bytes(file, file.size - 1)
    monkeypatch.setattr(images, "MAX_PIXELS", 20)
    assert source.decode(0).shape == (5, 4, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 19)
    with pytest.raises(ImageError, match="is 4x5, at most 19 pixels are read$"):
        source.decode(0)


def test_errors_of_a_decoder_that_are_no_images_fault_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_images(write_folder(tmp_path / "a", IMAGES[:2]))

    def decode(_self: ImageFiles, _row: int) -> object:
        raise MemoryError("no room")

    monkeypatch.setattr(ImageFiles, "decode", decode)
    with pytest.raises(MemoryError, match="no room"), ImageStream(source, skip_broken=True) as all_:
        next(all_.batches([0, 1], 2))
