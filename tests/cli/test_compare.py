"""`mergerl compare` and `mergerl report` as users meet them."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_rl.cli.compare import parse_seeds
from merge_rl.errors import ConfigError
from merge_rl.workflows.optimize.rounds import SearchLoop
from tests.pages import put, search_result, search_run

pytestmark = pytest.mark.usefixtures("no_network_here")

Mergerl = Callable[..., Any]
SMALL: list[object] = [
    "--track", "raw", "--budget", 100, "--final-images", 10, "--repeats", 3, "--seeds", "0,1",
    "--set", "evaluation.selection_images=10", "--set", "reward.pool_size=40",
    "--set", "reward.refresh_size=10", "--set", "reward.subset_size=10",
    "--set", "search.population=4",
]  # fmt: skip


def test_tables_files_and_the_same_again(tiny: Path, mergerl: Mergerl) -> None:
    two = ["--searcher", "uniform", "--searcher", "policy-gradient label=ours search.std=0.5"]
    code, out, err = mergerl("compare", tiny, "--out", "cmp", *two, *SMALL)
    assert code == 0, err
    assert "budget 100 images, median [range] of 2 seeds; FID at N = 10" in " ".join(out.split())
    firsts = [line.strip("│ ").split("  ")[0] for line in out.splitlines()]
    assert firsts.count("ours") == firsts.count("uniform") == 2
    assert firsts.count("uniform average") == 1
    assert "ratio: to the best merge without a search" in out
    assert "ours seed 1: search (100 images)" in err
    assert err.count("the pool has 40 images for 64 features") == 1  # of four searches
    folder = Path("cmp")
    assert {path.name for path in folder.iterdir()} == {
        "settings.json", "scores.json", "compare.json", "compare.md", "report.html",
        "ours-seed0", "ours-seed1", "uniform-seed0", "uniform-seed1",
    }  # fmt: skip
    # The same command again searches for nothing, and says the same.
    code, again, err = mergerl("compare", tiny, "--out", "cmp", "--json", *two, *SMALL)
    assert (code, err) == (0, "")
    document = json.loads(again)
    assert document.pop("out") == "cmp"
    assert document == json.loads((folder / "compare.json").read_text())
    # Its page can be written again, and that of each search.
    (folder / "compare.md").unlink()
    code, shown, _ = mergerl("report", "cmp")
    assert code == 0
    assert (folder / "compare.md").is_file()
    assert shown.splitlines()[:-1] == out.splitlines()[:-2]  # then where it is, and a verdict
    code, shown, _ = mergerl("report", folder / "ours-seed0", "--json")
    assert json.loads(shown)["page"] == "cmp/ours-seed0/report.md"


def test_a_stop_is_not_a_loss(
    tiny: Path, mergerl: Mergerl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_self: SearchLoop) -> None:
        raise KeyboardInterrupt

    arguments = ["compare", tiny, "--out", "cmp", "--searcher", "policy-gradient", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(SearchLoop, "run", stopped)
        code, out, err = mergerl(*arguments)
    assert (code, out) == (1, "")
    assert "what is done is kept in cmp. Go on: the same command" in err
    assert mergerl("report", "cmp").code == 0
    assert "Not finished: some searches are still to come." in Path("cmp/report.html").read_text()
    assert mergerl(*arguments, "--curve-images", 0).code == 1  # began with another number
    assert mergerl(*arguments).code == 0


def test_the_page_has_the_command_that_makes_it_again(tiny: Path, mergerl: Mergerl) -> None:
    few = [*SMALL[:8], *SMALL[10:]]  # one search has one seed
    assert mergerl("optimize", tiny, "--out", "run", *few).code == 0
    commands = re.findall("<pre><code>(mergerl .*?)</code>", Path("run/report.html").read_text())
    search, merge = (shlex.split(html.unescape(command))[1:] for command in commands)
    for command in (search, merge):
        code, _, err = mergerl(*command)
        assert code == 0, err
    again = [Path(folder) / "model.safetensors" for folder in ("run-again/merged", "merged")]
    first = Path("run/merged/model.safetensors").read_bytes()
    assert all(path.read_bytes() == first for path in again)


def test_a_page_follows_a_run_to_its_end(
    mergerl: Mergerl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = search_run(tmp_path / "run", ["a", "b"], finished=False)
    seen = []

    def wait(seconds: float) -> None:
        seen.append((seconds, (run / "report.html").read_text()))
        if len(seen) == 2:
            put(run, "result.json", search_result(["a", "b"], ["all"]))

    monkeypatch.setattr("merge_rl.cli.compare.time.sleep", wait)
    code, out, err = mergerl("report", "run", "--watch")
    assert code == 0, err
    assert "run/report.html follows the run" in err
    assert len(seen) == 2
    assert all('http-equiv="refresh"' in text for _, text in seen)
    assert 'http-equiv="refresh"' not in (run / "report.html").read_text()
    assert out.startswith("wrote run/report.html, beside it run/report.md")


def test_a_search_without_a_pool_tells_of_its_candidates(tiny: Path, mergerl: Mergerl) -> None:
    few = [*SMALL[:8], "--set", "evaluation.selection_images=10", "--subset", 10, "--population", 4]
    code, out, err = mergerl("optimize", tiny, "--out", "run", "--searcher", "random", *few)
    assert code == 0, err
    assert re.search(r"round 1  best candidate \d+\.\d{3}  \d+ images", err)
    assert "chose " in out or "reports the mean" in out
    assert re.search(
        r"spent 80 images: 0 to find the start, 80 in \d+ rounds", " ".join(out.split())
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,1,0"], "expected seeds, each once, as in 0,1,2, got 0 twice"),
        (["--seeds", ","], "expected --seeds such as 0,1,2, got ','"),
        (["--seeds", "a"], "expected --seeds such as 0,1,2, got 'a'"),
        (["--searcher", "lcs"], "unknown searcher 'lcs'; did you mean 'lcsc'"),
        (["--searcher", "uniform budget=9"], "searcher uniform: expected label=LABEL"),
        (["--searcher", "lcsc", "--searcher", "lcsc"], "the searcher 'lcsc' is there twice"),
        (["--searcher", "policy-gradient", "--budget", 30], "searcher policy-gradient: a budget"),
        (["--curve-images", 1], "expected 0 or at least 2 images along the search, got 1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    arguments: list[object], message: str, tiny: Path, mergerl: Mergerl
) -> None:
    code, out, err = mergerl("compare", tiny, "--out", "cmp", *SMALL, *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not Path("cmp").exists()


def test_seeds_are_whole_numbers() -> None:
    assert parse_seeds("3, 1,2 1e3") == [3, 1, 2, 1000]
    for text in ("1.5", "", ",", "1,x"):
        with pytest.raises(ConfigError, match=f"such as 0,1,2, got {text!r}"):
            parse_seeds(text)


def test_who_watches_a_run_ends_it_by_an_interrupt(
    mergerl: Mergerl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = search_run(tmp_path / "run", ["a", "b"], finished=False, pictures=False)
    seen = []

    def interrupted(_seconds: float) -> None:
        seen.append((run / "report.html").read_text(encoding="utf-8"))
        raise KeyboardInterrupt

    monkeypatch.setattr("merge_rl.cli.compare.time.sleep", interrupted)
    code, out, err = mergerl("report", run, "--watch")
    assert (code, out.startswith(f"wrote {run / 'report.html'}")) == (0, True), err
    assert "report.html follows the run; Ctrl-C ends this" in err
    assert 'http-equiv="refresh"' in seen[0]
    assert 'http-equiv="refresh"' not in (run / "report.html").read_text(encoding="utf-8")
