"""Pictures within a page: tiles of a run's samples, and whole grids, small enough to send on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import RunError
from merge_rl.storage.files import Pixels, decode_image, picture_address
from merge_rl.untrusted import load_json_mapping, open_file
from merge_rl.workflows.report.elements import image
from merge_rl.workflows.report.markup import NOTHING, Safe, joined, tag

SAMPLES: Final = "samples/samples.json"
TITLES: Final = {"start": "Before: the start", "result": "After: the result"}
LARGE: Final = 256  # pixels a side, to which larger pictures are scaled down
GRID: Final = 1200


def before_after(folder: Path, captions: Mapping[str, str]) -> Safe:
    """Tiles of start and result on equal seeds, of what `optimize` kept; nothing without it.

    `captions` are the scores beneath the titles.
    """
    if not (folder / SAMPLES).is_file():
        return NOTHING
    with open_file(folder / SAMPLES, RunError) as file:
        record = load_json_mapping(file.read(), str(folder / SAMPLES), RunError)
    panels = []
    for entry, title in TITLES.items():
        path = folder / "samples" / f"{entry}.png"
        if path.is_file():
            panels.append(_panel(title, captions.get(entry, ""), _tiles(_read(path), record)))
    return tag("div", *panels, class_="pair") if panels else NOTHING


def grids(pictures: Mapping[str, tuple[Path, str]]) -> Safe:
    """Whole grids by title, each with a caption; nothing for files that are not there."""
    panels = [
        _panel(title, caption, image(picture_address(_read(path), GRID), title, sharp=True))
        for title, (path, caption) in pictures.items()
        if path.is_file()
    ]
    return tag("div", *panels, class_="pair") if panels else NOTHING


def _read(path: Path) -> Pixels:
    with open_file(path, RunError) as file:
        return decode_image(file.read(), str(path))


def _panel(title: str, caption: str, content: str) -> Safe:
    said = tag("figcaption", tag("b", title), f", {caption}" if caption else "")
    return tag("figure", said, content)


def _tiles(grid: Pixels, record: Mapping[str, Any]) -> Safe:
    """Every image of a grid without gaps, with its class."""
    height, width, columns = (int(record[key]) for key in ("height", "width", "columns"))
    cells = []
    for index, label in enumerate(record["labels"]):
        top, left = index // columns * height, index % columns * width
        pixels = grid[top : top + height, left : left + width]
        seed = record["first_seed"] + index
        said = f"seed {seed}" if label is None else f"class {label}, seed {seed}"
        picture = image(picture_address(pixels, LARGE), said, sharp=max(height, width) < LARGE)
        cells.append(tag("div", picture, "" if label is None else str(label)))
    return tag("div", joined(cells), class_="tiles", style=f"--n:{min(columns, 10)}")
