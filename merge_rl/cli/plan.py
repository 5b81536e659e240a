"""`mergerl plan`, and `mergerl optimize --dry-run`: what a search will cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from merge_rl.cli.output import BarTracker, note_all, print_json
from merge_rl.cli.tables import print_table
from merge_rl.config import numbers_in, whole_number
from merge_rl.errors import ConfigError

if TYPE_CHECKING:
    from merge_rl.config import OptimizeConfig
    from merge_rl.storage.checkpoints import CheckpointSet
    from merge_rl.workflows.plan import SearchPlan

UNITS: Final = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def show_plan(
    settings: OptimizeConfig,
    opened: CheckpointSet,
    out: Path,
    *,
    json: bool,
    devices: str,
    memory: float | None,
) -> None:
    """Make the plan of a search in an open set and print it."""
    from merge_rl.workflows.assembly import allow_named, fit_batch, resolve_config, with_network
    from merge_rl.workflows.optimize import check_names
    from merge_rl.workflows.plan import plan

    counts = _counts(devices)
    if memory is not None and not memory > 0:
        raise ConfigError(f"expected --memory in GiB, > 0, got {memory:g}")
    allow_named(settings)
    with_network(opened, settings.network)
    resolved = resolve_config(settings, opened)
    check_names(resolved)
    with _Steps(quiet=json) as tracker:
        for text in opened.notes:
            tracker.say(text)
        size = None if memory is None else round(memory * 2**30)
        fitted = fit_batch(resolved, opened, size, tracker.say)
        found = plan(fitted, opened, out=out, devices=counts, tracker=tracker, memory=size)
    if json:
        print_json(found.as_dict())
    else:
        _print(found)


def _counts(text: str) -> list[int]:
    counts = numbers_in(text, whole_number)
    if counts is None or min(counts) < 1:
        raise ConfigError(f"expected --devices as numbers >= 1, such as 1,8,64, got {text!r}")
    if max(counts) > MOST_DEVICES:
        raise ConfigError(f"expected --devices as numbers <= {MOST_DEVICES}, got {text!r}")
    return counts


MOST_DEVICES: Final = 100_000


class _Steps(BarTracker):
    """The steps of the calibration."""

    def say(self, text: str) -> None:
        """A note."""
        self.event({"kind": "note", "text": text})

    def size_text(self, total: int) -> str:
        return f"{total} parts of the work, some seconds each"


def _print(found: SearchPlan) -> None:
    from merge_rl.progress import duration
    from merge_rl.workflows.assembly import gib

    load, memory, batch = found.workload, found.memory, found.config.batch
    stages = ", ".join(f"{name} {count:,}" for name, count in load.by_name.items())
    rows = [
        ["images", f"{load.images:,}", f"{load.rounds} rounds; {stages}"],
        ["network calls", _short(found.network_calls), f"{found.calls['reward']} an image"],
        ["FLOPs", _short(found.flops), f"{_short(found.flops / load.images)} an image"],
        ["merges", f"{load.merges:,}", f"{gib(found.merge_bytes)} read and written"],
        ["features", gib(found.gather_bytes), "gathered on rank 0, at most"],
        [f"memory of {memory.device}", gib(memory.needed(batch)), _memory_text(found)],
        ["disk", gib(found.disk), f"{gib(found.disk_free)} free"],
    ]
    print_table("The search", ["what", "how much", "of which"], rows, words=True)
    times = [
        [
            f"{e.devices}", duration(e.seconds), f"{e.efficiency:.0%}",
            "" if e.devices == 1 else e.limit,
        ]
        for e in found.estimates
    ]  # fmt: skip
    title = (
        "Estimate for devices like this one, from a calibration whose repeats differ by "
        f"{found.speeds.spread:.0%}"
    )
    print_table(title, ["devices", "time", "efficiency", "what limits it"], times, words=True)
    note_all(found.notes)


def _memory_text(found: SearchPlan) -> str:
    from merge_rl.workflows.assembly import gib

    memory, batch = found.memory, found.config.batch
    parts = [f"{name} {gib(size)}" for name, size in memory.weights.items()]
    parts.append(f"activations at batch {batch} {gib(memory.activations(batch))}")
    if not memory.weights.get("checkpoints"):
        parts.append(f"checkpoints on {memory.place}")
    return f"{gib(memory.capacity)} there, room for batch {memory.largest_batch}; " + ", ".join(
        parts
    )


def _short(value: float) -> str:
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
