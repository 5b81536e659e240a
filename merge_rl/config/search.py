"""Settings of a search: how theta becomes coefficients, and the searcher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from merge_rl.config.sampler import require
from merge_rl.config.setting import SEARCH, about, require_choices, setting

WHITENED_SCALE: Final = 0.02
COEFFICIENT_SCALE: Final = 0.05


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How the vector theta that is searched becomes merging coefficients, and where they start."""

    map: str = setting(
        "whitened",
        "whitened (steps that change the weights alike), affine, free, softmax, ema.",
        SEARCH, "--map",
    )  # fmt: skip
    start: str = setting(
        "auto",
        "auto (the best of the merges that cost no search: the newest checkpoints, averages of "
        "the newest few, EMA profiles, single ones), newest, uniform, or a checkpoint's name.",
        SEARCH, "--start",
    )  # fmt: skip
    scale: float | None = setting(
        None,
        "Exploration, one unit of theta: a share of the weights' norm for whitened, coefficient "
        "units for the other maps.",
        SEARCH, "--scale",
        unset=f"{WHITENED_SCALE} for whitened, {COEFFICIENT_SCALE} for the others",
    )  # fmt: skip
    grouping: str | None = setting(
        None,
        "What has coefficients of its own: stages of the network, its blocks, its tensors; or one "
        "set for all (one).",
        SEARCH, "--grouping", unset="tensors along gradients, else stages",
    )  # fmt: skip
    groups: Mapping[str, str] = field(
        default_factory=dict,
        metadata=about(
            help="Own coefficients for tensors whose names match; these come first.",
            panel=SEARCH, flag="--group", metavar="NAME=REGEX",
        ),
    )  # fmt: skip
    freeze: tuple[str, ...] = setting(
        (), "Tensors whose names match stay as in the start's checkpoint; repeatable.", SEARCH,
        "--freeze", metavar="REGEX", unset="none",
    )  # fmt: skip
    max_abs: float | None = setting(
        None, "No coefficient goes beyond it.", SEARCH, "--max-abs", unset="no bound"
    )
    l2: float = setting(
        0.0, "FID that a sum of squared coefficients of 1 costs a candidate.", SEARCH, "--l2"
    )

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


COEFFICIENTS, GUIDANCE, GUIDE = "coefficients", "guidance", "guide-coefficients"
TUNED: Final = (COEFFICIENTS, GUIDANCE, GUIDE)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The searcher and its settings; a searcher reads those that it has a use for."""

    name: str = setting(
        "auto",
        "auto (pathwise where all has a derivative, else policy-gradient), pathwise (the gradient "
        "through the rollout), policy-gradient, nevergrad:NAME, scipy:METHOD, lcsc, lr-cma, "
        "ema-grid, uniform, greedy-soup, best-checkpoint, random; or package.module:factory.",
        SEARCH, "--searcher",
    )  # fmt: skip
    tune: tuple[str, ...] = setting(
        (COEFFICIENTS,),
        "What is searched, with commas between: coefficients, guidance (strength and interval), "
        "guide-coefficients (those of a --guide that is a set).",
        SEARCH, "--tune", metavar="NAME,...", choices=TUNED,
    )  # fmt: skip
    policy: str = setting("direct", "direct (a free mean), or mlp (EMANet).", SEARCH, "--policy")
    update: str | None = setting(
        None, "What moves the policy.", SEARCH, unset="natural for direct, adam for mlp",
        choices=("natural", "adam"),
    )  # fmt: skip
    population: int | None = setting(
        None, "P, candidates a round.", SEARCH, "--population", unset="the searcher's"
    )
    antithetic: bool = setting(True, "Candidates in pairs about the mean.", SEARCH)
    std: float = setting(1.0, "Standard deviation of the first draws, in theta units.", SEARCH)
    box: float = setting(
        5.0, "Half-width of the box that a bounded method searches, in theta units.", SEARCH
    )
    learn_std: bool = setting(False, "Whether std is learnt too.", SEARCH)
    learning_rate: float | None = setting(
        None,
        "natural: the step in units of std along a gradient without noise; adam: Adam's, in theta "
        "units, about the step of one round.",
        SEARCH, unset="1 for natural, 0.7 for adam; 0.7 for pathwise, its first steps",
    )  # fmt: skip
    momentum: float = setting(0.7, "Momentum of the natural gradient.", SEARCH)
    width_rate: float = setting(
        0.3,
        "natural: how fast exploration widens where successive gradients agree, and narrows where "
        "they contradict each other; 0: not at all.",
        SEARCH,
    )  # fmt: skip
    std_learning_rate: float = setting(0.05, "Step of std, where it is learnt.", SEARCH)
    betas: tuple[float, float] = setting((0.5, 0.9), "Adam's betas.", SEARCH)
    decay: float = setting(0.93, "adam: what a round leaves of step and exploration.", SEARCH)
    min_decay: float = setting(0.1, "Where the schedule of step and exploration stops.", SEARCH)
    shaping: str = setting(
        "batch", "Advantages from rewards: their values (batch) or their places (rank).", SEARCH,
        choices=("batch", "rank"),
    )  # fmt: skip
    top_fraction: float = setting(1.0, "Share of candidates that the update keeps.", SEARCH)
    clip: float = setting(
        0.2, "adam: bound on the ratio of probabilities, 1 in the first of the epochs.", SEARCH
    )
    epochs: int = setting(1, "adam: updates from one batch.", SEARCH)
    # 0 leaves out the one or the other.
    start_share: float = setting(0.08, "Share of the budget to find the start (auto).", SEARCH)
    final_share: float = setting(
        0.12,
        "Share of the budget to choose the result at the end among policy mean, running average "
        "and the best candidates.",
        SEARCH,
    )  # fmt: skip
    incumbents: int = setting(
        4, "How many of the best candidates are scored again at the end.", SEARCH
    )

    @property
    def takes_gradients(self) -> bool:
        """Whether a round makes images with their gradient instead of candidates."""
        return self.name == "pathwise"

    def __post_init__(self) -> None:
        if self.population is not None:
            require(self.population >= 1, "population", ">= 1", self.population)
        require_choices(self)
        once = bool(self.tune) and len(set(self.tune)) == len(self.tune)
        require(once, "tune", "one or several names, each once", self.tune)
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
