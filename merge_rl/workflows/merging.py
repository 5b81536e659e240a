"""Merging a set of checkpoints: what becomes of each tensor, in memory or streamed from files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merge_rl import registry
from merge_rl.core.groups import Groups, assign_groups
from merge_rl.core.merging import (
    Checkpoints,
    FlatCheckpoints,
    FlatLayout,
    MappedCheckpoints,
    as_float32,
)
from merge_rl.core.weighted_sum import CHUNK, weighted_sum
from merge_rl.errors import CheckpointError, ConfigError, NonFiniteWeightsError, UnknownNameError
from merge_rl.storage.checkpoints import CheckpointSet

DISK = "disk"


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """What a merge does with every tensor of a set: average it in a group, or carry it."""

    merged: tuple[str, ...]  # names of the tensors that are averaged
    carried: tuple[str, ...]  # taken from the base as they are
    groups: Groups  # of the merged ones
    base: int  # index of the checkpoint that carried tensors come from

    @property
    def group_of(self) -> dict[str, int]:
        """Merged name -> index of its group."""
        return dict(zip(self.merged, self.groups.index, strict=True))


def plan_merge(
    checkpoints: CheckpointSet,
    *,
    groups: Mapping[str, str] | None = None,
    base: str = "newest",
    model: nn.Module | None = None,
) -> MergePlan:
    """The plan for a set: its network says what is carried.

    `groups` maps group names to regular expressions of tensor names. `model` saves building the
    network of the set's config again. Without any network (no config known) only tensors that are
    not floating are carried.
    """
    infos = checkpoints.tensors
    if model is None and checkpoints.config is not None:
        with torch.device("meta"):
            model = registry.build_model(checkpoints.config)
    if model is not None:
        require_fit(checkpoints, model)
        carried = carried_names(model)
    else:
        carried = {n for n, info in infos.items() if not info.dtype.is_floating_point}
    merged = tuple(name for name in infos if name not in carried)
    assigned = assign_groups(merged, groups) if groups else Groups(("all",), (0,) * len(merged))
    return MergePlan(
        merged=merged,
        carried=tuple(sorted(carried)),
        groups=assigned,
        base=base_index(checkpoints, base),
    )


def carried_names(model: nn.Module) -> set[str]:
    """Tensors that a merge carries from the base instead of averaging: the network's buffers."""
    return {name for name, _ in model.named_buffers()}


def require_fit(checkpoints: CheckpointSet, model: nn.Module) -> None:
    """Raise CheckpointError unless the set's tensors are those of the network of its config."""
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(info.shape) for name, info in checkpoints.tensors.items()}
    odd = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if odd:
        name = odd[0]
        raise CheckpointError(
            f"{checkpoints.folder}: {len(odd)} tensors do not fit the network of the model "
            f"config, first {name!r}: found {found.get(name, 'nothing')}, "
            f"expected {expected.get(name, 'nothing')}"
        )


def base_index(checkpoints: CheckpointSet, start: str) -> int:
    """The checkpoint that coefficients start from and buffers are carried from."""
    if start in checkpoints.names:
        return checkpoints.names.index(start)
    if start not in ("newest", "uniform"):
        raise UnknownNameError("checkpoint", start, ("newest", "uniform", *checkpoints.names))
    return checkpoints.newest


def load_checkpoints(
    checkpoints: CheckpointSet, plan: MergePlan, device: str = "cpu"
) -> Checkpoints:
    """The set ready to be merged many times: on a device, in memory ("cpu"), or on "disk".

    On disk the files are mapped, after one pass over each that checks hash and values. Merges give
    the same bits wherever the checkpoints lie.
    """
    shapes = {name: checkpoints.tensors[name].shape for name in plan.merged}
    layout = FlatLayout.of(shapes, plan.groups)
    if device != DISK:
        return FlatCheckpoints.load(
            checkpoints.read,
            len(checkpoints),
            layout,
            base=plan.base,
            fixed=plan.carried,
            device=torch.device(device),
        )
    rows = [checkpoints.mapped(index) for index in range(len(checkpoints))]
    fixed = {name: rows[plan.base][name].clone() for name in plan.carried}
    return MappedCheckpoints(layout, rows, fixed)


