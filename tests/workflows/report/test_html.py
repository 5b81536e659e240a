"""Pages as HTML: what they say of numbers given by hand, and that names of files stay names."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from merge_rl.config import OptimizeConfig
from merge_rl.errors import RunError
from merge_rl.interfaces import NullTracker
from merge_rl.storage.runs import FinetuneRun, RunDir
from merge_rl.workflows.compare.trials import parse_spec
from merge_rl.workflows.optimize import optimize
from merge_rl.workflows.report import LivePage, with_page, write_report, writing
from merge_rl.workflows.report.compare_html import compare_document, cost_to_reach, spec_of
from merge_rl.workflows.report.elements import Span, heat_table, strip
from merge_rl.workflows.report.figures import chart, counts_axis
from merge_rl.workflows.report.finetune_html import finetune_document
from merge_rl.workflows.report.markup import Safe, document, joined, tag
from merge_rl.workflows.report.run_html import run_document
from merge_rl.workflows.report.sections import settings_section
from tests.fixtures import TinyConfig
from tests.pages import (
    HOSTILE,
    comparison_folder,
    search_result,
    search_run,
    searcher,
    tuning_run,
)
from tests.quick import draw_figures

NAMES = ["snap-1", "snap-2", "snap-3"]


class Seen(HTMLParser):
    """Elements in order, text by the element it is in, and addresses of what is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        names = ("src", "href", "xlink:href", "data", "srcset", "action")
        self.addresses += [value or "" for name, value in attrs if name in names]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "h2":
            self.titles.append(data)
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_what_is_no_markup_is_escaped() -> None:
    assert tag("p", "a < b & c", class_='x"y') == '<p class="x&quot;y">a &lt; b &amp; c</p>'
    assert joined([Safe("<b>1</b>"), "<b>"]) == "<b>1</b>&lt;b&gt;"
    assert tag("td", Safe("&amp;"), title=None) == "<td>&amp;</td>"


def test_a_strip_is_to_scale() -> None:
    value = {"mean": 3.0, "low": 2.0, "high": 6.0, "values": [1.0]}
    drawn = strip(value, Span(0.0, 10.0))
    assert '<i style="left:20.00%;width:40.00%"></i>' in drawn
    assert '<b style="left:30.00%"></b>' in drawn
    assert '<u style="left:10.00%"></u>' in drawn
    assert strip({"mean": None, "low": None, "high": None}, Span(0.0, 1.0)) == ""


def test_many_columns_have_short_numbers() -> None:
    values = [0.05, -0.05, 0.001, -0.001, 1.2, -10.05, 0.996, 20.0, -0.5]
    drawn = heat_table("k", [f"c{i}" for i in range(9)], {"a": values})
    shown = re.findall("<td[^>]*>([^<]*)</td>", drawn)
    shown = [text.replace("\N{MINUS SIGN}", "-") for text in shown]
    assert shown == [".05", "-.05", "0", "0", "1.20", "-10.05", "1.00", "20.00", "-.50"]


def test_shades_go_by_the_largest_of_the_result() -> None:
    drawn = heat_table("k", ["start", "g"], {"a": [9.0, 0.5], "b": [0.0, -1.0]}, apart={"start"})
    assert '<td class="up" style="--w:0.50">+0.50</td>' in drawn
    assert '<td class="down" style="--w:1.00">\N{MINUS SIGN}1.00</td>' in drawn
    assert '<td class="apart">+9.00</td>' in drawn


@pytest.mark.parametrize(
    ("columns", "kind"), [(8, "heat"), (9, "heat dense"), (26, "heat dense"), (27, "dense broad")]
)
def test_tables_of_many_columns_are_printed_across(columns: int, kind: str) -> None:
    drawn = heat_table("k", [f"c{i}" for i in range(columns)], {"a": [0.5] * columns})
    assert f'{kind}"><thead>' in drawn
    style = (files("merge_rl") / "data/report/page.css").read_text(encoding="utf-8")
    assert "@page across{size:landscape}" in style
    assert ".scroll:has(.broad){page:across}" in style


# ---------------------------------------------------------------------------------- a search


ORDER = [
    "Before and after", "Scores on fresh seeds", "The search", "Coefficients", "Second opinions",
    "Cost and time", "Settings that differ from the defaults", "Provenance", "Make it again",
]  # fmt: skip


