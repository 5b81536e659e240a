"""Figures: axes and styles that all plots share, as PNG and within HTML; matplotlib is optional."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from merge_rl.errors import ConfigError, MissingLibraryError
from merge_rl.storage.files import atomic_path
from merge_rl.workflows.report.markup import NOTHING, Safe, tag

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MARKERS: Final = "osD^vPX*<>"
DRAWN: Final = ("png", "jpg", "webp", "pdf", "svg")  # kinds of files


def can_draw() -> bool:
    """Whether the library that draws is installed."""
    return find_spec("matplotlib") is not None


def _without_its_words() -> None:
    """Before the library is imported: what it has to say of a home that cannot be written is no
    concern of ours. A user's own level counts.
    """
    import logging

    logger = logging.getLogger("matplotlib")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)


@contextmanager
def drawing(
    path: str | os.PathLike[str], rows: int, columns: int, size: tuple[float, float]
) -> Iterator[list[Axes]]:
    """Axes to draw on, row by row; written to `path`, as its ending says, on leaving the block.

    `size` is that of the picture in inches. Raises ConfigError for another ending than those of
    DRAWN and, naming the extra, where the library is missing.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in DRAWN:
        known = ", ".join(f".{name}" for name in DRAWN)
        raise ConfigError(f"{os.fspath(path)}: expected the name of a plot, ending in {known}")
    if not can_draw():
        raise MissingLibraryError("a plot", "matplotlib", "report")
    _without_its_words()
    from matplotlib.figure import Figure

    # Without pyplot: no window system, and no figures that live on.
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    yield [axis for row in axes for axis in row]
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind)


def counts_axis(axis: Axes, at: Sequence[float] | None = None) -> None:
    """An x axis of images: 1K, 10K, 1M; logarithmic, with ticks `at` some places, if these are."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

    form = EngFormatter(places=1 if at else None, sep="")
    axis.xaxis.set_major_formatter(form)
    if at is not None:
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(at))
        axis.xaxis.set_minor_formatter(NullFormatter())
        # Parts of an image stand on no axis.
        text = FuncFormatter(lambda x, _: f"{x:.0f}" if x < 1000 else form(x))
        axis.xaxis.set_major_formatter(text)
    axis.set_xlabel("images generated")


def steps_axis(axis: Axes) -> None:
    """An x axis of steps: whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlabel("step")


def legend_below(axis: Axes) -> None:
    """A legend that hides no line, half an inch below the axes; none where nothing is drawn."""
    if not axis.get_legend_handles_labels()[0]:
        return
    whole = axis.get_figure(root=True)
    height = axis.get_position().height * (whole.get_figheight() if whole else 4.0)
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.5 / height), ncols=3, fontsize=8, frameon=False
    )


def values_axis(axis: Axes, values: list[float], label: str) -> None:
    """A y axis for positive values, logarithmic where they are far apart."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    if values and min(values) > 0 and max(values) > 4 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(ScalarFormatter())
        axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.set_ylabel(label)
    axis.grid(alpha=0.25)


def style(index: int) -> dict[str, Any]:
    """Colour and marker of the line `index`."""
    return {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)]}


# What matplotlib is told, and what the page's style sheet knows it by: colours that nobody uses.
_INK, _SOFT, _LINE = "#010203", "#010204", "#010205"
_SERIES: Final = tuple(f"#0a0b{i:02x}" for i in range(1, 9))
_VARIABLES: Final[Mapping[str, str]] = {
    _INK: "var(--ink)", _SOFT: "var(--soft)", _LINE: "var(--line)",
    **{colour: f"var(--c{i})" for i, colour in enumerate(_SERIES, 1)},
}  # fmt: skip
_LOOK: Final[Mapping[str, Any]] = {
    "svg.fonttype": "none", "svg.hashsalt": "merge_rl", "font.size": 10.0,
    "font.family": "sans-serif", "axes.titlesize": 10.5, "axes.titlelocation": "left",
    "axes.titlecolor": _INK, "axes.labelcolor": _SOFT, "text.color": _INK,
    "axes.edgecolor": _LINE, "xtick.color": _LINE, "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT, "ytick.labelcolor": _SOFT, "grid.color": _LINE,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.8,
    "legend.frameon": False,
}  # fmt: skip
_FONT: Final = "system-ui, sans-serif"


def chart(
    draw: Callable[[list[Axes]], None], size: tuple[float, float], what: str, columns: int = 1
) -> Safe:
    """What `draw` puts on axes side by side, `size` in inches; `what` is said to who cannot see.

    Nothing without matplotlib. Lines that ask for C0 to C7 have the page's colours.
    """
    if not can_draw():
        return NOTHING
    _without_its_words()
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    look: dict[Any, Any] = {**_LOOK, "axes.prop_cycle": cycler(color=_SERIES)}
    with matplotlib.rc_context(look):
        found = Figure(figsize=size, layout="constrained")
        found.patch.set_alpha(0)
        axes = list(found.subplots(1, columns, squeeze=False)[0])
        for axis in axes:
            axis.patch.set_alpha(0)
        draw(axes)
        file = io.StringIO()
        found.savefig(file, format="svg", metadata={"Date": None})
    return tag("div", Safe(_within(file.getvalue())), class_="chart", role="img", aria_label=what)


def charts(*found: Safe) -> Safe:
    """Figures side by side; where the library is missing and none was drawn, how to get it."""
    if any(found):
        return tag("div", *found, class_="pair")
    missing = MissingLibraryError("a chart", "matplotlib", "report")
    return tag("p", f"There are no charts: {missing}.", class_="note")


def _within(drawn: str) -> str:
    """The element of a file of SVG, as a part of a page: names and colours are the page's."""
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.S)
    drawn = re.sub(r'<g id="[^"]*">', "<g>", drawn)
    drawn = re.sub(r"(font: [\d.]+px )[^;\"]*", rf"\1{_FONT}", drawn)
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, variable)
    return drawn
