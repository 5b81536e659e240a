"""Merges in one pass over the files of a set: each byte read once, hashed and summed on the way."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from merge_rl.core.merging.stored_numbers import (
    Floats,
    Raw,
    as_numbers,
    finite_halves,
    product,
    raw_type,
    widen,
)
from merge_rl.errors import ConfigError, NonFiniteWeightsError
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet
from merge_rl.storage.checkpoints.plan import MergePlan, finite_bytes
from merge_rl.storage.files import WeightsReader

Put: TypeAlias = Callable[[int, str, int, Raw], None]
"""Takes (merge, tensor, first element, values): float32, or as stored what is not floating."""

PART: Final = 1 << 16  # elements summed at a time; of torch, which begins slower, twice as many
BLOCK_BYTES: Final = 1 << 22  # of each file, read while the block before is summed
HELD_BYTES: Final = 1 << 26  # of all files together, at most
ALIGNED: Final = 64


@dataclass(frozen=True)
class Segment:
    """Elements [start, start + count) of a tensor, and where a block holds their bytes."""

    name: str
    start: int
    count: int
    offset: int
    code: str

    @property
    def nbytes(self) -> int:
        """In a file, and in a block."""
        return self.count * raw_type(self.code).itemsize

    def within(self, row: npt.NDArray[np.uint8]) -> Raw:
        """The numbers, from what a block holds of a file."""
        return row[self.offset : self.offset + self.nbytes].view(raw_type(self.code))


def merge_pass(
    checkpoints: CheckpointSet,
    plan: MergePlan,
    coefficients: npt.ArrayLike,
    put: Put,
    *,
    hashed: bool = False,
) -> None:
    """P merges at once: out = sum_k coefficients[p, g, k] theta_{g,k}, in float32.

    Args:
        checkpoints: K of them; hashes that a manifest or a recipe records are compared.
        plan: see `plan_merge`.
        coefficients: (P, G, K), finite; used as float32. A file whose own are all 0 is not summed.
        put: gets every element of every merge once, from several threads at a time, in any order;
            the values are overwritten after it returns.
        hashed: hash every file, whether something is recorded or not.

    Each product and each sum is rounded once, in the order of k, as `weighted_sum` does: the bits
    do not depend on the machine. Files whose tensors follow one another in the same order are read
    once; where they differ, once more for their hashes. 64 MiB are held at most. Raises
    ConfigError for coefficients that do not fit, HashMismatchError, and NonFiniteWeightsError that
    names the file, or the tensor that overflows; `put` may have been called by then.
    """
    table = _table(checkpoints, plan, coefficients)
    workers = threads()
    with ExitStack() as stack:
        if "torch" in sys.modules:
            from merge_rl.parallel.blocks import single_threaded

            stack.enter_context(single_threaded(workers))  # inside each operation
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        _Pass(checkpoints, plan, table, put).run(pool, workers, stack, hashed=hashed)


def threads() -> int:
    """How many threads to work with: torch's number where it is loaded, else OMP's, else all."""
    if "torch" in sys.modules:
        count: int = sys.modules["torch"].get_num_threads()
        return count
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said):
        return int(said)
    # Those that this process may use, where the system tells.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _table(
    checkpoints: CheckpointSet, plan: MergePlan, coefficients: npt.ArrayLike
) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        table = np.asarray(coefficients).astype(np.float32)
    expected = (len(plan.groups.names), len(checkpoints))
    if table.ndim != 3 or table.shape[1:] != expected:
        raise ConfigError(f"expected coefficients {expected}, got {table.shape[1:]}")
    if not bool(np.isfinite(table).all()):
        raise ConfigError("expected finite coefficients, got NaN or infinity")
    return table


class _Pass:
    """What the threads of one pass share."""

    def __init__(
        self, checkpoints: CheckpointSet, plan: MergePlan, table: npt.NDArray[np.float32], put: Put
    ) -> None:
        self._checkpoints, self._put, self._base = checkpoints, put, plan.base
        self._group_of, self._table = plan.group_of, table
        self._used = [k for k in range(len(checkpoints)) if table[:, :, k].any()]
        self._read = sorted({*self._used, *([plan.base] if plan.carried else [])})
        self._own, self._part = threading.local(), PART * (1 + ("torch" in sys.modules))

    def run(
        self, pool: ThreadPoolExecutor, workers: int, stack: ExitStack, *, hashed: bool
    ) -> None:
        """Read, hash, sum and put out everything."""
        known, order = self._checkpoints, self._checkpoints.in_order(0)
        wanted = known.hashes.missing() if hashed else known.hashes.to_compare()
        stamps = {k: known.hashes.stamp(k) for k in wanted}
        aside = [k for k in wanted if k not in self._read or known.in_order(k) != order]
        apart = [pool.submit(known.hashes.learn, k, stamps[k]) for k in aside]
        passed = [k for k in wanted if k not in aside]
        readers = {k: stack.enter_context(known.reader(k, hashed=k in passed)) for k in self._read}
        size = min(BLOCK_BYTES, max(HELD_BYTES // (2 * max(len(readers), 1)), PART * 8))
        blocks = list(_blocks(known, order, size, self._part))
        if passed:
            self._go_through(pool, workers, readers, blocks)
        else:
            _settle([pool.submit(self._read_and_sum, readers, block) for block in blocks])
        for k, digest in zip(passed, pool.map(lambda k: readers[k].sha256(), passed), strict=True):
            known.hashes.learn(k, stamps[k], digest)
        for hashing in apart:
            hashing.result()

    def _go_through(
        self,
        pool: ThreadPoolExecutor,
        workers: int,
        readers: dict[int, WeightsReader],
        blocks: Sequence[list[Segment]],
    ) -> None:
        """Blocks in two turns: while one is summed the next is read, by file, and hashed."""
        size = max((b[-1].offset + b[-1].nbytes for b in blocks), default=0)
        turns = [{k: np.empty(size, np.uint8) for k in readers} for _ in range(2)]
        sums: list[list[Future[None]]] = [[], []]
        for number, block in enumerate(blocks):
            held = turns[number % 2]
            _settle(sums[number % 2])
            _settle([pool.submit(self._fill, k, readers[k], block, held[k]) for k in readers])
            shares = [block[share::workers] for share in range(min(workers, len(block)))]
            sums[number % 2] = [pool.submit(self._sum, share, held) for share in shares]
        for under_way in sums:
            _settle(under_way)

    def _read_and_sum(self, readers: dict[int, WeightsReader], block: Sequence[Segment]) -> None:
        """A block part by part, where nothing is hashed: summed while the cache holds it."""
        held = self._own.__dict__.setdefault("held", np.empty(self._part * 8, np.uint8))
        for part in block:
            alone = replace(part, offset=0)

            def read(k: int, alone: Segment = alone) -> Raw:
                self._fill(k, readers[k], [alone], held)
                return alone.within(held)

            self._sum_part(alone, read)

    def _fill(
        self, k: int, reader: WeightsReader, block: Sequence[Segment], row: npt.NDArray[np.uint8]
    ) -> None:
        for part in block:
            if k == self._base if part.name not in self._group_of else k in self._used:
                begin = part.start * raw_type(part.code).itemsize
                target = row.data[part.offset : part.offset + part.nbytes]
                reader.fill(part.name, begin, target)

    def _sum(self, parts: Sequence[Segment], held: dict[int, npt.NDArray[np.uint8]]) -> None:
        for part in parts:
            self._sum_part(part, lambda k, part=part: part.within(held[k]))  # type: ignore[misc]

    def _sum_part(self, part: Segment, source: Callable[[int], Raw]) -> None:
        with np.errstate(all="ignore"):
            if part.name in self._group_of:
                self._merge(part, source)
            else:
                self._carry(part, source(self._base))

    def _carry(self, part: Segment, raw: Raw) -> None:
        values = raw
        if self._checkpoints.tensors[part.name].is_floating:
            values = self._scratch(0, part.count)
            widen(self._numbers(part, raw), part.code, values)
            self._require_finite(part.name, values)
        for p in range(len(self._table)):
            self._put(p, part.name, part.start, values)

    def _merge(self, part: Segment, read: Callable[[int], Raw]) -> None:
        rows = self._table[:, self._group_of[part.name]]
        outs = [self._scratch(p + 2, part.count) for p in range(len(rows))]
        begun, term = [False] * len(rows), self._scratch(0, part.count)
        wide = self._scratch(1, part.count) if len(rows) > 1 else None
        # A source is summed while the cache holds it: file by file, for all merges.
        for k in self._used:
            if not rows[:, k].any():
                continue
            source = self._numbers(part, read(k))
            if wide is not None:
                widen(source, part.code, wide)
            for p, factor in enumerate(rows[:, k].tolist()):
                if factor == 0:
                    continue
                target = term if begun[p] else outs[p]
                if wide is None:
                    product(source, part.code, factor, target)
                else:
                    np.multiply(wide, np.float32(factor), out=target)
                if begun[p]:
                    np.add(outs[p], term, out=outs[p])
                begun[p] = True
        for p, out in enumerate(outs):
            if not begun[p]:
                out.fill(0)
            self._require_finite(part.name, out)
            self._put(p, part.name, part.start, out)

    def _numbers(self, part: Segment, raw: Raw) -> Raw:
        found = as_numbers(raw, part.code)
        # Moved about, the bits of infinity become a number, so that no sum would tell.
        if part.code == "F16" and found.dtype != np.float16 and not finite_halves(raw):
            self._blame(part.name)
        return found

    def _scratch(self, number: int, count: int) -> Floats:
        """(count,) of this thread's, kept: fresh memory costs more than what is written to it."""
        kept: dict[int, Floats] = self._own.__dict__.setdefault("kept", {})
        if number not in kept:
            kept[number] = np.empty(self._part, np.float32)
        return kept[number][:count]

    def _require_finite(self, name: str, values: Floats) -> None:
        # A sum tells of NaN and infinity; where it overflows by itself, a look at each.
        if not math.isfinite(float(values.sum())) and not bool(np.isfinite(values).all()):
            self._blame(name)

    def _blame(self, name: str) -> NoReturn:
        self._checkpoints.hashes.compare()
        for index in self._read:
            finite_bytes(self._checkpoints, index, name)
        raise NonFiniteWeightsError(
            f"tensor {name!r} of the merge overflows float32; expected coefficients of moderate "
            "size"
        )


def _settle(futures: Sequence[Future[Any]]) -> None:
    done, others = wait(futures, return_when=FIRST_EXCEPTION)
    for future in others:
        future.cancel()
    for future in done:
        future.result()


def _blocks(
    checkpoints: CheckpointSet, order: Sequence[str], size: int, longest: int
) -> Iterator[list[Segment]]:
    """The tensors in order, cut into parts, as many to a block as `size` bytes hold."""
    block: list[Segment] = []
    offset = 0
    for name in order:
        info = checkpoints.tensors[name]
        count, width = math.prod(info.shape), raw_type(info.code).itemsize
        for start in range(0, count, longest):
            part = min(longest, count - start)
            if block and offset + part * width > size:
                yield block
                block, offset = [], 0
            block.append(Segment(name, start, part, offset, info.code))
            offset += -(-part * width // ALIGNED) * ALIGNED
    if block:
        yield block
