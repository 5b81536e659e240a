"""Rounds of ask, evaluate, tell, with an on-policy pool and a resume point after each."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from merge_rl.config import OptimizeConfig, without_nan
from merge_rl.core.merging.tuned_map import setup_of
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.errors import NonFiniteWeightsError, StatisticsError
from merge_rl.interfaces import Searcher, Tracker
from merge_rl.rng import draw_subset, image_seeds, stream
from merge_rl.storage.runs import RunDir, fitting
from merge_rl.workflows.assembly import Job
from merge_rl.workflows.optimize.budget import require_paid
from merge_rl.workflows.optimize.state import BestSoFar, HeldOutCurve, SearchState, candidate_scores
from merge_rl.workflows.rewards import KEY as FIRST_ORDER
from merge_rl.workflows.rewards import FirstOrderWatch, Pool, RewardScores, pool_gap, term_means
from merge_rl.workflows.rollout import Failures, WorkItem

DAMP, RECOVER = 0.7, 1.15  # what a gap does to the step, and how it comes back
FAILED_ROUNDS = 3  # running, in which every candidate fails, end a search
GAP_MEMORY = 0.7  # of the running mean: one refresh alone is mostly chance


class SearchLoop:
    """The search of one run: owns pool, searcher and counters; saves all of them every round.

    It begins at `start` with `spent` images used, and no round begins that would take it beyond
    `limit`, the search's whole budget if not said. Rewards that score a candidate's own images
    alone need no pool, and make none.

    The pool holds images of the policy mean: rows are renewed round robin (or all, every k rounds),
    so that it follows the policy.
    """

    def __init__(
        self,
        config: OptimizeConfig,
        job: Job,
        searcher: Searcher,
        run: RunDir,
        tracker: Tracker,
        *,
        start: Tensor | None = None,
        spent: int = 0,
        limit: int | None = None,
    ) -> None:
        self.config, self.job, self.searcher = config, job, searcher
        self.run_dir, self.tracker, self.reward = run, tracker, job.reward
        self.limit = config.search_budget if limit is None else limit
        self.cursor = self.failed_rounds = 0
        self.images = spent
        self._begin(0)
        self.gap_mean = 0.0
        self.first_order, self.held_out = FirstOrderWatch(), HeldOutCurve(job)
        if start is not None:
            searcher.recenter(start)
        self.result_theta = searcher.mean  # the last one that is not known to fail
        self.incumbents = BestSoFar.empty(job.map.dim, config.search.incumbents)
        self.pool: Pool | None = None
        job.rollout.rollout.on_images = tracker.advance

    def run(self) -> None:
        """From the resume point, or the beginning, until the budget is used up."""
        if not self.searcher.done:  # what asks nothing makes no images
            self.tracker.phase("search", self.limit)
        with fitting(self.run_dir.state_path, "resume point"):
            begun = self._restore()
        self.tracker.advance(self.images)
        if not begun:
            if not self.searcher.done:
                asked = len(self.searcher.ask())
                needed = self.images + self._round_cost(asked)
                require_paid(self.config, asked, needed, self.limit)
            if self._needs_pool():
                self._first_pool()
            self._save()
        while self.failed_rounds < FAILED_ROUNDS and not self.searcher.done:
            thetas = self.searcher.ask()
            if self.images + self._round_cost(len(thetas)) > self.limit:
                break
            self._round(thetas)
        if self.failed_rounds >= FAILED_ROUNDS:
            text = f"all candidates failed in {FAILED_ROUNDS} rounds running: the search ends early"
            self.tracker.event({"kind": "warning", "text": text})

    def _begin(self, round_index: int) -> None:
        """Begin a round, after which `renewed` rows of the pool are generated again."""
        self.round_index, reward = round_index, self.config.reward
        self.renewed = reward.refresh_images(round_index) if reward.pooled else 0

    def _round_cost(self, candidates: int) -> int:
        return candidates * self.config.reward.images_per_candidate + self.renewed

    def _generate(self, theta: Tensor, labels: Tensor, *names: str | int) -> Tensor:
        """Features of images at theta; the noise comes from the stream called `names`."""
        seeds = image_seeds(len(labels), self.config.seed, *names, rules=self.config.rules)
        self.images += len(labels)
        item = WorkItem(self.job.map(theta), seeds, labels)
        return self.job.rollout.features_of([item], " ".join(map(str, names)))[0]

    def _needs_pool(self) -> bool:
        """Whether the reward replaces rows of a pool, and candidates are rewarded at all."""
        return self.config.reward.pooled and not self.searcher.done

    def _first_pool(self) -> None:
        labels = balanced_labels(self.config.reward.pool_size, self.job.num_classes)
        features = self._generate(self.searcher.mean, labels, "pool")
        if failures := Failures.of(features):
            name = self.job.rollout.rollout.extractor.name
            said = f"no score of the starting point: {failures.said(name)}"
            if failures.features:
                raise StatisticsError(said)
            raise NonFiniteWeightsError(f"{said}; choose another with --start")
        self.pool = Pool.of(features, labels)

    def _round(self, thetas: Tensor) -> None:
        began, sampled = time.monotonic(), self.job.rollout.seconds
        scored = score_candidates(self.job, self.pool, thetas, self.config, self.round_index)
        reward, first_order = self.config.reward, scored.first_order
        self.images += len(thetas) * reward.images_per_candidate
        rewards = scored.rewards - penalties(self.job, thetas, self.config)
        self.searcher.tell(thetas, rewards)
        before = self.reward.pool_distance(self._pool) if reward.pooled else None
        share = reward.images_per_subset / len(self._pool) if reward.pooled else 1.0
        told = self.config.rules > 1
        scores = candidate_scores(rewards, before, share, relative=told)
        late = told and 2 * self.images > self.limit
        self.incumbents = self.incumbents.with_round(thetas, scores, late=late)
        self._note_failures(rewards)
        refresh = self._refresh(before) if before is not None else self._no_refresh()
        event = {
            "kind": "round",
            "round": self.round_index,
            "theta": self.searcher.mean.tolist(),
            **setup_of(self.job.map, self.job.map(self.searcher.mean)).as_dict(),
            "candidates": thetas.tolist(),
            "rewards": without_nan(rewards.tolist()),
            **({"terms": term_means(scored.terms)} if len(scored.terms) > 1 else {}),
            **({FIRST_ORDER: first_order} if self.reward.has_first_order else {}),
            "failed": int(rewards.isnan().sum()),
            "pool_before": before,
            "distance": reward.distance,
            **refresh,
            **self.held_out.of(self.pool),
            "images": self.images,
            "seconds": time.monotonic() - began,
            "rollout_seconds": self.job.rollout.seconds - sampled,
        }
        self.run_dir.append_event(event)
        self._begin(self.round_index + 1)
        self._save()
        self.tracker.event(event)
        if (doubt := self.first_order.add(first_order)) is not None:
            self.tracker.event({"kind": "warning", "text": doubt})

    def _note_failures(self, rewards: Tensor) -> None:
        if bool(rewards.isnan().all()):
            self.searcher.halve()
            self.failed_rounds += 1
        else:
            self.failed_rounds = 0

    def _no_refresh(self) -> dict[str, Any]:
        """Fields of a round without refresh; its mean is the result unless all candidates fail."""
        if self.failed_rounds == 0:
            self.result_theta = self.searcher.mean
        return {"pool_after": None, "gap": None, "refreshed": 0}

    @property
    def _pool(self) -> Pool:
        if self.pool is None:  # pragma: no cover (run() makes it first)
            raise RuntimeError("no pool yet")
        return self.pool

    def _refresh(self, before: float) -> dict[str, Any]:
        """Renew rows at the new policy mean, measure the gap, act on it; for the event."""
        if not (count := self.renewed):
            return {**self._no_refresh(), "pool_after": before}
        after, previous = self._renew(count, 0), self.result_theta
        if after is None:
            self.searcher.recenter(previous)
            self.searcher.damp(DAMP)
            return {"pool_after": before, "gap": None, "refreshed": 0, "mean_failed": True}
        self.result_theta = self.searcher.mean
        gap = pool_gap(before, after, count / len(self._pool))
        self.gap_mean = GAP_MEMORY * self.gap_mean + (1 - GAP_MEMORY) * gap
        seen = {"gap": gap, "gap_mean": self.gap_mean}
        if self.gap_mean <= self.config.reward.max_gap:
            self.searcher.damp(RECOVER)
            return {"pool_after": after, "refreshed": count, **seen}
        # The pool looks better than the policy is: step less, and renew as much again if there
        # is budget, so that the next round is measured against what the policy makes now.
        self.searcher.damp(DAMP)
        self.gap_mean = 0.0
        if self.images + count <= self.limit:
            again = self._renew(count, 1)
            if again is None:
                self.searcher.recenter(previous)
                self.result_theta = previous
                failed = {"damped": True, "mean_failed": True}
                return {"pool_after": after, "refreshed": count, **failed, **seen}
            after, count = again, 2 * count
        return {"pool_after": after, "refreshed": count, "damped": True, **seen}

    def _renew(self, count: int, part: int) -> float | None:
        """Replace the `count` oldest rows; the pool's distance after it, None if not finite."""
        rows = (torch.arange(count) + self.cursor) % len(self._pool)
        labels = self._pool.labels[rows]
        features = self._generate(self.searcher.mean, labels, "refresh", self.round_index, part)
        if not bool(features.isfinite().all()):
            return None
        self.cursor = (self.cursor + count) % len(self._pool)
        self.pool = self._pool.replaced(rows, features)
        return self.reward.pool_distance(self.pool)

    def _save(self) -> None:
        SearchState(
            round_index=self.round_index,
            images=self.images,
            cursor=self.cursor,
            gap_mean=self.gap_mean,
            failed_rounds=self.failed_rounds,
            result_theta=self.result_theta,
            incumbents=self.incumbents,
            searcher=self.searcher.state_dict(),
            pool=self.pool,
            reward=self.reward.state_dict(self.pool) if self.pool is not None else {},
        ).save(self.run_dir)

    def _restore(self) -> bool:
        """Whether there was a resume point to go on from."""
        pooled = self._needs_pool()  # of the searcher as it was at first
        saved = SearchState.load(self.run_dir, self.incumbents, pooled=pooled)
        if saved is None:
            self.run_dir.keep_events_before(0)
            return False
        self._begin(saved.round_index)
        self.images = saved.images
        self.cursor, self.gap_mean = saved.cursor, saved.gap_mean
        self.failed_rounds, self.result_theta = saved.failed_rounds, saved.result_theta
        self.incumbents, self.pool = saved.incumbents, saved.pool
        if self.pool is not None:
            self.reward.load_state_dict(self.pool, saved.reward)
        self.searcher.load_state_dict(dict(saved.searcher))
        self.run_dir.keep_events_before(self.round_index)
        for event in self.run_dir.events():
            self.first_order.add(event.get(FIRST_ORDER))
        return True


