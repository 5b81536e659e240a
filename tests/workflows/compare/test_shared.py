"""A comparison shared out among ranks: that of one process, whoever made what."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from merge_rl.config.optimize import AUTO_BATCH, OptimizeConfig
from merge_rl.errors import ParallelError, StatisticsError
from merge_rl.interfaces import NullTracker
from merge_rl.parallel.group import Group
from merge_rl.storage.runs.run_dir import RunDir
from merge_rl.workflows.compare import trials
from merge_rl.workflows.compare.run import Asked, compare_on, compare_searchers
from merge_rl.workflows.compare.trials import parse_specs
from merge_rl.workflows.optimize import run_search
from merge_rl.workflows.report import CompareResult
from tests.ranks import on_ranks

pytestmark = [pytest.mark.usefixtures("no_network_here"), pytest.mark.numerics]

TinyConfig = Callable[..., OptimizeConfig]
SEARCHERS = ["policy-gradient", "best-checkpoint"]
ASKED = Asked(parse_specs(SEARCHERS), (3, 4), 10, lenient=False)


class Notes(NullTracker):
    """Keeps notes, and holds its rank up until another has scored something."""

    def __init__(self, other: Path) -> None:
        self.other, self.texts = other, list[str]()

    def advance(self, count: int) -> None:
        until = time.monotonic() + 60
        while not (self.other.is_file() and json.loads(self.other.read_bytes())):
            assert time.monotonic() < until
            time.sleep(0.02)

    def event(self, event: Mapping[str, Any]) -> None:
        self.texts.append(str(event.get("text")))


def without_time(document: Mapping[str, Any]) -> str:
    """All numbers to the bit, but how long it took."""

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: kept(v) for k, v in value.items() if k not in ("seconds", "overhead")}
        return [kept(each) for each in value] if isinstance(value, list) else value

    return json.dumps(kept(dict(document)))


@pytest.fixture(scope="module")
def alone(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[OptimizeConfig, Path, str]:
    config, out = tiny_config(shared_tiny), tmp_path_factory.mktemp("alone") / "out"
    found = compare_searchers(
        config, out=out, searchers=SEARCHERS, seeds=ASKED.seeds, curve_images=10, progress=False
    )
    return config, out, without_time(found)


def test_two_ranks_find_what_one_process_does(
    alone: tuple[OptimizeConfig, Path, str], tmp_path: Path
) -> None:
    config, before, expected = alone
    out = tmp_path / "out"
    heard = Notes(out / "ranks/1/scores.json")

    def work(group: Group) -> CompareResult:
        tracker = heard if group.leads else NullTracker()
        return compare_on(group, config, RunDir(out), ASKED, tracker)

    first, second = on_ranks(2, work)
    assert isinstance(first, CompareResult), first
    assert without_time(first) == expected
    assert first == second == json.loads((out / "compare.json").read_text())
    assert any(text.startswith("rank 1 has finished ") for text in heard.texts)
    assert {path.name for path in out.iterdir()} == {path.name for path in before.iterdir()}
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (out, before)]
    assert scores[0] == scores[1]
    # One process goes on with it: a searcher more, and all the others are there.
    more = compare_searchers(
        config, out=out, searchers=[*SEARCHERS, "uniform"], seeds=(3, 4), curve_images=10
    )
    assert more["searchers"][:2] == first["searchers"]


def test_a_search_that_fails_is_named_and_the_others_are_kept(
    alone: tuple[OptimizeConfig, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, expected = alone
    out = tmp_path / "out"
    search = run_search

    def failing(settings: OptimizeConfig, *rest: Any) -> Any:
        if settings.seed == 4:
            raise StatisticsError("no statistics")
        return search(settings, *rest)

    def work(group: Group) -> CompareResult:
        return compare_on(group, config, RunDir(out), ASKED, NullTracker())

    with monkeypatch.context() as patch:
        patch.setattr(trials, "run_search", failing)
        ended = on_ranks(2, work)
    assert any("policy-gradient seed 4: no statistics" in str(each) for each in ended), ended
    assert not (out / "compare.json").exists()
    # Any number of processes goes on.
    found = compare_searchers(
        config, out=out, searchers=SEARCHERS, seeds=(3, 4), curve_images=10, progress=False
    )
    assert without_time(found) == expected
    assert not (out / "ranks").exists()


def test_ranks_that_share_no_folder_are_told_so(
    alone: tuple[OptimizeConfig, Path, str], tmp_path: Path
) -> None:
    def work(group: Group) -> CompareResult:
        folder = RunDir(tmp_path / f"disk{group.rank}")
        return compare_on(group, alone[0], folder, ASKED, NullTracker())

    lead, other = on_ranks(2, work)
    assert isinstance(other, ParallelError)
    assert "rank 1 does not see the settings.json that rank 0 has written to " in str(other)
    assert isinstance(lead, ParallelError)


def test_the_batch_is_chosen_once(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(shared_tiny, batch=AUTO_BATCH)
    arguments: dict[str, Any] = {
        "out": tmp_path / "out", "searchers": ["uniform"], "seeds": (3,), "progress": False,
    }  # fmt: skip
    first = compare_searchers(config, **arguments)
    begun = json.loads((tmp_path / "out/settings.json").read_text())["settings"]["config"]["batch"]
    assert begun >= 1
    # With less memory it would be another; what was begun keeps its own.
    monkeypatch.setattr("merge_rl.workflows.compare.run.fit_batch", None)
    assert compare_searchers(config, **arguments) == first
