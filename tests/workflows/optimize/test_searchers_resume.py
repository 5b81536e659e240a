"""A run with any family of searchers goes on, once interrupted, as if it never had been."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import merge_rl as mrl
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.interfaces import NullTracker
from tests.quick import without_pages

TinyConfig = Callable[..., OptimizeConfig]
Outcome = Callable[[Path], dict[str, object]]
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("nevergrad:CMA", {"population": 4}, "raw"),
    ("nevergrad:OnePlusOne", {"population": 1}, "raw"),
    ("scipy:nelder-mead", {"population": None}, "raw"),
    ("lr-cma", {"population": 4}, "raw"),
    ("lcsc", {"population": 4}, "raw"),
    ("random", {"population": 4}, "raw"),
    ("greedy-soup", {"population": None}, "raw"),
    ("ema-grid", {"population": None}, "ema"),
]


class StopAfter(NullTracker):
    """Ctrl-C once so many rounds are done."""

    def __init__(self, rounds: int) -> None:
        self.left = rounds

    def event(self, event: Mapping[str, Any]) -> None:
        self.left -= event.get("kind") == "round"
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("name", "search", "track"), CASES, ids=[case[0] for case in CASES])
def test_interrupted_and_resumed(
    name: str, search: dict[str, Any], track: str, shared_tiny: Path, tiny_config: TinyConfig,
    tmp_path: Path, outcome: Outcome, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    budget = 400 if name == "ema-grid" else 200  # five rounds, or all points of two grids
    config = tiny_config(
        shared_tiny, track=track, budget=budget, reward={"name": "fid-full"},
        search={"name": name, "antithetic": True, **search},
    )  # fmt: skip
    mrl.optimize(shared_tiny, out=tmp_path / "whole", config=config)
    without_pages(monkeypatch)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        mrl.optimize(shared_tiny, out=run, config=config, tracker=StopAfter(2))
    with pytest.raises(KeyboardInterrupt):
        mrl.resume(run, tracker=StopAfter(2))
    mrl.resume(run)
    assert outcome(run) == outcome(tmp_path / "whole")
