"""Settings of `mergerl optimize`: inputs, budget, final scores, and presets of all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from merge_rl.config.reward import GRADIENT_COST
from merge_rl.config.reward import SUBSET_SIZE as SUBSET_SIZE
from merge_rl.config.reward import RewardConfig as RewardConfig
from merge_rl.config.sampler import SamplerConfig as SamplerConfig
from merge_rl.config.sampler import require, require_images
from merge_rl.config.search import GUIDANCE
from merge_rl.config.search import MergeConfig as MergeConfig
from merge_rl.config.search import SearchConfig as SearchConfig
from merge_rl.config.setting import (
    DATA,
    MODEL,
    RULES,
    RUN,
    SCORES,
    SEARCH,
    about,
    require_choices,
    require_rules,
    setting,
)
from merge_rl.errors import UnknownNameError

AUTO_BATCH: Final = -1  # "auto" wherever settings are said
DTYPES: Final = ("float32", "bfloat16")
OF_SET: Final = "that of the set"
MOST_FINAL: Final = 5000
MOST_SELECTION: Final = 1000


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The final comparison, on fresh seeds, of start, uniform average, best single and result."""

    num_images: int | None = setting(
        None, "N of one repeat; where it is given, the comparison comes on top of the budget.",
        SCORES, "--final-images", unset=f"what its share of the budget pays, {MOST_FINAL} at most",
    )  # fmt: skip
    repeats: int = setting(
        4, "Disjoint sets of seeds that every entry is scored on, at least 3.", SCORES, "--repeats"
    )
    selection_images: int | None = setting(
        None, "Images that each checkpoint is scored on to find the best one; their seeds serve "
        "nothing else.", SCORES,
        unset="over all checkpoints a sixth of the share, or as many as a model with num_images",
    )  # fmt: skip
    share: float = setting(
        0.4, "Share of the budget for the comparison, where num_images is not given.", SCORES
    )
    reserved: int = setting(
        0, "Images of the budget that the comparison takes; the run computes it.", SCORES
    )
    keep_worse: bool = setting(
        False, "Write the result even where it is worse than its start, or has no score.", SCORES,
        "--keep-worse",
    )  # fmt: skip

    def __post_init__(self) -> None:
        require_images("num_images", self.images, least=2)
        require_images("selection_images", self.selection, least=2)
        require(self.repeats >= 3, "repeats", ">= 3", self.repeats)
        require_images("repeats times num_images", self.repeats * self.images)
        require(0 < self.share < 1, "share", "in (0, 1)", self.share)
        require(self.reserved >= 0, "reserved", ">= 0", self.reserved)

    @property
    def images(self) -> int:
        """N of one repeat."""
        return MOST_FINAL if self.num_images is None else self.num_images

    @property
    def selection(self) -> int:
        """Images that each checkpoint is scored on."""
        return MOST_SELECTION if self.selection_images is None else self.selection_images


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What searches and fine-tuning both take: data, network, device, seed, licence, rules.

    None stands for what the set, or the run or set of a model, says.
    """

    extractor: str | None = setting(
        None,
        "Feature extractor: inception, dinov2, efficientnet-lite0, clip, ..., or "
        "package.module:factory; several with commas.",
        DATA, "--extractor", unset=OF_SET,
    )  # fmt: skip
    extractor_weights: str | None = setting(
        None, "The extractor's weights; with NAME those of another extractor of the reward.",
        DATA, "--extractor-weights", metavar="[NAME=]PATH", unset=OF_SET, named="extra_weights",
    )  # fmt: skip
    reference: str | None = setting(
        None,
        "Statistics of real data that rewards compare with; with NAME for another extractor of the "
        "reward.",
        DATA, "--reference", metavar="[NAME=]PATH", unset=OF_SET, named="extra_references",
    )  # fmt: skip
    heldout: str | None = setting(
        None, "Statistics of real data that no reward sees, for the scores.",
        DATA, "--heldout", path=True, unset=OF_SET,
    )  # fmt: skip
    extra_references: Mapping[str, str] = field(
        default_factory=dict,
        metadata=about(help="Statistics for other extractors of the reward, by name.", panel=DATA),
    )
    extra_weights: Mapping[str, str] = field(
        default_factory=dict,
        metadata=about(help="Weights of other extractors of the reward, by name.", panel=DATA),
    )
    network: str | None = setting(
        None, "Your own network: package.module:factory that returns merge_rl.describe(...).",
        MODEL, "--network", unset="that of the set",
    )  # fmt: skip
    autoencoder: str | None = setting(
        None, "What makes images of latents: sd-vae-edm2, sd-vae-sit, package.module:factory.",
        MODEL, "--autoencoder", unset=f"{OF_SET}, or the samples if they can be images",
    )  # fmt: skip
    autoencoder_weights: str | None = setting(
        None, "The autoencoder's weights: file, folder, or public name.",
        MODEL, "--autoencoder-weights", unset=OF_SET,
    )  # fmt: skip
    autoencoder_dtype: str = setting(
        "float32", "Precision of a latent decoder; bfloat16 halves its time and memory.", MODEL,
        choices=DTYPES,
    )  # fmt: skip
    device: str = setting("cpu", "cpu, cuda, ...", MODEL, "--device")
    seed: int = setting(0, "Fixes every draw.", RUN, "--seed")
    licence: str | None = setting(
        None, "Licence of the result.", RUN, "--license", unset="that of the weights"
    )
    rules: int = setting(RULES, "Rules of the release that a run began with, which it keeps.", RUN)

    def __post_init__(self) -> None:
        require_choices(self)
        require_rules(self.rules)


@dataclass(frozen=True, kw_only=True)
class OptimizeConfig(RunConfig):
    """Everything that fixes the outcome of `mergerl optimize`, and where its inputs lie."""

    checkpoints: str = ""  # which set: the call, or the command's argument, says it too
    track: str | None = setting(None, "Series of the manifest to use.", flag="--track", unset="all")
    select: tuple[str, ...] = setting(
        (), "A checkpoint to use, and no other; repeatable.", flag="--only", metavar="NAME",
        unset="all",
    )  # fmt: skip
    generate: str | None = setting(
        None,
        "package.module:function of weights, seeds and labels, to features or images for the "
        "extractor: generates in the place of a network.",
        MODEL, unset="the network of the set",
    )  # fmt: skip
    num_classes: int = setting(0, "Classes of what a function generates, which take turns.", MODEL)
    budget: int = setting(
        50_000, "Images that may be generated in all, the final comparison included unless "
        "--final-images is given.", SEARCH, "--budget",
    )  # fmt: skip
    batch: int = setting(
        250, "Images in one forward pass, or auto: as many as the device has room for.",
        MODEL, "--batch", metavar="N|auto", words={"auto": AUTO_BATCH},
    )  # fmt: skip
    # It changes the time, not the result.
    weights_device: str | None = setting(
        None,
        "Where the checkpoints lie while they are merged: a device, cpu (memory) or disk (mapped "
        "files).",
        MODEL, "--weights-device", unset="the first of the three with room",
    )  # fmt: skip
    sampler: SamplerConfig | None = None
    merge: MergeConfig = field(default_factory=MergeConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.budget >= 1, "budget", ">= 1 image", self.budget)
        require_images("budget", self.budget)
        require(self.batch >= 1 or self.batch == AUTO_BATCH, "batch", ">= 1", self.batch)
        require(self.num_classes >= 0, "num_classes", ">= 0", self.num_classes)

    @property
    def search_budget(self) -> int:
        """What of the budget is not kept for the final comparison."""
        return self.budget - self.evaluation.reserved

    @property
    def grouping(self) -> str:
        """What has coefficients of its own; along gradients, fine groups cost no more."""
        return self.merge.grouping or ("tensors" if self.search.takes_gradients else "stages")

    @property
    def tunes_guidance(self) -> bool:
        """Whether strength and interval of guidance are searched."""
        return GUIDANCE in self.search.tune

    @property
    def guided(self) -> bool:
        """Whether images may be made with guidance."""
        return self.tunes_guidance or (self.sampler is not None and self.sampler.guidance != 1)

    def round_images(self, candidates: int, round_index: int) -> int:
        """What a round costs, in images: of candidates, or with the gradient at the mean.

        A method without candidates has no round, which costs nothing.
        """
        reward = self.reward
        if self.search.takes_gradients:
            return GRADIENT_COST * reward.images_per_subset
        if not candidates:
            return 0
        refresh = reward.refresh_images(round_index) if reward.pooled else 0
        return candidates * reward.images_per_candidate + refresh


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    # Li et al., 2026 (arXiv:2607.02291), sections 4.1 and 4.3: EMANet from the newest checkpoint,
    # one free coefficient a checkpoint, std fixed to 1, the best quarter of the candidates, ratio
    # clip 1e-4, the whole pool renewed every 10 rounds, the last policy mean reported. What a unit
    # of theta is worth, the population and Adam's step the paper does not say. Rollouts are used
    # once, so that ratios are 1 and the clip changes nothing: it would with `search.epochs` of 2.
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
