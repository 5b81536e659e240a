"""Figures: axes, legends and styles that all plots share; matplotlib is optional."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from merge_rl.errors import MissingLibraryError
from merge_rl.storage.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MARKERS: Final = "osD^vPX*<>"


def can_draw() -> bool:
    """Whether the library that draws is installed."""
    return find_spec("matplotlib") is not None


@contextmanager
def drawing(
    path: str | os.PathLike[str], rows: int, columns: int, size: tuple[float, float]
) -> Iterator[list[Axes]]:
    """Axes to draw on, row by row; written to `path`, a PNG, on leaving the block.

    `size` is that of the picture in inches. Raises ConfigError, naming the extra, where the library
    is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingLibraryError("a plot", "matplotlib", "report") from None
    # Without pyplot: no window system, and no figures that live on.
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    yield [axis for row in axes for axis in row]
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def counts_axis(axis: Axes, at: Sequence[float] | None = None) -> None:
    """An x axis of images: 1K, 10K, 1M; logarithmic, with ticks `at` some places, if these are."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    if at is not None:
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(at))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(EngFormatter(places=1 if at else None, sep=""))
    axis.set_xlabel("images generated")


def steps_axis(axis: Axes) -> None:
    """An x axis of steps: whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("step")


def legend_below(axis: Axes) -> None:
    """A legend that hides no line."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=8, frameon=False)


def values_axis(axis: Axes, values: list[float], label: str) -> None:
    """A y axis for positive values, logarithmic where they are far apart."""
    from matplotlib.ticker import ScalarFormatter

    if values and min(values) > 0 and max(values) > 4 * min(values):
        axis.set_yscale("log")
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(ScalarFormatter())
        axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.set_ylabel(label)
    axis.grid(alpha=0.25)


def style(index: int) -> dict[str, Any]:
    """Colour and marker of the line `index`."""
    return {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)]}
