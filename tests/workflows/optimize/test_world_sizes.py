"""A search goes on with another number of processes, and ends in the bits of one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import merge_rl as mrl
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.interfaces import NullTracker
from merge_rl.parallel.group import Group
from merge_rl.parallel.rendezvous import Place
from merge_rl.workflows.optimize import run as searches
from tests.ranks import on_ranks
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
        except KeyboardInterrupt:
            group.fail("stopped")
            raise

    def start(ranks: int, work: Callable[[], object]) -> Any:
        def one(group: Group) -> object:
            own.group = group
            return work()

        return on_ranks(ranks, one) if ranks > 1 else [work()]

    monkeypatch.setattr(searches, "joined", joined)
    return start


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_begun_with_some_and_resumed_with_others(
    name: str, ranks: tuple[int, int], shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path,
    outcome: Outcome, on: Callable[..., Any],
) -> None:  # fmt: skip
    config = tiny_config(shared_tiny, budget=400, search={"name": name, **SEARCHERS[name]})
    whole, run = tmp_path / "whole", tmp_path / "run"
    mrl.optimize(shared_tiny, out=whole, config=config, tracker=NullTracker())

    def begin() -> object:
        return mrl.optimize(shared_tiny, out=run, config=config, tracker=StopAfter(2))

    with pytest.raises(KeyboardInterrupt):
        raise on(ranks[0], begin)[0]
    assert not (run / "result.json").exists()
    ended = on(ranks[1], lambda: mrl.resume(run, tracker=NullTracker()))
    assert [type(each).__name__ for each in ended] == ["OptimizeResult"] * ranks[1]
    assert outcome(run) == outcome(whole)
