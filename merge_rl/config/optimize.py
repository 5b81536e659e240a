"""Settings of a search: the map of the coefficients, the reward, the searcher, the final scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from merge_rl.config.sampler import SamplerConfig as SamplerConfig
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


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    # Li et al., 2026 (arXiv:2607.02291), sections 4.1 and 4.3: EMANet from the newest checkpoint,
    # one free coefficient a checkpoint, std fixed to 1, the best quarter of the candidates, ratio
    # clip 1e-4, the whole pool renewed every 10 rounds, the last policy mean reported. What a unit
    # of theta is worth, the population and Adam's step the paper does not say.
    "paper": {
        "merge": {"map": "free", "start": "newest", "scale": 0.02, "grouping": "one"},
        "search": {
            "name": "policy-gradient", "policy": "mlp", "update": "adam", "std": 1.0,
            "learn_std": False, "top_fraction": 0.25, "clip": 1e-4, "antithetic": False,
            "betas": [0.9, 0.999], "decay": 1.0, "learning_rate": 0.1, "start_share": 0.0,
            "final_share": 0.0, "incumbents": 0,
        },
        "reward": {
            "name": "fid-subset", "pool_size": 5000, "subset_size": 50, "refresh": "10",
        },
    },
}  # fmt: skip


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset, as a config file would have them; UnknownNameError for others."""
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    return {key: dict(value) for key, value in PRESETS[name].items()}


AUTO_BATCH: Final = -1  # "auto" on the command line and in files


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The comparison at the end, on fresh seeds."""

    num_images: int = 5000
    repeats: int = 4
    selection_images: int = 1000  # to find the best single checkpoint, on seeds of their own

    def __post_init__(self) -> None:
        require(self.num_images >= 2, "num_images", ">= 2", self.num_images)
        require(self.repeats >= 3, "repeats", ">= 3", self.repeats)
        require(self.selection_images >= 2, "selection_images", ">= 2", self.selection_images)


@dataclass(frozen=True, kw_only=True)
class OptimizeConfig:
    """Everything that fixes the outcome of `mergerl optimize`, and where its inputs lie."""

    checkpoints: str
    track: str | None = None
    select: tuple[str, ...] = ()  # names of the checkpoints to use; all if empty
    extractor: str | None = None  # None here and below: what the checkpoints' manifest says
    extractor_weights: str | None = None
    reference: str | None = None
    heldout: str | None = None
    # Statistics of real data, and weights, of other extractors that the reward names.
    extra_references: Mapping[str, str] = field(default_factory=dict)
    extra_weights: Mapping[str, str] = field(default_factory=dict)
    autoencoder: str | None = None  # None here: also the samples, if they can be images
    autoencoder_weights: str | None = None
    autoencoder_dtype: str = "float32"  # of a latent decoder; bfloat16 halves its time and memory
    budget: int = 50_000  # generated images: pool, candidates and refreshes
    seed: int = 0
    batch: int = 250  # images in one forward pass; AUTO_BATCH: as many as the device has room for
    device: str = "cpu"
    # Where the checkpoints lie while they are merged: a device, "cpu" (memory) or "disk" (mapped
    # files); None: the first of the three with room. It changes the time, not the result.
    weights_device: str | None = None
    licence: str | None = None  # of the merge; None: that of the checkpoints
    sampler: SamplerConfig | None = None
    merge: MergeConfig = field(default_factory=MergeConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        require(self.budget >= 1, "budget", ">= 1 image", self.budget)
        require(self.batch >= 1 or self.batch == AUTO_BATCH, "batch", ">= 1", self.batch)
        dtypes = ("float32", "bfloat16")
        require(self.autoencoder_dtype in dtypes, "autoencoder_dtype", f"in {dtypes}",
                 self.autoencoder_dtype)  # fmt: skip
