"""A grid of post-hoc EMA profiles: the way that EDM2's authors choose a model.

Karras et al., 2024 (arXiv:2312.02696, section 3): for each width and each end of training, the
coefficients that rebuild that EMA from the saved ones (`merge_rl.core.ema_profiles`); the best is
found by successive halving. Every checkpoint's nimg and ema_std must be known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.core.ema_profiles import posthoc_coefficients
from merge_rl.core.search_space import SearchSpace
from merge_rl.errors import ConfigError
from merge_rl.search.candidates import bound, reach
from merge_rl.search.halving import HalvingSearch

WIDTHS = tuple(round(float(width), 3) for width in np.geomspace(0.01, 0.25, 15))
EVALUATIONS_EACH = 8  # of the budget, for each candidate of the grid
SAME = 1e-6  # coefficients closer than this are one candidate
LARGEST_SUM = 10.0  # of |coefficients|: beyond it a fit is a small difference of large parts


class EmaGrid(HalvingSearch):
    """Successive halving over EMA profiles."""

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        nimg, ema_std = known_profiles(space, config.name)
        rows = profile_grid(nimg, ema_std, limit=space.evaluations // EVALUATIONS_EACH)
        largest = {label: float(row.abs().max()) for label, row in rows.items()}
        # If none is inside the map's box, the refusal names the bound that the nearest one needs.
        limit = max(bound(space), min(largest.values()))
        chosen = {label: row for label, row in rows.items() if largest[label] <= limit}
        candidates = {label: reach(space, row, config.name) for label, row in chosen.items()}
        super().__init__(config, space, seed, candidates)


def known_profiles(space: SearchSpace, searcher: str) -> tuple[list[int], list[float]]:
    """nimg and ema_std of all K checkpoints; ConfigError lists what is not known."""
    missing = []
    for kind, values in (("nimg", space.nimg), ("ema_std", space.ema_std)):
        names = [n for n, value in zip(space.names, values, strict=True) if value is None]
        if names:
            listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            missing.append(f"{kind} of {listed}")
    if missing:
        raise ConfigError(
            f"{searcher} needs nimg and ema_std of every checkpoint in the manifest,"
            f" missing: {'; '.join(missing)}"
        )
    nimg = [int(value) for value in space.nimg if value is not None]
    return nimg, [float(value) for value in space.ema_std if value is not None]


def grid_ends(nimg: Sequence[int], count: int) -> list[int]:
    """`count` ends of training, newest first: spread evenly over the later half of the saved."""
    saved = sorted(set(nimg), reverse=True)
    later = saved[: (len(saved) + 1) // 2]
    places = np.linspace(0, len(later) - 1, min(count, len(later))).round().astype(int)
    return [later[i] for i in places]


def profile_grid(nimg: Sequence[int], ema_std: Sequence[float], *, limit: int) -> dict[str, Tensor]:
    """label -> coefficients (K,) float64 of each profile; about `limit`, one end's at the least.

    A profile that ends at T is rebuilt from the checkpoints up to T; later ones get 0. Fits that
    are ill-conditioned and repetitions are left out. ConfigError if nothing remains.
    """
    widths = sorted({*WIDTHS, *ema_std})
    found: dict[str, Tensor] = {}
    refusal = ""
    for end in grid_ends(nimg, max(1, limit // len(widths))):
        for width in widths:
            try:
                row = profile_row(nimg, ema_std, end, width)
            except ConfigError as error:
                refusal = f": {error}"
                continue
            new = all(float((row - other).abs().max()) > SAME for other in found.values())
            if new and float(row.abs().sum()) <= LARGEST_SUM:
                found[f"ema_std {width:g} at nimg {end}"] = row
    if not found:
        raise ConfigError(f"no EMA profile can be rebuilt from these checkpoints{refusal}")
    return found


def profile_row(nimg: Sequence[int], ema_std: Sequence[float], end: int, width: float) -> Tensor:
    """Coefficients (K,) of the EMA of that width that ends at nimg = `end`."""
    seen = [i for i, time in enumerate(nimg) if time <= end]
    row = torch.zeros(len(nimg), dtype=torch.float64)
    times, widths = [nimg[i] for i in seen], [ema_std[i] for i in seen]
    row[seen] = posthoc_coefficients(times, widths, [end], [width])[:, 0]
    return row
