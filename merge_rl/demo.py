"""The embedded run of handwritten digits: written to a folder, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from merge_rl.errors import RunError
from merge_rl.storage.files import locked, temporary_beside

DATA = Path(__file__).parent / "data" / "digits"
RUNS: Final = ("edm2", "sit")


def write_demo(folder: Path) -> dict[str, Path]:
    """Write DIR/edm2 and DIR/sit: checkpoints with their manifest, extractor, reference statistics.

    Each is complete in itself. If one of them exists, nothing is written; else both appear whole
    or not at all. Returns the folders by the name of the run.
    """
    targets = {name: folder / name for name in RUNS}
    for target in targets.values():
        if target.exists():
            raise RunError(f"{target} exists already; choose another folder")
    with locked(folder):
        _write(targets, temporary_beside(folder / "demo"))
    return targets


def _write(targets: Mapping[str, Path], temporary: Path) -> None:
    moved = []
    try:
        for name in targets:
            shutil.copytree(DATA / name, temporary / name)
            # Beside the checkpoints, since a manifest names no path outside its folder.
            shutil.copytree(DATA / "evaluation", temporary / name / "evaluation")
        for name, target in targets.items():
            (temporary / name).replace(target)
            moved.append(target)
    except BaseException:
        for target in moved:
            shutil.rmtree(target, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
