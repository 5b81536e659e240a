"""Merges that cost no search, and how the best of them is found."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.core.merging.ema_profiles import posthoc_coefficients
from merge_rl.core.merging.maps import make_map
from merge_rl.errors import BudgetError
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet, open_checkpoints
from merge_rl.workflows.evaluate.score_store import Request
from merge_rl.workflows.optimize.budget import (
    Optimism,
    Rung,
    look_again,
    plan_budget,
    ranked,
    run_tournament,
)
from merge_rl.workflows.optimize.search import free_starts
from merge_rl.workflows.optimize.state import BestSoFar, candidate_scores

pytestmark = pytest.mark.usefixtures("no_network_here")

TinyConfig = Callable[..., OptimizeConfig]
F64 = torch.float64


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def starts(
    checkpoints: CheckpointSet, kind: str = "affine", most: int = 16, **options: Any
) -> dict[str, Tensor]:
    count = len(checkpoints)
    init = torch.eye(count, dtype=F64)[checkpoints.newest]
    chosen = make_map(
        kind, num_checkpoints=count, base=checkpoints.newest, scale=0.1, init=init, **options
    )
    return free_starts(checkpoints, chosen, most)


def test_averages_of_a_plain_track(shared_tiny: Path) -> None:
    opened = open_checkpoints(shared_tiny, track="raw")
    found = starts(opened)
    assert [(label, rows[0].tolist()) for label, rows in found.items()] == [
        ("newest", [0, 0, 0, 1]),
        ("average of 2 newest", [0, 0, 0.5, 0.5]),
        ("average of 4 newest", [0.25] * 4),
        (opened.names[2], [0, 0, 1, 0]),
        (opened.names[1], [0, 1, 0, 0]),
        (opened.names[0], [1, 0, 0, 0]),
    ]
    assert list(starts(opened, most=4)) == list(found)[:4]


def test_profiles_of_an_ema_track(shared_tiny: Path) -> None:
    opened = open_checkpoints(shared_tiny, track="ema")
    found = starts(opened)
    profiles = {label: rows for label, rows in found.items() if label.startswith("EMA")}
    assert len(profiles) >= 3
    nimg = [float(n or 0) for n in opened.nimg]
    widths = [float(w or 0) for w in opened.ema_std]
    for label, rows in profiles.items():
        wanted = posthoc_coefficients(nimg, widths, [max(nimg)], [float(label.split()[1])])
        torch.testing.assert_close(rows[0], wanted[:, 0])


def test_tracks_of_a_mixed_set_are_averaged_apart(shared_tiny: Path) -> None:
    opened = open_checkpoints(shared_tiny)
    found = starts(opened)
    assert {"newest of raw", "average of 4 newest of raw", "average of 4 newest of ema"} < set(
        found
    )
    # Few are of all tracks: which of them the best start is of is not known before.
    assert list(starts(opened, most=4)) == [
        "newest", "newest of raw", "average of 2 newest of raw", "average of 2 newest of ema",
    ]  # fmt: skip
    raw = found["average of 4 newest of raw"][0]
    chosen = [e.track for e, c in zip(opened.entries, raw.tolist(), strict=True) if c]
    assert chosen == ["raw"] * 4


def test_what_the_map_cannot_reach_is_left_out(shared_tiny: Path) -> None:
    opened = open_checkpoints(shared_tiny, track="ema")
    profile = starts(opened, "ema", nimg=[int(n or 0) for n in opened.nimg], ema_std=opened.ema_std)
    assert list(profile) == ["newest"]
    assert "average of 2 newest" not in starts(opened, "softmax")  # zeros


def test_every_group_starts_alike(shared_tiny: Path) -> None:
    opened = open_checkpoints(shared_tiny, track="raw")
    found = starts(opened, num_groups=2)
    assert found["average of 4 newest"].shape == (2, 4)


# ------------------------------------------------------------------------------------ the choice


class Scores:
    """Stands for the store: FID by label and rung, and the seeds that were asked for."""

    def __init__(
        self, table: dict[str, list[float]], second: dict[str, list[float]] | None = None
    ) -> None:
        self.table, self.others, self.asked = table, second or {}, []  # type: ignore[var-annotated]

    def second(self, key: str) -> float:
        _, rung, label = key.split("/")
        return self.others[label][int(rung)]

    def get_all(self, requests: list[Request]) -> list[dict[str, float]]:
        found = []
        for request in requests:
            _, rung, label = request.key.split("/")
            self.asked.append((label, request.count, request.stream))
            found.append({"reference": self.table[label][int(rung)]})
        return found


def test_the_better_half_goes_on() -> None:
    entries = {label: torch.zeros(1, 2) for label in "abc"}
    # a is best at first, and worse than c on other seeds; b fails.
    scores = Scores({"a": [1.0, 3.0], "b": [math.nan, 0.0], "c": [2.0, 2.5]})
    winner = run_tournament("final", entries, (Rung(3, 10), Rung(2, 15)), scores)  # type: ignore[arg-type]
    assert (winner.label, winner.score, winner.images_each, winner.images) == ("c", 2.5, 15, 60)
    assert scores.asked == [
        ("a", 10, ("final", 0)), ("b", 10, ("final", 0)), ("c", 10, ("final", 0)),
        ("a", 15, ("final", 1)), ("c", 15, ("final", 1)),
    ]  # fmt: skip
    assert winner.as_dict()["rungs"][0] == {"a": 1.0, "b": None, "c": 2.0}


def test_the_finalist_has_the_best_mean_rank() -> None:
    # Ranks in the first rung: a 0 + 3, b 1 + 1, c 2 + 2, d 3 + 0: b goes on, and of the others,
    # which are 3, 4, 3, a, whose FID is the lower one. Then both lead in one metric: FID decides.
    entries = {label: torch.zeros(1, 2) for label in "abcd"}
    scores = Scores(
        {"a": [1, 1.5], "b": [2, 1.4], "c": [3, 0], "d": [4, 0]},
        {"a": [9, 5.0], "b": [7, 6.0], "c": [8, 0], "d": [6, 0]},
    )
    rungs = (Rung(4, 10), Rung(2, 20))
    found = run_tournament("final", entries, rungs, scores, second=True)  # type: ignore[arg-type]
    assert list(found.rungs[1]) == ["b", "a"]
    assert (found.label, found.score) == ("b", 1.4)
    assert found.as_dict()["second_rungs"] == [{"a": 9, "b": 7, "c": 8, "d": 6}, {"b": 6, "a": 5}]
    nan = math.nan
    assert ranked([{"a": nan, "b": 2.0, "c": 1.0}, {"a": 0.0, "b": 1.0, "c": nan}]) == list("bca")


def test_without_a_look_the_first_entry_wins() -> None:
    entries = {"mean": torch.zeros(1, 2), "start": torch.ones(1, 2)}
    winner = run_tournament("final", entries, (), Scores({}))  # type: ignore[arg-type]
    assert (winner.label, winner.score, winner.images) == ("mean", None, 0)


# ------------------------------------------------------------------------------------ the budget


def test_the_budget_is_divided(shared_tiny: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(
        shared_tiny, budget=20_000, reward={"name": "fid-subset", "pool_size": 1000},
        search={"start_share": 0.1, "final_share": 0.2},
    )  # fmt: skip
    plan = plan_budget(config, 4)
    # 2,000 images on 4, then 2 starts; 4,000 kept for 7 finalists: 190 each at first.
    assert plan.start == ((4, 250), (2, 500))
    assert (plan.final, plan.limit, plan.pool) == (4000, 16_000, 1000)
    # A round: 4 candidates of 10 images and 10 renewed.
    assert plan.round == 50
    assert plan.rounds == (16_000 - 2000 - 1000) // 50
    # Shares that pay for too little are left to the rounds.
    plan = plan_budget(dataclasses.replace(config, budget=3900), 4)
    assert (plan.start, plan.final, plan.limit) == ((), 780 * 0, 3900)
    with pytest.raises(BudgetError, match=r"the pool of 1000 \(--pool\).* expected at least 1050$"):
        plan_budget(dataclasses.replace(config, budget=1049), 4)


def test_the_start_is_found_and_the_result_chosen(
    tiny: Path, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = tiny_config(
        tiny, budget=3000, merge={"start": "auto"}, reward={"name": "fid-subset"},
        search={"start_share": 0.3, "final_share": 0.4, "incumbents": 1},
    )  # fmt: skip
    found = mrl.optimize(tiny, out=tmp_path / "run", config=config).found
    assert found.images <= 3000
    assert [len(rung) for rung in found.beginning.rungs] == [4, 2]  # 900 images pay for four
    best = min(found.beginning.rungs[1], key=lambda label: found.beginning.rungs[1][label])
    assert found.start_label == best
    # Policy mean, running average, start and one incumbent.
    assert set(found.choice.rungs[0]) == {"mean", "average", "start", "incumbent 1"}
    document = found.as_dict()["final"]
    assert document["chosen"] == found.choice.label
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    fresh = [[scores[f"optimism/{i}/{name}"]["reference"] for i in range(3)]
             for name in ("result", "start")]  # fmt: skip
    lead = document["score"] - scores["final/1/start"]["reference"]
    # Leads over the start on the same seeds, before and after.
    expected = lead - sum(a - b for a, b in zip(*fresh, strict=True)) / 3
    assert document["optimism"] == pytest.approx(expected)
    assert document["fresh_score"] == pytest.approx(sum(fresh[0]) / 3)


def test_optimism_is_told_from_chance() -> None:
    # Leads of -1, -2, -3 on fresh seeds: mean -2, standard deviation 1. On those of the choice -5.
    found = Optimism.of(-5.0, [4.0, 4.0, 4.0], [5.0, 6.0, 7.0])
    assert (found.fresh_score, found.mean) == (4.0, -3.0)
    # A single lead among these: t_2 (4.3027) times sqrt(1 + 1/3).
    half = 4.302652729749464 * math.sqrt(4 / 3)
    assert (found.low, found.high) == pytest.approx((-3 - half, -3 + half))
    # What moves both scores of a set of seeds is no optimism.
    moved = Optimism.of(-5.0, [14.0, 4.0, -6.0], [15.0, 6.0, -3.0])
    assert (moved.mean, moved.low) == pytest.approx((found.mean, found.low))


def test_the_start_cannot_flatter_itself() -> None:
    start = torch.zeros(1, 2)
    winner = run_tournament("final", {"mean": start}, (), Scores({}))  # type: ignore[arg-type]
    assert look_again(winner, start + 1, start, Scores({})) is None  # type: ignore[arg-type]
    chosen = dataclasses.replace(winner, score=1.0, images_each=10)
    assert look_again(chosen, start, start, Scores({})) is None  # type: ignore[arg-type]


# -------------------------------------------------------------------------------- the incumbents


def test_incumbents_compare_across_pools() -> None:
    # A tenth of a pool of distance 5 replaced: R = -4.9 tells of a candidate of 4, to first order.
    rewards = column(-4.9, math.nan, -5.1)
    scores = candidate_scores(rewards, 5.0, 0.1, relative=False)
    torch.testing.assert_close(scores, column(-4.0, math.nan, -6.0), equal_nan=True)
    # In a better pool -3.05 is a candidate of 3.5, which beats both; -3.2 is one of 5.
    better = candidate_scores(column(-3.2, -3.05), 3.0, 0.1, relative=False)
    torch.testing.assert_close(better, column(-5.0, -3.5))
    # Without a pool a reward is the score, and alone in its round it stays so.
    for relative in (False, True):
        assert candidate_scores(column(-7), None, 1.0, relative=relative).tolist() == [-7.0]


def test_a_lucky_round_makes_no_incumbents() -> None:
    # The seeds of one round moved all of its rewards by 10: within it, the third is the best by
    # (4.8 - 4) / 0.1 = 8, which no shift of the round changes.
    rewards = column(-6, math.nan, -2, -4)
    plain = candidate_scores(rewards, 5.0, 0.25, relative=True)
    torch.testing.assert_close(plain, column(-8, math.nan, 8, 0), equal_nan=True)
    lucky = candidate_scores(rewards + 10, 5.0, 0.25, relative=True)
    torch.testing.assert_close(lucky, plain, equal_nan=True)


def test_incumbents_are_the_best_of_late_rounds() -> None:
    thetas = column(1, 2, 3)[:, None]
    early = BestSoFar.empty(1, 2).with_round(thetas, column(9, math.nan, 8), late=False)
    assert early.thetas.flatten().tolist() == [1.0, 3.0]
    # Drawn about an early mean and widely: whatever they scored, a late candidate is ahead.
    late = early.with_round(thetas[1:2], column(-5), late=True)
    assert late.thetas.flatten().tolist() == [2.0, 1.0]
    late = late.with_round(thetas[2:] + 1, column(-4), late=True)
    assert late.thetas.flatten().tolist() == [4.0, 2.0]
    assert late.scores.tolist() == [-4.0, -5.0]
    same = early.restored(late.state_dict())
    assert torch.equal(same.thetas, late.thetas)
    assert same.late.tolist() == [True, True]


def test_a_saved_state_without_rounds_holds_early_incumbents() -> None:
    kept = BestSoFar.empty(1, 2).with_round(column(1)[:, None], column(9), late=True)
    before = {k: v for k, v in kept.state_dict().items() if k != "incumbents.late"}
    assert kept.restored(before).late.tolist() == [False]
