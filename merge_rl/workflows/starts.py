"""Merges that cost no search: where a search may begin.

newest checkpoints        the newest of every track
averages of the newest    of 2, 4, 8, ... checkpoints of a track, up to all
EMA profiles              of the newest end, where the manifest says what the checkpoints are
single checkpoints        the others, from new to old

In this order, as many as the budget can compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from merge_rl import registry
from merge_rl.config import OptimizeConfig
from merge_rl.core.coefficients import CoefficientMap
from merge_rl.core.ema_profiles import posthoc_coefficients
from merge_rl.core.tournament import most_entries
from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.workflows.budget import LEAST

AUTO = "auto"
MOST = 16  # starts: further images are better spent on looking twice
WIDTHS = (0.5, 0.75, 1.5)  # of EMA profiles, times the widths at hand


def starts_of(
    config: OptimizeConfig, checkpoints: CheckpointSet, coefficients: CoefficientMap
) -> dict[str, Tensor]:
    """Where the search of a config may begin, coefficients (G, K) by what they are."""
    own = registry.chooses_itself(config.search.name)
    if config.merge.start == AUTO and config.search.start_share > 0 and not own:
        images = int(config.budget * config.search.start_share)
        return free_starts(checkpoints, coefficients, min(MOST, most_entries(images, LEAST)))
    label = "newest" if config.merge.start == AUTO else config.merge.start
    return {label: coefficients(torch.zeros(coefficients.dim, dtype=torch.float64))}


def free_starts(
    checkpoints: CheckpointSet, coefficients: CoefficientMap, most: int = MOST
) -> dict[str, Tensor]:
    """The first `most` of them, coefficients (G, K) by what they are; the map's own start first.

    What the map cannot reach is left out, and so is what another entry is already.
    """
    origin = coefficients(torch.zeros(coefficients.dim, dtype=torch.float64))
    found = {"newest": origin}
    rows = {**_averages(checkpoints), **_profiles(checkpoints), **_singles(checkpoints)}
    for label, row in rows.items():
        if len(found) >= most:
            break
        wide = row.expand(coefficients.num_groups, -1)
        try:
            coefficients.theta_of(wide)
        except ConfigError:
            continue
        if not any(torch.allclose(wide, other) for other in found.values()):
            found[label] = wide
    return found


def _averages(checkpoints: CheckpointSet) -> dict[str, Tensor]:
    rows = {}
    for track, members in _tracks(checkpoints).items():
        of = f" of {track}" if track else ""
        size = 1
        while size // 2 < len(members):
            chosen = members[-min(size, len(members)) :]
            row = torch.zeros(len(checkpoints), dtype=torch.float64)
            row[chosen] = 1 / len(chosen)
            alone = f"newest{of}" if size == 1 else f"average of {len(chosen)} newest{of}"
            rows[alone] = row
            size *= 2
    return rows


def _tracks(checkpoints: CheckpointSet) -> dict[str, list[int]]:
    """Indices of each track's checkpoints, oldest first; "" where there is one track at most."""
    names = [entry.track or "" for entry in checkpoints.entries]
    tracks: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        tracks.setdefault(name, []).append(index)
    nimg = checkpoints.nimg
    if all(n is not None for n in nimg):
        for members in tracks.values():
            members.sort(key=lambda i: (nimg[i] or 0, i))
    return tracks if len(tracks) > 1 else {"": next(iter(tracks.values()))}


def _profiles(checkpoints: CheckpointSet) -> dict[str, Tensor]:
    nimg, ema_std = checkpoints.nimg, checkpoints.ema_std
    known = [i for i in range(len(checkpoints)) if nimg[i] and ema_std[i]]
    if len(known) < 2:
        return {}
    times = [float(nimg[i] or 0) for i in known]
    widths = [float(ema_std[i] or 0) for i in known]
    rows = {}
    for width in _widths(widths):
        try:
            fitted = posthoc_coefficients(times, widths, [max(times)], [width])[:, 0]
        except ConfigError:  # profiles that cannot be told apart
            continue
        row = torch.zeros(len(checkpoints), dtype=torch.float64)
        row[known] = fitted
        rows[f"EMA {width:.3f}"] = row
    return rows


def _singles(checkpoints: CheckpointSet) -> dict[str, Tensor]:
    """From new to old, the tracks in turns."""
    tracks = [members[::-1] for members in _tracks(checkpoints).values()]
    turns = [i for place in zip_longest(*tracks) for i in place if i is not None]
    rows = torch.eye(len(checkpoints), dtype=torch.float64)
    return {checkpoints.names[i]: rows[i] for i in turns}


def _widths(at_hand: Sequence[float]) -> list[float]:
    low, high = min(at_hand), max(at_hand)
    widths = [low * WIDTHS[0], low * WIDTHS[1], (low * high) ** 0.5, high * WIDTHS[2]]
    return sorted({round(width, 3) for width in widths if 0 < width < 0.28})
