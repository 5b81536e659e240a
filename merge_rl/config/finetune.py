"""Settings of a fine-tuning run: frozen, keyword-only, checked once.

Every default is what `mergerl finetune` does when nothing is said.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from merge_rl.config.mapping import to_mapping
from merge_rl.config.optimize import OptimizeConfig, RewardConfig
from merge_rl.config.sampler import SDE_SOLVERS, SamplerConfig, require
from merge_rl.errors import ConfigError, UnknownNameError

ALGORITHMS: Final = ("pg", "rs")
CREDITS: Final = ("set", "per-image")
UNDER: Final = ("sde", "ode")
PARALLEL: Final = ("ddp", "fsdp")
TRACKERS: Final = ("tensorboard", "wandb", "trackio")
CURVES: Final = ("ode-train", "ode-eval", "sde-train", "sde-eval")
# N = 5,000, n = 50, a new pool every 10 steps (arXiv:2607.02291).
PAPER_REWARD: Final = RewardConfig(pool_size=5000, subset_size=50, refresh="10")
# What may differ when a run goes on: how far, what is kept of it, who is told, how processes share.
FREE_ON_RESUME: Final = ("steps", "save_every", "keep_last", "track", "parallel")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The images that a step learns from, made with few solver steps."""

    # sde or ode; None: the SDE for pg, whose steps need densities, and the ODE for rs. Samples of
    # an SDE with few steps carry its discretisation error, which rs would teach the network.
    under: str | None = None
    subsets: int = 16  # B: sets of images that are compared with each other
    train_steps: int = 50  # solver intervals of rollouts ("denoising reduction")
    window_size: int | None = None  # noise in so many steps alone, an ODE elsewhere; None: in all
    window_start: int | None = None  # its first step; None: drawn anew every step
    # RewardConfig has the rest: pool, images of a subset, refresh.

    def __post_init__(self) -> None:
        if self.under not in (None, *UNDER):
            raise UnknownNameError("kind of rollouts", str(self.under), UNDER)
        require(self.subsets >= 2, "subsets", ">= 2", self.subsets)
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

    top_fraction: float = 0.25  # of all rollouts, by advantage
    epochs: int = 1  # updates from one batch of rollouts
    clip: float = 0.2  # of the ratio of a step's probabilities
    # Ratios of D values each: the D-th root, the scale that published clips of 1e-4 belong to.
    per_dimension: bool = False
    kl_weight: float = 0.0  # to the frozen start
    learning_rate: float = 1e-5  # Adam's
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9  # of weights, an update; 0: none
    micro_batch: int = 64  # images in one forward and backward pass: bounds memory
    # Rejection sampling: noise draws of every kept image in an update, and EDM2's noise levels.
    noise_draws: int = 4
    level_mean: float = -0.4
    level_std: float = 1.0

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

    rank: int = 0  # 0: all weights are trained
    alpha: float | None = None  # scale of the update is alpha / rank; None: twice the rank
    targets: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2")  # ends of the names of linear layers

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", ">= 0", self.rank)
        if self.alpha is not None:
            require(0 < self.alpha < math.inf, "lora.alpha", "finite and > 0", self.alpha)
        require(bool(self.targets), "lora.targets", "at least one name", self.targets)


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """Scores along the run and at its end: under ODE and SDE, at both numbers of steps."""

    eval_steps: int = 250
    ode_solver: str = "heun"
    every: int = 50  # steps between scores
    num_images: int = 2000  # of a point of a curve: all points have the same seeds
    final_images: int = 5000  # of start and result at the end, on fresh seeds
    repeats: int = 3
    stop_on: str | None = None  # curve whose best point ends the run
    patience: int = 3  # points that may pass without a better one

    def __post_init__(self) -> None:
        require(self.eval_steps >= 2, "eval_steps", ">= 2", self.eval_steps)
        require(self.every >= 1, "every", ">= 1", self.every)
        for name in ("num_images", "final_images"):
            require(getattr(self, name) >= 2, name, ">= 2", getattr(self, name))
        require(self.repeats >= 2, "repeats", ">= 2", self.repeats)
        require(self.patience >= 1, "patience", ">= 1", self.patience)
        if self.stop_on is not None and self.stop_on not in CURVES:
            raise UnknownNameError("curve", self.stop_on, CURVES)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that fixes the outcome of `mergerl finetune`, and where its inputs lie."""

    model: str
    algorithm: str = "pg"  # pg: policy gradient; rs: rejection sampling
    credit: str = "set"  # set: one reward for the images of a subset; per-image: one each
    steps: int = 100
    extractor: str | None = None  # None here and below: what the run or set of the model says
    extractor_weights: str | None = None
    reference: str | None = None
    heldout: str | None = None
    extra_references: Mapping[str, str] = field(default_factory=dict)
    extra_weights: Mapping[str, str] = field(default_factory=dict)
    autoencoder: str | None = None
    autoencoder_weights: str | None = None
    autoencoder_dtype: str = "float32"
    seed: int = 0
    batch: int = 250  # images in one forward pass without gradients
    device: str = "cpu"
    # With several processes: ddp, all weights in each; fsdp, gradients and averages in shards.
    parallel: str = "ddp"
    licence: str | None = None  # of the result; None: that of the model
    save_every: int = 10  # steps between resume points
    keep_last: int = 2  # resume points
    snapshot_every: int = 25  # steps between snapshots of the weights
    track: tuple[str, ...] = ()
    sampler: SamplerConfig | None = None
    reward: RewardConfig = PAPER_REWARD
    rollout: RolloutConfig = RolloutConfig()
    update: UpdateConfig = UpdateConfig()
    lora: LoraConfig = LoraConfig()
    curves: CurveConfig = CurveConfig()

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every", "keep_last", "snapshot_every"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        named = (("algorithm", ALGORITHMS), ("credit", CREDITS), ("parallel", PARALLEL))
        for kind, known in named:
            if getattr(self, kind) not in known:
                raise UnknownNameError(kind, getattr(self, kind), known)
        for name in self.track:
            if name not in TRACKERS:
                raise UnknownNameError("tracker", name, TRACKERS)
        if self.algorithm == "pg" and self.rollout.under == "ode":
            raise ConfigError(
                "the steps of an ODE draw nothing, so that a policy gradient has nothing to learn "
                "from; expected rollouts under sde, or the algorithm rs"
            )
        if self.rollout.window_size is not None and self.rollout_kind == "ode":
            raise ConfigError("a window of noisy steps needs rollouts under sde, got ode")
        if self.reward.num_subsets != 1 or self.reward.num_replacements != 1:
            raise ConfigError(
                "fine-tuning compares rollout.subsets sets of images, each in the same rows of the "
                "pool; expected reward.num_subsets and reward.num_replacements to be 1"
            )

    @property
    def images_per_step(self) -> int:
        """Rollouts of a step: B n."""
        return self.rollout.subsets * self.reward.images_per_subset

    @property
    def rollout_kind(self) -> str:
        """What rollouts are made under: "sde" or "ode"."""
        return self.rollout.under or ("sde" if self.algorithm == "pg" else "ode")

    def rollout_sampler(self) -> SamplerConfig:
        """The sampler of rollouts: that of the curve "sde-train" or "ode-train"."""
        return self.curve_samplers()[f"{self.rollout_kind}-train"]

    def training_sde(self) -> SamplerConfig:
        """The SDE with the steps of training: Euler-Maruyama, whose every step has a density."""
        base = self.sampler or SamplerConfig()
        if base.is_sde and base.solver != "sde-euler":
            raise ConfigError(
                f"steps of {base.solver} have no density that depends on the weights; expected "
                f"{SDE_SOLVERS[0]} to train under"
            )
        return dataclasses.replace(base, solver="sde-euler", num_steps=self.rollout.train_steps)

    def curve_samplers(self) -> dict[str, SamplerConfig]:
        """The four samplers that weights are scored under, by the name of their curve."""
        sde = self.training_sde()
        ode = dataclasses.replace(sde, solver=self.curves.ode_solver)
        return {
            f"{kind}-{which}": dataclasses.replace(sampler, num_steps=steps)
            for kind, sampler in (("ode", ode), ("sde", sde))
            for which, steps in (
                ("train", self.rollout.train_steps), ("eval", self.curves.eval_steps),
            )
        }  # fmt: skip

    def reward_settings(self) -> OptimizeConfig:
        """The same inputs as a search names them, for what builds rewards."""
        shared = (
            "extractor", "extractor_weights", "reference", "heldout", "extra_references",
            "extra_weights", "autoencoder", "device", "seed", "reward",
        )  # fmt: skip
        return OptimizeConfig(checkpoints=self.model, **{k: getattr(self, k) for k in shared})


def differing_keys(one: FinetuneConfig, other: FinetuneConfig) -> list[str]:
    """Dotted names of settings that differ and that a run may not change as it goes on."""
    a, b = _flat(to_mapping(one)), _flat(to_mapping(other))
    return sorted(
        key for key in a.keys() | b.keys()
        if a.get(key) != b.get(key) and key not in FREE_ON_RESUME
    )  # fmt: skip


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
