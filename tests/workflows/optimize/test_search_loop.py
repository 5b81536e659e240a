"""Rounds: what happens to failed candidates, a failed mean, a pool that lags, and the budget."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.config.optimize import OptimizeConfig
from merge_rl.errors import BudgetError, NonFiniteWeightsError
from merge_rl.interfaces import NullTracker, Searcher
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.storage.runs.run_dir import RunDir
from merge_rl.workflows.assembly.job import Job, build_job
from merge_rl.workflows.assembly.resolve import resolve_config
from merge_rl.workflows.optimize.rounds import DAMP, GAP_MEMORY, RECOVER, SearchLoop
from merge_rl.workflows.optimize.search import make_searcher
from merge_rl.workflows.rewards.frechet import Pool
from merge_rl.workflows.rewards.sum import RewardScores
from merge_rl.workflows.rollout.rollout import MergedRollout

TinyConfig = Callable[..., OptimizeConfig]
Fake = Callable[[int, Tensor, Tensor], Tensor]
"""(index of the call, noise (N, 1, 8, 8), labels (N,)) -> features (N, 64)."""

POOL, SUBSET, POPULATION = 40, 10, 4


class Steps:
    """A searcher whose mean goes from 0 to 1, 2, 3 ... in every theta, and which takes notes."""

    def __init__(self, dim: int) -> None:
        self.value = torch.zeros(dim, dtype=torch.float64)
        self.told: list[Tensor] = []
        self.damped: list[float] = []
        self.recentered: list[float] = []
        self.halved = 0

    @property
    def done(self) -> bool:
        return False

    @property
    def mean(self) -> Tensor:
        return self.value.clone()

    @property
    def finalists(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def halve(self) -> None:
        self.halved += 1

    def ask(self) -> Tensor:
        return self.value + torch.arange(POPULATION, dtype=torch.float64)[:, None] / 10

    def tell(self, thetas: Tensor, rewards: Tensor) -> None:
        self.told.append(rewards)
        self.value = self.value + 1

    def damp(self, factor: float) -> None:
        self.damped.append(factor)

    def recenter(self, theta: Tensor) -> None:
        self.recentered.append(float(theta[0]))
        self.value = theta.clone()

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": {"value": self.value}, "scalars": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["tensors"]["value"]


class Script:
    """A reward whose pool distances are read from a list, the last of them for ever after."""

    has_first_order = False

    def __init__(self, distances: Sequence[float]) -> None:
        self.distances = list(distances)

    def pool_distance(self, pool: Pool) -> float:
        return self.distances.pop(0) if len(self.distances) > 1 else self.distances[0]

    def scores(self, pool: Pool, draws: Sequence[tuple[Tensor, Tensor]]) -> RewardScores:
        # Nothing but the class a row had may come in its place.
        for rows, features in draws:
            assert bool((features[..., 1].long() == pool.labels[rows]).all())
        rewards = -torch.ones(len(draws[0][1]), dtype=torch.float64)
        return RewardScores(rewards, {"script": rewards})

    def state_dict(self, pool: Pool) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, pool: Pool, state: Mapping[str, Tensor]) -> None:
        pass


def marked(call: int, noise: Tensor, labels: Tensor) -> Tensor:
    """Features that tell where they came from: the call, the class, and noise."""
    features = noise.flatten(1).clone()
    features[:, 0], features[:, 1] = call, labels
    return features


@dataclasses.dataclass(frozen=True)
class Built:
    loop: SearchLoop
    job: Job
    run: RunDir
    calls: list[int]  # images of every rollout

    def play(self) -> list[dict[str, Any]]:
        self.loop.run()
        return self.run.events()

    @property
    def pool(self) -> Pool:
        assert self.loop.pool is not None
        return self.loop.pool


Build = Callable[..., Built]
"""(features=None, searcher=None, distances=None, **settings) -> a loop that has not begun."""


@pytest.fixture
def build(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Build:
    def make(
        features: Fake | None = None,
        searcher: Searcher | None = None,
        distances: Sequence[float] | None = None,
        **changes: Any,
    ) -> Built:
        opened = open_checkpoints(shared_tiny, track="raw")
        reward = {"pool_size": POOL, "subset_size": SUBSET, **changes.pop("reward", {})}
        config = resolve_config(tiny_config(shared_tiny, reward=reward, **changes), opened)
        job = build_job(config, opened)
        if distances is not None:
            built = dataclasses.replace(job.parts.reward, reward=Script(distances))  # type: ignore[arg-type]
            vars(job.parts)["reward"] = built
        calls: list[int] = []
        original = MergedRollout.features

        def counted(self: MergedRollout, c: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
            calls.append(len(noise))
            if features is None:
                return original(self, c, noise, labels)
            return features(len(calls) - 1, noise, labels)

        monkeypatch.setattr(MergedRollout, "features", counted)
        run = RunDir.create(tmp_path / "run", config, {})
        searcher = searcher or make_searcher(config, job)
        return Built(SearchLoop(config, job, searcher, run, NullTracker()), job, run, calls)

    return make


# ---------------------------------------------------------------------------- failed candidates


def spoil(*calls: int) -> Fake:
    """Marked features, of another spread at each call; one row of these calls is not finite."""

    def features(call: int, noise: Tensor, labels: Tensor) -> Tensor:
        made = marked(call, noise, labels)
        made[:, 2:] *= 1 + call % 7 / 10
        if call in calls:
            made[7] = torch.nan
        return made

    return features


def test_a_failed_candidate_is_data(build: Build) -> None:
    # Calls: 0 is the pool, then four candidates and a refresh a round. Candidates 1 of round 0 and
    # 0 and 3 of round 2 fail.
    built = build(spoil(2, 11, 14), budget=190)
    events = built.play()
    assert [event["failed"] for event in events] == [1, 0, 2]
    nulls = [[r is None for r in event["rewards"]] for event in events]
    assert nulls == [[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert not any(event.get("mean_failed") for event in events)
    assert built.loop.images == 190


def test_a_failed_candidate_ranks_last(build: Build) -> None:
    built = build(spoil(2), budget=90)
    (event,) = built.play()
    rewards = [r for r in event["rewards"] if r is not None]
    # The same update as if it had been as bad as the worst; another one if it had been the best.
    means = []
    for stand_in in (min(rewards), max(rewards)):
        searcher = make_searcher(built.loop.config, built.job)
        thetas = searcher.ask()
        assert thetas.tolist() == event["candidates"]
        told = [stand_in if r is None else r for r in event["rewards"]]
        searcher.tell(thetas, torch.tensor(told, dtype=torch.float64))
        means.append(searcher.mean.tolist())
    assert event["theta"] == means[0] != means[1]


def test_a_round_in_which_all_fail_teaches_nothing(build: Build) -> None:
    built = build(spoil(1, 2, 3, 4), budget=90)
    (event,) = built.play()
    assert event["failed"] == 4
    assert event["rewards"] == [None] * 4
    assert event["theta"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["fid-subset", "fid-full"])
def test_three_rounds_in_which_all_fail_end_the_search(kind: str, build: Build) -> None:
    # Round 0 is sound; in every later one all candidates fail, while refreshes stay sound.
    per_round = 5 if kind == "fid-subset" else 4
    first = 1 if kind == "fid-subset" else 0
    bad = [
        first + per_round * r + i for r in range(1, 9) for i in range(4)
    ]  # fmt: skip
    searcher = Steps(3)
    built = build(spoil(*bad), searcher, budget=1000, reward={"name": kind})
    events = built.play()
    assert [event["failed"] for event in events] == [0, 4, 4, 4]
    assert searcher.halved == 3
    assert built.loop.failed_rounds == 3
    # The mean of a round in which nothing was learnt is no news where nothing saw it.
    assert float(built.loop.result_theta[0]) == (4 if kind == "fid-subset" else 1)
    # What ended stays ended.
    again = SearchLoop(built.loop.config, built.job, Steps(3), built.run, NullTracker())
    again.run()
    assert len(built.run.events()) == 4


def test_a_sound_round_forgives_failed_ones(build: Build) -> None:
    searcher = Steps(3)
    built = build(spoil(*range(1, 5), *range(6, 10)), searcher, budget=190)
    assert [event["failed"] for event in built.play()] == [4, 4, 0]
    assert (searcher.halved, built.loop.failed_rounds) == (2, 0)


def test_large_coefficients_cost_what_l2_says(build: Build) -> None:
    # Script gives -1 to everyone; 10 of 40 rows: a quarter of 0.4 times the sum of squares.
    searcher = Steps(3)
    built = build(marked, searcher, distances=[8.0], budget=90, merge={"l2": 0.4})
    (event,) = built.play()
    thetas = torch.tensor(event["candidates"], dtype=torch.float64)
    squares = torch.stack([built.job.map(theta).square().sum() for theta in thetas])
    expected = -1 - 0.25 * 0.4 * squares
    assert event["rewards"] == pytest.approx(expected.tolist())
    assert len(set(event["rewards"])) == 4


def test_the_search_begins_where_it_is_told(build: Build) -> None:
    built = build(marked, Steps(3), distances=[8.0], budget=150)
    start = torch.full((3,), 0.25, dtype=torch.float64)
    loop = SearchLoop(
        built.loop.config, built.job, Steps(3), built.run, NullTracker(), start=start, spent=7,
        limit=110,
    )  # fmt: skip
    loop.run()
    (event,) = built.run.events()
    assert event["candidates"][0] == [0.25] * 3
    assert event["images"] == loop.images == 7 + 40 + 50
    assert float(loop.result_theta[0]) == 1.25


def test_without_a_pool_every_image_is_a_candidates(build: Build) -> None:
    reward = {"name": "fid-full"}
    built = build(budget=109, reward=reward)
    first, second = built.play()
    assert built.calls == [10] * 8
    assert built.loop.pool is None
    assert (first["images"], second["images"]) == (40, 80)
    assert first["pool_after"] is first["gap"] is None
    assert torch.equal(built.loop.result_theta, built.loop.searcher.mean)
    # The second round is a late one, and its rewards count by what they are above their mean.
    rewards = torch.tensor(second["rewards"], dtype=torch.float64)
    best = float(rewards.max() - rewards.mean())
    assert float(built.loop.incumbents.scores[0]) == pytest.approx(best)
    assert built.loop.incumbents.late.any()


@pytest.mark.parametrize(
    ("settings", "budget", "needed"),
    [({}, 89, 90), ({"reward": {"name": "fid-full"}}, 39, 40)],
    ids=["pool 40, 4 x 10, refresh 10", "4 x 10"],
)
def test_a_budget_below_one_round_is_refused(
    build: Build, settings: dict[str, Any], budget: int, needed: int
) -> None:
    built = build(budget=needed, **settings)
    message = rf"{budget} images .* with 4 candidates of 10 images: expected at least {needed}$"
    loop = SearchLoop(
        built.loop.config, built.job, Steps(3), built.run, NullTracker(), limit=budget
    )
    with pytest.raises(BudgetError, match=message):
        loop.run()
    assert built.calls == []  # nothing was generated,
    assert not built.run.state_path.exists()  # and nothing saved


def test_a_map_that_fails_is_a_failed_candidate(build: Build) -> None:
    # With the real network: coefficients of NaN give weights of NaN and samples of NaN.
    class Broken:
        """The job's map, except that a positive first theta has no coefficients."""

        def __init__(self, job: Job) -> None:
            self.inner, self.dim, self.num_groups = job.map, job.map.dim, job.map.num_groups

        def __call__(self, theta: Tensor) -> Tensor:
            rows = self.inner(theta)
            return rows * torch.nan if float(theta[0]) > 0 else rows

    built = build(budget=90)
    job = dataclasses.replace(built.job, map=Broken(built.job))  # type: ignore[arg-type]
    built.loop.job = job
    (event,) = built.play()
    expected = [theta[0] > 0 for theta in event["candidates"]]
    assert [reward is None for reward in event["rewards"]] == expected
    assert event["failed"] == 2  # antithetic pairs
    assert event["theta"][0] < 0
    assert bool(built.pool.features.isfinite().all())


