"""The embedded runs of handwritten digits: written to a folder, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from merge_rl.errors import ConfigError, RunError
from merge_rl.storage.files import locked, temporary_beside, told_of

DATA = Path(__file__).parent / "data" / "digits"
DATA28 = DATA.with_name("digits28")
RUNS: Final = ("edm2", "sit")


def write_demo(folder: Path, pixels: int = 8) -> dict[str, Path]:
    """Write DIR/edm2 and DIR/sit: checkpoints with their manifest, extractor, reference statistics.

    `pixels` is the side of a digit: 8, or 28 for a larger EDM2 alone. Each run is complete in
    itself. If one of them exists, nothing is written; else all appear whole or not at all. Returns
    the folders by the name of the run. Raises ConfigError for another number of pixels.
    """
    if pixels not in (8, 28):
        raise ConfigError(f"expected digits of 8 or 28 pixels, got {pixels}")
    data, names = (DATA, RUNS) if pixels == 8 else (DATA28, RUNS[:1])
    targets = {name: folder / name for name in names}
    for target in targets.values():
        if target.exists():
            raise RunError(f"{target} exists already; choose another folder")
    temporary = temporary_beside(folder / "demo")
    with locked(folder), told_of(folder, temporary):
        _write(data, targets, temporary)
    return targets


def _copy(source: Path, target: Path) -> None:
    # Not by copytree, which tells of all files that a full disk does not take.
    for file in sorted(source.rglob("*.*")):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            shutil.copyfile(file, place)


def _write(data: Path, targets: Mapping[str, Path], temporary: Path) -> None:
    moved = []
    try:
        for name in targets:
            _copy(data / name, temporary / name)
            # Beside the checkpoints, since a manifest names no path outside its folder.
            _copy(data / "evaluation", temporary / name / "evaluation")
        for name, target in targets.items():
            (temporary / name).replace(target)
            moved.append(target)
    except BaseException:
        for target in moved:
            shutil.rmtree(target, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