def score_candidates(
    job: Job, pool: Pool | None, thetas: Tensor, config: OptimizeConfig, index: int
) -> RewardScores:
    """Rewards (P,) of thetas (P, D) in round `index`, higher is better, NaN for those that failed.

    P `config.reward.images_per_candidate` images are made.
    """
    reward, seed, draws = config.reward, config.seed, []
    for s in range(reward.num_subsets):
        rows = _rows(pool, reward.images_per_subset, seed, index, s)
        for r in range(reward.num_replacements):
            seeds = image_seeds(len(rows), seed, "round", index, s, r, rules=config.rules)
            draws.append((rows, seeds))
    candidates = [job.map(theta) for theta in thetas]
    classes = max(job.num_classes, 1)  # which take turns, as in the pool
    items = [WorkItem(c, seeds, rows % classes) for c in candidates for rows, seeds in draws]
    made = job.rollout.features_of(items, f"round {index}")
    # All candidates at once: most of what a distance costs is the same for all of them.
    scored = [(rows, torch.stack(made[i :: len(draws)])) for i, (rows, _) in enumerate(draws)]
    return job.reward.scores(pool, scored)


def penalties(job: Job, thetas: Tensor, config: OptimizeConfig) -> Tensor:
    """What large coefficients cost each candidate, (P,), in units of its reward.

    `merge.l2` is in FID: where a candidate moves a part of the pool alone, it counts for that part.
    """
    reward, l2 = config.reward, config.merge.l2
    if l2 == 0:
        return torch.zeros(len(thetas), dtype=torch.float64)
    share = reward.images_per_subset / reward.pool_size if reward.pooled else 1.0
    rows = torch.stack([setup_of(job.map, job.map(theta)).coefficients for theta in thetas])
    return l2 * share * rows.square().sum(2).mean(1)


def _rows(pool: Pool | None, count: int, seed: int, index: int, subset: int) -> Tensor:
    """Rows of the pool that a candidate's images stand for; without a pool, just numbers."""
    if pool is None:
        return torch.arange(count)
    return draw_subset(pool.labels, count, stream(seed, "subset", index, subset))
