"""Lines, bars and rates on a terminal of a given width."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Task

from merge_rl.cli import output, tables
from merge_rl.cli.output import ProgressTracker, complain, note, rate_of, say, tell
from merge_rl.cli.tables import print_table

Terminal = Callable[[int], io.StringIO]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A function: what is printed from now on goes to a terminal of so many columns."""

    def begin(columns: int) -> io.StringIO:
        file = io.StringIO()

        def console(**options: object) -> Console:
            options.pop("stderr", None)
            return Console(file=file, force_terminal=True, width=columns, color_system=None,
                           legacy_windows=False, **options)  # type: ignore[arg-type]  # fmt: skip

        for module in (output, tables):
            monkeypatch.setattr(module, "Console", console)
        return file

    return begin


LONG = "spent 19,000 images: 3,000 to find the start, 14,000 in 7 rounds, 2,000 on the final choice"


@pytest.mark.parametrize("columns", [60, 80])
def test_lines_are_folded_between_words(terminal: Terminal, columns: int) -> None:
    shown = terminal(columns)
    tell(LONG)
    say(f"[yellow]note:[/] {LONG}")
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    assert " ".join(line.strip() for line in lines) == f"{LONG} note: {LONG}"
    assert [line.startswith("  ") for line in lines].count(False) == 2


def test_elsewhere_a_line_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    tell(LONG + " [95 %] " + LONG)
    assert capsys.readouterr().out == f"{LONG} [95 %] {LONG}\n"


def test_what_moves_a_cursor_is_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[31m\x07\x9b\u202e[bold]\udcff b"  # as files and tensors of others may be called
    shown = r"a\x1b[31m\x07\x9b\u202e[bold]\udcff b"
    tell(name)
    note(name)
    complain(name)
    print_table("t\x1b", ["c\x07"], [["a long enough name\udcff"]])
    said = capsys.readouterr()
    assert said.err == f"note: {shown}\nerror: {shown}\n"
    assert said.out.startswith(f"{shown}\n")
    assert all(text in said.out for text in (r"t\x1b", r" c\x07 ", r" a long enough name\udcff "))
    assert not set(said.out + said.err) & set("\x1b\x07\x9b\u202e\udcff")
    tell("\u00e9 \u4e2d\nan\xa0end")  # letters of all languages, and lines, stay
    assert capsys.readouterr().out == "\u00e9 \u4e2d\nan\xa0end\n"


@pytest.mark.parametrize("columns", [60, 80])
def test_a_table_keeps_its_numbers_whole(terminal: Terminal, columns: int) -> None:
    shown = terminal(columns)
    row = ["best single (digits-0001572-0.050)", "11.111 [11.069, 11.153]", "1.064 [1.021, 1.107]"]
    print_table("FID, N = 1,000, 10 repeats on fresh seeds, mean", ["model", "a", "b"], [row])
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    for number in ("11.111", "[11.069,", "11.153]", "1.064", "[1.021,", "1.107]"):
        assert sum(number in line for line in lines) == 1


@pytest.mark.parametrize("columns", [0, 20, 40])
def test_a_table_is_wider_than_a_terminal_too_small_for_it(
    terminal: Terminal, columns: int
) -> None:
    shown = terminal(columns)
    print_table(
        "T", ["model", "nimg", "check"], [["digits-0002097-0.050", "2,097,152", "not read"]]
    )
    lines = shown.getvalue().splitlines()
    # "digits-0002097-0.050", "2,097,152" and "check" with two spaces between them, and one more.
    assert max(map(len, lines)) <= 20 + 9 + 5 + 4 + 3
    assert sum("digits-0002097-0.050  2,097,152  " in line for line in lines) == 1


def test_edges_are_drawn_where_there_is_room(terminal: Terminal) -> None:
    # 24 + 20 + 20 letters: with three edges and spaces around them 74 columns, without 68.
    row = ["best single (snapshot-1)", "0.906 [0.862, 0.950]", "0.790 [0.728, 0.852]"]
    for columns, edged in ((74, True), (73, False), (68, False)):
        shown = terminal(columns)
        print_table("FID", ["model", "reference", "heldout"], [row])
        assert ("│" in shown.getvalue()) is edged
        assert max(map(len, shown.getvalue().splitlines())) <= columns
        assert ("  " if not edged else " │ ").join(row) in shown.getvalue()


def test_words_are_broken_before_their_titles_are(terminal: Terminal) -> None:
    shown = terminal(60)
    row = ["edm2-img512-xs-uncond-0134217", "512", "128 of 249.4 MB", "CC-BY-NC-SA-4.0"]
    print_table("sets", ["name", "pixels", "files", "licence"], [row], words=True)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[1].split() == ["name", "pixels", "files", "licence"]
    assert lines[3].startswith(f"{row[0]}  512     128 of ")


def task(completed: int, elapsed: float, known: int = 0) -> Task:
    return SimpleNamespace(  # type: ignore[return-value]
        completed=completed, elapsed=elapsed, finished=False, finished_time=None,
        fields={"known": known},
    )  # fmt: skip


def test_a_rate_counts_what_was_made_in_the_phase() -> None:
    assert rate_of(task(1200, 4.0, known=400)) == 200.0
    assert rate_of(task(1200, 0.001)) is None  # no rate of 1,200,000 a second
    assert rate_of(task(400, 4.0, known=400)) is None


def test_what_was_known_is_no_work(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(80)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    tracker = ProgressTracker()
    tracker.phase("search", 2000)
    tracker.advance(900)  # of a run that goes on
    now[0] += 2.0
    tracker.advance(100)
    (shown,) = tracker._progress.tasks
    assert (shown.completed, shown.fields["known"]) == (1000, 900)


def last_bar(shown: io.StringIO) -> str:
    """The bar as it was left, without what moves the cursor."""
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "\n", shown.getvalue())
    return [line for line in text.splitlines() if "search" in line][-1]


def test_a_finished_bar_is_full(terminal: Terminal) -> None:
    shown = terminal(100)
    with ProgressTracker() as tracker:
        tracker.phase("search", 2000)
        tracker.advance(1900)  # a round more would not have fitted
    assert "1900/1900" in last_bar(shown)


def test_an_interrupted_bar_stays_where_it_was(terminal: Terminal) -> None:
    shown = terminal(100)
    tracker = ProgressTracker()
    tracker.__enter__()
    tracker.phase("search", 2000)
    tracker.advance(500)
    tracker.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "500/2000" in last_bar(shown)
