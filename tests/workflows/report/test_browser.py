"""Pages in a real browser: Chromium without a window, where one is installed.

Screenshots are kept in the tests' temporary folder.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from merge_rl.workflows.report import write_report
from tests.pages import HOSTILE, comparison_folder, search_run, searcher, tuning_run
from tests.quick import draw_figures

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
WIDTHS = (400, 800, 1600)


@dataclass(frozen=True)
class Visit:
    """What a page did when it was opened."""

    console: list[str]
    asked: list[str]  # addresses that the page asked for
    dom: str
    picture: Any  # (H, W, 3)


def visit(page: Path, width: int, folder: Path, *options: str) -> Visit:
    shot, log = folder / f"{page.parent.name}-{width}.png", folder / "net.json"
    command = [
        str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}/user",
        f"--window-size={width},1400", f"--screenshot={shot}", f"--log-net-log={log}",
        "--enable-logging=stderr", "--dump-dom", *options, page.as_uri(),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in ended.stderr.splitlines() if ":CONSOLE" in line]
    events = json.loads(log.read_text())["events"]
    requests = [event.get("params", {}) for event in events]
    asked = [
        str(params["url"])
        for params in requests
        # What the browser itself asks for has no page as its origin.
        if re.match("file:|null", str(params.get("initiator", ""))) and "url" in params
    ]
    with Image.open(shot) as image:
        picture = np.asarray(image.convert("RGB"))
    asked = [address for address in asked if not address.startswith(("data:", "file:"))]
    return Visit(console, asked, ended.stdout, picture)


def framed(pages: list[Path], folder: Path) -> Path:
    """A page that shows others side by side at WIDTHS: windows are at least 500 pixels wide.

    Its title is the numbers that they tell it, in order.
    """
    hears = "addEventListener('message', event => told.push(event.data) && show())"
    shows = "show = () => { document.title = told.sort((a, b) => a - b).join() }"
    frames = [
        f'<iframe src="{page.as_uri()}" style="border:0;width:{width}px;height:1400px"></iframe>'
        for page, width in zip(pages, WIDTHS, strict=True)
    ]
    path = folder / "frames.html"
    body = f"<script>told = []; {shows}; {hears}</script>{''.join(frames)}"
    path.write_text(f'<body style="margin:0;white-space:nowrap;font-size:0">{body}')
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of a search, of fine-tuning, of a comparison; with names that try to be more."""
    folder = tmp_path_factory.mktemp("pages")
    names = [HOSTILE, *(f"snapshot-{i}" for i in range(23))]
    made = [
        search_run(folder / "run", names, [HOSTILE, "enc", "mid", "dec", "rest"]),
        tuning_run(folder / "tuning"),
        comparison_folder(folder / "cmp", [searcher("a", 1, 2, 3), searcher(HOSTILE, 4, 5, 6)]),
    ]
    with pytest.MonkeyPatch.context() as patch:
        draw_figures(patch)
        return [write_report(path).html for path in made]


def test_pages_open_without_an_error_or_a_request(pages: list[Path], tmp_path: Path) -> None:
    seen = visit(framed(pages, tmp_path), sum(WIDTHS), tmp_path)
    assert seen.console == []
    assert seen.asked == []
    assert seen.picture.shape == (1400, sum(WIDTHS), 3)
    for part in np.split(seen.picture, np.cumsum(WIDTHS)[:-1], axis=1):
        colours = part.astype(np.uint32) @ np.array([2**16, 2**8, 1], dtype=np.uint32)
        assert len(np.unique(colours)) > 50  # text, colours, charts


def test_nothing_that_a_file_says_runs_and_it_is_dark_where_one_asks_for_it(
    pages: list[Path], tmp_path: Path
) -> None:
    seen = visit(pages[0], 800, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert "<script" not in seen.dom
    assert "<title>Merge of digits</title>" in seen.dom
    assert seen.picture[-1, 0].max() < 60


def test_only_tables_are_wider_than_the_window(pages: list[Path], tmp_path: Path) -> None:
    # Without its policy, and with a script of the test's, the page measures itself.
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", pages[0].read_text())
    script = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    page = tmp_path / "report.html"
    page.write_text(text.replace("</body>", f"{script}</body>"))
    framing = framed([page] * len(WIDTHS), tmp_path)
    dom = visit(framing, sum(WIDTHS), tmp_path).dom
    assert f"<title>{','.join(map(str, WIDTHS))}</title>" in dom


def test_what_is_checked_here_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "bad" / "page.html"
    page.parent.mkdir()
    page.write_text('<img src="http://example.invalid/x.png"><script>nothing()</script>')
    seen = visit(page, 400, tmp_path)
    assert "http://example.invalid/x.png" in seen.asked
    assert any("nothing is not defined" in line for line in seen.console)
    assert seen.picture[-1, 0].min() > 200  # light, where one does not ask
