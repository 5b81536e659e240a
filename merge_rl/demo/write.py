"""Write the embedded digits run to a folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from merge_rl.errors import RunError

DATA = Path(__file__).parent / "data"


def write_demo(folder: Path) -> Path:
    """Write DIR/edm2: checkpoints with their manifest, extractor, reference statistics.

    An existing DIR/edm2 is refused; the folder appears whole or not at all. Returns DIR/edm2.
    """
    target = folder / "edm2"
    if target.exists():
        raise RunError(f"{target} exists already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".edm2-", dir=folder))
    try:
        temporary.chmod(0o755)
        shutil.copytree(DATA / "edm2", temporary, dirs_exist_ok=True)
        # Beside the checkpoints, since a manifest names no path outside its folder.
        shutil.copytree(DATA / "evaluation", temporary / "evaluation")
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target
