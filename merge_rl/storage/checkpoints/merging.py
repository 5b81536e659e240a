"""Merging a set of checkpoints: what becomes of each tensor, in memory or streamed from files."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from merge_rl import registry
from merge_rl.core.merging.buffers import (
    Checkpoints,
    FlatCheckpoints,
    FlatLayout,
    MappedCheckpoints,
    as_float32,
)
from merge_rl.core.merging.groups import Groups, assign_groups
from merge_rl.core.merging.weighted_sum import CHUNK, add_product, float32
from merge_rl.errors import (
    ConfigError,
    IncompatibleCheckpointError,
    NonFiniteWeightsError,
    UnknownNameError,
)
from merge_rl.parallel.blocks import single_threaded
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet
from merge_rl.storage.checkpoints.model_file import require_fit, require_network
from merge_rl.storage.files import WeightsReader

DISK = "disk"


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """What a merge does with every tensor of a set: average it in a group, or carry it."""

    merged: tuple[str, ...]  # names of the tensors that are averaged
    carried: tuple[str, ...]  # taken from the base as they are
    groups: Groups  # of the merged ones
    base: int  # index of the checkpoint that carried tensors come from
    frozen: tuple[str, ...] = ()  # patterns of the tensors that are carried by the user's word

    @property
    def group_of(self) -> dict[str, int]:
        """Merged name -> index of its group."""
        return dict(zip(self.merged, self.groups.index, strict=True))


def plan_merge(
    checkpoints: CheckpointSet,
    *,
    groups: Mapping[str, str] | None = None,
    base: str = "newest",
    freeze: Sequence[str] = (),
    model: nn.Module | None = None,
) -> MergePlan:
    """The plan for a set: its network, and `freeze`, say what is carried.

    `groups` maps group names to regular expressions of tensor names. `freeze` are regular
    expressions too: what they are found in stays as in the base. `model` saves building the
    network of the set's config again. Without any network (no config known) only tensors that are
    not floating are carried.
    """
    infos = checkpoints.tensors
    where = str(checkpoints.folder)
    if model is None and checkpoints.config is not None:
        require_network(infos, checkpoints.config, where)
        model = registry.build_on_meta(checkpoints.config)
    elif model is not None:
        require_fit(infos, model, where)
    if model is not None:
        require_shared(checkpoints, fixed_names(model))
        carried = carried_names(model)
    else:
        carried = {n for n, info in infos.items() if not info.is_floating}
    carried |= frozen_names(infos, freeze)
    merged = tuple(name for name in infos if name not in carried)
    if not merged:
        raise ConfigError(f"--freeze takes all {len(infos)} tensors; expected some to merge")
    assigned = assign_groups(merged, groups) if groups else Groups(("all",), (0,) * len(merged))
    return MergePlan(
        merged=merged,
        carried=tuple(sorted(carried)),
        groups=assigned,
        base=base_index(checkpoints, base),
        frozen=tuple(freeze),
    )


def frozen_names(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Names that one of the regular expressions is found in; ConfigError for one found in none."""
    found: set[str] = set()
    for pattern in patterns:
        try:
            taken = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise ConfigError(
                f"expected a regular expression to freeze, got {pattern!r}: {error}"
            ) from None
        if not taken:
            raise ConfigError(f"expected {pattern!r} to freeze at least one tensor, got none")
        found |= taken
    return found


def carried_names(model: nn.Module) -> set[str]:
    """Tensors that a merge carries from the base instead of averaging: buffers and constants."""
    stored = model.state_dict().keys()
    buffers = {name for name, _ in model.named_buffers() if name in stored}
    return buffers | set(fixed_names(model))


def fixed_names(model: nn.Module) -> tuple[str, ...]:
    """Parameters that hold constants, by the network's own word (`fixed_names`)."""
    names: tuple[str, ...] = getattr(model, "fixed_names", ())
    return names


def require_shared(checkpoints: CheckpointSet, names: Sequence[str]) -> None:
    """Raise IncompatibleCheckpointError unless all checkpoints hold the same values of `names`."""
    for name in names:
        first = checkpoints.read_tensor(0, name)
        for index in range(1, len(checkpoints)):
            if not torch.equal(checkpoints.read_tensor(index, name), first):
                raise IncompatibleCheckpointError(
                    f"{checkpoints.paths[index]}: the constant {name!r} differs from that of "
                    f"{checkpoints.paths[0].name}; expected checkpoints of one run"
                )


