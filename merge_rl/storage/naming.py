"""What the name of a checkpoint file says: training progress and EMA width.

Names end in `-{kimg:07d}-{std}` (a power-function EMA) or `-{kimg:07d}`; kimg = nimg // 1000.
"""

from __future__ import annotations

import re

from merge_rl.core.ema_profiles import nimg_from_kimg
from merge_rl.errors import ConfigError

# Above 1 / sqrt(12) = 0.2887 no power-function EMA exists; 0.289 is the bound the names go by.
MAX_EMA_STD = 0.289

_PROGRESS = re.compile(r"-(?P<kimg>[0-9]{7,12})(?:-(?P<std>0\.[0-9]{1,6}))?$")


def _nimg(kimg: int) -> int:
    """Images seen behind a file name; of training that advances by other counts, at least these."""
    try:
        return nimg_from_kimg(kimg)
    except ConfigError:
        return 1000 * kimg


def parse_stem(stem: str) -> tuple[int | None, float | None]:
    """(nimg, ema_std) of a file name without its ending; None where it does not say."""
    match = _PROGRESS.search(stem)
    if match is None:
        return None, None
    std = float(match["std"]) if match["std"] else None
    if std is not None and not 0 < std < MAX_EMA_STD:
        return None, None
    return _nimg(int(match["kimg"])), std


def format_stem(prefix: str, nimg: int, ema_std: float | None = None) -> str:
    """Name for a checkpoint, without its ending: `prefix-0008388-0.050`, `prefix-0008388`."""
    stem = f"{prefix}-{nimg // 1000:07d}"
    return stem if ema_std is None else f"{stem}-{ema_std:.3f}"