def stream_merge(
    checkpoints: CheckpointSet, plan: MergePlan, coefficients: Tensor
) -> Iterator[tuple[str, list[Tensor]]]:
    """Several merges in one pass over the files: (name, P tensors) for every tensor, in file order.

    Args:
        checkpoints: K of them; hashes that a manifest records are compared first.
        plan: see `plan_merge`.
        coefficients: (P, G, K), finite.

    Every file is read once (once more for its hash, if one is recorded), a piece at a time: besides
    the tensors that are yielded, a few MiB for each of K files are held. Merged tensors are
    float32, summed as `weighted_sum` does, and finite, or NonFiniteWeightsError names the file.
    """
    table = coefficients.to("cpu", torch.float32)
    expected = (len(plan.groups.names), len(checkpoints))
    if table.ndim != 3 or tuple(table.shape[1:]) != expected:
        raise ConfigError(f"expected coefficients {expected}, got {tuple(table.shape[1:])}")
    if not bool(table.isfinite().all()):
        raise ConfigError("expected finite coefficients, got NaN or infinity")
    group_of = plan.group_of

    def make(name: str) -> tuple[str, list[Tensor]]:
        if name not in group_of:
            carried = as_float32(checkpoints.read_tensor(plan.base, name))
            return name, [carried] * len(table)
        return name, _merge_tensor(checkpoints, name, table[:, group_of[name]])

    workers = torch.get_num_threads()
    with single_threaded(workers), ThreadPoolExecutor(workers) as pool:
        checkpoints.check_hashes(pool.map)
        yield from _ahead(pool, make, list(checkpoints.tensors), workers)


def _ahead(
    pool: ThreadPoolExecutor, make: Any, names: Sequence[str], ahead: int
) -> Iterator[tuple[str, list[Tensor]]]:
    """make(name) of every name, in order, with `ahead` more under way and no more than that."""
    waiting = [pool.submit(make, name) for name in names[: ahead + 1]]
    try:
        for index in range(len(names)):
            result = waiting.pop(0).result()
            if index + ahead + 1 < len(names):
                waiting.append(pool.submit(make, names[index + ahead + 1]))
            yield result
    finally:
        for future in waiting:
            future.cancel()


def _merge_tensor(checkpoints: CheckpointSet, name: str, rows: Tensor) -> list[Tensor]:
    """Merges of one tensor with coefficients (P, K), from pieces of the files."""
    info = checkpoints.tensors[name]
    outs = [torch.empty(info.shape) for _ in rows]
    flats = [out.view(-1) for out in outs]
    used = [k for k in range(len(checkpoints)) if bool((rows[:, k] != 0).any())]
    files = checkpoints.slices(name, used)
    for start in range(0, flats[0].numel(), CHUNK):
        stop = min(start + CHUNK, flats[0].numel())
        pieces = [read(start, stop) for read in files]
        for flat, row in zip(flats, rows[:, used], strict=True):
            weighted_sum(pieces, row, flat[start:stop])
            if not bool(flat[start:stop].isfinite().all()):
                _blame(checkpoints, name, used)
    return outs


def _blame(checkpoints: CheckpointSet, name: str, used: Sequence[int]) -> None:
    for index in used:
        checkpoints.read_tensor(index, name)  # refuses values that are not finite, by file
    raise NonFiniteWeightsError(
        f"tensor {name!r} of the merge overflows float32; expected coefficients of moderate size"
    )


@contextlib.contextmanager
def single_threaded(workers: int) -> Iterator[None]:
    """One thread inside each operation while several workers run operations side by side."""
    before = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