def base_index(checkpoints: CheckpointSet, start: str) -> int:
    """The checkpoint that coefficients start from and buffers are carried from."""
    named = start if start in checkpoints.names else checkpoints.duplicates.get(start)
    if named is not None:
        return checkpoints.names.index(named)
    if start not in ("auto", "newest", "uniform"):
        known = ("auto", "newest", "uniform", *checkpoints.names)
        raise UnknownNameError("checkpoint", start, known)
    return checkpoints.newest


def load_checkpoints(
    checkpoints: CheckpointSet, plan: MergePlan, device: str = "cpu", *, network: str = "cpu"
) -> Checkpoints:
    """The set ready to be merged many times: on a device, in memory ("cpu"), or on "disk".

    On disk the files are mapped, after one pass over each that checks hash and values. Merges give
    the same bits wherever the checkpoints lie; in memory it is of a kind that is quickly sent to
    where the `network` is.
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
            pinned=device == "cpu" and torch.device(network).type == "cuda",
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
    used = [k for k in range(len(checkpoints)) if bool((table[:, :, k] != 0).any())]
    workers = torch.get_num_threads()
    with ExitStack() as stack:
        stack.enter_context(single_threaded(workers))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        checkpoints.check_hashes(pool.map)
        readers = [stack.enter_context(checkpoints.reader(k)) for k in used]
        sums = _Summer(checkpoints, readers, used)

        def make(name: str) -> tuple[str, list[Tensor]]:
            if name not in group_of:
                carried = as_float32(checkpoints.read_tensor(plan.base, name))
                return name, [carried] * len(table)
            return name, sums.merge(name, table[:, group_of[name]][:, used])

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


class _Summer:
    """Sums tensors from pieces of open files; each thread has buffers of its own."""

    def __init__(
        self, checkpoints: CheckpointSet, readers: Sequence[WeightsReader], used: Sequence[int]
    ) -> None:
        self._checkpoints, self._readers, self._used = checkpoints, readers, used
        self._own = threading.local()

    def merge(self, name: str, rows: Tensor) -> list[Tensor]:
        """Merges of one tensor with coefficients (P, U) of the U files that have a part in any."""
        info = self._checkpoints.tensors[name]
        outs = [torch.empty(info.shape) for _ in rows]
        table = [float32(row) for row in rows]
        flats = [out.view(-1) for out in outs]
        piece, term = self._buffer(info.dtype), self._buffer(torch.float32, 1)
        for start in range(0, flats[0].numel(), CHUNK):
            parts = [flat[start : start + CHUNK] for flat in flats]
            read = piece[: parts[0].numel()]
            begun = [False] * len(parts)
            # A piece is summed while the cache holds it: file by file, not chunk by chunk of all.
            for u, reader in enumerate(self._readers):
                reader.read_into(name, start, read)
                for p, part in enumerate(parts):
                    if table[p][u] != 0:
                        add_product(part, read, table[p][u], term, first=not begun[p])
                        begun[p] = True
            for part, any_term in zip(parts, begun, strict=True):
                if not any_term:
                    part.zero_()
                # A sum tells of NaN and infinity; where it overflows by itself, a look at each.
                if not math.isfinite(float(part.sum())) and not bool(part.isfinite().all()):
                    self._blame(name)
        return outs

    def _buffer(self, dtype: torch.dtype, number: int = 0) -> Tensor:
        """(CHUNK,), kept: fresh memory costs more than what is read into it."""
        kept: dict[tuple[torch.dtype, int], Tensor] = self._own.__dict__.setdefault("kept", {})
        if (dtype, number) not in kept:
            kept[dtype, number] = torch.empty(CHUNK, dtype=dtype)
        return kept[dtype, number]

    def _blame(self, name: str) -> NoReturn:
        for index in self._used:
            self._checkpoints.read_tensor(index, name)  # refuses what is not finite, by file
        raise NonFiniteWeightsError(
            f"tensor {name!r} of the merge overflows float32; expected coefficients of moderate "
            "size"
        )
