"""Rounds that take the reward's gradient at the mean instead of the rewards of candidates."""

from __future__ import annotations

import math
import time
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from merge_rl.config import FIXED_STEP_RULES, OptimizeConfig
from merge_rl.core.merging.live_model import theta_gradient
from merge_rl.core.merging.tuned_map import setup_of
from merge_rl.errors import ConfigError
from merge_rl.rng import draw_subset, image_seeds, stream
from merge_rl.searchers import Pathwise, Slope
from merge_rl.workflows.assembly import Job
from merge_rl.workflows.evaluate import SecondMetric
from merge_rl.workflows.optimize.rounds import SearchLoop
from merge_rl.workflows.rewards import (
    CombinedExtractor,
    Level,
    Pool,
    RewardGradient,
    pool_gap,
    require_gradient,
)
from merge_rl.workflows.rollout import DifferentiableRollout, WorkItem, with_gradient


class PathwiseLoop(SearchLoop):
    """A search whose rounds make images at the mean, with their gradient.

    A round's images take the place of the oldest of the pool, so that none is paid for twice. An
    image with its gradient counts as `GRADIENT_COST` images. Whenever all of the pool is new, a
    metric is looked at that the search does not optimise.
    """

    def _round_cost(self, candidates: int) -> int:
        return self.config.round_images(candidates, self.round_index)

    def _round(self, thetas: Tensor) -> None:
        began, sampled, theta = time.monotonic(), self.job.rollout.seconds, thetas[0]
        at = RewardGradient(self.reward, self._pool)
        level = at.level(stream(self.config.seed, "halves", self.round_index), self.cursor)
        before, share = level.distance, self._count / len(self._pool)
        found = self._gradient(theta, at, level)
        searcher, second = self._pathwise, self._second(share)
        step, returns = searcher.step, searcher.returns
        # Halves of a pool that one round renews are both of its mean.
        told = self.config.rules > FIXED_STEP_RULES and share <= 1 / 2
        slope = Slope(
            gradients=found["gradients"], noise=level.noise, second=second,
            trend=level.trend if told else None,
        )  # fmt: skip
        searcher.tell(thetas, found["rewards"], slope)
        self._note_failures(found["rewards"])
        if self.failed_rounds:
            searcher.recenter(self.result_theta)
        else:
            self.result_theta = theta
        after = self.reward.pool_distance(self._pool)
        went_back = searcher.returns > returns
        event = {
            "kind": "round",
            "round": self.round_index,
            "theta": searcher.mean.tolist(),
            **setup_of(self.job.map, self.job.map(searcher.mean)).as_dict(),
            "candidates": thetas.tolist(),
            "rewards": [None if math.isnan(r) else r for r in found["rewards"].tolist()],
            "failed": self._count if self.failed_rounds else len(found["dropped"]),
            "pool_before": before,
            "distance": self.config.reward.distance,
            "pool_after": after,
            "refreshed": self._count,
            "gap": pool_gap(before, after, share),
            "step_length": step,
            **({} if second is None else {self._metric.name: second[0]}),
            **self.held_out.of(self.pool),
            "images": self.images,
            "seconds": time.monotonic() - began,
            "rollout_seconds": self.job.rollout.seconds - sampled,
        }
        self.run_dir.append_event(event)
        if went_back:
            self._renew_pool()
        self._begin(self.round_index + 1)
        self._save()
        self.tracker.event(event)
        if found["dropped"]:
            self._say_dropped(found["dropped"])
        if went_back:
            self._say_back()

    def _say_dropped(self, dropped: tuple[str, ...]) -> None:
        more = f" ({len(dropped)} in this round)" if len(dropped) > 1 else ""
        self._announce(f"round {self.round_index}: left out the image of {dropped[0]}{more}")

    def _say_back(self) -> None:
        worse = "the distance" if self._pathwise.blamed == 0 else self._metric.name
        stopped = ": the search ends early" if self.searcher.done else " with half the step"
        self._announce(
            f"round {self.round_index}: {worse} of the pool was clearly worse than it had been for "
            f"several rounds: back to the best mean so far{stopped}"
        )

    def _renew_pool(self) -> None:
        """Images of where the search went back to, if there is budget for them and a round."""
        left = self.limit - self.images - self._round_cost(1)
        if self.searcher.done or left < len(self._pool):
            return
        labels, names = self._pool.labels, ("pool again", self.round_index)
        features = self._generate(self.searcher.mean, labels, *names)
        if bool(features.isfinite().all()):
            self.pool, self.cursor = Pool.of(features, labels), 0

    @cached_property
    def _metric(self) -> SecondMetric:
        return SecondMetric(self.job.references["reference"], str(self.job.rollout.rollout.device))

    def _second(self, share: float) -> tuple[float, float] | None:
        """The second metric of the pool, and what chance does to it; None where nothing is new."""
        columns = _columns(self.job)
        if columns is None or self.round_index % max(1, round(1 / share)):
            return None
        features = self._pool.features[:, columns]
        chosen = stream(self.config.seed, "second halves", self.round_index)
        half = draw_subset(self._pool.labels, len(features) // 2, chosen)
        other = torch.ones(len(features), dtype=torch.bool).index_fill(0, half, False)
        parts = self._metric.score(features[half]) - self._metric.score(features[other])
        return self._metric.score(features), abs(parts) / 2

    def _gradient(self, theta: Tensor, at: RewardGradient, level: Level) -> dict[str, Any]:
        """What the searcher is told of theta (D,); the images made for it go into the pool."""
        seed, index, pool = self.config.seed, self.round_index, self._pool
        rows = (torch.arange(self._count) + self.cursor) % len(pool)
        coefficients = self.job.map(theta)
        seeds = image_seeds(self._count, seed, "gradient", index, rules=self.config.rules)
        item = WorkItem(coefficients, seeds, pool.labels[rows])
        made = self._differentiable(item, at.cotangents)
        cost = self._round_cost(1)
        self.images += cost
        self.job.rollout.rollout.on_images(cost)
        sound = made.features.isfinite().all(1)
        if bool(sound.any()):
            self.pool = pool.replaced(rows[sound], made.features[sound])
            self.cursor = (self.cursor + self._count) % len(pool)
        gradient = theta_gradient(self.job.map, theta, made.gradient + self._penalty(theta))
        reward = -level.unbiased if bool(gradient.isfinite().all()) else math.nan
        return {
            "rewards": torch.tensor([reward], dtype=torch.float64),
            "gradients": -gradient[None],
            "dropped": made.dropped,
        }

    def _penalty(self, theta: Tensor) -> Tensor:
        """The gradient of what large coefficients cost, of the rows that theta (D,) stands for."""
        rows = self.job.map(theta)
        own = setup_of(self.job.map, rows).coefficients
        found = torch.zeros_like(rows)
        found[: own.shape[0], : own.shape[1]] = 2 * self.config.merge.l2 * own / len(own)
        return found

    @property
    def _count(self) -> int:
        """Images of a round."""
        return self.config.reward.images_per_subset

    @property
    def _pathwise(self) -> Pathwise:
        if not isinstance(self.searcher, Pathwise):  # pragma: no cover (`loop_of` has seen to it)
            raise TypeError(f"no gradients for {type(self.searcher).__name__}")
        return self.searcher

    @property
    def _differentiable(self) -> DifferentiableRollout:
        if self._rollout is None:
            self._rollout = with_gradient(self.job.rollout, announce=self._announce)
        return self._rollout

    _rollout: DifferentiableRollout | None = None

    def _announce(self, text: str) -> None:
        self.tracker.event({"kind": "warning", "text": text})


def require_gradients(config: OptimizeConfig, job: Job) -> None:
    """Raise ConfigError where there are no gradients for a searcher that takes them."""
    require_gradient(job.reward)
    with_gradient(job.rollout)
    if config.reward.num_subsets * config.reward.num_replacements != 1:
        raise ConfigError(
            "the searcher pathwise makes one set of images a round: expected num_subsets and "
            f"num_replacements of 1, got {config.reward.num_subsets} and "
            f"{config.reward.num_replacements}"
        )


def _columns(job: Job) -> slice | None:
    """The features of the pool that the second metric reads; None if the reward reads others."""
    made, own, start = job.rollout.rollout.extractor, job.final_rollout.rollout.extractor, 0
    for part in made.extractors if isinstance(made, CombinedExtractor) else (made,):
        if part is own:
            return slice(start, start + part.dim)
        start += part.dim
    return None
