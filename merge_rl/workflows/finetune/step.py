"""The parts of a fine-tuning step, none of which alters a state: pool, rollouts, gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merge_rl.config import FinetuneConfig
from merge_rl.core.policy import batch_advantages, keep_top_fraction
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.errors import NonFiniteWeightsError, OutOfMemoryError, StatisticsError
from merge_rl.rng import draw_subset, image_seeds, stream
from merge_rl.workflows.finetune.job import FinetuneJob
from merge_rl.workflows.finetune.learner import Learner, LoopState
from merge_rl.workflows.finetune.pathwise import PathwiseGradient
from merge_rl.workflows.finetune.rollouts import KeptRollouts, Window
from merge_rl.workflows.finetune.updates import PolicyGradient, RejectionSampling
from merge_rl.workflows.rewards import InfluenceFrechet, Pool, RewardGradient, RewardSum
from merge_rl.workflows.rollout import Failures, Rollout, is_out_of_memory, matmul_precision


class StepParts:
    """What a step is made of, for one job and learner.

    Every draw follows from the seed, the step and the image's place in the step.
    """

    def __init__(self, job: FinetuneJob, learner: Learner) -> None:
        self.job, self.config, self.learner = job, job.config, learner
        update, seed = self.config.update, self.config.seed
        self.failures = Failures(0, 0, 0)  # of the images that were made last
        self.update: PolicyGradient | RejectionSampling | PathwiseGradient
        if self.config.algorithm == "pg":
            self.update = PolicyGradient(learner, job.rollout, update, job.reference)
        elif self.config.algorithm == "pathwise":
            self.update = PathwiseGradient(learner, job.rollout, update)
        else:
            self.update = RejectionSampling(learner, job.rollout, update, seed)

    def window(self, step: int) -> Window | None:
        """Noisy steps of this step's rollouts, None for all."""
        settings = self.config.rollout
        if settings.window_size is None:
            return None
        first = settings.window_start
        if first is None:
            self.job.rollout.window = None
            places = self.job.rollout.sde(torch.zeros(1).long()).num_noisy - settings.window_size
            generator = stream(self.config.seed, "window", step)
            first = int(torch.randint(places + 1, [], generator=generator))
        return first, first + settings.window_size

    def pool_images(self, state: LoopState) -> int:
        """Rows of the pool that are due to be renewed before the next step."""
        if state.pool is None:
            return self.config.reward.pool_size
        if state.pool_step == state.step:
            return 0
        return self.config.reward.refresh_images(state.step - 1)

    def renew_pool(self, state: LoopState) -> LoopState | None:
        """The state with a pool that is up to date; None if the weights make NaN for images."""
        count, step, size = self.pool_images(state), state.step, self.config.reward.pool_size
        if count == 0:
            return state
        rows = (torch.arange(count) + step * count) % size
        labels = balanced_labels(size, self.job.num_classes)[rows]
        seeds = image_seeds(count, self.config.seed, "pool", step, rules=self.config.rules)
        features = self.features(self.job.rollout, seeds, labels, "pool")
        self.failures = Failures.of(features)
        if self.failures:
            if state.pool is None and self.failures.features:
                said = self.failures.said(self.job.rollout.extractor.name)
                raise StatisticsError(f"{self.config.model}: no score of the pool: {said}")
            if state.pool is None:
                raise NonFiniteWeightsError(
                    f"{self.config.model}: generates samples that are not finite with "
                    f"{self.config.rollout.train_steps} steps of the {self.config.rollout_kind}; "
                    "try more --train-steps"
                )
            return None
        old = state.pool
        pool = Pool.of(features, labels) if old is None else old.replaced(rows, features)
        return dataclasses.replace(state, pool=pool, pool_step=step, images=state.images + count)

    def collect(self, pool: Pool, step: int) -> tuple[Credit, KeptRollouts]:
        """Rewards of B sets of n images in the same rows of the pool, and the best rollouts."""
        config = self.config
        size, sets = config.reward.images_per_subset, config.subsets
        rows = draw_subset(pool.labels, size, stream(config.seed, "subset", step))
        seeds = image_seeds(sets * size, config.seed, "rollout", step, rules=config.rules)
        labels = pool.labels[rows].repeat(sets)
        features = self.features(self.job.rollout, seeds, labels, f"rollouts of step {step + 1}")
        self.failures = Failures.of(features)
        features = features.reshape(sets, size, -1)
        followed = config.algorithm == "pathwise"  # there is nothing to choose between
        credit = assign_credit(
            self.job.reward, pool, rows, features, credit=config.credit,
            fraction=1.0 if followed else config.update.top_fraction,
        )  # fmt: skip
        chosen = credit.kept.nonzero()[:, 0]
        noise = self.job.rollout.noise([seeds[i] for i in chosen.tolist()])
        slope = -1.0 if followed else credit.slope
        pull = self._pull(pool, features.flatten(0, 1)[chosen], slope)
        kept = KeptRollouts(noise, labels[chosen], credit.advantages[chosen], chosen, step, pull)
        return credit, kept

    def _pull(self, pool: Pool, features: Tensor, slope: float) -> Tensor | None:
        """Derivatives of advantages by features (M, D); None where they are not followed.

        `slope` times that of an image's influence on the pool's distance.
        """
        if not self.job.follows:
            return None
        towards = RewardGradient(self.job.reward, pool).cotangents(features)
        return towards.float() * (slope * len(features))

    def gradients(self, kept: KeptRollouts, epoch: int) -> dict[str, float]:
        """Gradients of the loss in the learner; what was seen, nothing if it is not finite."""
        with _repeatable(), matmul_precision(self.job.rollout.sampler):  # or ratios are off
            if epoch == 0:
                self.update.begin(kept)
            self.learner.begin()
            found = self.update.gradients(kept, epoch)
        found["grad_norm"] = self.learner.gradient_norm()
        return found if all(map(math.isfinite, found.values())) else {}

    def apply(self) -> None:
        """One update from the gradients."""
        self.learner.apply()

    def features(
        self, rollout: Rollout, seeds: Sequence[int], labels: Tensor, _phase: str = ""
    ) -> Tensor:
        """Features (N, D) of the images of these seeds and labels; the phase is for messages."""
        return rollout.features(rollout.noise(seeds), labels)

    def send_state(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Where there are other processes: set their learners to a resume point."""

    def send_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """Where there are other processes: let them have further networks, for `features`."""

    def describe(self, credit: Credit, pool: Pool) -> dict[str, Any]:
        """What the credit looks like, for the event of the step."""
        distance = self.job.reward.pool_distance(pool)
        share = self.config.reward.images_per_subset / len(pool)
        return {
            "reward_mean": float(credit.rewards.mean()),
            "reward_std": float(credit.rewards.std()),
            "kept_fraction": float(credit.kept.double().mean()),
            "pool_fid": distance,
            "distance": self.config.reward.distance,
            "pool_gap": relative_gap(distance, credit.rewards, share),
        }


def require_pool(state: LoopState) -> Pool:
    """The pool of a state that `renew_pool` has seen."""
    if state.pool is None:  # pragma: no cover (renew_pool makes it or raises)
        raise RuntimeError("no pool yet")
    return state.pool


@dataclass(frozen=True, eq=False)
class Credit:
    """Rewards and advantages of B sets of n images that replaced the same rows of a pool.

    rewards (B,) are those of the sets, whatever the credit; advantages (B n,), set by set, and
    kept (B n,), which of the images an update learns from.
    """

    rewards: Tensor
    advantages: Tensor
    kept: Tensor
    slope: float  # derivative of an image's advantage by N times what it adds to the distance

    @property
    def finite(self) -> bool:
        """Whether every reward is."""
        return bool(self.rewards.isfinite().all())


def assign_credit(
    reward: RewardSum, pool: Pool, rows: Tensor, features: Tensor, *, credit: str, fraction: float
) -> Credit:
    """Advantages of images from features (B, n, D) in place of rows (n,).

    "set": the subset-replace reward of a set belongs to each of its images (arXiv:2607.02291,
    equations 4 and 5), and the best `fraction` of the sets is kept. "per-image": what the image
    itself does to the distance, to first order; the best `fraction` of all images is kept. All
    sets stand in the same rows, so that what stood there before cancels: exactly between sets,
    and between images by taking each row's mean over the sets, which also takes out what a class
    is worth by itself.
    """
    size = features.shape[1]
    if credit == "set":
        rewards = reward.rewards(pool, [(rows, features)])
        advantages = batch_advantages(rewards)
        kept = keep_top_fraction(advantages, fraction)
        slope = -_per_spread(rewards, advantages) / len(pool)
        advantages, kept = (x.repeat_interleave(size) for x in (advantages, kept))
        return Credit(rewards, advantages, kept, slope)
    values = image_rewards(reward, pool, rows, features)
    centred = (values - values.mean(0)).flatten()
    advantages = batch_advantages(centred)
    kept = keep_top_fraction(advantages, fraction)
    slope = -_per_spread(centred, advantages) * size / len(pool)
    return Credit(values.mean(1), advantages, kept, slope)


def _per_spread(rewards: Tensor, advantages: Tensor) -> float:
    """1 / standard deviation of the rewards; 0 where they have none that counts."""
    if not bool((advantages != 0).any()):
        return 0.0
    return 1 / float((rewards - rewards.mean()).square().mean().sqrt())


def image_rewards(reward: RewardSum, pool: Pool, rows: Tensor, features: Tensor) -> Tensor:
    """Σ weight_t R_t of single images, (B, n) float64; their means over n are the sets' rewards."""
    total = torch.zeros(features.shape[:2], dtype=torch.float64)
    for term in reward.terms:
        if not isinstance(term.reward, InfluenceFrechet):  # check_credit has seen to it
            raise TypeError(f"{term.name} has no rewards of single images")
        part = pool.columns(term.start, term.stop)
        own = features[..., term.start : term.stop]
        total += term.weight * term.reward.per_image(part, rows, own)
    return total


def relative_gap(distance: float, rewards: Tensor, share: float) -> float:
    """How far the pool lags behind the policy, from the rewards of on-policy sets.

    Each set moved the pool's distance by -R - distance when it took its share of the rows; a set of
    the policy that the pool is of would not, but by chance. Relative, as `pool_gap`.
    """
    moved = float((-rewards).mean()) - distance
    return moved / (share * distance) if distance > 0 else 0.0


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """Gradients of convolutions add in a fixed order on a GPU too, so that a run can be resumed."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@contextlib.contextmanager
def memory_advice(config: FinetuneConfig) -> Iterator[None]:
    """Turn what the libraries say when memory runs out into a sentence on what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _shortage(config, error) from None


def _shortage(config: FinetuneConfig, error: BaseException) -> OutOfMemoryError:
    said = " ".join(str(error).split())[:120]
    return OutOfMemoryError(
        f"too little memory on {config.device} for this step; lower --micro-batch "
        f"({config.update.micro_batch} images with gradients at a time), --batch "
        f"({config.batch} without), or train adapters with --lora-rank ({said or 'no details'})"
    )


def peak_memory(device: str) -> int:
    """Bytes: the most that was allocated on an accelerator, or by this process on the CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
