"""Rollouts over many processes: rank 0 says what is to be made, every rank makes its blocks.

Only rank 0 searches, judges and writes; the others hold the same networks and know nothing of the
search. So nothing can drift apart, and a rank that is lost takes no state with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig, from_mapping, to_mapping
from merge_rl.errors import ParallelError
from merge_rl.parallel.blocks import Block, SharedWork, gather_rows, share_blocks, split_blocks
from merge_rl.parallel.group import Group
from merge_rl.version import __version__
from merge_rl.workflows.rollout.derivatives import Room
from merge_rl.workflows.rollout.device import device_facts
from merge_rl.workflows.rollout.differentiable import (
    BothWays,
    Cotangents,
    DifferentiableRollout,
    Way,
)
from merge_rl.workflows.rollout.execution import is_out_of_memory
from merge_rl.workflows.rollout.functions import with_gradient
from merge_rl.workflows.rollout.rollout import MergedRollout, WorkItem

GRADIENT: Final = "gradient"  # phase


class DistributedRollout:
    """The ranks of a launch, for rollouts that all of them hold under the same names.

    Args:
        group: the ranks.
        rollouts: what this rank holds; on rank 0 they spread their work from now on.
        announce: hears once if there is less work than there are ranks.
    """

    def __init__(
        self,
        group: Group,
        rollouts: Iterable[MergedRollout],
        announce: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._work = SharedWork(group, announce)
        self._rollouts = {rollout.name: rollout for rollout in rollouts}
        self._makers = dict[str, DifferentiableRollout]()  # of gradients, by the same names
        if group.leads and group.size > 1:
            for rollout in self._rollouts.values():
                rollout.spread, rollout.processes = self, group.size

    def end(self, result: Any = None) -> None:
        """On rank 0: dismiss the others; `result`, plain data, is what `follow` returns there."""
        self._work.end(result)

    def follow(self) -> Any:
        """On the other ranks: make what is asked for until rank 0 ends it; its result."""
        return self._work.follow(self._act)

    def _act(self, asked: Mapping[str, Any]) -> None:
        rollout = self._rollouts[asked["do"]]
        sampler = from_mapping(SamplerConfig, asked["sampler"])
        if sampler != rollout.rollout.sampler:
            rollout = rollout.with_sampler(sampler)
        if "room" in asked:
            maker, (item,) = self._makers.get(rollout.name), read_items(asked)
            if maker is None or maker.merged is not rollout:  # under another sampler
                maker = self._makers[rollout.name] = with_gradient(rollout)
            with contextlib.suppress(_NoRoom):
                share_ways(self._work.group, maker, Room(*asked["room"]), item)
        else:
            self._make(rollout, read_items(asked), asked["phase"])

    def both_ways(
        self, rollout: DifferentiableRollout, item: WorkItem, cotangents: Cotangents
    ) -> BothWays:
        """Features and gradient of the item's images, of all ranks; on rank 0."""
        merged, room = rollout.merged, rollout.room
        if len(item.labels) <= room.images:  # one part
            return rollout.both_ways(item, cotangents)
        sampler = to_mapping(merged.rollout.sampler)
        self._work.ask(
            merged.name, GRADIENT, sampler=sampler, room=[room.images, room.kept],
            **write_items([item]),
        )  # fmt: skip
        return share_ways(self._work.group, rollout, room, item, cotangents)

    def __call__(
        self, rollout: MergedRollout, items: Sequence[WorkItem], phase: str
    ) -> list[Tensor]:
        """Features of each item's images, of all ranks; on rank 0."""
        sampler = to_mapping(rollout.rollout.sampler)
        self._work.ask(rollout.name, phase, sampler=sampler, **write_items(items))
        made = self._make(rollout, items, phase)
        return list(torch.split(made, [len(item.labels) for item in items]))

    def _make(self, rollout: MergedRollout, items: Sequence[WorkItem], phase: str) -> Tensor:
        """This rank's blocks; on rank 0 the features of all images, in order."""
        inner = rollout.rollout
        blocks = split_blocks([len(item.labels) for item in items], inner.batch)
        self._work.tell_idle(blocks)
        return self._work.rows(
            blocks, inner.extractor.dim, partial(rollout.parts, items), phase, inner.on_images
        )


class _NoRoom(torch.OutOfMemoryError):
    """A rank had none, of which all have heard."""


