"""First-order rewards beside exact ones: the ratio, when a search speaks up, the report's line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.core.distances.frechet import frechet_distance
from merge_rl.core.distances.statistics import FeatureStats, feature_stats
from merge_rl.interfaces import NullTracker
from merge_rl.storage.runs.run_dir import RunDir
from merge_rl.workflows.reference.formats import Reference
from merge_rl.workflows.report import write_report
from merge_rl.workflows.rewards import first_order
from merge_rl.workflows.rewards.first_order import (
    FirstOrderWatch,
    first_order_line,
    first_order_ratio,
    first_order_warnings,
)
from merge_rl.workflows.rewards.frechet import (
    InfluenceFrechet,
    Pool,
    RewardSource,
    Subset,
    SubsetFrechet,
)
from merge_rl.workflows.rewards.sum import RewardSum, WeightedReward

pytestmark = pytest.mark.usefixtures("no_network_here")

TinyConfig = Callable[..., OptimizeConfig]
DIM = 4
F64 = torch.float64


def text_of(run: Path) -> str:
    """The page of a run in Markdown."""
    page = write_report(run).page
    assert page is not None
    return page.read_text()


def test_ratio_by_hand() -> None:
    found = torch.tensor([1.0, math.nan, 3.0, 2.0], dtype=F64)
    # Best is number 2, worst number 0: exact rewards differ by 5 - 4 where first order says 2.
    assert first_order_ratio(found, lambda pair: torch.tensor([4.0, 0, 5, 9])[pair]) == 0.5
    assert first_order_ratio(found, lambda pair: torch.tensor([5.0, 0, 4, 9])[pair]) == -0.5


@pytest.mark.parametrize("rewards", [[math.nan, 1.0], [math.nan] * 3, [2.0, 2.0]])
def test_nothing_to_compare(rewards: list[float]) -> None:
    def exact(pair: Tensor) -> Tensor:
        raise AssertionError("not asked for")

    assert first_order_ratio(torch.tensor(rewards, dtype=F64), exact) is None


def test_an_exact_reward_that_fails_gives_no_ratio() -> None:
    found = torch.tensor([1.0, 2.0], dtype=F64)
    assert first_order_ratio(found, lambda pair: torch.tensor([math.nan, 1.0])) is None


# ------------------------------------------------------------------------------------ real pools


def features(count: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
    return torch.randn(count, DIM, generator=generator) + shift


@pytest.fixture
def reference(generator: torch.Generator) -> FeatureStats:
    return feature_stats(features(400, generator))


@pytest.fixture
def pool(generator: torch.Generator) -> Pool:
    return Pool.of(features(200, generator, 0.5), torch.zeros(200, dtype=torch.int64))


def term(kind: type[SubsetFrechet], weight: float, reference: FeatureStats) -> WeightedReward:
    name = kind.__name__
    made = kind(RewardSource(name=name, reference=Reference(stats=reference)))
    return WeightedReward(name, weight, made, 0, DIM)


def test_ratio_of_a_sum_is_that_of_distances_computed_apart(
    pool: Pool, reference: FeatureStats, generator: torch.Generator
) -> None:
    shifts = torch.tensor([0.6, -0.5, 0.1])[:, None, None]
    draws = [
        (rows, features(60, generator).reshape(3, 20, DIM) + shifts)
        for rows in (torch.arange(20), torch.arange(30, 50))
    ]
    near = term(InfluenceFrechet, 2.0, reference)
    # Terms that are exact by themselves have no say in it.
    found = RewardSum([near, term(SubsetFrechet, 5.0, reference)]).scores(pool, draws)
    assert found.first_order is not None

    def distance(candidate: int) -> float:
        values = []
        for rows, made in draws:
            replaced = pool.features.clone()
            replaced[rows] = made[candidate]
            values.append(float(frechet_distance(feature_stats(replaced), reference)))
        return sum(values) / len(values)

    rewards = found.terms["InfluenceFrechet"]
    best, worst = int(rewards.argmax()), int(rewards.argmin())
    assert (best, worst) == (1, 0)
    expected = (distance(worst) - distance(best)) / float(rewards[best] - rewards[worst])
    assert found.first_order == pytest.approx(expected, rel=1e-8)


def test_small_subsets_are_of_first_order(
    pool: Pool, reference: FeatureStats, generator: torch.Generator
) -> None:
    reward = RewardSum([term(InfluenceFrechet, 1.0, reference)])
    # What first order leaves out goes with the square of the subset's share of the pool.
    towards, away = features(100, generator, -0.5), features(100, generator, 1.5)
    off = []
    for count in (100, 25):
        draws = [(torch.arange(count), torch.stack([towards[:count], away[:count]]))]
        ratio = reward.scores(pool, draws).first_order
        assert ratio is not None
        off.append(abs(ratio - 1))
    assert off[1] < 0.5 * off[0]
    assert off[1] < 0.1


def test_exact_rewards_have_no_ratio(
    pool: Pool, reference: FeatureStats, generator: torch.Generator
) -> None:
    reward = RewardSum([term(SubsetFrechet, 1.0, reference)])
    draws = [(torch.arange(5), features(10, generator).reshape(2, 5, DIM))]
    assert reward.scores(pool, draws).first_order is None


# ---------------------------------------------------------------------------------------- in runs


def test_the_warning_comes_once() -> None:
    watch = FirstOrderWatch()
    ratios = [1.0, None, 3.0, 3.0, 1.0, 1.5, 3.0, 3.0, 3.0, -1.0]
    said = [watch.add(ratio) for ratio in ratios]
    # After the seventh the last five are 3, 3, 1, 1.5, 3, and their median is beyond 2.
    assert [text is not None for text in said] == [i == 6 for i in range(10)]
    assert said[6] == (
        "exact rewards differ by 3 times what first-order ones say (median of 5 rounds), expected "
        "0.5 to 2: lower reward.subset_size, raise reward.pool_size, or name the exact form in "
        "reward.name (fid-subset)"
    )
    # A page made later says the same, from the events alone.
    assert first_order_warnings([{"first_order": ratio} for ratio in ratios]) == [said[6]]
    assert first_order_warnings([{}, {"first_order": 9.0}]) == []


def test_line_of_the_report() -> None:
    events: list[dict[str, Any]] = [
        {"first_order": 0.9},
        {},
        {"first_order": None},
        {"first_order": 1.1},
    ]
    assert first_order_line([{}]) == []
    assert first_order_line(events) == [
        "exact differences between candidates over first-order ones: median 1.00 [0.90, 1.10] of 2 "
        "rounds"
    ]


class Listener(NullTracker):
    """Keeps the texts of warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, event: Mapping[str, Any]) -> None:
        if event.get("kind") == "warning":
            self.texts.append(str(event["text"]))


