"""A search goes on with another number of processes, and ends in the bits of one."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import merge_rl as mrl
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.config.search import SearchConfig
from merge_rl.errors import StoppedError
from merge_rl.interfaces import NullTracker
from merge_rl.parallel.group import Group
from merge_rl.parallel.rendezvous import Place
from merge_rl.workflows.optimize import function
from merge_rl.workflows.optimize import run as searches
from tests.quick import without_network
from tests.ranks import on_ranks
from tests.workflows.optimize.test_function import SMALL, search
from tests.workflows.optimize.test_searchers_resume import StopAfter

pytestmark = [pytest.mark.usefixtures("no_network"), pytest.mark.numerics]

TinyConfig = Callable[..., OptimizeConfig]
Outcome = Callable[[Path], dict[str, object]]
SEARCHERS: Mapping[str, dict[str, Any]] = {
    "policy-gradient": {"population": 4},
    "pathwise": {"population": None, "antithetic": False},
}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], Any]:
    """Work on so many ranks, each a thread that finds its own group where a launcher's would be."""
    own = threading.local()

    @contextmanager
    def joined() -> Iterator[Group]:
        group = getattr(own, "group", None) or Group(Place())
        try:
            yield group
        except BaseException as error:
            if not group.leads and (told := group.failure()):  # as `parallel.joined` does
                raise StoppedError(told) from None
            group.fail(str(error) or "stopped")
            raise

    def start(ranks: int, work: Callable[[], object]) -> Any:
        def one(group: Group) -> object:
            own.group = group
            return work()

        return on_ranks(ranks, one) if ranks > 1 else [work()]

    for module in (searches, function):
        monkeypatch.setattr(module, "joined", joined)
    return start


WholeOf = Callable[[str], tuple[OptimizeConfig, dict[str, object]]]


@pytest.fixture(scope="module")
def whole_of(
    shared_tiny: Path, tiny_config: TinyConfig, outcome: Outcome,
    tmp_path_factory: pytest.TempPathFactory,
) -> WholeOf:  # fmt: skip
    """name -> settings of a search of four rounds, and what it comes to on one process."""

    @functools.cache
    def under(name: str) -> tuple[OptimizeConfig, dict[str, object]]:
        config = tiny_config(shared_tiny, budget=240, search={"name": name, **SEARCHERS[name]})
        run = tmp_path_factory.mktemp("whole") / "run"
        with pytest.MonkeyPatch.context() as patch:
            without_network(patch)
            mrl.optimize(shared_tiny, out=run, config=config, tracker=NullTracker())
        return config, outcome(run)

    return under


@pytest.mark.parametrize(("name", "ranks"), [("policy-gradient", (2, 1)), ("pathwise", (1, 2))])
def test_begun_with_some_and_resumed_with_others(
    name: str, ranks: tuple[int, int], shared_tiny: Path, whole_of: WholeOf, tmp_path: Path,
    outcome: Outcome, on: Callable[..., Any],
) -> None:  # fmt: skip
    config, whole = whole_of(name)
    run = tmp_path / "run"

    def begin() -> object:
        return mrl.optimize(shared_tiny, out=run, config=config, tracker=StopAfter(2))

    with pytest.raises(KeyboardInterrupt):
        raise on(ranks[0], begin)[0]
    assert not (run / "result.json").exists()
    ended = on(ranks[1], lambda: mrl.resume(run, tracker=NullTracker()))
    assert [type(each).__name__ for each in ended] == ["OptimizeResult"] * ranks[1]
    assert outcome(run) == whole


@pytest.mark.parametrize("name", ["policy-gradient", "auto"])
def test_a_function_on_two_ranks_ends_in_the_bits_of_one(
    name: str, tmp_path: Path, outcome: Outcome, on: Callable[..., Any]
) -> None:
    config = dataclasses.replace(SMALL, search=SearchConfig())
    # A batch of 20 makes one part of a round of `pathwise`, which "auto" takes here.
    options = {"config": config, "searcher": name, "budget": 500, "batch": 20}
    search(tmp_path / "alone", **options)
    ended = on(2, lambda: search(tmp_path / "together", **options))
    assert [type(each).__name__ for each in ended] == ["OptimizeResult"] * 2
    assert outcome(tmp_path / "together") == outcome(tmp_path / "alone")


@pytest.mark.parametrize(
    "name", ["auto", "policy-gradient"]
)  # asked beforehand; in its first round
def test_a_function_that_fails_is_told_of_by_all_and_leaves_nothing(
    name: str, tmp_path: Path, on: Callable[..., Any]
) -> None:
    def failing(_weights: object, _seeds: object, _labels: object) -> Any:
        raise ValueError("trouble of its own")

    options = {"config": dataclasses.replace(SMALL, search=SearchConfig()), "searcher": name}
    ended = on(2, lambda: search(tmp_path / "run", generate=failing, **options))
    assert all("trouble of its own" in str(each) for each in ended)
    assert not (tmp_path / "run").exists()
