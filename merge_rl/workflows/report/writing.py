"""Pages of runs, fine-tuning runs and comparisons, written into their folders."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import ConfigError, MergeRLError, quoted
from merge_rl.interfaces import Tracker
from merge_rl.progress import announcing
from merge_rl.storage.files import write_text
from merge_rl.storage.runs import SETTINGS, FinetuneRun, RunDir, find_run, fitting, is_finetune_run
from merge_rl.untrusted import reason
from merge_rl.workflows.report.compare_html import compare_document
from merge_rl.workflows.report.compare_page import write_comparison
from merge_rl.workflows.report.finetune_html import finetune_document
from merge_rl.workflows.report.plots import draw_run
from merge_rl.workflows.report.run_html import run_document
from merge_rl.workflows.report.run_page import run_markdown

HTML: Final = "report.html"
LEAST_SECONDS: Final = 15.0  # between two pages of a run that goes on
SHARE: Final = 100  # of its time that it takes to write them: one part in so many


@dataclass(frozen=True)
class Report:
    """What was written."""

    html: Path
    page: Path | None  # in Markdown
    picture: Path | None
    note: str | None  # why one of these is not there
    finished: bool = True
    comparison: dict[str, Any] | None = None  # of searchers, where the folder holds one


def write_report(path: str | os.PathLike[str], *, reloads: bool = False) -> Report:
    """Write report.html, with Markdown and plots beside it, of a run or of a comparison.

    What goes on is reported as far as it is; with `reloads` its page loads itself anew. The
    Markdown of a fine-tuning run is written when it ends. Raises RunError for a folder of something
    else.
    """
    folder = find_run(path).path
    html = _write_html(folder, reloads=reloads)
    if (folder / SETTINGS).is_file():
        return _of_comparison(folder, html)
    if is_finetune_run(folder):
        page, curves = (folder / name for name in ("report.md", "curves.png"))
        done = (folder / "result.json").is_file()
        return Report(
            html, page if page.is_file() else None, curves if curves.is_file() else None, None, done
        )
    return _of_search(RunDir.open(folder), html)


def _write_html(folder: Path, *, reloads: bool) -> Path:
    """Write the page alone, of whatever the folder holds."""
    if (folder / SETTINGS).is_file():
        with fitting(folder, f"{SETTINGS} or compare.json"):
            text = compare_document(RunDir(folder), reloads=reloads)
    elif is_finetune_run(folder):
        text = finetune_document(FinetuneRun.open(folder), reloads=reloads)
    else:
        text = run_document(RunDir.open(folder), reloads=reloads)
    write_text(folder / HTML, text)
    return folder / HTML


def _of_search(run: RunDir, html: Path) -> Report:
    picture, page, note = run.path / "report.png", run.path / "report.md", None
    events, result = run.events(), run.read("result.json")
    done = result is not None
    try:
        with fitting(run.path, "events.jsonl or result.json"):
            try:
                draw_run(events, result, picture)
            except ConfigError as error:
                note = str(error)
            text = run_markdown(run.config(), events, result, None if note else picture.name)
    except MergeRLError as error:  # of another version: the page itself shows what there is
        return Report(html, None, None, str(error), done)
    write_text(page, text)
    return Report(html, page, None if note else picture, note, done)


def _of_comparison(folder: Path, html: Path) -> Report:
    document = RunDir(folder).read("compare.json")
    if document is None:
        return Report(html, None, None, None, finished=False)
    with fitting(folder, "compare.json"):
        note = write_comparison(document, folder)
    picture = None if note else folder / "compare.png"
    return Report(html, folder / "compare.md", picture, note, True, document)


@contextmanager
def with_page(folder: Path | None, tracker: Tracker) -> Iterator[Tracker]:
    """A tracker that keeps the page of a run fresh; where the block ends well it is whole.

    What fails with a page fails no run: `tracker` hears of it. None, of a rank that writes none, is
    the tracker itself.
    """
    if folder is None:
        yield tracker
        return
    yield _Paged(tracker, LivePage(folder))
    try:
        written = write_report(folder)
    except (MergeRLError, OSError) as error:
        where = f"{name}: " if (name := getattr(error, "filename", None)) else ""
        later = f"write it with mergerl report {quoted(folder)}"
        announcing(tracker)(f"no page: {where}{reason(error)}; {later}")
        return
    if written.note:
        announcing(tracker)(f"no plot: {written.note}")


class _Paged:
    """Looks whether the page is due, whenever the tracker hears of something."""

    def __init__(self, heard: Tracker, page: LivePage) -> None:
        self._heard, self._page = heard, page

    def advance(self, count: int) -> None:
        self._heard.advance(count)

    def phase(self, name: str, total: int) -> None:
        self._heard.phase(name, total)
        self._page.refresh()

    def event(self, event: Mapping[str, Any]) -> None:
        self._heard.event(event)
        self._page.refresh()


class LivePage:
    """Keeps the page of a run that goes on fresh, at a small share of its time."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder, self._next = Path(folder), time.monotonic() + LEAST_SECONDS

    def refresh(self) -> None:
        """Write the page, if the last one is old enough; what fails with it ends no run."""
        began = time.monotonic()
        if began < self._next:
            return
        try:
            _write_html(self._folder, reloads=True)
        except Exception:  # noqa: BLE001 (a page is worth no search)
            self._next = float("inf")
            return
        took = time.monotonic() - began
        self._next = began + max(LEAST_SECONDS, SHARE * took)