def test_a_search_watches_itself(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every ratio is one to warn of, from the second round on.
    monkeypatch.setattr(first_order, "MEMORY", 2)
    monkeypatch.setattr(first_order, "LOW", math.inf)
    config = tiny_config(shared_tiny, budget=320, reward={"name": "fid-influence"})
    original = RunDir.append_event

    def stopping(self: RunDir, event: Mapping[str, Any]) -> None:
        if event["round"] == 3:
            raise KeyboardInterrupt
        original(self, event)

    monkeypatch.setattr(RunDir, "append_event", stopping)
    first, second = Listener(), Listener()
    with pytest.raises(KeyboardInterrupt):
        mrl.optimize(shared_tiny, out=tmp_path / "run", config=config, tracker=first)
    monkeypatch.setattr(RunDir, "append_event", original)
    mrl.resume(tmp_path / "run", tracker=second)
    assert len(first.texts) == 1
    assert first.texts[0].startswith("exact rewards differ by ")
    assert not second.texts

    events = RunDir.open(tmp_path / "run").events()
    assert len(events) > 3
    assert all(isinstance(event["first_order"], float) for event in events)
    page = text_of(tmp_path / "run")
    assert "- exact differences between candidates over first-order ones: median " in page
    assert f"**Warning**: {first.texts[0]}." in page
    # Nothing is said of rewards that are exact.
    plain = tiny_config(shared_tiny, budget=190, reward={"name": "fid-subset"})
    mrl.optimize(shared_tiny, out=tmp_path / "plain", config=plain)
    assert all("first_order" not in e for e in RunDir.open(tmp_path / "plain").events())
    assert "first-order" not in text_of(tmp_path / "plain")


def test_rounds_without_a_ratio_say_so(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def equal(_self: InfluenceFrechet, _pool: Pool, draws: Sequence[Subset]) -> Tensor:
        return torch.zeros(len(draws[0][1]), dtype=F64)

    monkeypatch.setattr(InfluenceFrechet, "rewards", equal)
    config = tiny_config(shared_tiny, reward={"name": "fid-influence"})
    mrl.optimize(shared_tiny, out=tmp_path / "run", config=config)
    events = RunDir.open(tmp_path / "run").events()
    assert events
    assert all(event["first_order"] is None for event in events)
    assert "first-order ones" not in text_of(tmp_path / "run")
