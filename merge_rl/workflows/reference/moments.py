"""Moments, and some features, of a stream of images: the resumable loop behind a reference."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from merge_rl.core.distances.statistics import FeatureStats, extend_stats
from merge_rl.errors import RunError
from merge_rl.interfaces import FeatureExtractor
from merge_rl.parallel.group import Group
from merge_rl.parallel.rendezvous import Place
from merge_rl.storage.files import ImageKind, ImageSource, WorkFolder
from merge_rl.workflows.reference.extract import SharedExtraction

BLOCK_ROWS: Final = 256  # images whose features enter the moments together, in whole batches
SAVE_SECONDS: Final = 20.0  # how often the state is saved
ALONE: Final = Group(Place())

Found = tuple[Tensor, Tensor]
"""Positions (B,) in the plan, features (B, D)."""


@dataclass(frozen=True, eq=False)
class CollectPlan:
    """Which images to take, and what each of them counts for."""

    rows: Tensor  # (N,) int64, ascending rows of the source
    parts: Tensor  # (N,) int64, the set of moments that an image belongs to
    keep: Tensor  # (N,) bool, whether its features are kept
    num_parts: int
    batch: int

    @property
    def block(self) -> int:
        """Images of a block: a number of whole batches."""
        return max(1, BLOCK_ROWS // self.batch) * self.batch


@dataclass(frozen=True, eq=False)
class Collected:
    """What is known after the first `done` images of a plan; a value, saved as a whole."""

    stats: tuple[FeatureStats | None, ...]
    done: int = 0
    pieces: int = 0  # of kept features on disk
    pending: tuple[Found, ...] = ()  # kept features in memory
    kind: ImageKind | None = None
    broken: tuple[str, ...] = ()

    def extended(
        self, plan: CollectPlan, block: Sequence[Found], images: SharedExtraction
    ) -> Collected:
        """After the next block; what is there is left as it is."""
        positions = torch.cat([found for found, _ in block])
        features = torch.cat([features for _, features in block])
        if features.device.type == "mps":
            features = features.cpu()  # which lacks float64
        parts, keep = plan.parts[positions], plan.keep[positions]
        stats = tuple(
            extend_stats(known, features[(parts == part).to(features.device)])
            for part, known in enumerate(self.stats)
        )
        kept = (positions[keep], features[keep.to(features.device)].cpu())
        return dataclasses.replace(
            self,
            stats=stats,
            done=min(self.done + plan.block, len(plan.rows)),
            pending=(*self.pending, kept) if len(kept[0]) else self.pending,
            kind=images.kind,
            broken=tuple(images.broken),
        )


def collect(
    source: ImageSource,
    plan: CollectPlan,
    extractor: FeatureExtractor,
    work: WorkFolder | None,
    *,
    device: str,
    skip_broken: bool,
    on_images: Callable[[int], None],
    group: Group = ALONE,
) -> Collected:
    """Go through the images of a plan, from where the work folder says an earlier call got to.

    Blocks begin at the same images whoever forms them, so an interruption changes no bit, nor does
    the number of processes. Rank 0 calls this, the others `help_collect`.
    """
    state = restore(work, plan, device)
    on_images(state.done)
    group.broadcast(state.done, phase="images")
    left, saved = plan.rows[state.done :].tolist(), time.monotonic()
    images = SharedExtraction(
        group, source, extractor, batch=plan.batch, device=device, skip_broken=skip_broken,
        kind=state.kind, broken=state.broken,
    )  # fmt: skip

    def batches() -> Generator[Found, None, None]:
        for number, (rows, features) in enumerate(images.batches(left)):
            yield torch.searchsorted(plan.rows, rows), features
            on_images(min(plan.batch, len(left) - number * plan.batch))

    try:
        # Closed before anything else happens: threads read ahead inside.
        with contextlib.closing(batches()) as found:
            for block in _grouped(found, plan.block // plan.batch):
                state = state.extended(plan, block, images)
                if time.monotonic() - saved >= SAVE_SECONDS:
                    state, saved = save(work, state), time.monotonic()
    except KeyboardInterrupt:
        save(work, state)
        raise
    return state


def help_collect(
    source: ImageSource,
    plan: CollectPlan,
    extractor: FeatureExtractor,
    group: Group,
    *,
    device: str,
    skip_broken: bool,
) -> None:
    """What `collect` of rank 0 needs of the others."""
    done = group.broadcast(phase="images")
    images = SharedExtraction(
        group, source, extractor, batch=plan.batch, device=device, skip_broken=skip_broken
    )
    for _ in images.batches(plan.rows[done:].tolist()):
        pass


def save(work: WorkFolder | None, state: Collected) -> Collected:
    """Write the state to the work folder; kept features go to a piece of their own first."""
    if work is None:
        return state
    if state.pending:
        positions, features = (torch.cat(parts) for parts in zip(*state.pending, strict=True))
        work.write(_piece(state.pieces), {"positions": positions, "features": features}, {})
        state = dataclasses.replace(state, pieces=state.pieces + 1, pending=())
    tensors: dict[str, Tensor] = {}
    for part, stats in enumerate(state.stats):
        if stats is not None:
            tensors |= {f"mean{part}": stats.mean, f"cov{part}": stats.cov}
    note = {
        "done": state.done,
        "counts": [stats.count if stats else 0 for stats in state.stats],
        "pieces": state.pieces,
        "kind": dataclasses.asdict(state.kind) if state.kind else None,
        "broken": state.broken,
    }
    work.write("state", tensors, note)
    return state


def restore(work: WorkFolder | None, plan: CollectPlan, device: str) -> Collected:
    """The saved state, or the first one."""
    found = work.read("state") if work is not None else None
    if found is None:
        return Collected(stats=(None,) * plan.num_parts)
    tensors, note = found
    where = "cpu" if device.startswith("mps") else device
    stats = tuple(
        FeatureStats(count, tensors[f"mean{part}"].to(where), tensors[f"cov{part}"].to(where))
        if count
        else None
        for part, count in enumerate(note["counts"])
    )
    return Collected(
        stats=stats,
        done=note["done"],
        pieces=note["pieces"],
        kind=ImageKind(**note["kind"]) if note["kind"] else None,
        broken=tuple(note["broken"]),
    )


def kept_features(work: WorkFolder | None, state: Collected) -> Found | None:
    """All kept features in order, with their positions in the plan; None if none were kept."""
    found = []
    for number in range(state.pieces):
        piece = work.read(_piece(number)) if work is not None else None
        if piece is None:
            raise RunError(f"features that were kept are lost from {work and work.path}: remove it")
        found.append((piece[0]["positions"], piece[0]["features"]))
    found += state.pending
    if not found:
        return None
    positions, features = zip(*found, strict=True)
    return torch.cat(positions), torch.cat(features)


def _piece(number: int) -> str:
    return f"features-{number:06d}"


def _grouped(items: Iterable[Found], size: int) -> Iterator[list[Found]]:
    group: list[Found] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