def test_the_page_of_a_search(figures: None, tmp_path: Path) -> None:
    run = search_run(tmp_path / "run", NAMES, ["enc", "dec"])
    page = Seen(run_document(RunDir(run)))
    assert page.titles == ORDER
    text = page.text
    assert (
        "Better than its start, the uniform average and the best single checkpoint (snap-1)" in text
    )
    assert "Held-out FID went from 1.500 to 1.100, a gain of +0.400 [+0.350, +0.450]." in text
    assert "FID to the reference improved, but KID did not." in text  # the overfit note
    assert page.tags.count("img") == 6
    assert "By KID, which no step optimised: worse" in text
    assert "Optimism of the final choice: -0.031" in text
    # 4 entries of 3 repeats of 100 images, and 1,000 images of each of 3 checkpoints.
    assert "final comparison 4,200 (62%)" in text
    assert "6,806 images in all, in 3 rounds" in text  # with 3 pictures of either end
    assert "budget 2000 50000" in text
    assert "f" * 64 in text
    assert "mergerl optimize /data/digits --config" in text
    for row, name in enumerate(NAMES):
        for values in search_result(NAMES, ["enc", "dec"])["coefficients"]:
            assert f"{values[row]:+.2f}".replace("-", "\N{MINUS SIGN}") in text, name


@pytest.mark.parametrize(("count", "groups"), [(24, 5), (64, 30)])
def test_every_coefficient_of_a_large_set_is_a_cell(
    tmp_path: Path, count: int, groups: int
) -> None:
    names = [f"snapshot-{i:07d}-0.050" for i in range(count)]
    run = search_run(tmp_path / "run", names, [f"group {i}" for i in range(groups)])
    text = run_document(RunDir(run))
    (heat,) = re.findall(r'<table class="heat[^>]*>.*?</table>', text, flags=re.S)
    assert heat.count("<td") == (count + 1) * (groups + 1)  # with the sums, and the start
    assert len(text) < 3_000_000


def test_a_run_that_goes_on_says_how_far_it_is(tmp_path: Path) -> None:
    run = search_run(tmp_path / "run", NAMES, finished=False, pictures=False)
    text = run_document(RunDir(run), reloads=True)
    page = Seen(text)
    assert "Not finished: 3 rounds, 1,400 images so far." in page.text
    assert "There are no pictures: the run is not finished." in page.text
    assert "mergerl resume" in page.text
    assert '<progress value="1400" max="2000">' in text
    assert '<meta http-equiv="refresh" content="10">' in text
    (run / "events.jsonl").unlink()
    assert "Not finished: no round is over yet." in Seen(run_document(RunDir(run))).text
    assert 'http-equiv="refresh"' not in run_document(RunDir(run))


def test_a_finished_run_does_not_reload(tmp_path: Path) -> None:
    run = search_run(tmp_path / "run", NAMES)
    assert 'http-equiv="refresh"' not in run_document(RunDir(run), reloads=True)


def test_a_run_whose_candidates_fail_says_so(tmp_path: Path) -> None:
    run = search_run(tmp_path / "run", NAMES, finished=False)
    text = (run / "events.jsonl").read_text().replace('"failed": 0', '"failed": 2')
    (run / "events.jsonl").write_text(text)
    said = Seen(run_document(RunDir(run))).text
    assert "The last rounds failed: no candidate made finite samples." in said


