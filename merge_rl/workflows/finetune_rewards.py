"""From features of rollouts to advantages: one reward a set of images, or one an image."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.config import OptimizeConfig
from merge_rl.core.policy import batch_advantages, keep_top_fraction
from merge_rl.errors import ConfigError
from merge_rl.workflows.pool import Pool
from merge_rl.workflows.reward import InfluenceFrechet
from merge_rl.workflows.reward_names import parse_reward
from merge_rl.workflows.reward_sum import RewardSum


@dataclass(frozen=True, eq=False)
class Credit:
    """What B sets of n images that stood in the same rows of a pool have earned.

    rewards (B,) are those of the sets, whatever the credit; advantages (B n,), set by set, and
    kept (B n,), which of the images an update learns from.
    """

    rewards: Tensor
    advantages: Tensor
    kept: Tensor

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
        return Credit(rewards, advantages.repeat_interleave(size), kept.repeat_interleave(size))
    values = image_rewards(reward, pool, rows, features)
    advantages = batch_advantages((values - values.mean(0)).flatten())
    kept = keep_top_fraction(advantages, fraction)
    return Credit(values.mean(1), advantages, kept)


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


def influence_name(name: str) -> str:
    """The first-order form of a reward, which has a reward for every image.

    "fid-subset + 0.2 * fd-dinov2-subset" -> "fid-influence + 0.2 * fd-dinov2-influence".
    Raises ConfigError for a term that has no such form.
    """
    parts = []
    for term in parse_reward(name):
        if term.base not in ("fid-subset", "fid-influence"):
            raise ConfigError(
                f"the reward {term.name} has none for single images; expected terms of "
                "fid-subset or fid-influence for per-image credit"
            )
        first_order = term.name.rpartition("-")[0] + "-influence"
        parts.append(first_order if term.weight == 1 else f"{term.weight!r} * {first_order}")
    return " + ".join(parts)


def relative_gap(distance: float, rewards: Tensor, share: float) -> float:
    """How far the pool lags behind the policy, from the rewards of on-policy sets.

    Each set moved the pool's distance by -R - distance when it took its share of the rows; a set of
    the policy that the pool is of would not, but by chance. Relative, as `pool_gap`.
    """
    moved = float((-rewards).mean()) - distance
    return moved / (share * distance) if distance > 0 else 0.0


def with_reward(settings: OptimizeConfig, credit: str) -> OptimizeConfig:
    """The settings with the form of the reward that the credit needs."""
    if credit == "set":
        return settings
    named = dataclasses.replace(settings.reward, name=influence_name(settings.reward.text))
    return dataclasses.replace(settings, reward=named)
