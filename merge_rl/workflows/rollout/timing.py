"""How long work takes on a machine that other programs may keep busy as well.

A measurement is long beside the turns of others, is repeated, and the median counts.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Final, NamedTuple

from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.parallel.blocks import block_size
from merge_rl.workflows.rollout.execution import calls_an_image
from merge_rl.workflows.rollout.rollout import Rollout

ENOUGH: Final = 0.02  # seconds of a measurement for a first estimate
PLENTY: Final = 1.0  # from which fewer images stand for a block
REPEATS: Final = 3  # of it
LONGEST: Final = 3.0  # seconds after which it is not repeated
STEPS: Final = (2, 4)  # of Euler, between which a network call is taken
PAUSE: Final = 10  # times `enough`, which no pause takes that others force on a measurement


class Timing(NamedTuple):
    """Seconds of one call."""

    seconds: float  # median
    spread: float  # (most - least) / median of the repeats


def timings(
    works: Sequence[Callable[[], object]], *, enough: float, repeats: int, longest: float
) -> list[Timing]:
    """The time of each: repeats of all take turns, so that what slows one down slows down all.

    Args:
        works: what is measured; each is called once before, which sets things up.
        enough: seconds of one measurement at least; short works are called many times in it.
        repeats: measurements of each, an odd number.
        longest: seconds after which nothing more is repeated.
    """
    calls = [_calls(work, enough) for work in works]
    rows: list[list[float]] = []
    began = perf_counter()
    # The median of an even number would be half as wrong as a wrong one of the two in the middle.
    while len(rows) < repeats and (len(rows) % 2 == 0 or perf_counter() - began < longest):
        rows.append(
            [_seconds(partial(_repeat, work, n)) / n for work, n in zip(works, calls, strict=True)]
        )
    return [_timing(column) for column in zip(*rows, strict=True)]


def is_long(work: Callable[[], object], enough: float) -> bool:
    """Whether work takes `enough` seconds, and not a pause that others force on it."""
    # A pause makes one measurement longer, not every one.
    first = _seconds(work)
    return first >= PAUSE * enough or (first >= enough and _seconds(work) >= enough)


def _calls(work: Callable[[], object], enough: float) -> int:
    """How many calls take long enough to be measured; the first one sets things up."""
    work()
    count = 1
    while not is_long(partial(_repeat, work, count), enough):
        count *= 2
    return count


def _repeat(work: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        work()


def _timing(seconds: Sequence[float]) -> Timing:
    middle = statistics.median(seconds)
    return Timing(middle, (max(seconds) - min(seconds)) / middle if middle else 0.0)


def _seconds(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def image_seconds(rollout: Rollout, num_classes: int, most: int) -> float:
    """Seconds that an image takes, about: from few steps of as many images as a second takes.

    As a search of items of `most` images makes them, blocks side by side: threads that share an
    operation wait for one another, which takes many times as long where other programs run.
    """
    workers = rollout.workers

    def maker(steps: int, count: int) -> Callable[[], object]:
        quick = stepped(rollout, steps)
        block = rollout.noise(range(count)), balanced_labels(count, num_classes)
        return lambda: list(quick.features_of([lambda: block] * workers))

    (few, many), largest = STEPS, block_size(most, rollout.batch)
    count = min(2, largest)
    maker(few, count)()  # the first call sets things up
    while count < largest and not is_long(maker(many, count), PLENTY):
        count = min(4 * count, largest)
    works = maker(few, count), maker(many, count)
    found = timings(works, enough=ENOUGH, repeats=REPEATS, longest=LONGEST)
    short, long = (timing.seconds for timing in found)
    call = max(0.0, long - short) / (many - few)
    calls = calls_an_image(rollout.sampler, rollout.model)
    return (call * calls + max(0.0, short - few * call)) / (count * workers)


def stepped(rollout: Rollout, steps: int) -> Rollout:
    """The rollout with so many steps of Euler."""
    sampler = dataclasses.replace(rollout.sampler, solver="euler", num_steps=steps)
    return rollout.with_sampler(sampler)


def make_images(rollout: Rollout, count: int, num_classes: int) -> None:
    """Make images of seeds 0 to count - 1, and their features."""
    rollout.features(rollout.noise(range(count)), balanced_labels(count, num_classes))