def test_a_start_that_fails_is_refused(build: Build) -> None:
    built = build(spoil(0), budget=90)
    with pytest.raises(NonFiniteWeightsError, match="starting point.*choose another with --start"):
        built.play()
    assert built.calls == [POOL]


# -------------------------------------------------------------------------------- a failed mean


def test_a_mean_that_fails_never_becomes_the_result(build: Build) -> None:
    # Refreshes are calls 5, 10, 15, 20; those of rounds 1 and 2 fail.
    searcher = Steps(3)
    built = build(spoil(10, 15), searcher, budget=240)
    events = built.play()
    assert [event.get("mean_failed", False) for event in events] == [False, True, True, False]
    # The mean of round 0 was 1; rounds 1 and 2 try 2 and go back to it; round 3 tries 2 again.
    assert [event["theta"][0] for event in events] == [1, 1, 1, 2]
    assert searcher.recentered == [1, 1]
    assert searcher.damped == [RECOVER, DAMP, DAMP, RECOVER]
    assert float(built.loop.result_theta[0]) == 2
    # What failed left the pool as it was, but was generated and counts.
    assert [event["refreshed"] for event in events] == [10, 0, 0, 10]
    for event in events[1:3]:
        assert event["gap"] is None
        assert event["pool_after"] == event["pool_before"]
    assert [event["images"] for event in events] == [90, 140, 190, 240]
    assert built.loop.images == sum(built.calls)
    assert bool(built.pool.features.isfinite().all())