def share_ways(
    group: Group,
    rollout: DifferentiableRollout,
    room: Room,
    item: WorkItem,
    cotangents: Cotangents | None = None,
) -> BothWays:
    """Differentiate this rank's images; on rank 0, which has `cotangents`, what all ranks found.

    All ranks call it with the same item and room. Ranks take neighbouring parts of `room.images`
    images, and their gradients, of the coefficients, are summed in the order of ranks. Raises
    torch.OutOfMemoryError on every rank where one had no room.
    """
    size, total = room.images, len(item.labels)
    blocks = [Block(0, i, min(i + size, total)) for i in range(0, total, size)]
    shares = [[blocks[i] for i in share] for share in share_blocks(blocks, group.size)]
    own = shares[group.rank] or [Block(0, 0, 0)]
    rows = slice(own[0].start, own[-1].stop)
    part = WorkItem(item.coefficients, item.seeds[rows], item.labels[rows])
    way = Way(rollout, part, room)
    with contextlib.ExitStack() as stack:
        problems = _together(group, partial(stack.enter_context, way), way, rows.start)
        counts = [sum(block.size for block in share) for share in shares]
        features = _gathered(group, way.features, counts)
        if not problems:
            asked = cotangents(features).tolist() if cotangents is not None else None
            back = torch.tensor(group.broadcast(asked, phase=GRADIENT)[rows])
            back = back.reshape(way.features.shape)
            problems = _together(group, partial(way.back, back), way, rows.start)
    found = group.gather(way.gradient(), phase=GRADIENT) or [rollout.no_gradient()]
    return BothWays(features, torch.stack(found).sum(0), problems)


def _together(group: Group, act: Callable[[], Any], way: Way, start: int) -> dict[int, str]:
    """Act on every rank; what is wrong with which image of all, or _NoRoom where one had none."""
    said: dict[str, Any] = {"room": True, "problems": []}
    try:
        act()
        said["problems"] = [[start + i, why] for i, why in way.problems().items()]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said["room"] = False
    every = group.broadcast(group.collect(said, phase=GRADIENT), phase=GRADIENT)
    if not all(each["room"] for each in every):
        raise _NoRoom("out of memory with gradients")
    return {i: why for each in every for i, why in each["problems"]}


def _gathered(group: Group, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all ranks, in order, on rank 0; elsewhere those that are there."""
    into = torch.empty(sum(counts), rows.shape[1]) if group.leads else rows
    parts = torch.split(into, list(counts)) if group.leads else ()
    sizes = [[count] if count else [] for count in counts]
    gather_rows(group, [rows] if len(rows) else [], sizes, parts, GRADIENT)
    return into


def write_items(items: Sequence[WorkItem]) -> dict[str, Any]:
    """Items as plain data; what several of them share (seeds, labels) is written once."""
    tables: dict[str, dict[tuple[int, ...], int]] = {"seeds": {}, "labels": {}}
    rows = []
    for item in items:
        values = {"seeds": tuple(item.seeds), "labels": tuple(item.labels.tolist())}
        row = {k: tables[k].setdefault(v, len(tables[k])) for k, v in values.items()}
        c = item.coefficients
        rows.append({**row, "coefficients": None if c is None else c.double().tolist()})
    return {"items": rows, **{name: list(table) for name, table in tables.items()}}


def read_items(document: Mapping[str, Any]) -> list[WorkItem]:
    """What `write_items` wrote; numbers are the same to the last bit."""
    labels = [torch.tensor(row, dtype=torch.int64) for row in document["labels"]]
    return [
        WorkItem(
            None if row["coefficients"] is None
            else torch.tensor(row["coefficients"], dtype=torch.float64),
            document["seeds"][row["seeds"]],
            labels[row["labels"]],
        )
        for row in document["items"]
    ]  # fmt: skip


def require_agreement(group: Group, facts: Mapping[str, Any]) -> None:
    """Raise ParallelError on every rank unless all have the same facts; the message names one.

    Facts are plain data: the version, the settings, hashes of the inputs, the device.
    """
    found = group.collect(dict(facts), phase="comparing inputs")
    verdict = None if found is None else _difference(found)
    verdict = group.broadcast(verdict, phase="comparing inputs")
    if verdict is not None:
        raise ParallelError(verdict)


def _difference(found: Sequence[Mapping[str, Any]]) -> str | None:
    first = found[0]
    for rank, facts in enumerate(found):
        for name in sorted(first.keys() | facts.keys()):
            if facts.get(name) != first.get(name):
                inner, here, there = _innermost(name, first.get(name), facts.get(name))
                return (
                    f"the ranks differ in {inner}: rank 0 has {here}, rank {rank} has {there}; "
                    "expected the same on all"
                )
    return None


def _innermost(name: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """The first entry of nested mappings that differs."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                return _innermost(f"{name} {key}", a.get(key), b.get(key))
    return name, a, b


# Where inputs lie may differ from machine to machine; what they hold is compared by hash.
PATHS: Final = (
    "checkpoints", "model", "extractor_weights", "reference", "heldout", "extra_references",
    "extra_weights", "autoencoder_weights",
)  # fmt: skip


def require_same_everywhere(
    group: Group, settings: Mapping[str, Any], hashes: Mapping[str, Any], device: str
) -> None:
    """Raise ParallelError unless all ranks have the same version, settings, inputs and device."""
    known = {k: v for k, v in settings.items() if k not in PATHS}
    known["sampler"] = {k: v for k, v in (settings["sampler"] or {}).items() if k != "guide"}
    facts = {
        "version": __version__, "torch": torch.__version__, "settings": known,
        "hashes of": hashes, "device": device_facts(device),
    }  # fmt: skip
    if group.size > 1:
        require_agreement(group, facts)
