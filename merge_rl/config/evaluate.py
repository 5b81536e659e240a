"""Settings of `mergerl sample` and `mergerl evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from merge_rl.config.sampler import SamplerConfig, require
from merge_rl.config.setting import DATA, MODEL, SCORES, setting

NEAR: Final = "that of the run or set"
MODEL_IMAGES: Final = 5000


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a model's images are made; None, and no sampler: as its run or set says."""

    network: str | None = setting(
        None, "Your own, package.module:factory, which says what it predicts over which time.",
        MODEL, "--network", unset="that of the model",
    )  # fmt: skip
    autoencoder: str | None = setting(
        None, "What makes images of latents: sd-vae-edm2, sd-vae-sit, package.module:factory.",
        MODEL, "--autoencoder", unset=NEAR,
    )  # fmt: skip
    autoencoder_weights: str | None = setting(
        None, "Its weights: file, folder, or public name.",
        MODEL, "--autoencoder-weights", unset=NEAR,
    )  # fmt: skip
    batch: int = setting(250, "Images in one forward pass.", MODEL, "--batch")
    device: str = setting("cpu", "cpu, cuda, ...", MODEL, "--device")
    sampler: SamplerConfig | None = None

    def __post_init__(self) -> None:
        require(self.batch >= 1, "batch", ">= 1", self.batch)


@dataclass(frozen=True, kw_only=True)
class SampleConfig(GenerationConfig):
    """Which images `mergerl sample` makes."""

    num_images: int = setting(64, "Images of the grid.", flag="--num-images")
    seed: int = setting(0, "First image seed; one seed an image.", flag="--seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_images >= 1, "num_images", ">= 1", self.num_images)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(GenerationConfig):
    """How `mergerl evaluate` scores a model, images or features."""

    num_images: int | None = setting(
        None, "N of one repeat; papers use 50000.", flag="--num-images",
        unset=f"{MODEL_IMAGES}; of images and features, all there are",
    )  # fmt: skip
    repeats: int = setting(3, "Disjoint blocks of seeds, or of images.", flag="--repeats")
    seed: int = setting(0, "Of the images; no two seeds share one.", flag="--seed")
    metrics: str = setting(
        "fid", "Comma-separated: fid, kid, mmd, prdc, fid-infinity, fd-mean.", flag="--metrics"
    )
    extractor: str | None = setting(
        None, "Feature extractor, or package.module:factory.", DATA, "--extractor",
        unset=f"{NEAR}, or of the reference",
    )  # fmt: skip
    extractor_weights: str | None = setting(
        None, "Its weights: file, folder, or public name.", DATA, "--extractor-weights", unset=NEAR
    )
    reference: str | None = setting(
        None, "Statistics of real data, of any known format.",
        DATA, "--reference", path=True, unset=NEAR,
    )  # fmt: skip
    heldout: str | None = setting(
        None, "Statistics of held-out data.",
        DATA, "--heldout", path=True, unset=f"{NEAR}, unless --reference is given",
    )  # fmt: skip
    under: str | None = setting(
        None, "What a model's images are made under.", MODEL, "--under",
        metavar="ode|sde|both",
        unset="both for SiT, ode for EDM2; what a solver that is named is",
    )  # fmt: skip
    max_rows: int = setting(
        10_000, "Rows of either set that kid, mmd and prdc compare.", SCORES, "--max-rows"
    )
    save_features: str | None = setting(
        None, "Folder to keep features in, and to go on from.", SCORES, "--save-features",
        path=True,
    )  # fmt: skip
    skip_broken: bool = setting(
        False, "Leave out unreadable images, and count them.", SCORES, "--skip-broken"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_rows >= 2, "max_rows", ">= 2", self.max_rows)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics one by one."""
        return tuple(name.strip() for name in self.metrics.split(","))