def test_the_result_is_the_start_if_no_mean_is_finite(build: Build) -> None:
    built = build(spoil(5, 10), Steps(3), budget=140)
    events = built.play()
    assert [event["theta"][0] for event in events] == [0, 0]
    assert built.loop.result_theta.tolist() == [0, 0, 0]


# -------------------------------------------------------------------------------- pool and gap


def test_rows_are_renewed_round_robin(build: Build) -> None:
    # 15 of 40 rows a round: 0-14, 15-29, 30-39 and 0-4, 5-19. A row is marked with its call.
    reward = {"refresh_size": 15}
    built = build(marked, distances=[8.0], budget=40 + 4 * 55, reward=reward)
    events = built.play()
    assert len(events) == 4
    refreshes = [5, 10, 15, 20]
    expected = torch.tensor([15] * 5 + [20] * 15 + [10] * 10 + [15] * 10)
    assert set(refreshes) == {5, *expected.tolist()}
    assert torch.equal(built.pool.features[:, 0].long(), expected)
    assert built.loop.cursor == 20


@pytest.mark.parametrize("refresh", ["rolling", "1", "3"])
def test_classes_stay_balanced(build: Build, refresh: str) -> None:
    built = build(marked, distances=[8.0], budget=420, reward={"refresh": refresh})
    built.play()
    labels = built.pool.labels
    assert torch.bincount(labels).tolist() == [4] * 10
    assert torch.equal(built.pool.features[:, 1].long(), labels)


