"""Settings of the search itself: the map of the coefficients, the reward, the searcher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from merge_rl.config.sampler import require
from merge_rl.errors import ConfigError, UnknownNameError

WHITENED_SCALE: Final = 0.02
COEFFICIENT_SCALE: Final = 0.05
SUBSET_SIZE: Final = 100


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How theta becomes coefficients."""

    map: str = "whitened"  # whitened, affine, free, softmax, ema
    # auto: the best of the merges that cost no search (the newest checkpoints, averages of the
    # newest few, EMA profiles, single checkpoints); newest, uniform, or a checkpoint's name.
    start: str = "auto"
    # One unit of theta: a share of the weights' norm for whitened, of coefficients for the others.
    scale: float | None = None
    # What has coefficients of its own: stages of the network, its blocks; or one set for all
    # tensors. Groups, by name -> regex of tensor names, come first.
    grouping: str = "stages"
    groups: Mapping[str, str] = field(default_factory=dict)
    max_abs: float | None = None  # no coefficient goes beyond it
    l2: float = 0.0  # FID that a sum of squared coefficients of 1 costs a candidate

    def __post_init__(self) -> None:
        if self.scale is not None:
            require(0 < self.scale < math.inf, "scale", "finite and > 0", self.scale)
        if self.max_abs is not None:
            require(0 < self.max_abs < math.inf, "max_abs", "finite and > 0", self.max_abs)
        require(0 <= self.l2 < math.inf, "l2", "finite and >= 0", self.l2)

    @property
    def unit(self) -> float:
        """What one unit of theta changes: `scale`, or the map's own."""
        if self.scale is not None:
            return self.scale
        return WHITENED_SCALE if self.map == "whitened" else COEFFICIENT_SCALE


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The reward and its pool."""

    # A name, or a sum such as "fid-subset + 0.2 * fd-dinov2-subset"; None: what suits the searcher.
    name: str | None = None
    pool_size: int = 5000  # N
    # n: images a candidate replaces, or all it is scored on; None: what suits reward and budget.
    subset_size: int | None = None
    num_subsets: int = 1  # Ns: different subsets a candidate is scored on
    num_replacements: int = 1  # Nr: fresh sets of images for each subset
    # rolling: some rows every round; or a number: all rows, every k rounds. The result of a search
    # is the policy mean of the last refresh, the last one whose samples were seen to be sound.
    refresh: str = "rolling"
    # Rows a rolling refresh renews; unset, a tenth of the pool, or what four candidates replace if
    # that is more: a pool that is renewed more slowly than the policy moves makes it overshoot.
    refresh_size: int | None = None
    max_gap: float = 0.20  # running mean of the relative gap above which the loop acts

    def __post_init__(self) -> None:
        require(self.pool_size >= 2, "pool_size", ">= 2", self.pool_size)
        if self.subset_size is not None:
            require(self.subset_size >= 1, "subset_size", ">= 1", self.subset_size)
        if self.pooled and self.images_per_subset > self.pool_size:
            raise ConfigError(
                f"the subset of {self.images_per_subset} images is larger than the pool of "
                f"{self.pool_size}; expected subset_size <= pool_size"
            )
        require(self.num_subsets >= 1, "num_subsets", ">= 1", self.num_subsets)
        require(self.num_replacements >= 1, "num_replacements", ">= 1", self.num_replacements)
        require(self.max_gap > 0, "max_gap", "> 0", self.max_gap)
        if self.refresh != "rolling":
            require(
                self.refresh.isdecimal() and int(self.refresh) >= 1,
                "refresh", '"rolling" or a number of rounds >= 1', self.refresh,
            )  # fmt: skip
        if self.refresh_size is not None:
            inside = 1 <= self.refresh_size <= self.pool_size
            require(inside, "refresh_size", f"in 1..{self.pool_size}", self.refresh_size)

    @property
    def text(self) -> str:
        """The reward: `name`, or the subset-replace FID."""
        return self.name or "fid-subset"

    @property
    def pooled(self) -> bool:
        """Whether a term replaces part of a pool; the others score a candidate's own images."""
        return not all(term.strip().endswith("-full") for term in self.text.split("+"))

    @property
    def images_per_subset(self) -> int:
        """n: `subset_size`, or what is usual."""
        return self.subset_size or SUBSET_SIZE

    @property
    def images_per_candidate(self) -> int:
        """Images a candidate costs: Ns Nr n."""
        return self.num_subsets * self.num_replacements * self.images_per_subset

    @property
    def rolling_size(self) -> int:
        """Rows that a rolling refresh renews."""
        share = max(1, self.pool_size // 10, 4 * self.images_per_candidate)
        return self.refresh_size or min(share, self.pool_size)

    def refresh_images(self, round_index: int) -> int:
        """Rows that are renewed after a round, counted from 0."""
        if self.refresh == "rolling":
            return self.rolling_size
        return self.pool_size if (round_index + 1) % int(self.refresh) == 0 else 0


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The searcher; what `policy-gradient` reads is marked so in its own module."""

    name: str = "policy-gradient"
    policy: str = "direct"  # direct: a free mean; mlp: EMANet
    update: str | None = None  # natural, adam; None: natural for direct, adam for mlp
    population: int | None = None  # P, candidates a round; None: the searcher's own
    antithetic: bool = True
    std: float = 1.0  # of the first draws, in theta units
    box: float = 5.0  # half-width of the box that a bounded method searches, in theta units
    learn_std: bool = False
    # natural: the step in units of std along a gradient without noise, 1 if unset; adam: Adam's,
    # in theta units, about the step of one round, 0.7 if unset.
    learning_rate: float | None = None
    momentum: float = 0.7  # of the natural gradient
    # natural: how fast exploration widens where successive gradients agree, and narrows where they
    # contradict each other; 0: not at all
    width_rate: float = 0.3
    std_learning_rate: float = 0.05
    betas: tuple[float, float] = (0.5, 0.9)  # Adam's
    decay: float = 0.93  # adam: of step and exploration, a round
    min_decay: float = 0.1  # where the schedule of step and exploration stops
    shaping: str = "batch"  # advantages from rewards: batch (their values) or rank (their places)
    top_fraction: float = 1.0  # kept for the update, by advantage
    clip: float = 0.2
    epochs: int = 1  # adam: updates from one batch
    # Shares of the budget: to find the start (`auto`), and to choose the result at the end among
    # policy mean, running average and the best candidates. 0 leaves out the one or the other.
    start_share: float = 0.08
    final_share: float = 0.12
    incumbents: int = 4  # of the best candidates that are scored again at the end

    def __post_init__(self) -> None:
        if self.population is not None:
            require(self.population >= 1, "population", ">= 1", self.population)
        if self.update not in (None, "natural", "adam"):
            raise UnknownNameError("update", str(self.update), ("natural", "adam"))
        if self.shaping not in ("batch", "rank"):
            raise UnknownNameError("shaping", self.shaping, ("batch", "rank"))
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        good = 0 <= self.width_rate < math.inf
        require(good, "width_rate", "finite and >= 0", self.width_rate)
        for name in ("std", "box"):
            width = getattr(self, name)
            require(0 < width < math.inf, name, "finite and > 0", width)
        for name in ("learning_rate", "std_learning_rate"):
            rate = getattr(self, name)
            if rate is not None:
                require(0 < rate < math.inf, name, "finite and > 0", rate)
        require(0 < self.decay <= 1, "decay", "in (0, 1]", self.decay)
        require(0 < self.min_decay <= 1, "min_decay", "in (0, 1]", self.min_decay)
        require(0 < self.top_fraction <= 1, "top_fraction", "in (0, 1]", self.top_fraction)
        require(self.clip > 0, "clip", "> 0", self.clip)
        require(self.epochs >= 1, "epochs", ">= 1", self.epochs)
        for name in ("start_share", "final_share"):
            share = getattr(self, name)
            require(0 <= share < 0.5, name, "in [0, 0.5)", share)
        require(self.incumbents >= 0, "incumbents", ">= 0", self.incumbents)
        good = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        require(good, "betas", "two numbers in [0, 1)", self.betas)