def test_files_of_another_version_cost_their_section_alone(tmp_path: Path) -> None:
    run = search_run(tmp_path / "run", NAMES)
    text = (run / "result.json").read_text().replace('"search_images"', '"images_searched"')
    (run / "result.json").write_text(text)
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings + "gone: 1\n")
    written = write_report(run)
    page = Seen(written.html.read_text())
    assert "the files of another version differ here ('search_images' is missing)." in page.text
    assert {"Before and after", "Scores on fresh seeds", "Coefficients"} <= set(page.titles)
    assert written.page is None
    assert "'gone'" in (written.note or "")


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    run = search_run(tmp_path / "run", NAMES)
    (run / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"result\.json: damaged"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_without_matplotlib_only_the_charts_are_missing(tmp_path: Path) -> None:
    page = Seen(run_document(RunDir(search_run(tmp_path / "run", NAMES))))
    assert page.titles == ORDER
    assert "svg" not in page.tags
    assert (
        "needs the library matplotlib, which is not installed; pip install 'merge_rl[report]'"
        in page.text
    )


# ------------------------------------------------------------------------------ other pages


def test_the_page_of_fine_tuning(figures: None, tmp_path: Path) -> None:
    page = Seen(finetune_document(FinetuneRun(tuning_run(tmp_path / "run"))))
    assert page.tags.count("svg") == 4
    assert page.tags.count("img") == 2
    assert page.text.count("2.000 [1.800, 2.200] +1.000 [+0.950, +1.050] better") == 4
    assert "held-out FID 2.000 [1.800, 2.200]" in page.text  # as in the table
    assert "20 steps, 200 images, 10 s in steps" in page.text
    begun = Seen(finetune_document(FinetuneRun(tuning_run(tmp_path / "b", finished=False))))
    assert "Not finished: step 20 of 20." in begun.text


def test_the_page_of_a_comparison(figures: None, tmp_path: Path) -> None:
    lines = [searcher("late", 0.9, 1.0, 1.1), searcher("early", 0.5, 0.6, 0.7)]
    folder = comparison_folder(tmp_path / "cmp", lines)
    page = Seen(compare_document(RunDir(folder)))
    assert "early found the best merges; ahead of late (1.000) with every seed." in page.text
    assert page.text.index("1. early") < page.text.index("2. late") < page.text.index("newest")
    assert "--seeds 0,1,2 --searcher late --searcher early" in page.text
    assert "svg" in page.tags


def test_a_comparison_has_no_searcher_among_what_all_share(tmp_path: Path) -> None:
    folder = comparison_folder(tmp_path / "cmp", None)
    begun = RunDir(folder).read("settings.json") or {}
    begun["settings"]["config"]["search"] |= {"name": "policy-gradient", "std": 0.5}
    (folder / "settings.json").write_text(json.dumps(begun), encoding="utf-8")
    text = Seen(compare_document(RunDir(folder))).text
    assert "search.std" in text
    assert "search.name" not in text


def test_an_axis_of_images_has_whole_numbers(figures: None) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axis = figure.subplots()
    counts_axis(axis, [312.5, 625.0, 1250.0, 5000.0])
    figure.draw_without_rendering()
    assert [label.get_text() for label in axis.get_xticklabels()] == ["312", "625", "1.2k", "5.0k"]


def test_cost_to_reach_is_the_first_look_at_or_below(tmp_path: Path) -> None:
    lines = [searcher("late", 0.9, 1.0, 1.1), searcher("early", 0.5, 0.6, 0.7)]
    found = RunDir(comparison_folder(tmp_path / "cmp", lines)).read("compare.json") or {}
    columns, rows = cost_to_reach(found)
    # Medians of early: 1.2, 0.9, 0.6 after 100, 200, 400 images; of late: 2.0, 1.5, 1.0.
    assert columns[1:] == [
        "the best merge without a search (1.200)", "the second-best searcher's end (1.000)",
    ]  # fmt: skip
    assert rows == [["early", "100", "200"], ["late", "400", "400"]]


@pytest.mark.parametrize(
    "text", ["lcsc", "nevergrad:CMA search.population=4 reward.name=fid-subset",
             "nevergrad:CMA label='a b' search.std=0.5 merge.max_abs=null"],
)  # fmt: skip
def test_searchers_are_named_as_the_command_takes_them(text: str) -> None:
    before = parse_spec(text)
    line = {"searcher": before.label, "name": before.name, "settings": dict(before.settings)}
    assert parse_spec(spec_of(line)) == before


def test_a_comparison_that_goes_on_lists_its_searches(tmp_path: Path) -> None:
    folder = comparison_folder(tmp_path / "cmp", None)
    written = write_report(folder, reloads=True)
    page = Seen(written.html.read_text())
    assert not written.finished
    assert "a-seed0 3 1,400 finished a-seed1 3 1,400 unfinished" in page.text


# --------------------------------------------------------------------------- what is not shown


def test_names_from_files_stay_names_and_a_page_loads_nothing(
    figures: None, tmp_path: Path
) -> None:
    pages = [
        run_document(RunDir(search_run(
            tmp_path / "run", [HOSTILE, "b"], [HOSTILE, "g"], set_name="a<b>"))),
        finetune_document(FinetuneRun(tuning_run(tmp_path / "ft", model="a<script>"))),
        compare_document(RunDir(comparison_folder(tmp_path / "cmp", [searcher(HOSTILE, 1, 2, 3)]))),
    ]  # fmt: skip
    for text in pages:
        page = Seen(text)
        assert "script" not in page.tags
        assert "onerror" not in re.sub(r"&lt;.*?&gt;", "", text)
        assert page.addresses
        assert all(re.match(r"data:image/|#", address) for address in page.addresses)
        assert not re.search(r"@import|url\((?!#)", text)
        assert {"link", "iframe", "object", "base"}.isdisjoint(page.tags)
    assert HOSTILE in "".join(Seen(pages[0]).words)


def test_one_page_is_the_same_every_time(figures: None, tmp_path: Path) -> None:
    run = RunDir(search_run(tmp_path / "run", NAMES))
    assert run_document(run) == run_document(run)


def test_a_live_page_waits_and_never_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    run = search_run(tmp_path / "run", NAMES, finished=False)
    live = LivePage(run)
    live.refresh()
    assert not (run / "report.html").exists()
    now[0] = 20.0
    live.refresh()
    assert (run / "report.html").is_file()
    assert not (run / "report.md").exists()  # whoever asks for it, or the end, writes the rest
    (run / "report.html").unlink()
    now[0] = 30.0  # not again so soon
    live.refresh()
    assert not (run / "report.html").exists()
    (run / "events.jsonl").write_text("{\n{}\n")
    now[0] = 60.0
    live.refresh()
    assert not (run / "report.html").exists()


def test_a_page_has_a_title_and_a_policy() -> None:
    text = document("<T>", tag("p", "x"))
    assert "<title>&lt;T&gt;</title>" in text
    assert 'content="default-src &#x27;none&#x27;; img-src data:' in text


class Watching(NullTracker):
    """Looks at the page of a run whenever it hears of a round."""

    def __init__(self, page: Path) -> None:
        self.page, self.seen, self.notes = page, set[str](), list[str]()

    def event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "round" and self.page.is_file():
            again = 'http-equiv="refresh"' in self.page.read_text()
            self.seen.add("reloads" if again else "is whole")
        if event["kind"] == "note":
            self.notes.append(event["text"])


def test_a_run_from_python_has_a_live_page_and_ends_with_a_whole_one(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    no_network: None,
) -> None:  # fmt: skip
    monkeypatch.setattr(writing, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(writing, "SHARE", 0)
    page = tmp_path / "run/report.html"
    heard = Watching(page)
    optimize(shared_tiny, out=page.parent, config=tiny_config(shared_tiny), tracker=heard)
    assert heard.seen == {"reloads"}
    assert 'http-equiv="refresh"' not in page.read_text()
    assert page.with_name("report.md").is_file()


def test_a_page_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, _text: str) -> None:
        raise OSError(28, "cannot be written: no space left", str(path))

    monkeypatch.setattr(writing, "write_text", full)
    run = search_run(tmp_path / "run", NAMES)
    heard = Watching(run / "report.html")
    with with_page(run, heard):
        pass
    page = run / "report.html"
    told = f"no page: {page}: cannot be written: no space left"
    assert heard.notes == [f"{told}; write it with mergerl report {run}"]
    with pytest.raises(KeyError), with_page(run, heard):
        raise KeyError
    assert len(heard.notes) == 1  # a run that failed has no page of its end


def test_settings_that_are_mappings_are_told() -> None:
    groups = {"attention": r"attn\.", "tensor": "(?P<each>.+)"}
    seen = Seen(settings_section(OptimizeConfig, {"merge": {"groups": groups, "freeze": []}}))
    assert "merge.groups" in seen.words
    assert "merge.freeze" not in seen.words
    told = " ".join(seen.words)
    assert r"attention: attn\." in told
    assert "tensor: (?P<each>.+)" in told
    grouped = {"merge": {"grouping": "tensors", "groups": {"tensor": "(?P<each>.+)"}}}
    seen = Seen(settings_section(OptimizeConfig, grouped))  # the groups are those of the grouping
    assert "merge.grouping" in seen.words
    assert "merge.groups" not in seen.words


def test_a_home_that_cannot_be_written_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_figures(monkeypatch)
    logger = logging.getLogger("matplotlib")
    for level, warns in ((logging.NOTSET, False), (logging.DEBUG, True)):  # the user's word counts
        monkeypatch.setattr(logger, "level", level)
        chart(lambda _axes: None, (1.0, 1.0), "nothing")
        assert (logger.level <= logging.WARNING) is warns