def test_the_whole_pool_every_other_round(build: Build) -> None:
    # 40 for the pool, 40 a round, 40 for the refresh after rounds 1 and 3: four rounds cost 280,
    # and 319 do not pay for a fifth.
    reward = {"refresh": "2"}
    built = build(marked, distances=[8.0], budget=319, reward=reward)
    events = built.play()
    assert [event["refreshed"] for event in events] == [0, 40, 0, 40]
    assert [event["gap"] for event in events] == [None, 0.0, None, 0.0]
    assert [event["images"] for event in events] == [80, 160, 200, 280]
    assert built.calls == [40, *[10] * 8, 40, *[10] * 8, 40]
    assert set(built.pool.features[:, 0].tolist()) == {18.0}


def test_between_whole_refreshes_the_result_is_the_last_mean(build: Build) -> None:
    searcher = Steps(3)
    built = build(marked, searcher, distances=[8.0], budget=320, reward={"refresh": "2"})
    events = built.play()
    assert len(events) == 5
    assert events[-1]["theta"] == [5.0] * 3
    # It has made no images yet; candidates around it have.
    assert built.loop.result_theta.tolist() == [5.0] * 3


# Distances of 10 before and 13 after a quarter of the pool is renewed: a gap of 3 / (10 / 4) = 1.2,
# which moves the running mean from 0 to this.
ONE_GAP = (1 - GAP_MEMORY) * 1.2


def test_a_gap_is_acted_on_twice(build: Build) -> None:
    # 14 once ten more are renewed. Then 14 and 14: no gap.
    searcher = Steps(3)
    reward = {"max_gap": ONE_GAP - 0.01}
    built = build(marked, searcher, [10.0, 13.0, 14.0, 14.0], budget=150, reward=reward)
    first, second = built.play()
    assert first["gap"] == pytest.approx(1.2)
    assert first["gap_mean"] == pytest.approx(ONE_GAP)
    assert (first["pool_before"], first["pool_after"]) == (10.0, 14.0)
    assert (first["refreshed"], first["damped"], first["images"]) == (20, True, 100)
    # Acting on a gap settles it: the mean begins again at 0.
    assert (second["gap"], second["gap_mean"]) == (0.0, 0.0)
    assert (second["refreshed"], second["images"]) == (10, 150)
    assert "damped" not in second
    assert searcher.damped == [DAMP, RECOVER]
    assert DAMP < 1 < RECOVER
    # Both renewals are of other rows and of other noise, at the same mean.
    calls = torch.tensor([5, 6, 11, 0]).repeat_interleave(10)
    assert torch.equal(built.pool.features[:, 0].long(), calls)
    assert len(torch.unique(built.pool.features[:20, 2:], dim=0)) == 20
    assert built.loop.result_theta.tolist() == [2.0] * 3


