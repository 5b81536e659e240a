"""Parts of the settings of fine-tuning: rollouts, updates, adapters, curves of scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from merge_rl.config.sampler import require, require_images
from merge_rl.config.setting import LEARN, SCORES, setting
from merge_rl.errors import ConfigError, UnknownNameError

UNDER: Final = ("sde", "ode")
CURVES: Final = ("ode-train", "ode-eval", "sde-train", "sde-eval")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The images that a step learns from, made with few solver steps."""

    # pg needs densities of steps. Samples of an SDE with few steps carry its discretisation error,
    # which rs would teach the network.
    under: str | None = setting(
        None, "Rollouts of rs and pathwise: ode or sde; those of pg are sde.", LEARN, "--under",
        metavar="sde|ode", unset="sde for pg, else ode",
    )  # fmt: skip
    subsets: int | None = setting(
        None, "B, sets of images that a step learns from; pg and rs compare them.", LEARN,
        "--subsets", unset="16, for pathwise 2",
    )  # fmt: skip
    train_steps: int = setting(
        50, "Solver intervals of rollouts (denoising reduction).", LEARN, "--train-steps"
    )
    window_size: int | None = setting(
        None, "Noise in so many steps alone, an ODE elsewhere.", LEARN, unset="in all steps"
    )
    window_start: int | None = setting(
        None, "First step of the window.", LEARN, unset="drawn anew every step"
    )
    # RewardConfig has the rest: pool, images of a subset, refresh.

    def __post_init__(self) -> None:
        if self.under not in (None, *UNDER):
            raise UnknownNameError("kind of rollouts", str(self.under), UNDER)
        require(self.subsets is None or self.subsets >= 2, "subsets", ">= 2", self.subsets)
        require(self.train_steps >= 2, "train_steps", ">= 2", self.train_steps)
        if self.window_size is None:
            if self.window_start is not None:
                raise ConfigError("window_start needs window_size, the number of noisy steps")
            return
        require(self.window_size >= 1, "window_size", ">= 1", self.window_size)
        count, start = self.train_steps - 1, self.window_start or 0  # the last one adds no noise
        require(0 <= start <= count - self.window_size, "a window",
                f"within the noisy steps 0..{count - 1}",
                f"{self.window_size} steps from step {start}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """What a step does with its rollouts."""

    top_fraction: float = setting(
        0.25, "Share of all rollouts that the update keeps, by advantage.", LEARN, "--top-fraction"
    )
    epochs: int = setting(1, "Updates from one batch of rollouts.", LEARN, "--epochs")
    clip: float = setting(
        0.2, "Bound on the ratio of a step's probabilities, which is 1 in the first of the epochs.",
        LEARN, "--clip",
    )  # fmt: skip
    still_steps: bool = setting(
        True,
        "pg: follow the reward's gradient through steps that draw nothing, the last one and those "
        "outside of a window.",
        LEARN,
    )  # fmt: skip
    # Ratios of D values each: the D-th root, the scale that published clips of 1e-4 belong to.
    per_dimension: bool = setting(
        False, "Ratios of one of the D values, the D-th root of those of all of them.", LEARN
    )
    kl_weight: float = setting(0.0, "Weight of the KL to the frozen start.", LEARN, "--kl")
    learning_rate: float = setting(1e-5, "Adam's learning rate.", LEARN, "--lr")
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam's betas.", LEARN)
    weight_decay: float = setting(0.0, "AdamW's weight decay.", LEARN)
    warmup_steps: int = setting(0, "Steps until the learning rate is reached.", LEARN)
    max_grad_norm: float = setting(1.0, "Longer gradients are shortened to it.", LEARN)
    ema_decay: float = setting(
        0.9, "Decay of the average of weights, an update; 0: none.", LEARN, "--ema"
    )
    # It bounds memory.
    micro_batch: int = setting(
        64, "Images in one forward and backward pass.", LEARN, "--micro-batch"
    )
    noise_draws: int = setting(4, "rs: noise draws of every kept image in an update.", LEARN)
    level_mean: float = setting(-0.4, "rs: mean of EDM2's log noise levels.", LEARN)
    level_std: float = setting(1.0, "rs: standard deviation of EDM2's log noise levels.", LEARN)

    def __post_init__(self) -> None:
        require(0 < self.top_fraction <= 1, "top_fraction", "in (0, 1]", self.top_fraction)
        for name in ("epochs", "micro_batch", "noise_draws"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        for name in ("clip", "learning_rate", "max_grad_norm", "level_std"):
            require(0 < getattr(self, name) < math.inf, name, "finite and > 0", getattr(self, name))
        for name in ("kl_weight", "weight_decay"):
            good = 0 <= getattr(self, name) < math.inf
            require(good, name, "finite and >= 0", getattr(self, name))
        require(self.warmup_steps >= 0, "warmup_steps", ">= 0", self.warmup_steps)
        require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)", self.ema_decay)
        good = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        require(good, "betas", "two numbers in [0, 1)", self.betas)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters instead of all weights (extra `lora`)."""

    rank: int = setting(
        0, "Rank of adapters that alone are trained (extra lora); 0: all weights.",
        LEARN, "--lora-rank",
    )  # fmt: skip
    alpha: float | None = setting(
        None, "The update's scale is alpha / rank.", LEARN, unset="twice the rank"
    )
    targets: tuple[str, ...] = setting(
        ("qkv", "proj", "fc1", "fc2"), "Ends of the names of linear layers.", LEARN
    )

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", ">= 0", self.rank)
        if self.alpha is not None:
            require(0 < self.alpha < math.inf, "lora.alpha", "finite and > 0", self.alpha)
        require(bool(self.targets), "lora.targets", "at least one name", self.targets)


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """Scores along the run and at its end: under ODE and SDE, at both numbers of steps."""

    eval_steps: int = setting(
        250, "Solver intervals of the curves beside those of training.", SCORES, "--eval-steps"
    )
    ode_solver: str = setting("heun", "Solver of the curves under an ODE.", SCORES)
    every: int = setting(50, "Steps between scores.", SCORES, "--eval-every")
    num_images: int = setting(
        2000, "N of a point of a curve; all points have the same seeds.", SCORES, "--eval-images"
    )
    final_images: int = setting(
        5000, "N of one repeat at the end, of start and result, on fresh seeds.",
        SCORES, "--final-images",
    )  # fmt: skip
    repeats: int = setting(3, "Repeats at the end; at least 2.", SCORES, "--repeats")
    stop_on: str | None = setting(
        None, f"End on the best point of a curve: {', '.join(CURVES)}.", SCORES, "--stop-on",
        unset="all steps are made",
    )  # fmt: skip
    patience: int = setting(3, "Points that may pass without a better one.", SCORES)

    def __post_init__(self) -> None:
        require(self.eval_steps >= 2, "eval_steps", ">= 2", self.eval_steps)
        require(self.every >= 1, "every", ">= 1", self.every)
        for name in ("num_images", "final_images"):
            require_images(name, getattr(self, name), least=2)
        require(self.repeats >= 2, "repeats", ">= 2", self.repeats)
        require_images("repeats times final_images", self.repeats * self.final_images)
        require(self.patience >= 1, "patience", ">= 1", self.patience)
        if self.stop_on is not None and self.stop_on not in CURVES:
            raise UnknownNameError("curve", self.stop_on, CURVES)
