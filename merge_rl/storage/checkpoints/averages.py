"""What a set's checkpoints are in training time: images seen, and the averages that they are."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints.listing import progress
from merge_rl.storage.checkpoints.manifest import CheckpointEntry

if TYPE_CHECKING:
    from merge_rl.core.merging.posthoc import Profiles


class Averages:
    """Entries of a manifest, in order; the base of `CheckpointSet`."""

    folder: Path
    entries: tuple[CheckpointEntry, ...]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def nimg(self) -> list[int | None]:
        """Training images seen, per checkpoint."""
        return [entry.nimg for entry in self.entries]

    @property
    def ema_std(self) -> list[float | None]:
        """Relative EMA width per checkpoint, None for raw weights."""
        return [entry.ema_std for entry in self.entries]

    @cached_property
    def ema_gamma(self) -> list[float | None]:
        """Exponent of the average per checkpoint, of which ema_std is the width; None for raw."""
        from merge_rl.core.merging.ema_profiles import exponent_from_std

        stated = [entry.ema_gamma for entry in self.entries]
        widths = [exponent_from_std(w) if w is not None else None for w in self.ema_std]
        return [
            width if gamma is None else gamma for gamma, width in zip(stated, widths, strict=True)
        ]

    @property
    def ema_start(self) -> float:
        """Images at which the averages began, all at one time; 0 where the manifest says nothing.

        CheckpointError where it says several.
        """
        averages = [e for e in self.entries if e.ema_std is not None or e.ema_gamma is not None]
        starts = sorted({entry.ema_start or 0.0 for entry in averages})
        if len(starts) > 1:
            raise CheckpointError(
                f"{self.folder}: averages that began at {starts[0]:g} and at {starts[-1]:g} images;"
                " expected those of one run, from one time on (choose a series with --track)"
            )
        return starts[0] if starts else 0.0

    def profiles(self) -> Profiles | None:
        """The averages' profiles in time; None where a checkpoint's is not known."""
        from merge_rl.core.merging.posthoc import Profiles

        return Profiles.known(self.nimg, self.ema_gamma, self.ema_start)

    @property
    def tracks(self) -> list[str]:
        """The distinct tracks, in order of appearance."""
        return list(dict.fromkeys(entry.track for entry in self.entries if entry.track))

    @property
    def newest(self) -> int:
        """Index of the largest (nimg, ema_std); the last one if some nimg is unknown."""
        indices = range(len(self))
        if any(nimg is None for nimg in self.nimg):
            return indices[-1]
        return max(indices, key=lambda i: (*progress(self.entries[i]), i))