def test_small_gaps_add_up(build: Build) -> None:
    searcher = Steps(3)
    twice = GAP_MEMORY * ONE_GAP + ONE_GAP
    reward = {"max_gap": (ONE_GAP + twice) / 2}
    distances = [10.0, 13.0, 10.0, 13.0, 10.0]
    built = build(marked, searcher, distances, budget=150, reward=reward)
    first, second = built.play()
    assert [first["gap_mean"], second["gap_mean"]] == pytest.approx([ONE_GAP, twice])
    assert "damped" not in first
    assert second["damped"] is True
    assert searcher.damped == [RECOVER, DAMP]


def test_a_gap_just_allowed_is_not_acted_on(build: Build) -> None:
    searcher = Steps(3)
    reward = {"max_gap": ONE_GAP + 0.01}
    built = build(marked, searcher, [10.0, 13.0], budget=90, reward=reward)
    (event,) = built.play()
    assert event["gap"] == pytest.approx(1.2)
    assert event["refreshed"] == 10
    assert searcher.damped == [RECOVER]


def test_a_second_renewal_needs_budget(build: Build) -> None:
    searcher = Steps(3)
    built = build(marked, searcher, [10.0, 13.0, 99.0], budget=99, reward={"max_gap": 1e-3})
    (event,) = built.play()
    assert (event["refreshed"], event["pool_after"], event["images"]) == (10, 13.0, 90)
    assert event["damped"] is True
    assert searcher.damped == [DAMP]


def test_a_second_renewal_may_fail(build: Build) -> None:
    # The first ten images of the mean 1 are finite, one of the next ten is not: back to 0.
    searcher = Steps(3)
    built = build(spoil(6), searcher, [10.0, 13.0], budget=100, reward={"max_gap": 1e-3})
    (event,) = built.play()
    assert (event["refreshed"], event["images"]) == (10, 100)
    assert (event["damped"], event["mean_failed"]) == (True, True)
    assert searcher.damped == [DAMP]
    assert searcher.recentered == [0.0]
    assert event["theta"] == built.loop.result_theta.tolist() == [0.0] * 3
    assert bool(built.pool.features.isfinite().all())


@pytest.mark.parametrize("max_gap", [1e-6, 1e9])
@pytest.mark.parametrize("refresh", ["rolling", "1", "2"])
def test_the_budget_is_never_exceeded(build: Build, refresh: str, max_gap: float) -> None:
    # Distances that grow make every refresh open a gap.
    growing = [1.1**i for i in range(100)]
    reward = {"refresh": refresh, "max_gap": max_gap}
    built = build(marked, distances=growing, budget=433, reward=reward)
    events = built.play()
    assert sum(built.calls) == built.loop.images == events[-1]["images"] <= 433
    costs = [b["images"] - a["images"] for a, b in itertools.pairwise(events)]
    assert costs == [40 + event["refreshed"] for event in events[1:]]
    # Another round would not have been paid for.
    index = len(events)
    due = {"rolling": 10, "1": 40, "2": 40 if index % 2 else 0}[refresh]
    assert built.loop.images + 40 + due > 433


def test_the_loop_goes_on_from_its_resume_point(build: Build) -> None:
    built = build(budget=140)
    built.play()
    saved = built.run.load_state()
    assert saved is not None
    fresh = SearchLoop(
        dataclasses.replace(built.loop.config, budget=190),
        built.job, make_searcher(built.loop.config, built.job), built.run, NullTracker(),
    )  # fmt: skip
    del built.calls[:]
    fresh.run()
    assert built.calls == [10] * 5  # no second pool
    assert [event["round"] for event in built.run.events()] == [0, 1, 2]
    assert fresh.images == 190
    assert math.isfinite(built.run.events()[-1]["pool_after"])
